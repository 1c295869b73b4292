"""One timed pass: a closed loop that keeps a fixed number of requests in flight.

The same loop, order, seeds and token numbers for every arm. It speaks to an engine through
two methods, so it is tested without one. A pass may be served in several *turns*, between which
other arms have theirs; its clock stands still meanwhile.
"""

import hashlib
import math
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
    turns: list[tuple[int, float]]
    """Tokens and seconds of each turn; one turn where the pass was not interrupted."""

    @property
    def output_tokens(self) -> int:
        """Tokens written by all requests together."""
        return sum(len(request.tokens) for request in self.requests)


FollowUp = Callable[[Work, Sequence[list[int]]], Sequence[int] | None]
"""Given a conversation and the answers so far, the next prompt; None ends it."""


class Stopwatch:
    """A clock that runs between :meth:`start` and :meth:`stop` only."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._before = 0.0
        self._started: float | None = None

    def __call__(self) -> float:
        """Seconds so far."""
        running = 0.0 if self._started is None else self._clock() - self._started
        return self._before + running

    def start(self) -> None:
        """Go on."""
        self._started = self._clock()

    def stop(self) -> None:
        """Stand still."""
        self._before, self._started = self(), None


class Loop:
    """A pass under way: all of ``work`` with ``batch`` requests in flight, in order.

    Args:
        engine: the arm.
        work: what to serve.
        batch: requests in flight; the next one is sent as soon as one has ended.
        seed: request i is sampled with ``seed + i``, whatever the arm.
        follow_up: builds the later turns of conversations that have any.
        by_group: whether a group has to end before the next one begins.
        clock: seconds; replaced in tests.
    """

    def __init__(
        self,
        engine: Engine,
        work: Sequence[Work],
        batch: int,
        *,
        seed: int = 0,
        follow_up: FollowUp | None = None,
        by_group: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine = engine
        self._batch = batch
        self._seed = seed
        self._follow_up = follow_up
        self._by_group = by_group
        self._waiting = list(enumerate(work))[::-1]
        self._running: dict[str, tuple[int, RequestRecord, list[list[int]]]] = {}
        self._done: list[RequestRecord] = []
        self._turns: list[tuple[int, float]] = []
        self._written = 0
        self.watch = Stopwatch(clock)

    @property
    def done(self) -> bool:
        """Whether every request has ended."""
        return not (self._waiting or self._running)

    def run(
        self,
        until_tokens: float = math.inf,
        *,
        resume: Callable[[], Any] | None = None,
        pause: Callable[[], Any] | None = None,
    ) -> None:
        """Serve, until the pass has written so many tokens or is done: one turn.

        Args:
            until_tokens: since the pass began.
            resume: lets the engine go on, before the clock does.
            pause: holds the engine; what it does until it stands still is this turn's.
        """
        if resume is not None:
            resume()
        began, written_before = self.watch(), self._written
        self.watch.start()
        while not self.done and self._written < until_tokens:
            while self._waiting and len(self._running) < self._batch:
                index, item = self._waiting[-1]
                others = (record.work.group for _, record, _ in self._running.values())
                if self._by_group and any(group != item.group for group in others):
                    break
                self._waiting.pop()
                self._send(index, item, item.tokens, 0, [])
            self._take(self._engine.step())
        if pause is not None and not self.done:
            pause()
        self.watch.stop()
        self._turns.append((self._written - written_before, self.watch() - began))

    def result(self) -> Pass:
        """The pass, when it is done."""
        return Pass(self.watch(), self._done, self._turns)

    def _send(
        self, index: int, item: Work, tokens: Sequence[int], turn: int, answers: list[list[int]]
    ) -> None:
        record = RequestRecord(item, turn, tokens, submitted=self.watch())
        self._running[record.id] = (index, record, answers)
        self._engine.submit(record.id, tokens, self._seed + index)

    def _take(self, outputs: Sequence[Output]) -> None:
        now = self.watch()
        for output in outputs:
            index, record, answers = self._running[output.request_id]
            if output.new_tokens:
                record.stamps.append(now)
                record.tokens.extend(output.new_tokens)
                record.first_tokens = record.first_tokens or len(record.tokens)
                self._written += len(output.new_tokens)
            if not output.finished:
                continue
            del self._running[output.request_id]
            self._done.append(record)
            turn = record.turn + 1
            if turn < len(record.work.turns) and self._follow_up is not None:
                answers = [*answers, record.tokens]
                tokens = self._follow_up(record.work, answers)
                if tokens is not None:
                    self._send(index, record.work, tokens, turn, answers)


def digest(tokens: Sequence[int]) -> str:
    """A short hash of an output, enough to tell whether two outputs are the same."""
    return hashlib.sha256(" ".join(map(str, tokens)).encode()).hexdigest()[:16]


def summarise(result: Pass) -> dict[str, Any]:
    """The figures of a pass, as they are stored.

    ``acceptance_length`` is taken from the stamps, the same way for every arm: tokens per
    engine step and request, the prefill's own token left out. It counts the target's own
    token and the steps without a draft. Times are in milliseconds, ``seconds`` apart: of the
    whole pass, of each turn, and for each group of its requests' together.
    """
    ttft: list[float] = []
    gaps: list[float] = []
    per_token: list[float] = []
    groups: dict[str, dict[str, Any]] = {}
    for request in result.requests:
        if not request.stamps:
            raise BenchError(f"request {request.id} ended without a token")
        ttft.append(request.stamps[0] - request.submitted)
        gaps.extend(b - a for a, b in pairwise(request.stamps))
        later = len(request.tokens) - request.first_tokens
        if later:
            per_token.append((request.stamps[-1] - request.stamps[0]) / later)
        group = groups.setdefault(
            request.work.group,
            {"requests": 0, "tokens": 0, "steps": 0, "output_tokens": 0, "seconds": 0.0},
        )
        group["requests"] += 1
        group["output_tokens"] += len(request.tokens)
        group["seconds"] += request.stamps[-1] - request.submitted
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
        "turns": result.turns,
        "digests": {request.id: digest(request.tokens) for request in result.requests},
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {
        f"p{round(share * 100)}": percentile(seconds, share) * 1e3 for share in (0.5, 0.9, 0.99)
    } | {"mean": sum(seconds) / len(seconds) * 1e3}
