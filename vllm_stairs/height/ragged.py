"""The height of every staircase, request by request and step by step.

The mathematics, the bounds and the sources are in ``docs/height-policy.md``. The calls of a step::

    policy.observe(...)                 what became of the staircases before, what the step took
    plan = policy.plan(...)             who drafts, at most how far, and why not
    while plan.active:                  one draft pass for these
        policy.proceed(plan, ...)       who goes on, given the draft's confidence
                                    or, where drafts come all at once: policy.arrived(plan, ...)
    heights = policy.settle(plan)       what the target is to verify
    policy.drafted(plan, ...)           what drafting took

Everything here is arithmetic on numbers: same calls, same decisions.
"""

from collections.abc import Hashable, Sequence
from functools import partial
from itertools import accumulate
from operator import mul

from vllm_stairs.height.choice import Choice, added_ms, cheapest_trial, could_pay, uneven_margin
from vllm_stairs.height.costs import DraftCost, TargetCost, bucket
from vllm_stairs.height.gain import Gain
from vllm_stairs.height.plan import (
    CATCHING_UP,
    LIMIT,
    LOAD,
    MEASURING,
    PAUSED,
    REASONS,
    WEAK_DRAFT,
    Plan,
)
from vllm_stairs.height.risk import Account, Prober
from vllm_stairs.height.vector import best_prefix

__all__ = [
    "CATCHING_UP",
    "LIMIT",
    "LOAD",
    "MEASURING",
    "PAUSED",
    "REASONS",
    "WEAK_DRAFT",
    "Plan",
    "RaggedPolicy",
]

_COLD = 8
"""Verified staircases after which the draft is no longer a stranger."""
_COLD_STAKE = 2.0
"""Times the account's balance that the first trial may cost: a long prompt has to be read for it,
and waiting for a shorter one could last."""
_TALLEST_COLD = 4
"""The largest height until half of these are verified."""
_TALLEST_PROBE = 2
_PROBED = 4
"""Staircases that a probe is to verify."""
_GOOD = 0.8
"""Acceptance of which a probe could not bring much better news."""
_CLOSE = 0.75
"""Of what a draft for each costs; where it brings so much, it is looked at again soon."""
_SMALL_HOLE = 16
"""Tokens; above, drafting is an investment, and decided soberly."""
_PLAIN_EVERY = 128
"""Speculating steps after which one plain step is measured again, at the latest."""
_PLAIN_AGAIN = 8
"""The same if the last one took another time than was expected."""
_PLAIN_IN_A_ROW = 4
"""Plain steps at once if they take less than was expected: then drafting may be losing."""
_PLAIN_SHARE = 0.0025
"""Share of time that measuring plain steps may cost while drafting pays."""
_PLAIN_APART = 16
"""Speculating steps between two plain ones that are made for their cost, at the least."""
_LARGE_BATCH = 4
_REPLAN_EVERY = 4
_REPLAN_OFF = 8
"""Steps for which a batch in which nobody drafts is left alone."""
_EXPLORE_EVERY = 32
"""Steps between two that are one higher or lower, where no confidence varies the heights."""
_UNTRIMMED_EVERY = 16
"""Steps of which one verifies all that was drafted: what more rows cost is not known else."""
_LONELY_PASSES = 64
"""Steps of one draft pass after which one has two: what is not done is not measured."""


class _Live:
    """What the policy keeps of a request that runs."""

    __slots__ = ("confidences", "debt", "instalment", "whole", "written")

    def __init__(self) -> None:
        self.written = 0
        self.confidences: list[float] = []
        # Milliseconds spent on filling its hole that its staircases have yet to earn.
        self.debt = 0.0
        self.instalment = 0.0
        # Whether the draft has read all of what it had missed, or the end; None: it was short.
        self.whole: bool | None = None


