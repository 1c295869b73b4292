"""The simulator: scores heights and policies on a record, without a model.

What is exact: a greedy draft depends on the text before it alone, so a staircase that starts or
ends elsewhere than the recorded one meets the same agreements and disagreements, and the text
is the target's own whatever is drafted.

What is not: the token that follows a draft which held in full was never drafted; whether the
draft would have had it is guessed from the record's own rate. The share of staircases that met
such a place is reported (``guessed``): record with a height well above those of interest.
Past a wrong token a policy sees recorded probabilities while there are any, then stops. With a
sampled draft or target (temperature above 0) the first paragraph does not hold and the result is an
approximation.

The course is the engine's. A request that starts has its prompt read in a step in which the others
go on; its first token comes with that, its first staircase is drafted after it. A draft pass is for
those who still draft, and the first one also reads the text that the draft has missed, the prompt
first of all. Text, whoever reads it, costs as the cost model says of so many more rows or requests.
Where ``auto`` has the draft read the end of a text only, its drafts are taken to be the same.

``auto`` is asked for all requests of a step at once, as in the engine, and told the times of the
cost model.

A draft on a device of its own (``dedicated``) costs the time that the target waits for it
(:mod:`vllm_stairs.bench.dedicated`).
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from vllm_stairs.bench.costs import CostModel, Curve
from vllm_stairs.bench.dedicated import Dedicated, passes_ms, written_ahead
from vllm_stairs.bench.errors import BenchError
from vllm_stairs.bench.policies import Auto, Fixed, Policy
from vllm_stairs.bench.record import Record, Trace
from vllm_stairs.proposer.plan import context_start


@dataclass(frozen=True)
class Score:
    """What one policy would have done with a record."""

    policy: str
    batch: int
    tokens: int
    """Written, the first of each request too where the record holds its prompt."""
    steps: int
    """Engine steps, those that only read prompts too."""
    staircases: int
    """Steps, counted once per request in them."""
    mean_height: float
    acceptance_length: float
    """Tokens per staircase, the target's own included, a request's first one not."""
    heights: tuple[int, ...]
    """Staircases by height."""
    draft_ms: float
    """Sum over all steps, as the next two; prompts included."""
    target_ms: float
    overhead_ms: float
    tokens_per_s: float
    guessed: float
    """Share of staircases that met a position which the record does not know."""
    extrapolated: float
    """Share of steps with more rows than the cost model's last point, prompts left out."""
    simulated_per_s: float
    """Staircases simulated per second of wall clock."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class _Lane:
    """One request on its way through its trace."""

    __slots__ = (
        "ahead",
        "position",
        "read",
        "request",
        "runs",
        "tokens",
        "trace",
        "unknown",
        "unread",
    )

    def __init__(self, request: int, trace: Trace) -> None:
        self.request = request
        self.trace = trace
        self.position = 0
        # Tokens of the prompt that the target has yet to read.
        self.unread = trace.prompt
        # Leading tokens of prompt and text that the draft has read.
        self.read = 0
        self.tokens = trace.tokens
        # Drafts of its next staircase that a dedicated draft has written already.
        self.ahead = 0
        self.runs = _runs(trace.held)
        self.unknown = np.concatenate([[0], np.cumsum(~trace.known)]).tolist()

    @property
    def missed(self) -> int:
        """Tokens that the draft has to read beside the newest one; its last draft if it held."""
        return max(self.trace.start + self.position - self.read - 1, 0)

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

    def advance(self, height: int, drafted: int) -> tuple[int, bool]:
        """Validate a staircase; returns the accepted drafts and whether any was a guess.

        Args:
            height: drafts that the target judges.
            drafted: as many or more: some may have been left out.
        """
        start = self.position
        accepted = min(self.runs[start], height)
        compared = min(accepted + 1, height)
        guessed = self.unknown[start + compared] > self.unknown[start]
        if drafted:
            # Its last draft the draft has not read, and what it read of refused ones is void.
            self.read = self.trace.start + start + min(accepted, drafted - 1)
        self.position += accepted + 1
        return accepted, guessed


class _Drafting(NamedTuple):
    """What was drafted in a step, request by request."""

    heights: list[int]
    """Drafts that the target is to judge."""
    drafted: list[int]
    """Drafts written."""
    ms: float


def _runs(held: np.ndarray) -> list[int]:
    """For every position, how many drafts in a row hold from there on."""
    runs = [0] * (len(held) + 1)
    for position in range(len(held) - 1, -1, -1):
        runs[position] = runs[position + 1] + 1 if held[position] else 0
    return runs


def _more_ms(curve: Curve, size: int, tokens: int) -> float:
    """Milliseconds that so many tokens of text add to a pass over ``size`` rows or requests.

    Texts are long and measured curves short: beyond the last point a token costs what one does on
    average within the curve, not what its last two points, which may be close, happen to say.
    """
    first, last = curve.sizes[0], curve.sizes[-1]
    within = min(tokens, max(last - size, 0))
    ms = curve(size + within) - curve(size)
    if tokens > within and last > first:
        rise = max(curve.values[-1] - curve.values[0], 0.0)
        ms += (tokens - within) * rise / (last - first)
    return ms


def _target_ms(costs: CostModel, rows: int, prompts: int) -> float:
    """One pass of the target over ``rows`` decode rows and ``prompts`` tokens of prompts."""
    least = max(rows, 1)
    return costs.target_ms(least) + _more_ms(costs.target_ms, least, rows + prompts - least)


def _draft_each(policy: Policy, running: Sequence[_Lane], costs: CostModel) -> _Drafting:
    """One step's drafting, every request for itself; who is done leaves the draft batch."""
    heights = [lane.height(policy, len(running)) for lane in running]
    ms, still = 0.0, sum(own > 0 for own in heights)
    if still:
        missing = sum(lane.missed for lane, own in zip(running, heights, strict=True) if own)
        ms += _more_ms(costs.draft_ms, still, missing)
    drafted = 0
    while still:
        drafted += 1
        ms += costs.draft_ms(still)
        still = sum(own > drafted for own in heights)
    return _Drafting(heights, heights, ms)


