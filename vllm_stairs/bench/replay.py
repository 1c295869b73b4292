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

``auto`` is asked for all requests of a step at once, as in the engine, and told the times of the
cost model. Text that the draft has missed while it was not drafting is read in its next first pass,
which then costs as much as one of so many more requests.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vllm_stairs.bench.costs import CostModel
from vllm_stairs.bench.errors import BenchError
from vllm_stairs.bench.policies import Auto, Fixed, Policy
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
    extrapolated: float
    """Share of steps with more rows than the cost model's last point."""
    simulated_per_s: float
    """Staircases simulated per second of wall clock."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class _Lane:
    """One request on its way through its trace."""

    __slots__ = ("position", "read", "request", "runs", "tokens", "trace", "unknown")

    def __init__(self, request: int, trace: Trace) -> None:
        self.request = request
        self.trace = trace
        self.position = 0
        # Where the draft has last followed the text to.
        self.read = 0
        self.tokens = trace.tokens
        self.runs = _runs(trace.held)
        self.unknown = np.concatenate([[0], np.cumsum(~trace.known)]).tolist()

    def height(self, policy: Policy, batch: int) -> int:
        """Height of the next staircase; never past the end of the text."""
        wanted = min(policy.ceiling(self.request, batch), self.tokens - self.position - 1)
        if not policy.reads_probabilities or wanted < 1:
            return max(wanted, 0)
        seen = self.seen(wanted)
        for drafted in range(1, min(wanted, len(seen)) + 1):
            if not policy.go_on(seen[:drafted]):
                return drafted
        return min(wanted, len(seen))

    def seen(self, wanted: int) -> list[float]:
        """The draft's probabilities of its next tokens: ``wanted`` of them, or as far as known."""
        run = self.runs[self.position]
        known = self.trace.probability[self.position : self.position + min(wanted, run + 1)]
        seen: list[float] = known.tolist()
        if wanted > run:
            seen += self.trace.tails.get(self.position + run, ())
        return seen[:wanted]

    def advance(self, height: int) -> tuple[int, bool]:
        """Validate a staircase; returns the accepted drafts and whether any was a guess."""
        start = self.position
        accepted = min(self.runs[start], height)
        compared = min(accepted + 1, height)
        guessed = self.unknown[start + compared] > self.unknown[start]
        self.position += accepted + 1
        if height:
            self.read = self.position
        return accepted, guessed


def _runs(held: np.ndarray) -> list[int]:
    """For every position, how many drafts in a row hold from there on."""
    runs = [0] * (len(held) + 1)
    for position in range(len(held) - 1, -1, -1):
        runs[position] = runs[position + 1] + 1 if held[position] else 0
    return runs


def _draft_together(
    auto: Auto, running: Sequence[_Lane], costs: CostModel
) -> tuple[list[int], float]:
    """One step's drafting as the engine does it; returns heights and milliseconds."""
    policy = auto.policy
    room = [min(auto.height, lane.tokens - lane.position - 1) for lane in running]
    plan = policy.plan(
        [lane.request for lane in running],
        room,
        [lane.position - lane.read for lane in running],
        [lane.tokens - lane.position for lane in running],
    )
    seen = {index: running[index].seen(room[index]) for index in plan.active}
    first = further = 0.0
    while plan.active:
        depth = len(plan.passes)
        if depth:
            further += costs.draft_ms(len(plan.active))
        else:
            first = costs.draft_ms(len(plan.active) + plan.filled)
        policy.proceed(plan, [seen[index][depth] for index in plan.active])
        for index in list(plan.active):
            if len(seen[index]) == depth + 1:
                plan.drop(index)  # Nobody knows what the draft would have written next.
    if plan.passes:
        policy.drafted(plan, first, further)
    return policy.settle(plan), first + further


def replay(record: Record, policy: Policy | Auto, costs: CostModel, batch: int = 1) -> Score:
    """Run a policy over a record.

    Args:
        record: of :func:`vllm_stairs.bench.record.load`.
        policy: decides the heights.
        costs: of a step.
        batch: requests in flight, kept as in the benchmark: the next starts where one ends.

    Raises:
        BenchError: the record has fewer requests than ``batch``.
    """
    if batch > len(record.traces):
        raise BenchError(
            f"a batch of {batch} needs as many requests, the record has {len(record.traces)}"
        )
    started = time.perf_counter()
    waiting = [_Lane(number, trace) for number, trace in enumerate(record.traces)][::-1]
    running: list[_Lane] = []
    heights: dict[int, int] = {}
    tokens = steps = staircases = guessed = drafted_in_all = extrapolated = 0
    draft_ms = target_ms = 0.0
    while waiting or running:
        while waiting and len(running) < batch:
            running.append(waiting.pop())
        size = len(running)
        chosen: list[int] = []
        outcomes: list[tuple[int, bool]] = []
        if isinstance(policy, Auto):
            chosen, spent = _draft_together(policy, running, costs)
            outcomes = [lane.advance(own) for lane, own in zip(running, chosen, strict=True)]
            draft_ms += spent
        else:
            for lane in running:
                height = lane.height(policy, size)
                outcomes.append(lane.advance(height))
                policy.observe(lane.request, height, outcomes[-1][0])
                chosen.append(height)
            if passes := max(chosen):
                draft_ms += passes * costs.draft_ms(sum(own > 0 for own in chosen))
        rows = size + sum(chosen)
        extrapolated += rows > costs.target_ms.sizes[-1]
        for height, (accepted, unsure) in zip(chosen, outcomes, strict=True):
            heights[height] = heights.get(height, 0) + 1
            tokens += accepted + 1
            guessed += unsure
        drafted_in_all += sum(chosen)
        staircases += size
        steps += 1
        target_ms += costs.target_ms(rows)
        ended = [lane for lane in running if lane.position >= lane.tokens]
        if isinstance(policy, Auto):
            policy.policy.observe(
                [lane.request for lane in running],
                chosen,
                [accepted for accepted, _ in outcomes],
                costs.target_ms(rows) + costs.overhead_ms,
            )
            policy.policy.forget([lane.request for lane in ended])
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
        extrapolated=extrapolated / steps,
        simulated_per_s=staircases / (time.perf_counter() - started),
    )


def compare(
    record: Record, policies: Sequence[Policy | Auto], costs: CostModel, batch: int
) -> tuple[Score, list[Score]]:
    """Plain decoding (a height of 0) and every policy, on the same record."""
    plain = replay(record, Fixed(0), costs, batch)
    return plain, [replay(record, policy, costs, batch) for policy in policies]
