"""The height of every staircase, request by request and step by step.

The mathematics, the bounds and the sources are in ``docs/height-policy.md``. The calls of a step::

    policy.observe(...)                 what became of the staircases before, what the step took
    plan = policy.plan(...)             who drafts, at most how far, and why not
    while plan.active:                  one draft pass for these
        policy.proceed(plan, ...)       who goes on, given the draft's confidence
    heights = policy.settle(plan)       what the target is to verify
    policy.drafted(plan, ...)           what drafting took

Everything here is arithmetic on numbers: same calls, same decisions.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul

from vllm_stairs.height.costs import DraftCost, TargetCost, bucket
from vllm_stairs.height.gain import Gain
from vllm_stairs.height.risk import Account, Prober
from vllm_stairs.height.vector import best_prefix, best_vector

WEAK_DRAFT = "weak_draft"
"""Drafts are kept too seldom, or cost too much, to pay even for a request alone."""
LOAD = "load"
"""Drafting would pay for the request alone; in this batch rows are too dear."""
CATCHING_UP = "catching_up"
"""Reading the text that the draft has missed would not pay back before the request's end."""
MEASURING = "measuring"
"""A step to learn from: plain, to know its cost, or with drafts of other requests."""
LIMIT = "limit"
"""The caller left no room and gave no reason of its own."""
REASONS = (WEAK_DRAFT, LOAD, CATCHING_UP, MEASURING, LIMIT)

_COLD = 8
"""Verified staircases after which the draft is no longer a stranger."""
_TALLEST_COLD = 4
"""The largest height until half of these are verified."""
_TALLEST_PROBE = 2
_PROBED = 4
"""Staircases that a probe is to verify."""
_GOOD = 0.8
"""Acceptance of which a probe could not bring much better news."""
_SMALL_HOLE = 16
"""Tokens; above, drafting is an investment, and decided soberly."""
_PLAIN_EVERY = 128
"""Speculating steps after which one plain step is measured again."""
_PLAIN_AGAIN = 8
"""The same if the last one took another time than was expected."""
_PLAIN_APART = 16
"""Speculating steps between two plain ones that are made for their cost."""
_LARGE_BATCH = 4
_REPLAN_EVERY = 4
_EXPLORE_EVERY = 32
"""Steps between two that are one higher or lower, where no confidence varies the heights."""
_LONELY_PASSES = 64
"""Steps of one draft pass after which one has two: what is not done is not measured."""


@dataclass(slots=True)
class Plan:
    """One step's decision; see :meth:`RaggedPolicy.plan`. Costs are relative to the target's level.

    Attributes:
        keys: ``[B]``: the requests.
        heights: ``[B]``: how far each may draft: with confidences a ceiling, else the height.
        reasons: ``[B]``: why a height is 0 (:data:`REASONS` or the caller's), else None.
        active: indices of the requests in the next draft pass, rising.
        probe: whether this step drafts to learn, whatever it brings.
        rate: tokens per unit of cost that rows and passes have to bring; 0 where off.
        rows: cost of a speculating step with 0, 1, 2, ... drafts.
        first, further: cost of the first and of each further draft pass.
        filled: tokens of missing text that the first pass reads beside the usual.
        holes: request's index -> tokens that it has to catch up, milliseconds of an instalment.
        passes: requests in each draft pass so far.
        confidences: request's index -> the draft's confidences; empty where unknown.
        survival: request's index -> probabilities that all its drafts up to each are kept.
    """

    keys: Sequence[Hashable]
    heights: list[int]
    reasons: list[str | None]
    active: list[int] = field(default_factory=list)
    probe: bool = False
    rate: float = 0.0
    rows: list[float] = field(default_factory=list)
    first: float = 0.0
    further: float = 0.0
    filled: int = 0
    holes: dict[int, tuple[int, float]] = field(default_factory=dict)
    passes: list[int] = field(default_factory=list)
    confidences: dict[int, list[float]] = field(default_factory=dict)
    survival: dict[int, list[float]] = field(default_factory=dict)

    def drop(self, index: int) -> None:
        """Take a request out of the next pass, for a reason of the caller's own.

        Its draft has ended (an end-of-text token, say), after so many passes as there were.
        """
        self.active.remove(index)
        self.heights[index] = len(self.passes)


