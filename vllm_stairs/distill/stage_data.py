"""The stage ``data``: the target writes conversations, then its distributions are stored."""

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from vllm_stairs.distill import generators, prompts
from vllm_stairs.distill.conversations import SAMPLED, Talk, converse
from vllm_stairs.distill.device import device_of, dtype_of, limited_memory, prepare_memory
from vllm_stairs.distill.draft import WEIGHTS_FILE
from vllm_stairs.distill.errors import DistillError
from vllm_stairs.distill.prompts import BenchmarkFilter, Seed, Turn
from vllm_stairs.distill.settings import Reporter, Settings, hash_of
from vllm_stairs.distill.shards import Folder
from vllm_stairs.distill.target import check_target, load_target, load_tokenizer

TALKS_A_SHARD = 1024
FEWEST_NEW = 0.02
"""A shard of which a smaller share is new means that the prompts are exhausted."""
FEWEST_TOKENS = 60
"""A conversation brings more of them on average: a shard for few tokens is a small one."""
FEWEST_TALKS = 32
"""But not smaller."""
TEXT_SHARDS = 50_000
"""Shards of given text are numbered from here."""


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
    made = dict(settings.data_settings)
    if writer != settings.target:
        made["writer"] = hash_of(Path(writer) / WEIGHTS_FILE)
    folder = Folder(settings.work / name, made)
    if settings.tokens:
        _write(settings, folder, writer, reporter)
    if settings.text and folder.of_target:
        _take_text(settings, folder)
    _label(settings, folder, reporter)
    return folder


def _write(settings: Settings, folder: Folder, writer: str, reporter: Reporter) -> None:
    done = {i: folder.load(i).written for i in folder.indices() if i < TEXT_SHARDS}
    total = sum(done.values())
    if total >= settings.tokens:
        reporter.say(f"data: {total:,} tokens are there")
        return
    left = ((index, seeds) for index, seeds in _seed_batches(settings) if index not in done)
    first = next(left, None)
    if first is None:
        reporter.say(f"data: {total:,} of {settings.tokens:,} tokens; every prompt is used")
        return
    config, tokenizer = check_target(settings.target), load_tokenizer(settings.target)
    manner = settings.manner
    may_use = BenchmarkFilter(prompts.benchmark_texts())
    device = device_of(settings.device)
    seen = folder.seen()
    with (
        limited_memory(generators.LESS_MEMORY),
        contextlib.closing(
            generators.start(
                settings.generator,
                writer,
                dtype=dtype_of(settings.dtype, device),
                max_length=min(manner.max_length + 8, config.max_position_embeddings),
                device=device,
            )
        ) as generator,
    ):
        started, before = time.monotonic(), total
        for index, seeds in itertools.chain([first], left):
            reporter.progress("writing", total, settings.tokens)
            if not settings.prompts:  # There is no end of these: no more than are wanted.
                wanted = math.ceil((settings.tokens - total) / FEWEST_TOKENS)
                seeds = seeds[: max(wanted, FEWEST_TALKS)]
            talks = converse(
                seeds, generator, tokenizer, manner, may_use=may_use, seed=settings.seed
            )
            shard = folder.save(index, talks, seen)
            total += shard.written
            reporter.progress("writing", total, settings.tokens)
            rate = (total - before) / (time.monotonic() - started)
            reporter.say(
                f"shard {index}: {len(shard)} conversations, {total:,} of "
                f"{settings.tokens:,} tokens, {rate:.0f} tokens/s"
            )
            if total >= settings.tokens:
                return
            if len(shard) < FEWEST_NEW * len(seeds):
                reporter.say("the prompts bring nothing new any more")
                return
        reporter.say("every prompt is used")


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


def _take_text(settings: Settings, folder: Folder) -> None:
    """Cut given text into pieces: every token is to be foretold.

    The first shard is written last, and says that all are there.
    """
    assert settings.text is not None
    if folder.file(TEXT_SHARDS).exists():
        return
    tokenizer = load_tokenizer(settings.target)
    try:
        text = settings.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DistillError(f"cannot read the text {str(settings.text)!r}: {error}") from None
    may_use = BenchmarkFilter(prompts.benchmark_texts())
    paragraphs = [p for p in text.split("\n\n") if may_use(p)]
    ids = tokenizer("\n\n".join(paragraphs))["input_ids"]
    length = settings.manner.max_length
    talks = []
    for start in range(0, len(ids) - 1, length):  # Nothing foretells a token that stands alone.
        seed = Seed(f"text-{start}", "text", (Turn(),))
        talk = Talk(seed, greedy=False, past_the_end=False, temperature=0.0)
        talk.add(ids[start : start + length], SAMPLED)
        talks.append(talk)
    if not talks:
        raise DistillError(f"no text in {str(settings.text)!r}")
    seen: set[bytes] = set()
    for start in reversed(range(0, len(talks), TALKS_A_SHARD)):
        index = TEXT_SHARDS + start // TALKS_A_SHARD
        folder.save(index, talks[start : start + TALKS_A_SHARD], seen)


def _label(settings: Settings, folder: Folder, reporter: Reporter) -> None:
    from vllm_stairs.distill.labels import label

    missing = [i for i in folder.indices() if not folder.labels_file(i).exists()]
    if not missing:
        return
    device = device_of(settings.device)
    on_device = device != "cpu"
    with limited_memory(f"give --target-dtype bfloat16{', or --device cpu' * on_device}"):
        target = load_target(settings)
        prepare_memory(device)
        total = sum(folder.load(i).written for i in missing)
        done = 0
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
