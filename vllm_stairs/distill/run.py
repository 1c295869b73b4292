"""The stages of a distillation, one after the other; each goes on where it stopped."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vllm_stairs.bench.provenance import describe_model
from vllm_stairs.distill import acceptance, generators, prompts
from vllm_stairs.distill.conversations import SAMPLED, Manner, Talk, converse
from vllm_stairs.distill.draft import DraftShape
from vllm_stairs.distill.errors import DistillError
from vllm_stairs.distill.prompts import BenchmarkFilter, Seed, Turn
from vllm_stairs.distill.shards import Folder
from vllm_stairs.folders import new_folder
from vllm_stairs.proposer.vocabulary import save_frequencies

MADE_BY = "distill.json"
"""In a draft's folder: how it was made."""

TALKS_A_SHARD = 1024
FEWEST_NEW = 0.02
"""A shard of which a smaller share is new means that the prompts are exhausted."""


class Reporter(Protocol):
    """Told what goes on."""

    def say(self, text: str) -> None:
        """A line for the user."""

    def progress(self, what: str, done: int, total: int) -> None:
        """How far a stage is, in tokens."""


@dataclass(frozen=True)
class Settings:
    """What to do. Where a field changes what a stage makes, it is part of its fingerprint."""

    target: str
    work: Path
    prompts: Path | None = None
    text: Path | None = None
    """Given text to learn from as well, or alone if ``tokens`` is 0."""
    tokens: int = 2_000_000
    """Tokens that the target is to write."""
    generator: str = "auto"
    dtype: str = "auto"
    """Of the target while it writes and labels."""
    manner: Manner = field(default_factory=Manner)
    keep: int = 16
    """Ids of the target's distribution that are kept at a position."""
    device: str = "auto"
    seed: int = 0

    def data_settings(self) -> dict[str, Any]:
        """What the shards depend on; the number of tokens can be raised later."""
        return {
            "version": 1,
            "target": describe_model(self.target)["weights_hash"],
            "prompts": _hash(self.prompts),
            "text": _hash(self.text),
            "manner": asdict(self.manner),
            "seed": self.seed,
        }


def device_of(name: str) -> str:
    """``cpu`` or ``cuda``."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise DistillError("--device cuda: torch sees no CUDA device here")
    return name


def dtype_of(name: str, device: str) -> str:
    """The precision in which the target runs: bfloat16 wherever that is fast."""
    import torch

    if name != "auto":
        return name
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return "bfloat16" if fast_bfloat16() else "float32"


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32."""
    import torch

    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)


def target_folder(target: str) -> str:
    """The target's folder; a model of a hub is fetched.

    Raises:
        DistillError: there is no such model.
    """
    if Path(target).is_dir():
        return target
    try:
        from huggingface_hub import snapshot_download

        return snapshot_download(
            target, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]
        )
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DistillError(f"no target {target!r}: {reason}") from None