def _draft_together(auto: Auto, running: Sequence[_Lane], costs: CostModel) -> _Drafting:
    """One step's drafting as the engine does it."""
    policy = auto.policy
    room = [min(auto.height, lane.tokens - lane.position - 1) for lane in running]
    # A last draft that held is no hole: it is read beside the newest token, at no extra pass.
    holes = [max(lane.missed - 1, 0) if own else 0 for lane, own in zip(running, room, strict=True)]
    ends = [hole - context_start(hole, 0, 1) for hole in holes]
    plan = policy.plan(
        [lane.request for lane in running],
        room,
        holes,
        [lane.tokens - lane.position for lane in running],
        ends=ends,
        lengths=[lane.trace.start + lane.position for lane in running],
    )
    for index in plan.active:
        if plan.cut.get(index):
            running[index].read += holes[index] - ends[index]
    seen = {index: running[index].seen(room[index]) for index in plan.active}
    missing = sum(running[index].missed for index in plan.active)
    first = further = 0.0
    while plan.active:
        depth, drafting = len(plan.passes), len(plan.active)
        if depth:
            further += costs.draft_ms(drafting)
        else:
            first = costs.draft_ms(drafting) + _more_ms(costs.draft_ms, drafting, missing)
        policy.proceed(plan, [seen[index][depth] for index in plan.active], first + further)
        for index in list(plan.active):
            if len(seen[index]) == depth + 1:
                plan.drop(index)  # Nobody knows what the draft would have written next.
    drafted = list(plan.heights)
    heights = policy.settle(plan, may_trim=True)
    if plan.passes:
        policy.drafted(plan, first, further)
    return _Drafting(heights, drafted, first + further)


def _draft_elsewhere(
    policy: Policy, running: Sequence[_Lane], costs: CostModel, busy_ms: float, handover_ms: float
) -> _Drafting:
    """One step's drafting on a device of its own: what the target waits for.

    Args:
        policy: decides the heights.
        running: requests.
        costs: of a step.
        busy_ms: that the draft's last pass, written ahead, still takes.
        handover_ms: of question and answer.
    """
    heights = [lane.height(policy, len(running)) for lane in running]
    ahead = [min(lane.ahead, own) for lane, own in zip(running, heights, strict=True)]
    asking = [lane for lane, own in zip(running, heights, strict=True) if own]
    if not asking:
        return _Drafting(heights, heights, 0.0)
    late = [lane for lane, own in zip(running, ahead, strict=True) if not own and lane in asking]
    ms = handover_ms + busy_ms + passes_ms(heights, ahead, costs.draft_ms)
    if late:
        ms += _more_ms(costs.draft_ms, len(late), sum(lane.missed for lane in late))
    return _Drafting(heights, heights, ms)