class _Option:
    """The best choice so far of who drafts, and how far."""

    __slots__ = ("drafting", "extra", "heights", "plan", "rate", "survivals")

    def __init__(self, plan: Plan, survivals: dict[int, list[float]]) -> None:
        self.plan = plan
        self.survivals = survivals
        # Index -> cost per step of filling its hole.
        self.extra: dict[int, float] = {}
        self.rate = 0.0
        self.drafting: list[int] = []
        self.heights: list[int] = []

    def choose(self, drafting: list[int]) -> None:
        """Take the best heights of these requests, if they are better than what there is."""
        plan = self.plan
        once = plan.first + sum(self.extra.get(index, 0.0) for index in drafting)
        rate, heights = best_vector(
            [self.survivals[index] for index in drafting],
            len(plan.keys),
            plan.rows,
            once,
            plan.further,
        )
        if rate > self.rate:
            self.rate, self.drafting, self.heights = rate, drafting, heights


class _Live:
    """What the policy keeps of a request that runs."""

    __slots__ = ("confidences", "debt", "instalment", "written")

    def __init__(self) -> None:
        self.written = 0
        self.confidences: list[float] = []
        # Milliseconds spent on filling its hole that its staircases have yet to earn.
        self.debt = 0.0
        self.instalment = 0.0


