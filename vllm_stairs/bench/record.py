"""The record of a stairs run: what the draft proposed, step by step, and what was kept."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vllm_stairs.bench.costs import CostModel, Curve, monotone
from vllm_stairs.bench.errors import BenchError
from vllm_stairs.bench.statistics import median

_KEYS = ("request", "position", "draft", "probability", "emitted")

_FEW = 8
"""A median of fewer steps is noise on a busy machine."""


@dataclass(frozen=True)
class Trace:
    """One request, position by position of the text that the recorded steps wrote.

    A greedy draft depends on the text before it alone. So what it says at a position, given the
    target's own text up to there, is one fact, whatever staircase asks for it.
    """

    request: str
    held: np.ndarray
    """bool: whether the draft's token at this position is the text's; a guess where unknown."""
    known: np.ndarray
    """bool: whether that was recorded. It was not where a whole draft held: the target's own
    token after it was never drafted."""
    probability: np.ndarray
    """float: the draft's probability of its own token at this position."""
    tails: dict[int, tuple[float, ...]]
    """Position of a wrong draft token -> probabilities of the tokens drafted after it."""
    start: int = 0
    """Tokens of text before position 0: the prompt and the token that came with its reading."""

    @property
    def prompt(self) -> int:
        """Tokens of the prompt; 0 where the record starts without one."""
        return max(self.start - 1, 0)

    @property
    def tokens(self) -> int:
        """Tokens of text."""
        return len(self.held)


@dataclass(frozen=True)
class Record:
    """All requests of a record, and the cost model that its times give."""

    traces: tuple[Trace, ...]
    height: int
    """The largest height in it."""
    measured: CostModel | None
    """None where the record carries no times of steps without a prefill."""


def load(path: Path) -> Record:
    """Read a record (JSON lines, see ``speculative_config["stairs_record"]``).

    Raises:
        BenchError: ``FILE:LINE: ...`` for the first line that no run can have written.
    """
    if not path.is_file():
        raise BenchError(f"no record {str(path)!r}: make one with vllm-stairs bench run --record")
    try:
        texts = path.read_bytes().split(b"\n")
    except OSError as error:
        raise BenchError(f"cannot read record {str(path)!r}: {error.strerror}") from None
    lines = [
        _line(text, f"{path}:{number}")
        for number, text in enumerate(texts, start=1)
        if text.strip()
    ]
    if not lines:
        raise BenchError(f"record {str(path)!r} is empty")
    height = max(len(line["draft"]) for line in lines)
    if not height:
        raise BenchError(f"record {str(path)!r} holds no draft")
    return Record(tuple(_traces(lines, str(path))), height, _measured(lines, str(path)))


