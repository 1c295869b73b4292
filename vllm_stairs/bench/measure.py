"""One timed pass: a closed loop that keeps a fixed number of requests in flight.

The same loop, order, seeds and token numbers for every arm. It speaks to an engine through
two methods, so it is tested without one.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

from vllm_stairs.bench.errors import BenchError
from vllm_stairs.bench.statistics import percentile


class Output(NamedTuple):
    """What one engine step gave one request."""

    request_id: str
    new_tokens: Sequence[int]
    finished: bool


class Engine(Protocol):
    """The two things that the loop asks of an engine."""

    def submit(self, request_id: str, tokens: Sequence[int], seed: int) -> None:
        """Queue a request."""

    def step(self) -> Sequence[Output]:
        """Run one step; return what came out of it."""


@dataclass(frozen=True)
class Work:
    """A conversation, ready to be sent: the first turn as token ids, the others as text."""

    id: str
    group: str
    tokens: tuple[int, ...]
    turns: tuple[str, ...]
    chat: bool


@dataclass
class RequestRecord:
    """One request's stamps, in seconds of the pass's clock."""

    work: Work
    turn: int
    prompt: Sequence[int]
    submitted: float
    stamps: list[float] = field(default_factory=list)
    """When each output came; one output may carry several tokens."""
    tokens: list[int] = field(default_factory=list)
    first_tokens: int = 0
    """Tokens in the first output."""

    @property
    def id(self) -> str:
        """Unique within a pass."""
        return f"{self.work.id}/{self.turn}"


@dataclass
class Pass:
    """A finished pass."""

    seconds: float
    requests: list[RequestRecord]

    @property
    def output_tokens(self) -> int:
        """Tokens written by all requests together."""
        return sum(len(request.tokens) for request in self.requests)


FollowUp = Callable[[Work, Sequence[list[int]]], Sequence[int] | None]
"""Given a conversation and the answers so far, the next prompt; None ends it."""


def run_pass(
    engine: Engine,
    work: Sequence[Work],
    batch: int,
    *,
    seed: int = 0,
    follow_up: FollowUp | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Pass:
    """Serve all of ``work`` with ``batch`` requests in flight, in order.

    Args:
        engine: the arm.
        work: what to serve.
        batch: requests in flight; the next one is sent as soon as one has ended.
        seed: request i is sampled with ``seed + i``, whatever the arm.
        follow_up: builds the later turns of conversations that have any.
        clock: seconds; replaced in tests.
    """
    waiting = list(enumerate(work))[::-1]
    running: dict[str, tuple[int, RequestRecord, list[list[int]]]] = {}
    done: list[RequestRecord] = []
    start = clock()

    def send(
        index: int, item: Work, tokens: Sequence[int], turn: int, answers: list[list[int]]
    ) -> None:
        record = RequestRecord(item, turn, tokens, submitted=clock())
        running[record.id] = (index, record, answers)
        engine.submit(record.id, tokens, seed + index)

    while waiting or running:
        while waiting and len(running) < batch:
            index, item = waiting.pop()
            send(index, item, item.tokens, 0, [])
        outputs = engine.step()
        now = clock()
        for output in outputs:
            index, record, answers = running[output.request_id]
            if output.new_tokens:
                record.stamps.append(now)
                record.tokens.extend(output.new_tokens)
                record.first_tokens = record.first_tokens or len(record.tokens)
            if not output.finished:
                continue
            del running[output.request_id]
            done.append(record)
            turn = record.turn + 1
            if turn < len(record.work.turns) and follow_up is not None:
                answers = [*answers, record.tokens]
                tokens = follow_up(record.work, answers)
                if tokens is not None:
                    send(index, record.work, tokens, turn, answers)
    return Pass(clock() - start, done)


def digest(tokens: Sequence[int]) -> str:
    """A short hash of an output, enough to tell whether two outputs are the same."""
    return hashlib.sha256(" ".join(map(str, tokens)).encode()).hexdigest()[:16]


def summarise(result: Pass) -> dict[str, Any]:
    """The figures of a pass, as they are stored.

    ``acceptance_length`` is taken from the stamps, the same way for every arm: tokens per
    engine step and request, the prefill's own token left out. It counts the target's own
    token and the steps without a draft. Times are in milliseconds.
    """
    ttft: list[float] = []
    gaps: list[float] = []
    per_token: list[float] = []
    groups: dict[str, dict[str, int]] = {}
    for request in result.requests:
        if not request.stamps:
            raise BenchError(f"request {request.id} ended without a token")
        ttft.append(request.stamps[0] - request.submitted)
        gaps.extend(b - a for a, b in pairwise(request.stamps))
        later = len(request.tokens) - request.first_tokens
        if later:
            per_token.append((request.stamps[-1] - request.stamps[0]) / later)
        group = groups.setdefault(request.work.group, {"requests": 0, "tokens": 0, "steps": 0})
        group["requests"] += 1
        group["tokens"] += later
        group["steps"] += len(request.stamps) - 1
    steps = sum(group["steps"] for group in groups.values())
    count = len(result.requests)
    return {
        "requests": count,
        "output_tokens": result.output_tokens,
        "seconds": result.seconds,
        "tokens_per_s": result.output_tokens / result.seconds,
        "ttft_ms": _percentiles(ttft),
        "itl_ms": _percentiles(gaps),
        "tpot_ms": _percentiles(per_token),
        "acceptance_length": (
            sum(group["tokens"] for group in groups.values()) / steps if steps else None
        ),
        "mean_prompt_tokens": sum(len(r.prompt) for r in result.requests) / count,
        "mean_context_tokens": sum(len(r.prompt) + len(r.tokens) / 2 for r in result.requests)
        / count,
        "groups": groups,
        "digests": {request.id: digest(request.tokens) for request in result.requests},
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {
        f"p{round(share * 100)}": percentile(seconds, share) * 1e3 for share in (0.5, 0.9, 0.99)
    } | {"mean": sum(seconds) / len(seconds) * 1e3}