class RaggedPolicy:
    """Chooses heights that maximise expected tokens per second.

    Not thread-safe; one per engine. Under parallel ranks one decides and tells the others.

    Args:
        max_height: the largest height, K.
        use_confidence: whether :meth:`proceed` will be given the draft's confidences.
        draft_share: assumed cost of a draft pass as a share of a plain step, until measured; the
            ratio of the models' weights is a good guess.
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
        # Steps since one with more than one draft pass.
        self._lonely = 0
        # Bucket of batch sizes -> plain steps asked for to know their cost.
        self._asked: dict[int, int] = {}
        # Batch size -> step and answer of the last _could_pay.
        self._potential: dict[int, tuple[int, bool]] = {}
        # What steps bring of what was planned: stopping inside a draft makes it more.
        self._edge = 1.0
        self._brought = [20.0, 20.0]
        self._last: Plan | None = None
        self._last_heights: list[int] = []
        self._last_step = 0
        self._pending: Plan | None = None
        self._pending_ms = self._pending_fill_ms = 0.0
        self._mean_height = 0.0
        self._time = [0.0, 0.0]

    # --------------------------------------------------------------------------- figures

    @property
    def mean_height(self) -> float:
        """Mean height of the staircases of late, height 0 included."""
        return self._mean_height

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
    ) -> Plan:
        """Decide who drafts in this step, and how far.

        Args:
            keys: ``[B]``: the requests that wrote a token in this step and go on.
            rooms: ``[B]``: the tallest staircase that each allows; 0: none.
            holes: ``[B]``: tokens that the draft would have to read for each beside the usual
                (the newest token, and the last draft where all were kept). None: no holes.
            remaining: ``[B]``: tokens that each may still write. None: unknown.
            reasons: ``[B]``: why ``rooms`` is 0, where it is.
        """
        batch = len(keys)
        self._steps += 1
        self.gains.tick()
        self.account.tick()
        plan = Plan(tuple(keys), [0] * batch, [None] * batch)
        self._pending = plan
        self._pending_ms = self._pending_fill_ms = 0.0
        able = [index for index, room in enumerate(rooms) if room > 0]
        if len(able) < batch:
            for index, room in enumerate(rooms):
                if room <= 0:
                    plan.reasons[index] = (reasons[index] if reasons else None) or LIMIT
        if not able:
            return plan
        if self._must_measure(batch):
            self._since_plain = 0
            for index in able:
                plan.reasons[index] = MEASURING
            return plan
        if holes is not None and not any(holes):
            holes = None
        if holes is None and self._repeat(plan, able, rooms):
            return plan
        survivals = self._survivals(plan, able, rooms, holes)
        self._decide(plan, survivals, rooms, holes, remaining)
        self._since_plain = self._since_plain + 1 if plan.active else 0
        if holes is not None:
            plan.filled = sum(holes[index] for index in plan.active)
        for index in plan.active:
            plan.survival[index], plan.confidences[index] = [], []
        if len(plan.active) < len(able):
            self._say_why(plan, survivals)
        elif self._on and not plan.probe and holes is None:
            self._last, self._last_step = plan, self._steps
            self._last_heights = list(plan.heights)
        return plan

    def _repeat(self, plan: Plan, able: Sequence[int], rooms: Sequence[int]) -> bool:
        """In a batch of several that has not changed, do as in the last step, for a few steps.

        Deciding costs as much as the batch is large, and the estimates hardly move in a step.
        """
        last = self._last
        if (
            last is None
            or len(able) < _LARGE_BATCH
            or self._steps - self._last_step >= _REPLAN_EVERY
            or last.keys != plan.keys
            or self.account.blocked
        ):
            return False
        self._since_plain += 1
        self.prober.tick(False)
        plan.rate, plan.first, plan.further = last.rate, last.first, last.further
        plan.heights = [min(pair) for pair in zip(self._last_heights, rooms, strict=True)]
        plan.rows = self.target.table(len(plan.keys), sum(plan.heights) + 1)
        plan.active = list(able)
        for index in able:
            plan.survival[index], plan.confidences[index] = [], []
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
            rates = forecast(plan.keys[index], min(rooms[index], tallest), bold)
            survivals[index] = list(accumulate(rates, mul))
            total += len(rates)
        plan.rows = target.table(len(plan.keys), total)
        plan.first = self.draft.first(len(able), target.unit) / target.level
        plan.further = self.draft.next(len(able), target.unit) / target.level
        return survivals

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
        option = _Option(plan, survivals)
        option.choose(able)
        probe_height = min(max(option.heights), _TALLEST_PROBE)
        least = (1.0 if self._on else 1.02) * batch / self.target.relative(batch, False)
        go = option.rate * self._edge > least and not self.account.blocked
        if go and holes is not None:
            self._weigh_holes(plan, option, holes, remaining)
            go = option.rate * self._edge > least
        pilots: list[int] = []
        if go and evidence < _COLD:
            # Nothing is known of the draft yet: a few try it first, if that can be afforded.
            pilots, cost = self._pilots(plan, able, holes, probe_height)
            go = cost <= self.account.balance
        self._on = go
        self.prober.tick(not go)
        if go:
            plan.rate = option.rate * self._edge
            if 0 < len(pilots) < len(able):
                self._probe(plan, pilots, rooms, probe_height)
            else:
                self._go(plan, option, rooms)
            return
        self._edge += 0.01 * (1.0 - self._edge)
        good = evidence >= _COLD and self.gains.rates[0] > _GOOD
        useful = self._could_pay(batch) and not good
        if self.prober.due(evidence > 0, useful):
            pilots, cost = self._pilots(plan, able, holes, probe_height)
            if self.prober.affords(cost):
                if self.prober.fresh:
                    self.gains.doubt(_COLD)
                self._probe(plan, pilots, rooms, probe_height)

    def _weigh_holes(
        self,
        plan: Plan,
        option: _Option,
        holes: Sequence[int],
        remaining: Sequence[int] | None,
    ) -> None:
        """Choose with those who would have to catch up, where that pays back.

        Filling a hole costs once and serves to the request's end: it is charged in instalments,
        one per expected staircase. Chosen is the best of: all, those who bring their own
        instalment at the rate that all would reach, those without a hole. What may be spent in a
        step is limited, and goes to the smallest holes.
        """
        level, able = self.target.level, list(option.survivals)
        left = self.account.stake * self.target(len(plan.keys))
        for index in sorted(able, key=holes.__getitem__):
            if holes[index] > 0:
                left -= self.draft.fill(holes[index], self.target.unit)
                if left < 0.0:
                    able.remove(index)
                    plan.holes[index] = (holes[index], 0.0)
                    continue
                rest = self._typical_length
                if remaining is not None:
                    rest = min(rest, float(remaining[index]))
                steps = max(rest / (1.0 + sum(option.survivals[index])), 1.0)
                instalment = self.draft.fill(holes[index], self.target.unit) / steps
                plan.holes[index] = (holes[index], instalment)
                option.extra[index] = instalment / level
        option.rate = 0.0
        if not able:
            return
        option.choose(able)
        price = option.rate * (plan.rows[len(able)] - plan.rows[0]) / len(able)
        tallest = max(option.heights)
        option.choose(
            [
                index
                for index in able
                if index not in option.extra
                or sum(max(value - price, 0.0) for value in option.survivals[index][:tallest])
                > option.rate * option.extra[index]
            ]
        )
        option.choose([index for index in able if index not in option.extra])

    def _go(self, plan: Plan, option: _Option, rooms: Sequence[int]) -> None:
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

        Those with the smallest holes, after a wait first those of whom nothing is known; so many
        that what has to be learned is learned at the least cost: each fills its hole once, and the
        more there are the fewer steps it takes.
        """
        gains, keys, target, draft = self.gains, plan.keys, self.target, self.draft
        strangers = gains.evidence >= _COLD and self.prober.fresh
        ranked = sorted(
            able,
            key=lambda index: (
                strangers and gains.knows(keys[index]),
                holes[index] if holes else 0,
            ),
        )
        wanted = max(_COLD - int(gains.evidence), _PROBED)
        plain = target(len(keys))
        best, count, price, missing = 0.0, 0, 0.0, 0
        for number, index in enumerate(ranked[:wanted], 1):
            missing += holes[index] if holes else 0
            once = draft.fill(missing, target.unit, sure=False)
            step = (
                draft.first(number, target.unit)
                + (height - 1) * draft.next(number, target.unit)
                + target(len(keys) + height * number, True)
                - plain
            )
            total = once + step * -(-wanted // number)
            if not count or total < best:
                best, count, price = total, number, once + step
        return sorted(ranked[:count]), price / plain

    def _probe(self, plan: Plan, pilots: Sequence[int], rooms: Sequence[int], height: int) -> None:
        """Draft with a few requests to learn."""
        plan.probe = True
        for index in pilots:
            plan.heights[index] = min(height, rooms[index])
            plan.active.append(index)

    def _could_pay(self, batch: int) -> bool:
        """Whether a draft that is nearly always right would pay at this batch size."""
        step, answer = self._potential.get(batch, (-100, False))
        if self._steps - step >= 32:
            unit, plain = self.target.unit, self.target(batch)
            first, further = self.draft.first(batch, unit), self.draft.next(batch, unit)
            answer = any(
                (1.0 + sum(0.9**stair for stair in range(1, height + 1))) * plain
                > 1.03 * (self.target(batch * (height + 1), True) + first + (height - 1) * further)
                for height in range(1, min(self.max_height, 4) + 1)
            )
            self._potential[batch] = (self._steps, answer)
        return answer

    def _must_measure(self, batch: int) -> bool:
        """Whether this step is to be plain to learn what plain costs."""
        if self._since_plain >= (_PLAIN_AGAIN if self.target.surprised else _PLAIN_EVERY):
            return True
        if self.target.knows_plain(batch) or (self._on and self._since_plain < _PLAIN_APART):
            return False
        # The step may turn out to be no measure (it also read a prompt): do not insist.
        asked = self._asked.get(bucket(batch), 0)
        self._asked[bucket(batch)] = asked + 1
        return asked < 4 or not self.target.known

    def _say_why(self, plan: Plan, survivals: dict[int, list[float]]) -> None:
        target = self.target
        alone = (self.draft.first(1, target.unit) + target(2, True)) / target.unit - 1.0
        for index, survival in survivals.items():
            if not plan.heights[index]:
                if plan.probe and plan.rate:
                    reason = MEASURING
                elif self.account.blocked or survival[0] < alone:
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
        if places and elapsed_ms is not None and elapsed_ms > 2.0 * self._expected_ms(plan):
            places = []
        if places and worth is not None and not plan.probe:
            able, places = places, self._worth_a_pass(plan, places, worth)
            if not places and self._lonely >= _LONELY_PASSES:
                places = [max(able, key=worth.__getitem__)]
        if len(places) == len(active):
            return places
        plan.active = [active[place] for place in places]
        for index in set(active).difference(plan.active):
            heights[index] = depth
        return places

    def _expected_ms(self, plan: Plan) -> float:
        """Milliseconds that the draft passes so far were expected to take."""
        passes = plan.first + (len(plan.passes) - 1) * plan.further
        fill = self.draft.fill(plan.filled, self.target.unit) if plan.filled else 0.0
        return passes * self.target.level + fill

    def _after_pass(self, plan: Plan, confidences: Sequence[float]) -> list[float]:
        """Note what is known now; returns per active request what one more stair would bring."""
        worth = []
        after, keys = self.gains.after, plan.keys
        for index, confidence in zip(plan.active, confidences, strict=True):
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
        if may_trim and not plan.probe:
            pool = [value for own in plan.survival.values() for value in own]
            pool.sort(reverse=True)
            count = best_prefix(pool, plan.rows[: len(pool) + 1], plan.rate) if pool else 0
            if count < len(pool):
                least = pool[count - 1] if count else 2.0
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
        later = plan.passes[1:]
        self._lonely = 0 if later else self._lonely + 1
        mean_later = sum(later) / len(later) if later else 1.0
        usual = (plan.first + len(later) * plan.further) * self.target.level
        total = first_ms + (next_ms or 0.0)
        self.draft.add(
            plan.passes[0], len(later), plan.filled, self.target.unit, first_ms, next_ms, mean_later
        )
        filling = 0.0
        if plan.filled:
            filling = max(total - usual, 0.0)
            if plan.rate and not plan.probe:
                self._borrow(plan, filling)
                self._pending_fill_ms = filling
                filling = 0.0
        # One outlier (a compilation) says nothing about the next step.
        self._pending_ms = filling + min(total - self._pending_fill_ms - filling, 3.0 * usual)

    def _borrow(self, plan: Plan, filling_ms: float) -> None:
        """Filling holes is an investment: charged in instalments while the request drafts."""
        for index, (hole, instalment) in plan.holes.items():
            if plan.heights[index]:
                live = self._of(plan.keys[index])
                live.debt += filling_ms * hole / plan.filled
                live.instalment = instalment

    # -------------------------------------------------------------------------- learning

    def observe(
        self,
        keys: Sequence[Hashable],
        heights: Sequence[int],
        accepted: Sequence[int],
        target_ms: float | None = None,
        rows: int | None = None,
    ) -> None:
        """Record a step of the target, before the next plan.

        Args:
            keys: ``[B]``: the requests that decoded in it; none if it only read prompts.
            heights: ``[B]``: drafts verified for each.
            accepted: ``[B]``: drafts kept.
            target_ms: milliseconds of the step without its drafting; None if unknown.
            rows: tokens that the target read, prompts included; None: no prompts.
        """
        batch, own_rows = len(keys), len(keys) + sum(heights)
        if target_ms is not None and rows is not None and rows > own_rows:
            self.target.add_prompt(rows, target_ms)
            target_ms = None
        if not batch:
            return
        for key, height, kept in zip(keys, heights, accepted, strict=True):
            live = self._of(key)
            live.written += kept + 1
            if height:
                self.gains.observe(key, height, kept, live.confidences)
        if own_rows > batch:
            self.gains.learned()
        if target_ms is not None:
            self.target.add(own_rows, target_ms, own_rows > batch)
            self.draft.row_share = self.target.slope
        self._mean_height += 0.02 * ((own_rows - batch) / batch - self._mean_height)
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
            self.prober.made(won, cold or 0 < tried <= 2 * held)
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
                self.account.book(-live.debt / self.target.unit)

    def _of(self, key: Hashable) -> _Live:
        live = self._live.get(key)
        if live is None:
            live = self._live[key] = _Live()
        return live