def check_target(target: str) -> Any:
    """The target's configuration.

    Raises:
        DistillError: there is no such model, or it has no tokenizer.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(target)
    except (OSError, ValueError) as error:
        raise DistillError(f"no target {target!r}: {str(error).splitlines()[0]}") from None
    try:
        AutoTokenizer.from_pretrained(target)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DistillError(f"no tokenizer with the target {target!r}: {reason}") from None
    return config


def load_target(settings: Settings) -> Any:
    """The target, ready to label."""
    import torch
    from transformers import AutoModelForCausalLM

    device = device_of(settings.device)
    dtype = getattr(torch, dtype_of(settings.dtype, device))
    return AutoModelForCausalLM.from_pretrained(settings.target, dtype=dtype).to(device).eval()


# Data.


def make_data(
    settings: Settings, reporter: Reporter, *, writer: str | None = None, name: str = "data"
) -> Folder:
    """Write conversations until there are enough, then label them.

    Args:
        settings: what to do.
        reporter: is told.
        writer: who writes; the target, unless it is an on-policy round of a draft.
        name: of the folder in ``settings.work``.
    """
    writer = writer or settings.target
    added = {} if writer == settings.target else {"writer": name}
    folder = Folder(settings.work / name, {**settings.data_settings(), **added})
    if settings.tokens:
        _write(settings, folder, writer, reporter)
    if settings.text and name == "data":
        _take_text(settings, folder)
    _label(settings, folder, reporter)
    return folder


def _write(settings: Settings, folder: Folder, writer: str, reporter: Reporter) -> None:
    done = {i: folder.load(i).written for i in folder.indices() if i < TEXT_SHARDS}
    total = sum(done.values())
    if total >= settings.tokens:
        reporter.say(f"data: {total:,} tokens are there")
        return
    from transformers import AutoTokenizer

    config = check_target(settings.target)
    tokenizer = AutoTokenizer.from_pretrained(settings.target)
    manner = settings.manner
    may_use = BenchmarkFilter(prompts.benchmark_texts())
    device = device_of(settings.device)
    seen = folder.seen()
    generator = generators.start(
        settings.generator,
        writer,
        dtype=dtype_of(settings.dtype, device),
        max_length=min(manner.max_length + 8, config.max_position_embeddings),
        device=device,
    )
    try:
        started, before = time.monotonic(), total
        for index, seeds in _seed_batches(settings):
            if total >= settings.tokens:
                break
            if index in done:
                continue
            talks = converse(
                seeds, generator, tokenizer, manner, may_use=may_use, seed=settings.seed
            )
            shard = folder.save(index, talks, seen)
            total += shard.written
            reporter.progress("writing", total, settings.tokens)
            rate = (total - before) / (time.monotonic() - started)
            reporter.say(
                f"shard {index}: {len(shard)} conversations, {total:,} of {settings.tokens:,} "
                f"tokens, {rate:.0f} tokens/s"
            )
            if len(shard) < FEWEST_NEW * len(seeds):
                reporter.say("the prompts bring nothing new any more")
                break
    finally:
        generator.close()


def _seed_batches(settings: Settings) -> Iterator[tuple[int, Sequence[Seed]]]:
    if settings.prompts:
        seeds = prompts.from_file(settings.prompts)
        for index, start in enumerate(range(0, len(seeds), TALKS_A_SHARD)):
            yield index, seeds[start : start + TALKS_A_SHARD]
        return
    for index in range(TEXT_SHARDS):
        first = index * TALKS_A_SHARD
        yield (
            index,
            [prompts.built_in(n, settings.seed) for n in range(first, first + TALKS_A_SHARD)],
        )


TEXT_SHARDS = 50_000
"""Shards of given text are numbered from here."""


def _take_text(settings: Settings, folder: Folder) -> None:
    """Cut given text into pieces: every token is to be foretold."""
    from transformers import AutoTokenizer

    assert settings.text is not None
    if folder.file(TEXT_SHARDS).exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(settings.target)
    try:
        text = settings.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DistillError(f"cannot read the text {str(settings.text)!r}: {error}") from None
    may_use = BenchmarkFilter(prompts.benchmark_texts())
    paragraphs = [p for p in text.split("\n\n") if may_use(p)]
    ids = tokenizer("\n\n".join(paragraphs))["input_ids"]
    length = settings.manner.max_length
    talks = []
    for start in range(0, len(ids), length):
        seed = Seed(f"text-{start}", "text", (Turn(),))
        talk = Talk(seed, greedy=False, past_the_end=False, temperature=0.0)
        talk.add(ids[start : start + length], SAMPLED)
        talks.append(talk)
    if not talks:
        raise DistillError(f"no text in {str(settings.text)!r}")
    folder.save(TEXT_SHARDS, talks, set())


def _label(settings: Settings, folder: Folder, reporter: Reporter) -> None:
    from vllm_stairs.distill.labels import label

    missing = [i for i in folder.indices() if not folder.labels_file(i).exists()]
    if not missing:
        return
    with _memory("lower --max-length"):
        target = load_target(settings)
        total, done = 0, 0
        sizes = {i: folder.load(i).written for i in missing}
        total = sum(sizes.values())
        started = time.monotonic()

        def progress(tokens: int) -> None:
            nonlocal done
            done += tokens
            reporter.progress("labelling", done, total)

        for index in missing:
            label(folder.load(index), target, settings.keep, progress).save(
                folder.labels_file(index)
            )
        rate = done / max(1e-9, time.monotonic() - started)
        reporter.say(f"labelled {done:,} tokens, {rate:.0f} tokens/s")


# Training.


def make_draft(
    settings: Settings,
    shape: DraftShape,
    recipe: Any,
    folders: Sequence[Folder],
    out: Path,
    reporter: Reporter,
    *,
    name: str = "training",
    start_from: Path | None = None,
) -> dict[str, acceptance.Acceptance]:
    """Train a draft and write it to ``out``.

    Args:
        settings: what to do.
        shape: of the draft.
        recipe: a :class:`~.training.Recipe`.
        folders: the data.
        out: the draft's folder; is replaced when the draft is complete.
        reporter: is told.
        name: of the folder in ``settings.work`` for checkpoints.
        start_from: a draft to go on with, in an on-policy round.

    Returns:
        The held-out acceptance by group.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_stairs.distill import card, draft, training

    device = device_of(settings.device)
    work = settings.work / name
    _same_run(
        work,
        {
            "target": settings.data_settings()["target"],
            "shape": asdict(shape),
            "recipe": asdict(recipe),
            "data": [f.fingerprint() for f in folders],
            "start_from": _hash(start_from / "model.safetensors") if start_from else None,
        },
    )
    torch.manual_seed(recipe.seed)
    with _memory("lower --batch, --max-length, or choose a smaller preset"):
        target = AutoModelForCausalLM.from_pretrained(settings.target, dtype=torch.float32)
        model = draft.build(target, shape)
        if start_from:
            trained = AutoModelForCausalLM.from_pretrained(start_from, dtype=torch.float32)
            model.load_state_dict(trained.state_dict())
        untrained = acceptance.measure(model, training.held_out_texts(folders))
        del target
        started = time.monotonic()
        by_group, curve = training.train(
            model, folders, recipe, work, device=device, say=reporter.say
        )
    minutes = (time.monotonic() - started) / 60
    counts = training.frequencies(folders, model.config.vocab_size)
    with new_folder(out, MADE_BY, DistillError) as folder:
        draft.save(model.to("cpu").float(), folder, Path(settings.target))
        save_frequencies(folder, counts)
        (folder / "README.md").write_text(
            card.text(
                settings=settings,
                shape=shape,
                recipe=recipe,
                folders=folders,
                before=untrained,
                after=by_group,
                curve=curve,
                minutes=minutes,
                model=model,
            )
        )
        (folder / MADE_BY).write_text(
            json.dumps(
                {
                    "target": Path(settings.target).name,
                    "data": settings.data_settings(),
                    "shape": asdict(shape),
                    "recipe": asdict(recipe),
                    "data_sha256": [f.fingerprint() for f in folders],
                    "curve": curve,
                    "acceptance": {g: asdict(a) for g, a in by_group.items()},
                },
                indent=1,
            )
            + "\n"
        )
    return by_group