class RaggedPolicy:
    """Chooses heights that maximise expected tokens per second.

    Not thread-safe; one per engine. Under parallel ranks one decides and tells the others.

    Args:
        max_height: the largest height, K.
        use_confidence: whether :meth:`proceed` will be given the draft's confidences.
        draft_share: assumed cost of a draft pass as a share of a plain step, until measured; the
            ratio of the bytes of the models' weights is a good guess.
        loss_share: the share of time that probes may cost in the long run.
        warm_up: what may be lost before speculation pauses for the first time, in plain steps;
            half as much again on probes.
    """

    def __init__(
        self,
        max_height: int,
        *,
        use_confidence: bool = True,
        draft_share: float = 0.25,
        loss_share: float = 0.01,
        warm_up: float = 8.0,
    ) -> None:
        if max_height < 1:
            raise ValueError(f"max_height must be at least 1, not {max_height}")
        self.max_height = max_height
        self.uses_confidence = use_confidence
        self.target = TargetCost()
        self.draft = DraftCost(draft_share)
        self.gains = Gain(max_height)
        self.prober = Prober(warm_up / 2, loss_share)
        self.account = Account(warm_up)
        self._live: dict[Hashable, _Live] = {}
        self._typical_length = 128.0
        self._on = False
        self._steps = 0
        self._since_plain = 0
        # Plain steps in a row that were asked for; whether the coming step is one.
        self._in_a_row = 0
        self._asked_for = False
        # Whether the last such row was no measure, for its first step read a prompt.
        self._in_vain = False
        # Plain steps that a speculating one is expected to win.
        self._ahead = 0.0
        # Steps since one with more than one draft pass.
        self._lonely = 0
        # What for, and of which bucket -> plain steps asked for.
        self._asked: dict[tuple[str, int], int] = {}
        # Batch size, octave of the texts' length -> step and answer of the last _could_pay.
        self._potential: dict[tuple[int, int], tuple[int, bool]] = {}
        # Whether the last probe was of a draft that could pay, not of costs alone.
        self._could = True
        # What steps bring of what was planned: stopping inside a draft makes it more.
        self._edge = 1.0
        self._brought = [20.0, 20.0]
        # Requests in the last step.
        self._batch = 1
        self._last: Plan | None = None
        # By request: their order in the batch changes from step to step.
        self._last_heights: dict[Hashable, int] = {}
        self._last_step = 0
        # Where nobody was to draft in the last plan, why by request, and its step.
        self._idle: dict[Hashable, str | None] | None = None
        self._idle_step = 0
        self._pending: Plan | None = None
        self._pending_ms = self._pending_fill_ms = 0.0
        self._time = [0.0, 0.0]

    # --------------------------------------------------------------------------- figures

    @property
    def gain(self) -> float:
        """Tokens per second of late relative to plain decoding, as estimated (1: equal)."""
        spent, plain = self._time
        return plain / spent if spent else 1.0

    # -------------------------------------------------------------------------- planning

    def plan(
        self,
        keys: Sequence[Hashable],
        rooms: Sequence[int],
        holes: Sequence[int] | None = None,
        remaining: Sequence[int] | None = None,
        reasons: Sequence[str | None] | None = None,
        ends: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Plan:
        """Decide who drafts in this step, and how far.

        Args:
            keys: ``[B]``: the requests that wrote a token in this step and go on.
            rooms: ``[B]``: the tallest staircase that each allows; 0: none.
            holes: ``[B]``: tokens that the draft would have to read for each beside the usual
                (the newest token, and the last draft where all were kept). None: no holes.
            remaining: ``[B]``: tokens that each may still write. None: unknown.
            reasons: ``[B]``: why ``rooms`` is 0, where it is.
            ends: ``[B]``: as ``holes``, if the draft read the end of what it has missed only, and
                drafted without the rest (``plan.cut``). None: it cannot.
            lengths: ``[B]``: tokens of each request's text so far. None: unknown, or all the same.
        """
        batch = self._batch = len(keys)
        if lengths:
            self.target.stretch.over(sum(lengths) // batch)
        self._steps += 1
        self.gains.tick()
        self.account.tick()
        if self._pending_ms and self.target.known:
            # Drafts that no step has judged: their requests have ended.
            lost = self._pending_ms / self.target(batch)
            if self._pending is not None and not self._pending.rate:
                self.prober.made(-lost, False)
            else:
                self.account.book(-lost)
        plan = Plan(tuple(keys), [0] * batch, [None] * batch)
        self._pending = plan
        self._pending_ms = self._pending_fill_ms = 0.0
        able = [index for index, room in enumerate(rooms) if room > 0]
        if len(able) < batch:
            for index, room in enumerate(rooms):
                if room <= 0:
                    plan.reasons[index] = (reasons[index] if reasons else None) or LIMIT
        self._asked_for = False
        if not able:
            self._in_a_row = 0
            return plan
        if self._stay_idle(plan, able):
            return plan
        if self._must_measure(batch):
            self._in_a_row += 1
            self._asked_for = True
            self._since_plain = 0
            for index in able:
                plan.reasons[index] = MEASURING
            return plan
        self._in_a_row = 0
        if holes is not None and not any(holes):
            holes = None
        if holes is None and self._repeat(plan, able, rooms):
            return plan
        if holes is not None and ends is not None:
            holes = self._cut(plan, holes, ends, remaining)
        survivals = self._survivals(plan, able, rooms, holes)
        self._decide(plan, survivals, rooms, holes, remaining)
        self._since_plain = self._since_plain + 1 if plan.active else 0
        if holes is not None:
            plan.filled = sum(holes[index] for index in plan.active)
        plan.begin(plan.active)
        if len(plan.active) < len(able):
            self._say_why(plan, survivals)
            if not plan.active:
                self._idle = dict.fromkeys(plan.keys)
                self._idle.update((plan.keys[index], plan.reasons[index]) for index in survivals)
                self._idle_step = self._steps
        elif self._on and not plan.probe and holes is None:
            self._last, self._last_step = plan, self._steps
            self._last_heights = dict(zip(plan.keys, plan.heights, strict=True))
        return plan

    def _stay_idle(self, plan: Plan, able: Sequence[int]) -> bool:
        """Where nobody drafted and the batch has not changed, nobody drafts for a few steps more.

        Without drafts nothing is learned that would change the decision, and a step without drafts
        is to cost what a plain one costs.
        """
        idle = self._idle
        if (
            idle is None
            or idle.keys() != set(plan.keys)
            or self._steps - self._idle_step >= _REPLAN_OFF
        ):
            self._idle = None
            return False
        self._forget_edge()
        self.prober.tick(True)
        for index in able:
            plan.reasons[index] = idle[plan.keys[index]] or WEAK_DRAFT
        self._since_plain = 0
        return True

    def _forget_edge(self) -> None:
        """Without drafts, what stopping inside a draft has brought becomes old."""
        self._edge += 0.01 * (1.0 - self._edge)

    def _repeat(self, plan: Plan, able: Sequence[int], rooms: Sequence[int]) -> bool:
        """In a batch of several that has not changed, do as in the last step, for a few steps.

        Deciding costs as much as the batch is large, and the estimates hardly move in a step.
        """
        last = self._last
        if (
            last is None
            or len(able) < _LARGE_BATCH
            or self._steps - self._last_step >= _REPLAN_EVERY
            or self.account.blocked
            or len(last.keys) != len(plan.keys)
            # One that is new, or had no room then: nothing was decided about it.
            or not all(self._last_heights.get(plan.keys[index]) for index in able)
        ):
            return False
        self._since_plain += 1
        self.prober.tick(False)
        plan.rate, plan.first, plan.further = last.rate, last.first, last.further
        plan.heights = [
            min(self._last_heights.get(key, 0), room)
            for key, room in zip(plan.keys, rooms, strict=True)
        ]
        plan.rows = self.target.table(len(plan.keys), sum(plan.heights) + 1)
        plan.begin(list(able))
        return True

    def _survivals(
        self, plan: Plan, able: list[int], rooms: Sequence[int], holes: Sequence[int] | None
    ) -> dict[int, list[float]]:
        """For those that may draft the probabilities that their drafts 1..j are all kept.

        Also notes in the plan what rows and passes cost.
        """
        target, forecast, tallest = self.target, self.gains.forecast, self.max_height
        survivals = {}
        total = 1
        for index in able:
            bold = holes is None or holes[index] < _SMALL_HOLE
            rates = forecast(
                plan.keys[index], min(rooms[index], tallest), bold, self._reads_all(plan, index)
            )
            survivals[index] = list(accumulate(rates, mul))
            total += len(rates)
        plan.rows = target.table(len(plan.keys), total)
        plan.first = self.draft.first(len(able), target.unit) / target.level
        plan.further = self.draft.next(len(able), target.unit) / target.level
        return survivals

    def _reads_all(self, plan: Plan, index: int) -> bool | None:
        """Whether a request's draft reads all of a long text, or its end; None: it is short."""
        if index in plan.cut:
            return not plan.cut[index]
        live = self._live.get(plan.keys[index])
        return None if live is None else live.whole

    def _decide(
        self,
        plan: Plan,
        survivals: dict[int, list[float]],
        rooms: Sequence[int],
        holes: Sequence[int] | None,
        remaining: Sequence[int] | None,
    ) -> None:
        """Who drafts: because it pays, to learn, or nobody."""
        batch, able, evidence = len(plan.keys), list(survivals), self.gains.evidence
        option = Choice(plan, survivals)
        option.choose(able)
        probe_height = min(max(option.heights), _TALLEST_PROBE)
        margin = uneven_margin(batch, self._typical_length, evidence) + (0.0 if self._on else 0.02)
        least = (1.0 + margin) * batch / self.target.relative(batch, False)
        go = wanted = option.rate * self._edge > least and not self.account.blocked
        if go and holes is not None:
            self._weigh_holes(option, holes, remaining)
            go = option.rate * self._edge > least
        pilots: list[int] = []
        if go and evidence < _COLD:
            # Nothing is known of the draft yet: a few try it first, if that can be afforded.
            pilots, cost = self._pilots(plan, able, holes, probe_height)
            go = cost <= _COLD_STAKE * self.account.balance
        self._on = go
        self.prober.tick(not go)
        if go:
            plan.rate = option.rate * self._edge
            self._ahead = plan.rate * self.target.relative(batch, False) / batch - 1.0
            if 0 < len(pilots) < len(able):
                self._probe(plan, pilots, rooms, probe_height)
            else:
                self._go(plan, option, rooms)
            return
        self._forget_edge()
        good = evidence >= _COLD and self.gains.rates[0] > _GOOD and not wanted
        useful = self._could_pay(batch) and not good
        close = self._nearly_pays(batch, survivals)
        if self.prober.due(evidence > 0, useful, close, self.account.patience):
            pilots, cost = self._pilots(plan, able, holes, probe_height)
            if self.prober.affords(cost):
                if self.prober.fresh:
                    self.gains.doubt(_COLD)
                self._could = useful
                self._probe(plan, pilots, rooms, probe_height)

    def _cut(
        self,
        plan: Plan,
        holes: Sequence[int],
        ends: Sequence[int],
        remaining: Sequence[int] | None,
    ) -> list[int]:
        """The holes, where it is the better bargain only their ends (noted in the plan).

        All of a long text is worth its reading if drafts are kept more often with it, as learned
        from both, so much more often that it makes up for the time in which the batch waits.
        """
        gains, batch, typical = self.gains, len(holes), self._typical_length
        whole, end = gains.with_context(True), gains.with_context(False)
        # Drafts kept for each first one that is.
        run = 1.0 + sum(gains.rates[1:2])
        plain = self.target(batch)
        chosen = list(holes)
        for index, (hole, shorter) in enumerate(zip(holes, ends, strict=True)):
            if shorter >= hole:
                continue
            rest = typical if remaining is None else min(typical, remaining[index])
            worth = rest / (1.0 + run * end) * run * (whole - end)
            saved = self.draft.fill(hole - shorter, self.target.unit) * batch / plain
            plan.cut[index] = worth < saved
            if worth < saved:
                chosen[index] = shorter
        return chosen

    def _weigh_holes(
        self,
        option: Choice,
        holes: Sequence[int],
        remaining: Sequence[int] | None,
    ) -> None:
        """Let the choice be made anew with the price of reading what the draft has missed."""
        target, batch, typical = self.target, len(holes), self._typical_length
        option.weigh_holes(
            holes,
            [typical] * batch if remaining is None else [min(typical, rest) for rest in remaining],
            partial(self.draft.fill, plain_ms=target.unit),
            target.level,
            self.account.stake * target(batch),
        )

    def _go(self, plan: Plan, option: Choice, rooms: Sequence[int]) -> None:
        """Draft because it is expected to pay."""
        tallest = self.max_height
        if self.gains.evidence < _COLD / 2:
            tallest = min(tallest, _TALLEST_COLD)
        turn = 0
        if not self.uses_confidence and not self._steps % _EXPLORE_EVERY:
            turn = 1 if self._steps // _EXPLORE_EVERY % 2 else -1
        for index, height in zip(option.drafting, option.heights, strict=True):
            if height:
                wanted = tallest if self.uses_confidence else min(height + turn, tallest)
                plan.heights[index] = max(min(wanted, rooms[index]), 1)
                plan.active.append(index)

    def _pilots(
        self, plan: Plan, able: list[int], holes: Sequence[int] | None, height: int
    ) -> tuple[list[int], float]:
        """Who is to draft so that something is learned, and what that costs (plain steps).

        Those with the smallest holes, after a wait first those of whom nothing is known.
        """
        gains, keys = self.gains, plan.keys
        strangers = gains.evidence >= _COLD and self.prober.fresh
        ranked = sorted(
            able,
            key=lambda index: (
                strangers and gains.knows(keys[index]),
                holes[index] if holes else 0,
            ),
        )
        count, ms = cheapest_trial(
            [holes[index] if holes else 0 for index in ranked],
            len(keys),
            height,
            max(_COLD - int(gains.evidence), _PROBED),
            self.target,
            self.draft,
        )
        return sorted(ranked[:count]), ms / self.target(len(keys))

    def _probe(self, plan: Plan, pilots: Sequence[int], rooms: Sequence[int], height: int) -> None:
        """Draft with a few requests to learn."""
        plan.probe = True
        for index in pilots:
            plan.heights[index] = min(height, rooms[index])
            plan.active.append(index)

    def _nearly_pays(self, batch: int, survivals: dict[int, list[float]]) -> bool:
        """Whether one draft for each would bring a good part of what it costs."""
        kept = sum(survival[0] for survival in survivals.values())
        cost = added_ms(batch, len(survivals), 1, self.target, self.draft)
        return kept * self.target(batch) / batch >= _CLOSE * cost

    def _could_pay(self, batch: int) -> bool:
        """Whether a draft that is nearly always right would pay at this batch size, as of late."""
        place = batch, self.target.stretch.place
        step, answer = self._potential.get(place, (-100, False))
        if self._steps - step >= 32:
            answer = could_pay(batch, min(self.max_height, 4), self.target, self.draft)
            self._potential[place] = (self._steps, answer)
        return answer

    def _must_measure(self, batch: int) -> bool:
        """Whether this step is to be plain to learn what plain costs."""
        if self._since_plain >= self._plain_wait():
            return True
        if 0 < self._in_a_row < _PLAIN_IN_A_ROW and self.target.surprise < 0:
            return True
        stretch = self.target.stretch
        if self._since_plain >= _PLAIN_APART and stretch.is_new and stretch.compares(False):
            # Before it can be compared with, the size itself has to be known well.
            well = self.target.knows_plain_well(batch)
            if self._ask("length", stretch.place) if well else self._ask("size", bucket(batch)):
                return True
        if self.target.knows_plain(batch) or (self._on and self._since_plain < _PLAIN_APART):
            return False
        return self._ask("cost", bucket(batch), 4) or not self.target.known

    def _ask(self, purpose: str, place: int, times: int = 8) -> bool:
        """Whether to ask for a plain step for a purpose; not more often than so.

        The step may turn out to be no measure (it also read a prompt): nobody insists.
        """
        asked = self._asked[purpose, place] = self._asked.get((purpose, place), 0) + 1
        return asked <= times

    def _plain_wait(self) -> int:
        """Speculating steps after which a plain one is due, which says what plain costs.

        It costs what drafting wins: little where drafting nearly loses, which is where it counts.
        """
        if self.target.surprise and not self._in_vain:
            return _PLAIN_AGAIN
        return min(max(int(self._ahead / _PLAIN_SHARE), _PLAIN_APART), _PLAIN_EVERY)

    def _say_why(self, plan: Plan, survivals: dict[int, list[float]]) -> None:
        alone = added_ms(1, 1, 1, self.target, self.draft) / self.target.unit
        for index, survival in survivals.items():
            if not plan.heights[index]:
                if plan.probe and plan.rate:
                    reason = MEASURING
                elif self.account.blocked:
                    reason = PAUSED
                elif survival[0] < alone:
                    reason = WEAK_DRAFT
                elif index in plan.holes:
                    # Only weighed where drafting would pay otherwise.
                    reason = CATCHING_UP
                else:
                    reason = LOAD if len(plan.keys) > 1 else WEAK_DRAFT
                plan.reasons[index] = reason

    # -------------------------------------------------------------------------- drafting

    def proceed(
        self,
        plan: Plan,
        confidences: Sequence[float] | None = None,
        elapsed_ms: float | None = None,
    ) -> list[int]:
        """After a draft pass: who takes part in the next one.

        Args:
            plan: of this step.
            confidences: for each request in ``plan.active``, the draft's probability of the token
                that it just wrote; None where unknown: then the planned heights stand.
            elapsed_ms: milliseconds since drafting began in this step: where that is far more than
                was to be expected, it ends. None: not looked at.

        Returns:
            Places within the ``plan.active`` of before, rising; ``plan.active`` is updated.
        """
        active, heights = plan.active, plan.heights
        plan.passes.append(len(active))
        depth = len(plan.passes)
        worth = None if confidences is None else self._after_pass(plan, confidences)
        places = [place for place, index in enumerate(active) if heights[index] > depth]
        if places and elapsed_ms is not None and elapsed_ms > 2.0 * sum(self._expected_ms(plan)):
            places = []
        if places and worth is not None and not plan.probe:
            able, places = places, self._worth_a_pass(plan, places, worth)
            if not places and depth == 1 and self._lonely >= _LONELY_PASSES:
                places = [max(able, key=worth.__getitem__)]
        if len(places) == len(active):
            return places
        plan.active = [active[place] for place in places]
        for index in set(active).difference(plan.active):
            heights[index] = depth
        return places

    def expected_tokens(self, plan: Plan) -> float:
        """How many drafts of the requests in ``plan.active`` are likely to be kept."""
        forecast = self.gains.forecast
        return sum(
            sum(
                accumulate(
                    forecast(
                        plan.keys[index], plan.heights[index], whole=self._reads_all(plan, index)
                    ),
                    mul,
                )
            )
            for index in plan.active
        )

    def arrived(self, plan: Plan, confidences: Sequence[Sequence[float]]) -> None:
        """All drafts have come at once, from elsewhere; in place of :meth:`proceed`.

        Args:
            plan: of this step.
            confidences: for each request in ``plan.active``, the draft's probability of each token
                that came; none where nothing did.
        """
        drafts = dict(zip(plan.active, confidences, strict=True))
        for index, own in drafts.items():
            plan.heights[index] = len(own)
        for depth in range(max(map(len, confidences), default=0)):
            plan.active = [index for index, own in drafts.items() if len(own) > depth]
            plan.passes.append(len(plan.active))
            self._after_pass(plan, [drafts[index][depth] for index in plan.active])
        if not plan.passes:
            # It was waited for, which has its price.
            plan.passes.append(len(drafts))
        plan.active = []

    def _expected_ms(self, plan: Plan) -> tuple[float, float]:
        """Milliseconds that the draft passes so far, and reading missing text, should take."""
        passes = plan.first + (len(plan.passes) - 1) * plan.further
        return passes * self.target.level, self.draft.fill(plan.filled, self.target.unit)

    def _after_pass(self, plan: Plan, confidences: Sequence[float]) -> list[float]:
        """Note what is known now; returns per active request what one more stair would bring."""
        worth = []
        after, keys = self.gains.after, plan.keys
        for index, confidence in zip(plan.active, confidences, strict=True):
            if not 0.0 <= confidence <= 1.0:
                confidence = float(confidence > 1.0)  # Rounding, or no number at all.
            own = plan.survival[index]
            kept, further = after(keys[index], confidence)
            if own:
                kept *= own[-1]
            own.append(kept)
            plan.confidences[index].append(confidence)
            worth.append(kept * further)
        return worth

    def _worth_a_pass(self, plan: Plan, places: list[int], worth: Sequence[float]) -> list[int]:
        """Of those that may go on, the ones for whom together another pass pays."""
        drafted = sum(plan.passes)
        if len(places) == 1:
            cost = plan.rows[drafted + 1] - plan.rows[drafted] + plan.further
            return places if worth[places[0]] > plan.rate * cost else []
        ranked = sorted(places, key=worth.__getitem__, reverse=True)
        values = [worth[place] for place in ranked]
        costs = plan.rows[drafted : drafted + len(values) + 1]
        count = best_prefix(values, costs, plan.rate)
        net = sum(values[:count]) - plan.rate * (costs[count] - costs[0] + plan.further)
        return sorted(ranked[:count]) if net > 0.0 else []

    def settle(self, plan: Plan, may_trim: bool = False) -> list[int]:
        """After the last pass: the heights that the target is to verify.

        Args:
            plan: of this step.
            may_trim: whether drafted tokens may be left out again where their confidence turned
                out too low for the price of a row. Only where a draft is a function of the text
                before it (its most likely token): leaving out *sampled* tokens by their own
                confidence would bias the output.

        Returns:
            ``[B]`` heights, at most as many as were drafted.
        """
        heights = list(plan.heights)
        for index, confidences in plan.confidences.items():
            self._of(plan.keys[index]).confidences = confidences
        if may_trim and not plan.probe and self._steps % _UNTRIMMED_EVERY:
            pool = [value for own in plan.survival.values() for value in own]
            pool.sort(reverse=True)
            # One is verified in any case: from a step that verifies nothing nothing is learned.
            count = max(best_prefix(pool, plan.rows[: len(pool) + 1], plan.rate), 1) if pool else 0
            if count < len(pool):
                least = pool[count - 1]
                for index, own in plan.survival.items():
                    heights[index] = sum(value >= least for value in own)
        return heights

    def drafted(self, plan: Plan, first_ms: float, next_ms: float | None = None) -> None:
        """Record what drafting took; not needed for a step without any.

        Args:
            plan: of this step.
            first_ms: milliseconds until the first tokens were there, deciding and reading missing
                text included; of all passes where ``next_ms`` is None.
            next_ms: milliseconds of the further passes.
        """
        if not plan.passes:
            return
        for index, cut in plan.cut.items():
            live = self._of(plan.keys[index])
            # What was left unread once stays so, whatever is read of what came later.
            if plan.heights[index] and live.whole is not False:
                live.whole = not cut
        later = plan.passes[1:]
        self._lonely = 0 if later else self._lonely + 1
        mean_later = sum(later) / len(later) if later else 1.0
        usual, reading = self._expected_ms(plan)
        self.draft.add(
            plan.passes[0], len(later), plan.filled, self.target.unit, first_ms, next_ms, mean_later
        )
        # One outlier (a compilation) says nothing about the next step.
        self._pending_ms = min(first_ms + (next_ms or 0.0), 3.0 * (usual + reading))
        if plan.filled and plan.rate and not plan.probe:
            self._pending_fill_ms = max(self._pending_ms - usual, 0.0)
            self._pending_ms -= self._pending_fill_ms
            self._borrow(plan, self._pending_fill_ms)

    def _borrow(self, plan: Plan, filling_ms: float) -> None:
        """Filling holes is an investment: charged in instalments while the request drafts."""
        for index, (hole, instalment) in plan.holes.items():
            if plan.heights[index]:
                live = self._of(plan.keys[index])
                # A small hole (after a plain step, say) does not put off what is still owed.
                live.instalment = instalment + (live.instalment if live.debt else 0.0)
                live.debt += filling_ms * hole / plan.filled

    # -------------------------------------------------------------------------- learning

    def observe(
        self,
        keys: Sequence[Hashable],
        heights: Sequence[int],
        accepted: Sequence[int],
        target_ms: float | None = None,
        rows: int | None = None,
        refused: Sequence[bool] | None = None,
    ) -> None:
        """Record a step of the target, before the next plan.

        Args:
            keys: ``[B]``: the requests that decoded in it; none if it only read prompts.
            heights: ``[B]``: drafts verified for each.
            accepted: ``[B]``: drafts kept.
            target_ms: milliseconds of the step without its drafting; None if unknown.
            rows: tokens that the target read, prompts included; None: no prompts.
            refused: ``[B]``: whether one more draft would have been reached but was refused before
                the target saw it, by a grammar. None: none was.
        """
        batch, own_rows = len(keys), len(keys) + sum(heights)
        if target_ms is not None and rows is not None and rows > own_rows:
            self.target.add_prompt(rows, target_ms)
            target_ms = None
            if self._asked_for and self._in_a_row == 1:
                self._in_vain = True
            self._in_a_row = 0
        self._asked_for = False
        if not batch:
            return
        judged = heights
        if refused is not None:
            judged = [height + more for height, more in zip(heights, refused, strict=True)]
        for key, height, kept in zip(keys, judged, accepted, strict=True):
            live = self._of(key)
            live.written += kept + 1
            if height:
                self.gains.observe(key, height, kept, live.confidences, live.whole)
        if any(judged):
            self.gains.learned()
        if target_ms is not None:
            # Further steps of a row are of the same moment as its first.
            self.target.add(own_rows, target_ms, own_rows > batch, self._in_a_row <= 1)
            self.draft.row_share = self.target.slope
            if own_rows == batch:
                self._in_vain = False
                self.draft.follow(self.target.level)
        if self.target.known:
            self._book(keys, heights, accepted, target_ms)
        self._pending = None
        self._pending_ms = self._pending_fill_ms = 0.0

    def _book(
        self,
        keys: Sequence[Hashable],
        heights: Sequence[int],
        accepted: Sequence[int],
        target_ms: float | None,
    ) -> None:
        """Book what the step won or lost against plain decoding, in plain steps."""
        batch, drafts, tokens = len(keys), sum(heights), len(keys) + sum(accepted)
        plan = self._pending
        plain = self.target(batch)
        usual = self.target(batch + drafts, True) if drafts else plain
        # Spikes hit plain steps as well: they are no argument against speculation.
        spent = usual if target_ms is None else min(target_ms, 2.0 * usual)
        spent += self._pending_ms
        self._time[0] = 0.998 * self._time[0] + spent + self._pending_fill_ms
        self._time[1] = 0.998 * self._time[1] + tokens * plain / batch
        if not drafts and not self._pending_ms:
            return
        owed = 0.0
        for key, height in zip(keys, heights, strict=True):
            live = self._live[key]
            if height and live.debt:
                paid = min(live.debt, live.instalment)
                live.debt -= paid
                owed += paid
        won = tokens / batch - (spent + owed) / plain
        if plan is not None and not plan.rate:
            tried = sum(height > 0 for height in heights)
            held = sum(kept > 0 for kept in accepted)
            cold = self.gains.evidence < _COLD
            promising = cold or 0 < tried <= 2 * held
            if not self._could:
                # A probe of costs alone: whether its step, without the reading of missing text
                # that is done once, was faster than a plain one.
                reading = min(self.draft.fill(plan.filled, self.target.unit), self._pending_ms)
                promising = tried > 0 and won + reading / plain > 0.0
            self.prober.made(won, promising)
            return
        self.account.book(won)
        if self.account.full:
            self.prober.reset()
        if plan is not None and not plan.probe:
            expected = plan.rate / self._edge * (usual + self._pending_ms) / self.target.level
            self._brought[0] = 0.99 * self._brought[0] + tokens
            self._brought[1] = 0.99 * self._brought[1] + expected
            self._edge = min(max(self._brought[0] / self._brought[1], 1.0), 1.5)

    def forget(self, keys: Sequence[Hashable]) -> None:
        """Requests have ended, by themselves or not."""
        for key in keys:
            self.gains.forget(key)
            live = self._live.pop(key, None)
            if live is None:
                continue
            if live.written:
                self._typical_length += 0.1 * (live.written - self._typical_length)
            if live.debt and self.target.known:
                self.account.write_off(live.debt / self.target(self._batch))

    def _of(self, key: Hashable) -> _Live:
        live = self._live.get(key)
        if live is None:
            live = self._live[key] = _Live()
        return live
