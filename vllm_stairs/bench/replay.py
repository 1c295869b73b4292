"""The simulator: scores heights and policies on a record, without a model.

What is exact: a greedy draft depends on the text before it alone, so a staircase that starts or
ends elsewhere than the recorded one meets the same agreements and disagreements, and the text
is the target's own whatever is drafted.

What is not: the token that follows a draft which held in full was never drafted; whether the
draft would have had it is guessed from the record's own rate. The share of staircases that met
such a place is reported (``guessed``): record with a height well above those of interest.
Past a wrong token a policy sees recorded probabilities while there are any, then stops. Prefill
is free. A step of several requests costs as many draft passes as its tallest staircase. With a
sampled draft or target (temperature above 0) the first paragraph does not hold and the result
is an approximation.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vllm_stairs.bench.costs import CostModel
from vllm_stairs.bench.policies import Fixed, Policy
from vllm_stairs.bench.record import Record, Trace


@dataclass(frozen=True)
class Score:
    """What one policy would have done with a record."""

    policy: str
    batch: int
    tokens: int
    steps: int
    """Engine steps."""
    staircases: int
    """Steps, counted once per request in them."""
    mean_height: float
    acceptance_length: float
    """Tokens per staircase, the target's own included."""
    heights: tuple[int, ...]
    """Staircases by height."""
    draft_ms: float
    """Sum over all steps, as the next two."""
    target_ms: float
    overhead_ms: float
    tokens_per_s: float
    guessed: float
    """Share of staircases that met a position which the record does not know."""
    simulated_per_s: float
    """Staircases simulated per second of wall clock."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class _Lane:
    """One request on its way through its trace."""

    __slots__ = ("position", "request", "runs", "tokens", "trace", "unknown")

    def __init__(self, request: int, trace: Trace) -> None:
        self.request = request
        self.trace = trace
        self.position = 0
        self.tokens = trace.tokens
        self.runs = _runs(trace.held)
        self.unknown = np.concatenate([[0], np.cumsum(~trace.known)]).tolist()

    def height(self, policy: Policy, batch: int) -> int:
        """Height of the next staircase; never past the end of the text."""
        wanted = min(policy.ceiling(self.request, batch), self.tokens - self.position - 1)
        if not policy.reads_probabilities or wanted < 1:
            return max(wanted, 0)
        run = self.runs[self.position]
        seen = self.trace.probability[self.position : self.position + min(wanted, run + 1)].tolist()
        if wanted > run:
            seen += self.trace.tails.get(self.position + run, ())
        for drafted in range(1, min(wanted, len(seen)) + 1):
            if not policy.go_on(seen[:drafted]):
                return drafted
        return min(wanted, len(seen))

    def advance(self, height: int) -> tuple[int, bool]:
        """Validate a staircase; returns the accepted drafts and whether any was a guess."""
        start = self.position
        accepted = min(self.runs[start], height)
        compared = min(accepted + 1, height)
        guessed = self.unknown[start + compared] > self.unknown[start]
        self.position += accepted + 1
        return accepted, guessed


def _runs(held: np.ndarray) -> list[int]:
    """For every position, how many drafts in a row hold from there on."""
    runs = [0] * (len(held) + 1)
    for position in range(len(held) - 1, -1, -1):
        runs[position] = runs[position + 1] + 1 if held[position] else 0
    return runs


def replay(record: Record, policy: Policy, costs: CostModel, batch: int = 1) -> Score:
    """Run a policy over a record.

    Args:
        record: of :func:`vllm_stairs.bench.record.load`.
        policy: decides the heights.
        costs: of a step.
        batch: requests in flight, kept as in the benchmark: the next starts where one ends.
    """
    started = time.perf_counter()
    waiting = [_Lane(number, trace) for number, trace in enumerate(record.traces)][::-1]
    running: list[_Lane] = []
    heights: dict[int, int] = {}
    tokens = steps = staircases = guessed = drafted_in_all = 0
    draft_ms = target_ms = 0.0
    while waiting or running:
        while waiting and len(running) < batch:
            running.append(waiting.pop())
        size = len(running)
        rows = passes = drafting = 0
        for lane in running:
            height = lane.height(policy, size)
            accepted, unsure = lane.advance(height)
            policy.observe(lane.request, height, accepted)
            heights[height] = heights.get(height, 0) + 1
            rows += height + 1
            passes = max(passes, height)
            drafting += height > 0
            tokens += accepted + 1
            drafted_in_all += height
            guessed += unsure
        staircases += size
        steps += 1
        if passes:
            draft_ms += passes * costs.draft_ms(drafting)
        target_ms += costs.target_ms(rows)
        running = [lane for lane in running if lane.position < lane.tokens]
    overhead_ms = steps * costs.overhead_ms
    return Score(
        policy=policy.name,
        batch=batch,
        tokens=tokens,
        steps=steps,
        staircases=staircases,
        mean_height=drafted_in_all / staircases,
        acceptance_length=tokens / staircases,
        heights=tuple(heights.get(height, 0) for height in range(max(heights) + 1)),
        draft_ms=draft_ms,
        target_ms=target_ms,
        overhead_ms=overhead_ms,
        tokens_per_s=tokens / (draft_ms + target_ms + overhead_ms) * 1e3,
        guessed=guessed / staircases,
        simulated_per_s=staircases / (time.perf_counter() - started),
    )


def compare(
    record: Record, policies: Sequence[Policy], costs: CostModel, batch: int
) -> tuple[Score, list[Score]]:
    """Plain decoding (a height of 0) and every policy, on the same record."""
    plain = replay(record, Fixed(0), costs, batch)
    return plain, [replay(record, policy, costs, batch) for policy in policies]
