"""Conversations on disk: shards of safetensors, written whole or not at all."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_stairs.distill.conversations import Talk
from vllm_stairs.distill.errors import DistillError
from vllm_stairs.folders import new_file, writing

SETTINGS_FILE = "data.json"
HELD_OUT_EVERY = 40
"""One conversation in so many is never trained on; acceptance is measured on these."""


@dataclass(frozen=True)
class Shard:
    """Some conversations, one after the other."""

    tokens: npt.NDArray[np.int32]
    """Shape [number of tokens]."""
    origin: npt.NDArray[np.uint8]
    """Of each token, see :mod:`.conversations`. Shape [number of tokens]."""
    offsets: npt.NDArray[np.int64]
    """Where each conversation begins, and the end. Shape [conversations + 1]."""
    group: npt.NDArray[np.int16]
    """Index into :attr:`groups`. Shape [conversations]."""
    held_out: npt.NDArray[np.bool_]
    """Shape [conversations]."""
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.group)

    def conversation(self, number: int) -> slice:
        """Where conversation ``number`` lies in :attr:`tokens`."""
        return slice(int(self.offsets[number]), int(self.offsets[number + 1]))

    @property
    def written(self) -> int:
        """Number of tokens that were not given."""
        return int((self.origin > 0).sum())


class Folder:
    """The shards of one set of settings, in one folder.

    Args:
        path: is made if it is not there.
        settings: how the data are made; a folder with shards made otherwise is refused.

    Raises:
        DistillError: the folder holds the data of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.of_target = "writer" not in settings
        """Whether the target wrote the texts: then what is greedy in them is the target's best."""
        check_same_run(path / SETTINGS_FILE, settings, "the data", begun=bool(self.indices()))

    def file(self, index: int) -> Path:
        """Of shard ``index``, whether it is there or not."""
        return self.path / f"shard-{index:05d}.safetensors"

    def labels_file(self, index: int) -> Path:
        """Of the labels of shard ``index``, whether they are there or not."""
        return self.path / f"labels-{index:05d}.safetensors"

    def indices(self) -> list[int]:
        """The shards that are there."""
        return sorted(int(f.stem.split("-")[1]) for f in self.path.glob("shard-*.safetensors"))

    def load(self, index: int) -> Shard:
        """Read a shard."""
        from safetensors.numpy import load_file

        found = load_file(self.file(index))
        names = json.loads(bytes(found["groups"]).decode())
        return Shard(
            found["tokens"],
            found["origin"],
            found["offsets"],
            found["group"],
            found["held_out"].astype(bool),
            tuple(names),
        )

    def shards(self) -> Iterator[Shard]:
        """All shards, one at a time."""
        for index in self.indices():
            yield self.load(index)

    def fingerprint(self) -> str:
        """SHA-256 over the shards' files, in order."""
        digest = hashlib.sha256()
        for index in self.indices():
            digest.update(hashlib.sha256(self.file(index).read_bytes()).digest())
        return digest.hexdigest()

    def save(self, index: int, talks: Sequence[Talk], seen: set[bytes]) -> Shard:
        """Write a shard, without the conversations that are ``seen`` already.

        Args:
            index: of the shard.
            talks: finished conversations.
            seen: fingerprints of the conversations so far; is added to.
        """
        kept = []
        for talk in talks:
            name = _name(talk.tokens)
            if name not in seen:
                seen.add(name)
                kept.append((talk, name))
        groups = sorted({talk.seed.group for talk, _ in kept})
        lengths = [len(talk.tokens) for talk, _ in kept]
        shard = Shard(
            np.array([t for talk, _ in kept for t in talk.tokens], np.int32),
            np.array([o for talk, _ in kept for o in talk.origin], np.uint8),
            np.cumsum([0, *lengths]).astype(np.int64),
            np.array([groups.index(talk.seed.group) for talk, _ in kept], np.int16),
            np.array([talk.greedy and name[0] < 256 / HELD_OUT_EVERY for talk, name in kept], bool),
            tuple(groups),
        )
        save_arrays(
            self.file(index),
            {
                "tokens": shard.tokens,
                "origin": shard.origin,
                "offsets": shard.offsets,
                "group": shard.group,
                "held_out": shard.held_out.astype(np.uint8),
                "groups": np.frombuffer(json.dumps(groups).encode(), np.uint8),
            },
        )
        return shard

    def seen(self) -> set[bytes]:
        """Fingerprints of the conversations that are on disk."""
        return {
            _name(shard.tokens[shard.conversation(n)].tolist())
            for shard in self.shards()
            for n in range(len(shard))
        }


def save_arrays(file: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write a safetensors file beside its place, then rename it.

    Raises:
        DistillError: the disk is full, or the place cannot be written.
    """
    from safetensors.numpy import save_file

    with writing(file, DistillError), new_file(file) as partial:
        save_file(dict(arrays), partial)


def save_json(file: Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file beside its place, in a folder that is made if need be, then rename it.

    Args:
        file: its place.
        value: its content.
        indent: as in :func:`json.dumps`.

    Raises:
        DistillError: the disk is full, or the place cannot be written.
    """
    with writing(file, DistillError):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise DistillError(f"{str(file.parent)!r} is no folder") from None
        with new_file(file) as partial:
            partial.write_text(json.dumps(value, indent=indent) + "\n")


def check_same_run(file: Path, settings: Mapping[str, Any], what: str, *, begun: bool) -> None:
    """Note in a folder what its contents depend on; refuse to go on there with anything else.

    Args:
        file: JSON; is written if it is not there, or if there are no contents yet.
        settings: what the contents depend on.
        what: they are, for the message.
        begun: whether there are contents.

    Raises:
        DistillError: the folder was begun with other settings, or cannot be written.
    """
    found = different_settings(file, settings) if begun else None
    if found:
        raise DistillError(another_run(file.parent, what, found))
    if found is None:
        save_json(file, dict(settings))


def another_run(folder: Path, what: str, different: Sequence[str]) -> str:
    """The message that a folder is another run's."""
    return (
        f"{str(folder)!r} holds {what} of another run (different: {', '.join(different)}): "
        "move it away, choose another --work folder, or give the same settings"
    )


def different_settings(file: Path, settings: Mapping[str, Any]) -> list[str] | None:
    """Names of the settings that a folder was not begun with; None if it was not begun.

    Raises:
        DistillError: ``file`` is damaged.
    """
    if not file.is_file():
        return None
    try:
        found = dict(json.loads(file.read_text()))
    except (ValueError, TypeError):
        raise DistillError(f"{str(file)!r} is damaged: move its folder away") from None
    wanted = json.loads(json.dumps(dict(settings)))
    return sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))


def _name(tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.array(tokens, np.int32).tobytes(), digest_size=12).digest()