def _line(text: bytes, where: str) -> dict[str, Any]:
    try:
        line = json.loads(text.decode())
    except json.JSONDecodeError as error:
        raise BenchError(f"{where}: not JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise BenchError(f"{where}: not JSON (not UTF-8 text)") from None
    except (ValueError, RecursionError) as error:
        raise BenchError(f"{where}: not JSON ({error})") from None
    if not isinstance(line, dict) or any(key not in line for key in _KEYS):
        raise BenchError(f"{where}: expected an object with {', '.join(_KEYS)}")
    if problem := _problem(line):
        raise BenchError(f"{where}: {problem}")
    return line


def _problem(line: dict[str, Any]) -> str | None:
    """What is wrong with a line's values, None if nothing is."""
    draft, probability, emitted = line["draft"], line["probability"], line["emitted"]
    if type(line["request"]) not in (str, int):
        return "request must be text or a whole number"
    if type(line["position"]) is not int or line["position"] < 0:
        return "position must be a whole number of at least 0"
    for key, tokens in (("draft", draft), ("emitted", emitted)):
        if type(tokens) is not list or any(type(token) is not int for token in tokens):
            return f"{key} must be a list of token ids"
    if type(probability) is not list or not all(map(_number, probability)):
        return "probability must be a list of numbers"
    if len(draft) != len(probability):
        return "draft and probability differ in length"
    if not emitted:
        return "emitted is empty, a step keeps at least one token"
    if not all(0 <= value <= 1 for value in probability):
        return "probability must be between 0 and 1"
    if len(emitted) > len(draft) + 1:
        return "more tokens kept than the staircase has rows"
    if emitted[:-1] != draft[: len(emitted) - 1]:
        return "emitted is not the draft's beginning and one token of the target"
    if "rows" in line and (type(line["rows"]) is not int or line["rows"] < 1):
        return "rows must be a whole number of at least 1"
    if "target_ms" in line and not (_number(line["target_ms"]) and line["target_ms"] > 0):
        return "target_ms must be a number above 0"
    if "draft_ms" in line and not (_number(line["draft_ms"]) and line["draft_ms"] >= 0):
        return "draft_ms must be a number of at least 0"
    return None


def _number(value: Any) -> bool:
    """A finite number; whole ones only as large as a float can hold."""
    return (type(value) is int and abs(value) < 2**63) or (
        type(value) is float and math.isfinite(value)
    )


def _traces(lines: Iterable[dict[str, Any]], where: str) -> list[Trace]:
    requests: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        requests.setdefault(str(line["request"]), []).append(line)
    traces = []
    for request, staircases in requests.items():
        staircases.sort(key=lambda line: int(line["position"]))
        for before, after in pairwise(staircases):
            if before["position"] + len(before["emitted"]) != after["position"]:
                raise BenchError(
                    f"{where}: request {request!r} has a gap at position {after['position']}"
                )
        traces.append(_trace(request, staircases))
    return _guess(traces)


def _trace(request: str, staircases: Sequence[dict[str, Any]]) -> Trace:
    tokens = sum(len(line["emitted"]) for line in staircases)
    held = np.zeros(tokens, dtype=bool)
    known = np.zeros(tokens, dtype=bool)
    probability = np.zeros(tokens)
    tails: dict[int, tuple[float, ...]] = {}
    start = 0
    for line in staircases:
        accepted = len(line["emitted"]) - 1
        own = line["probability"]
        seen = min(len(own), accepted + 1)
        held[start : start + accepted] = True
        known[start : start + seen] = True
        probability[start : start + seen] = own[:seen]
        if seen == accepted + 1:
            tails[start + accepted] = tuple(own[seen:])
        start += accepted + 1
    return Trace(request, held, known, probability, tails, staircases[0]["position"])


def _guess(traces: list[Trace]) -> list[Trace]:
    """Fill what was not recorded: it holds as often as what was, drawn with a fixed seed."""
    held = np.concatenate([trace.held[trace.known] for trace in traces])
    probability = np.concatenate([trace.probability[trace.known] for trace in traces])
    share = float(held.mean()) if len(held) else 0.0
    usual = {
        outcome: float(probability[held == outcome].mean()) if (held == outcome).any() else share
        for outcome in (True, False)
    }
    random = np.random.default_rng(0)
    for trace in traces:
        unknown = np.flatnonzero(~trace.known)
        drawn = random.random(len(unknown)) < share
        trace.held[unknown] = drawn
        trace.probability[unknown] = np.where(drawn, usual[True], usual[False])
    return traces


def _measured(lines: Sequence[dict[str, Any]], where: str) -> CostModel | None:
    """Costs from the steps that held decode rows only.

    The lines of one step follow each other and carry the same times. A step whose staircases
    do not add up to its rows held a prefill too and is left out. The curves are made monotone;
    where plain decoding at a recorded batch size rests on few steps, the origin says so.
    """
    target: dict[int, list[float]] = {}
    draft: dict[int, list[float]] = {}
    batches: Counter[int] = Counter()
    step: list[dict[str, Any]] = []

    def close() -> None:
        rows = sum(len(line["draft"]) + 1 for line in step)
        if not step or rows != step[0].get("rows") or "target_ms" not in step[0]:
            return
        batches[len(step)] += 1
        target.setdefault(rows, []).append(float(step[0]["target_ms"]))
        drafting = sum(bool(line["draft"]) for line in step)
        passes = max(len(line["draft"]) for line in step)
        if passes and step[0].get("draft_ms"):  # 0: drafted before the step that preceded.
            draft.setdefault(drafting, []).append(float(step[0]["draft_ms"]) / passes)

    for line in lines:
        if step and (
            any(line.get(k) != step[0].get(k) for k in ("rows", "target_ms", "draft_ms"))
            or any(line["request"] == other["request"] for other in step)
        ):
            close()
            step = []
        step.append(line)
    close()
    if not target or not draft:
        return None
    origin = f"measured: times in {where} (no overhead outside draft and target)"
    # Each batch size that was recorded for more than its last few steps.
    often = [size for size, steps in sorted(batches.items()) if steps >= _FEW] or [
        batches.most_common(1)[0][0]
    ]
    few = [
        f"{steps} step{'' if steps == 1 else 's'} at batch {size}"
        for size in often
        if (steps := len(target.get(size, ()))) < _FEW
    ]
    if few:
        origin += (
            f"; plain rests on {', '.join(few)}: record height-0 steps, or give --cost a result "
            "with plain in it"
        )
    return CostModel(_curve(draft), _curve(target), 0.0, origin)


def _curve(samples: dict[int, list[float]]) -> Curve:
    return Curve(monotone({size: (median(ms), len(ms)) for size, ms in samples.items()}))