def replay(
    record: Record,
    policy: Policy | Auto,
    costs: CostModel,
    batch: int = 1,
    dedicated: Dedicated | None = None,
) -> Score:
    """Run a policy over a record.

    Args:
        record: of :func:`vllm_stairs.bench.record.load`.
        policy: decides the heights.
        costs: of a step.
        batch: requests in flight, kept as in the benchmark: the next starts where one ends.
        dedicated: the draft has a device of its own; ``costs.draft_ms`` are its passes there. The
            scores' ``draft_ms`` is then the time that the target waits.

    Raises:
        BenchError: the record has fewer requests than ``batch``; ``auto`` with ``dedicated``, which
            is not simulated.
    """
    if dedicated is not None and isinstance(policy, Auto):
        raise BenchError("auto is not simulated for a dedicated draft: score fixed heights")
    if batch > len(record.traces):
        raise BenchError(
            f"a batch of {batch} needs as many requests, the record has {len(record.traces)}"
        )
    started = time.perf_counter()
    waiting = [_Lane(number, trace) for number, trace in enumerate(record.traces)][::-1]
    running: list[_Lane] = []
    ended: list[_Lane] = []
    heights: dict[int, int] = {}
    first_tokens = tokens = steps = staircases = guessed = drafted_in_all = extrapolated = 0
    draft_ms = target_ms = busy_ms = 0.0
    while waiting or running:
        while waiting and len(running) < batch:
            running.append(waiting.pop())
        decoding = [lane for lane in running if not lane.unread]
        reading = [lane for lane in running if lane.unread]
        drafting = _Drafting([], [], 0.0)
        if decoding:
            if isinstance(policy, Auto):
                drafting = _draft_together(policy, decoding, costs)
            elif dedicated is not None:
                drafting = _draft_elsewhere(policy, decoding, costs, busy_ms, dedicated.handover_ms)
            else:
                drafting = _draft_each(policy, decoding, costs)
        chosen = drafting.heights
        # Whether the draft's guess of the target's own token holds after a staircase that does.
        sure = [
            0 < height < lane.runs[lane.position]
            for lane, height in zip(decoding, chosen, strict=True)
        ]
        outcomes = [
            lane.advance(height, drafted)
            for lane, height, drafted in zip(decoding, chosen, drafting.drafted, strict=True)
        ]
        rows, prompts = len(decoding) + sum(chosen), sum(lane.unread for lane in reading)
        step_ms = _target_ms(costs, rows, prompts)
        busy_ms = 0.0
        if dedicated is not None and dedicated.overlap and any(chosen):
            written, busy_ms = written_ahead(
                step_ms + costs.overhead_ms + dedicated.handover_ms,
                costs.draft_ms(sum(height > 0 for height in chosen)),
                max(chosen) + 1,
            )
            for lane, held in zip(decoding, sure, strict=True):
                lane.ahead = written if held else 0
        if isinstance(policy, Auto):
            # In this order in the engine: it hears with the next step's work that requests ended.
            policy.policy.forget([lane.request for lane in ended])
            policy.policy.observe(
                [lane.request for lane in decoding],
                chosen,
                [accepted for accepted, _ in outcomes],
                step_ms + costs.overhead_ms,
                rows + prompts,
            )
        else:
            for lane, height, (accepted, _) in zip(decoding, chosen, outcomes, strict=True):
                policy.observe(lane.request, height, accepted)
        extrapolated += rows > costs.target_ms.sizes[-1]
        for height, (accepted, unsure) in zip(chosen, outcomes, strict=True):
            heights[height] = heights.get(height, 0) + 1
            tokens += accepted + 1
            guessed += unsure
        drafted_in_all += sum(chosen)
        staircases += len(decoding)
        steps += 1
        draft_ms += drafting.ms
        target_ms += step_ms
        for lane in reading:
            lane.unread = 0
            first_tokens += 1
        ended = [lane for lane in running if lane.position >= lane.tokens]
        running = [lane for lane in running if lane.position < lane.tokens]
    overhead_ms = steps * costs.overhead_ms
    return Score(
        policy=policy.name,
        batch=batch,
        tokens=first_tokens + tokens,
        steps=steps,
        staircases=staircases,
        mean_height=drafted_in_all / staircases,
        acceptance_length=tokens / staircases,
        heights=tuple(heights.get(height, 0) for height in range(max(heights) + 1)),
        draft_ms=draft_ms,
        target_ms=target_ms,
        overhead_ms=overhead_ms,
        tokens_per_s=(first_tokens + tokens) / (draft_ms + target_ms + overhead_ms) * 1e3,
        guessed=guessed / staircases,
        extrapolated=extrapolated / steps,
        simulated_per_s=staircases / (time.perf_counter() - started),
    )


def compare(
    record: Record,
    policies: Sequence[Policy | Auto],
    costs: CostModel,
    batch: int,
    dedicated: Dedicated | None = None,
) -> tuple[Score, list[Score]]:
    """Plain decoding (a height of 0) and every policy, on the same record."""
    plain = replay(record, Fixed(0), costs, batch)
    return plain, [replay(record, policy, costs, batch, dedicated) for policy in policies]
