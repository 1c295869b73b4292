"""Which token ids a draft may write: reading frequencies and lists of ids, choosing among them.

A small draft spends much of its step in its output head, most of whose rows are hardly ever
chosen. Source: W. Zhao et al., "FR-Spec: Accelerating Large-Vocabulary Language Models via
Frequency-Ranked Speculative Sampling", arXiv 2502.14856: let the draft choose among the most
frequent ids only. The target still chooses among all, so the output stays the same.

Numpy and safetensors only; the head itself is trimmed in :mod:`vllm_stairs.engine.trimmed_head`.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FREQUENCIES_FILE = "token_frequencies.safetensors"
"""In a draft's folder: one int64 tensor ``counts``, ``[vocabulary]``: how often each id occurs in
the texts that the draft learned from."""

COVERAGE = 0.99
"""'auto' keeps the most frequent ids that make up this share of the count. What is left out can
cost one draft in a hundred, fewer in truth, for rare ids are seldom drafted right; the rare ids
of a vocabulary cost time in each pass."""

LARGEST_SHARE = 0.5
"""'auto' leaves a head alone if it would keep more than this share of its rows: the time saved
would not be worth the memory of a second head."""

_INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class DraftVocabulary:
    """The ids that a draft may write.

    Attributes:
        ids: ascending, without duplicates, at least one.
        share: the share of the frequencies' count that falls on them; None without frequencies.
    """

    ids: tuple[int, ...]
    share: float | None


def choose_vocabulary(
    value: str | int,
    counts: np.ndarray | None,
    vocab_size: int,
    always: Collection[int] = (),
) -> DraftVocabulary | None:
    """Turn the option ``stairs_draft_vocab`` into ids.

    Args:
        value: 'auto', 'full', a number of ids, or the path of a file of ids.
        counts: ``[ids]``, integer: the draft's token frequencies, None where it has none.
        vocab_size: ids that both draft and target know: 0 to ``vocab_size`` - 1.
        always: ids to keep in any case (ends of text, special tokens); those outside the
            vocabulary are ignored.

    Returns:
        The ids to keep, or None to leave the head whole.

    Raises:
        ValueError: one sentence for the user.
    """
    if value == "full":
        return None
    if counts is not None and np.any(counts[vocab_size:]):
        raise ValueError(
            f"{FREQUENCIES_FILE} of the draft counts id {len(np.trim_zeros(counts, 'b')) - 1}, "
            f"outside the vocabulary of {vocab_size} ids: it belongs to another tokenizer."
        )
    if value == "auto":
        if counts is None:
            return None
        wanted = covering_ids(counts, COVERAGE)
    elif isinstance(value, int):
        if value > vocab_size:
            raise ValueError(
                f"stairs_draft_vocab={value}: the vocabulary has {vocab_size} ids; use a number "
                f"from 1 to {vocab_size}, or 'full'."
            )
        if counts is None:
            raise ValueError(
                f"stairs_draft_vocab={value}: which ids are the most frequent is read from "
                f"{FREQUENCIES_FILE} in the draft's folder, and there is none: name a file of "
                "ids, or use 'full'."
            )
        padded = np.zeros(vocab_size, np.int64)
        padded[: min(len(counts), vocab_size)] = counts[:vocab_size]
        wanted = by_frequency(padded)[:value]
    else:
        wanted = np.asarray(read_ids(Path(value)), np.int64)
        outside = wanted[(wanted < 0) | (wanted >= vocab_size)]
        if len(outside):
            raise ValueError(
                f"stairs_draft_vocab={value}: id {outside[0]} lies outside the vocabulary "
                f"(0 to {vocab_size - 1})."
            )
    kept = np.union1d(wanted, [i for i in always if 0 <= i < vocab_size]).astype(np.int64)
    if value == "auto" and len(kept) > LARGEST_SHARE * vocab_size:
        return None
    share = None
    if counts is not None:
        share = float(counts[kept[kept < len(counts)]].sum() / counts.sum())
    return DraftVocabulary(tuple(kept.tolist()), share)


def by_frequency(counts: np.ndarray) -> np.ndarray:
    """Ids, the most frequent first; of equally frequent ones the smaller first (``[ids]``)."""
    return np.argsort(-counts, kind="stable")


def covering_ids(counts: np.ndarray, share: float) -> np.ndarray:
    """The fewest ids that make up a share of the count.

    Args:
        counts: ``[ids]``, integer, not all 0.
        share: above 0, at most 1.

    Returns:
        Ids, the most frequent first.
    """
    order = by_frequency(counts)
    covered = np.cumsum(counts[order])
    return order[: int(np.searchsorted(covered, share * covered[-1])) + 1]


def read_frequencies(file: Path) -> np.ndarray:
    """The counts in a draft's :data:`FREQUENCIES_FILE`.

    Returns:
        ``[ids]``, int64, none negative, not all 0.

    Raises:
        ValueError: one sentence: the file cannot be read or holds something else.
    """
    counts = _read_tensor(file, "counts")
    if counts is None or (counts < 0).any() or not counts.any():
        raise ValueError(
            f"{file} is not a file of token frequencies: it must hold a tensor 'counts' of one "
            "dimension with whole numbers >= 0 that are not all 0."
        )
    return counts


def read_ids(file: Path) -> list[int]:
    """The ids in a file: a JSON list, text with one id a line, or safetensors with ``ids``.

    Raises:
        ValueError: one sentence: no such file, or something else in it than ids.
    """
    name = f"stairs_draft_vocab={file}"
    if not file.is_file():
        raise ValueError(
            f"{name}: there is no such file; give 'auto', 'full', a number of ids or a file of ids."
        )
    if file.suffix == ".safetensors":
        tensor = _read_tensor(file, "ids")
        if tensor is None:
            raise ValueError(
                f"{name}: must hold a tensor 'ids' of one dimension with whole numbers."
            )
        ids = tensor.tolist()
    else:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} cannot be read: {error}.") from None
        ids = _parse_ids(text, name)
    if not ids:
        raise ValueError(f"{name}: there is no id in it.")
    return ids


def save_frequencies(folder: Path, counts: np.ndarray) -> None:
    """Store token frequencies beside a draft's weights.

    vLLM loads every ``*.safetensors`` of a folder as weights, unless an index names those that
    are: where there is none, it is written too.

    Args:
        folder: the draft's folder, weights included.
        counts: ``[vocabulary]``, integer.
    """
    index = folder / _INDEX_FILE
    if not index.exists():
        weight_map: dict[str, str] = {}
        total_size = 0
        for file in sorted(folder.glob("*.safetensors")):
            if file.name == FREQUENCIES_FILE:
                continue
            total_size += file.stat().st_size
            with safe_open(file, framework="np") as tensors:
                weight_map |= dict.fromkeys(tensors.keys(), file.name)
        content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_file({"counts": np.asarray(counts, np.int64)}, folder / FREQUENCIES_FILE)


def check_index(folder: Path) -> None:
    """See to it that vLLM does not take the frequencies for weights.

    Raises:
        ValueError: one sentence: the folder holds frequencies, but no index of its weights.
    """
    if (folder / FREQUENCIES_FILE).is_file() and not (folder / _INDEX_FILE).is_file():
        raise ValueError(
            f"Draft model {folder}: vLLM would load {FREQUENCIES_FILE} as weights, because there "
            f"is no {_INDEX_FILE} that says which files are: write the frequencies with "
            "vllm_stairs.proposer.vocabulary.save_frequencies, which adds it."
        )


def _read_tensor(file: Path, name: str) -> np.ndarray | None:
    """An integer tensor of one dimension as int64; None where the file has no such thing."""
    try:
        with safe_open(file, framework="np") as tensors:
            if name not in tensors.keys():  # noqa: SIM118 (no mapping)
                return None
            tensor = tensors.get_tensor(name)
    except (OSError, SafetensorError, TypeError):
        return None
    if tensor.ndim != 1 or not np.issubdtype(tensor.dtype, np.integer):
        return None
    return tensor.astype(np.int64)


def _parse_ids(text: str, name: str) -> list[int]:
    if text.lstrip().startswith(("[", "{")):
        try:
            ids = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: not JSON: {error}.") from None
        if not isinstance(ids, list) or any(type(token) is not int for token in ids):
            raise ValueError(f"{name}: must be a JSON list of whole numbers.")
        return ids
    ids = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            ids.append(int(line))
        except ValueError:
            raise ValueError(f"{name}: line {number} is no id: {line.strip()[:40]!r}.") from None
    return ids
