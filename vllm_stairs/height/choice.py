"""Who drafts: because it pays, or to learn at the least cost. Arithmetic on what things cost."""

from collections.abc import Callable, Sequence

from vllm_stairs.height.costs import DraftCost, TargetCost
from vllm_stairs.height.plan import Plan
from vllm_stairs.height.vector import best_vector


class Choice:
    """The best choice so far of who drafts, and how far.

    Args:
        plan: of the step, with the costs of rows and passes.
        survivals: index of each request that may draft -> the probabilities that its drafts 1, 2,
            ... are kept with all before them.

    Attributes:
        rate: tokens per unit of cost that the choice brings; 0 before the first one.
        drafting: the requests that it was made among.
        heights: a height for each of these.
    """

    __slots__ = ("_extra", "drafting", "heights", "plan", "rate", "survivals")

    def __init__(self, plan: Plan, survivals: dict[int, list[float]]) -> None:
        self.plan = plan
        self.survivals = survivals
        # Index -> cost per step of filling its hole.
        self._extra: dict[int, float] = {}
        self.rate = 0.0
        self.drafting: list[int] = []
        self.heights: list[int] = []

    def choose(self, drafting: list[int]) -> None:
        """Take the best heights of these requests, if they are better than what there is."""
        plan = self.plan
        once = plan.first + sum(self._extra.get(index, 0.0) for index in drafting)
        rate, heights = best_vector(
            [self.survivals[index] for index in drafting],
            len(plan.keys),
            plan.rows,
            once,
            plan.further,
        )
        if rate > self.rate:
            self.rate, self.drafting, self.heights = rate, drafting, heights

    def weigh_holes(
        self,
        holes: Sequence[int],
        rests: Sequence[float],
        fill_ms: Callable[[int], float],
        level: float,
        budget_ms: float,
    ) -> None:
        """Choose anew with those who would have to catch up, where that pays back.

        Filling a hole costs once and serves to the request's end: it is charged in instalments,
        one per expected staircase. Chosen is the best of: all, those who bring their own
        instalment at the rate that all would reach, those without a hole. The budget goes to the
        smallest holes. Instalments are noted in the plan, 0 where the budget did not reach.

        Args:
            holes: ``[B]``: tokens that the draft would have to read for each.
            rests: ``[B]``: tokens that each is expected to write yet.
            fill_ms: milliseconds of reading so many tokens.
            level: milliseconds of what the plan's costs are relative to.
            budget_ms: what may be spent on holes in this step.
        """
        plan, extra, able = self.plan, self._extra, list(self.survivals)
        for index in sorted(able, key=holes.__getitem__):
            if holes[index] > 0:
                cost = fill_ms(holes[index])
                budget_ms -= cost
                if budget_ms < 0.0:
                    able.remove(index)
                    plan.holes[index] = (holes[index], 0.0)
                    continue
                steps = max(rests[index] / (1.0 + sum(self.survivals[index])), 1.0)
                plan.holes[index] = (holes[index], cost / steps)
                extra[index] = cost / steps / level
        self.rate = 0.0
        if not able:
            return
        self.choose(able)
        price = self.rate * (plan.rows[len(able)] - plan.rows[0]) / len(able)
        tallest = max(self.heights)
        self.choose(
            [
                index
                for index in able
                if index not in extra
                or sum(max(value - price, 0.0) for value in self.survivals[index][:tallest])
                > self.rate * extra[index]
            ]
        )
        self.choose([index for index in able if index not in extra])


def added_ms(batch: int, requests: int, height: int, target: TargetCost, draft: DraftCost) -> float:
    """Milliseconds by which a step is longer than a plain one where some requests draft.

    Args:
        batch: requests in the step.
        requests: how many of them draft, without holes.
        height: of their staircases.
        target: cost of the target.
        draft: cost of the draft.
    """
    return (
        draft.first(requests, target.unit)
        + (height - 1) * draft.next(requests, target.unit)
        + target(batch + height * requests, True)
        - target(batch)
    )


def cheapest_trial(
    holes: Sequence[int],
    batch: int,
    height: int,
    wanted: int,
    target: TargetCost,
    draft: DraftCost,
) -> tuple[int, float]:
    """With how many requests the draft is tried at the least cost.

    Each fills its hole once, and the more there are the fewer steps it takes.

    Args:
        holes: tokens that the draft would have to read, for each request that could take part; the
            first ones do.
        batch: requests in the step.
        height: of their staircases.
        wanted: staircases to verify in all.
        target: cost of the target.
        draft: cost of the draft.

    Returns:
        How many take part, and what the first step with them costs (milliseconds).
    """
    best, count, price, missing = 0.0, 0, 0.0, 0
    for number, hole in enumerate(holes[:wanted], 1):
        missing += hole
        once = draft.fill(missing, target.unit, sure=False)
        step = added_ms(batch, number, height, target, draft)
        total = once + step * -(-wanted // number)
        if not count or total < best:
            best, count, price = total, number, once + step
    return count, price


def uneven_margin(batch: int, length: float, evidence: float) -> float:
    """What a batch must win by drafting, as a share, to make up for falling out of step.

    Drafts are kept for some requests and not for others. So these end apart, their successors'
    prompts are read in steps of their own, and the last ones run in small batches, which plain
    decoding of equally long requests does not. No step shows that cost; measured it was 3 to 10 %
    with answers of 48 to 96 tokens (``docs/height-policy.md``). It is paid once per request. The
    rest is for what plans of a batch were measured to promise too much: plain steps among
    speculating ones, by which they are judged, take 3 % longer than plain steps in a row.

    While little is known of the draft it is asked for less: what it shows decides about all that
    follows.

    Args:
        batch: requests in the step.
        length: tokens that requests write of late.
        evidence: staircases that were verified so far.
    """
    known = evidence / (evidence + 64.0)
    return min(0.05 * (batch - 1), 0.15) * min(128.0 / max(length, 1.0), 1.0) * known


def could_pay(batch: int, tallest: int, target: TargetCost, draft: DraftCost) -> bool:
    """Whether a draft that is nearly always right would pay, at some height up to ``tallest``."""
    unit, plain = target.unit, target(batch)
    first, further = draft.first(batch, unit), draft.next(batch, unit)
    return any(
        (1.0 + sum(0.9**stair for stair in range(1, height + 1))) * plain
        > 1.03 * (target(batch * (height + 1), True) + first + (height - 1) * further)
        for height in range(1, tallest + 1)
    )