def check_out(out: Path) -> None:
    """Refuse to replace a folder that is not a draft of ours."""
    if out.exists() and not (out / MADE_BY).is_file():
        raise DistillError(f"{out} exists but was not made by this command: move it away")


# Evaluation.


def greedy_texts(
    settings: Settings,
    source: str,
    *,
    tokens: int,
    limit: int | None,
    reporter: Reporter,
) -> list[acceptance.Text]:
    """The target's own greedy answers to prompts of the benchmark, or of a file.

    They are kept in ``settings.work``, in float32: what a server in that precision would say.
    """
    import numpy as np
    from transformers import AutoTokenizer

    from vllm_stairs.bench import prompts as bench
    from vllm_stairs.bench.errors import BenchError
    from vllm_stairs.distill.generators import Request

    try:
        chosen = bench.select(bench.load(source), limit=limit, seed=settings.seed)
    except BenchError as error:
        raise DistillError(str(error)) from None
    name = hashlib.sha256(f"{source} {tokens} {limit}".encode()).hexdigest()[:12]
    file = settings.work / f"answers-{name}.json"
    if file.is_file():
        saved = json.loads(file.read_text())
    else:
        tokenizer = AutoTokenizer.from_pretrained(settings.target)
        rendered = [bench.render(p.turns[:1], p.chat, tokenizer) for p in chosen]
        config = check_target(settings.target)
        longest = max(len(r) for r in rendered) + tokens + 8
        generator = generators.start(
            settings.generator,
            settings.target,
            dtype="float32",
            max_length=min(longest, config.max_position_embeddings),
            device=device_of(settings.device),
        )
        try:
            written = generator.write([Request(tuple(r), tokens) for r in rendered])
        finally:
            generator.close()
        saved = [
            {
                "group": p.group,
                "prompt": r,
                "answer": [*w.tokens, *(() if w.end is None else (w.end,))],
            }
            for p, r, w in zip(chosen, rendered, written, strict=True)
        ]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(saved))
        reporter.say(f"{len(saved)} answers of the target in {file}")
    return [
        acceptance.Text(
            np.array([*item["prompt"], *item["answer"]], np.int32),
            np.r_[np.zeros(len(item["prompt"]), bool), np.ones(len(item["answer"]), bool)],
            item["group"],
        )
        for item in saved
    ]


def evaluate(
    draft: str, texts: Sequence[acceptance.Text], device: str
) -> dict[str, acceptance.Acceptance]:
    """The acceptance of a draft on greedy texts, by group."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32).to(device_of(device))
    return acceptance.measure(model, texts)


# Common.


def _same_run(work: Path, settings: dict[str, Any]) -> None:
    file = work / "training.json"
    wanted = json.loads(json.dumps(settings, default=str))
    if file.is_file():
        found = json.loads(file.read_text())
        different = sorted(k for k in wanted if found.get(k) != wanted[k])
        if different:
            raise DistillError(
                f"{str(work)!r} holds the training of another run (different: "
                f"{', '.join(different)}): choose another --work folder, or remove it"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted, indent=2) + "\n")


def _hash(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DistillError(f"cannot read {str(path)!r}: {error.strerror}") from None


@contextmanager
def _memory(advice: str) -> Iterator[None]:
    """Say what to lower when memory runs out."""
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise DistillError(f"out of memory: {advice}") from None
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "DefaultCPUAllocator" in str(error):
            raise DistillError(f"out of memory: {advice}") from None
        raise
