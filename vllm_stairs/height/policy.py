r"""The height decision, and its mathematics.

**What is maximised.** A staircase of height *h* over one text yields the accepted drafts
and the target's own token. If draft *i* is kept with probability :math:`a_i`, given that
all drafts before it were kept, the expected number of tokens of one step is

.. math:: T(h) = 1 + \sum_{i=1}^{h} a_1 a_2 \cdots a_i .

The step costs one target pass over *h + 1* rows, :math:`t(h + 1)` milliseconds, and *h*
draft passes of :math:`d` milliseconds. Steps follow one another, so by the renewal-reward
theorem the long-run rate of tokens at a constant height is

.. math:: R(h) = \frac{T(h)}{t(h + 1) + h\,d}

and the best height is :math:`h^* = \arg\max_{0 \le h \le K} R(h)`. Height 0 is the target
alone. With *B* texts in one batch the rows are :math:`B (h + 1)`, the yield
:math:`B\,T(h)`; cost is measured per batch size, so one formula serves both. (Where a batch
size is new, the cost by rows at all others stands in.)

**How it is learned.** :math:`a_i`: :class:`~vllm_stairs.height.estimates.Acceptance`.
:math:`t`: :class:`~vllm_stairs.height.estimates.RowCost`, :math:`d`: a running median;
both apart for each batch size. Two things are not learned by doing only what looks best:

- at height 0 nothing is drafted, so nothing is seen of a draft that has become good. After
  ``probe_after`` steps at 0 one step probes; each probe that changes nothing doubles the
  wait, up to ``probe_limit``, so probing costs at most a fraction of about
  ``1 / probe_limit`` of the time in the long run;
- the cost at heights that were left is stale. Every ``explore_every`` steps one step is
  made one higher or one lower than what looks best, in turn.

**Stopping inside a draft.** Not all tokens of a draft are alike. When the host can read
the draft model's confidence, :meth:`HeightPolicy.go_on` decides before each further draft
token: with :math:`r_b` the probability that text *b*'s draft is still wholly kept (the
product of the calibrated acceptances of its tokens) and :math:`\bar a` the mean
acceptance, one more stair brings :math:`\bar a \sum_b r_b` tokens and costs
:math:`d + t(B(h + 2)) - t(B(h + 1))`. At the optimum of a ratio of expectations an action is
worth its time if and only if it brings more than :math:`\lambda` times its cost, where
:math:`\lambda` is the rate reached; here :math:`\lambda` is the measured one.
"""

from collections.abc import Callable, Sequence

from vllm_stairs.height.estimates import Acceptance, Calibration, RowCost, RunningMedian


def expected_tokens(acceptance: Sequence[float], height: int) -> float:
    """Expected tokens of one step: ``1 + sum over i <= height of a_1 * ... * a_i``."""
    total = reach = 1.0
    for rate in acceptance[:height]:
        reach *= rate
        total += reach
    return total


def tokens_per_ms(
    acceptance: Sequence[float],
    height: int,
    draft_ms: float,
    target_ms: Callable[[int], float],
    batch: int = 1,
) -> float:
    """Expected rate of a constant height.

    Args:
        acceptance: conditional acceptance of positions 1..K.
        height: the height in question, at most K.
        draft_ms: milliseconds of one draft pass (over the whole batch).
        target_ms: milliseconds of one target pass over so many rows.
        batch: texts in the batch; the pass has ``batch * (height + 1)`` rows.
    """
    cost = target_ms(batch * (height + 1)) + height * draft_ms
    return batch * expected_tokens(acceptance, height) / cost


def best_height(
    acceptance: Sequence[float],
    draft_ms: float,
    target_ms: Callable[[int], float],
    max_height: int,
    batch: int = 1,
) -> int:
    """The height in ``0..max_height`` of the highest rate; the lowest such on a tie."""
    return max(
        range(max_height + 1),
        key=lambda height: (
            tokens_per_ms(acceptance, height, draft_ms, target_ms, batch),
            -height,
        ),
    )


class FixedHeight:
    """The paper's choice: always the same height. The interface of `HeightPolicy`."""

    def __init__(self, height: int) -> None:
        self.max_height = height

    def choose(self, batch: int = 1) -> int:
        """The height of the next staircase."""
        return self.max_height

    def limit(self, chosen: int) -> int:
        """How far a draft may go for which `choose` gave ``chosen``."""
        return chosen

    def go_on(self, height: int, confidences: Sequence[Sequence[float]]) -> bool:
        """Whether to draft one more token: always."""
        return True

    @property
    def uses_confidence(self) -> bool:
        """Whether `go_on` looks at the draft's confidence."""
        return False

    def observe(
        self,
        heights: Sequence[int],
        accepted: Sequence[int],
        target_ms: float | None = None,
        draft_ms: float | None = None,
        confidences: Sequence[Sequence[float]] | None = None,
        height: int | None = None,
    ) -> None:
        """Record a step: nothing to learn."""


class _Cost:
    """What is known of one batch size."""

    def __init__(self, window: int) -> None:
        self.target = RowCost(window)
        self.draft = RunningMedian(window)
        self.tokens = 0.0
        self.ms = 0.0


class HeightPolicy:
    """Chooses the height with the highest expected rate of tokens (see the module).

    Not thread-safe; one per engine, or per pair of models in a process.

    Args:
        max_height: the largest height, K.
        use_confidence: also stop inside a draft, by `go_on`.
        keep: forgetting of the acceptance per step.
        window: length of the running medians of cost.
        probe_after: steps at height 0 before the first probe.
        probe_limit: the longest wait between two probes.
        explore_every: steps between two steps beside the best height.
        draft_share: assumed cost of a draft pass, as a share of a target pass, until
            one was measured.
    """

    def __init__(
        self,
        max_height: int,
        *,
        use_confidence: bool = True,
        keep: float = 0.98,
        window: int = 7,
        probe_after: int = 8,
        probe_limit: int = 256,
        explore_every: int = 24,
        draft_share: float = 0.15,
    ) -> None:
        if max_height < 1:
            raise ValueError(f"max_height must be at least 1, not {max_height}")
        self.max_height = max_height
        self.acceptance = Acceptance(max_height, keep=keep)
        self.calibration = Calibration()
        self.uses_confidence = use_confidence
        self._window = window
        self._probe_after = probe_after
        self._probe_limit = probe_limit
        self._explore_every = explore_every
        self._draft_share = draft_share
        self._costs: dict[int, _Cost] = {}
        self._any_batch = RowCost(window)
        self._batch = 1
        self._wait = probe_after
        self._steps_at_zero = 0
        self._steps = 0
        self._probing = False

    def _cost(self, batch: int) -> _Cost:
        if batch not in self._costs:
            self._costs[batch] = _Cost(self._window)
        return self._costs[batch]

    def _target_ms(self, batch: int) -> RowCost:
        """Cost by rows at this batch size, or at any while this one is little known.

        Rows tell most of the cost, so a batch that shrinks as its texts end need not be
        learned anew at every size.
        """
        own = self._cost(batch).target
        return own if len(own) > 1 or not len(self._any_batch) else self._any_batch

    def _draft_ms(self, batch: int) -> float:
        measured = self._cost(batch).draft.value
        if measured is not None:
            return measured
        # Not measured for this batch size: the nearest one that was, else a share of t.
        known = [(abs(size - batch), cost.draft.value) for size, cost in self._costs.items()]
        near = [(distance, ms) for distance, ms in known if ms is not None]
        return min(near)[1] if near else self._draft_share * self._target_ms(batch)(batch)

    def _rate(self, batch: int) -> float:
        """Tokens per millisecond: as measured lately, else as expected."""
        cost = self._cost(batch)
        if cost.ms:
            return cost.tokens / cost.ms
        height = self.best(batch)
        target_ms = self._target_ms(batch)
        return tokens_per_ms(self.acceptance.rates, height, self._draft_ms(batch), target_ms, batch)

    def best(self, batch: int = 1) -> int:
        """The best height by what is known now, without probes and exploration."""
        target_ms = self._target_ms(batch)
        if not len(target_ms):
            # Nothing measured: a moderate first step, from which both costs are learned.
            return min(2, self.max_height)
        return best_height(
            self.acceptance.rates, self._draft_ms(batch), target_ms, self.max_height, batch
        )

    def choose(self, batch: int = 1) -> int:
        """The height of the next staircase.

        Args:
            batch: texts that take part in the next step.
        """
        self._batch = batch
        self._steps += 1
        self._probing = False
        best = self.best(batch)
        if best > 0:
            self._wait, self._steps_at_zero = self._probe_after, 0
            if self._steps % self._explore_every == 0:
                step = 1 if (self._steps // self._explore_every) % 2 else -1
                return min(max(best + step, 0), self.max_height)
            return best
        self._steps_at_zero += 1
        if self._steps_at_zero > self._wait:
            self._steps_at_zero = 0
            self._wait = min(2 * self._wait, self._probe_limit)
            self._probing = True
            return min(2, self.max_height)
        return 0

    def limit(self, chosen: int) -> int:
        """How far `go_on` may carry a draft for which `choose` gave ``chosen``."""
        if not self.uses_confidence or chosen == 0 or self._probing:
            return chosen
        if not len(self._target_ms(self._batch)):  # `go_on` knows no price yet.
            return chosen
        return self.max_height

    def go_on(self, height: int, confidences: Sequence[Sequence[float]]) -> bool:
        """Whether one more draft token is worth its time.

        Args:
            height: tokens drafted so far in this staircase.
            confidences: for each text, the draft's confidence in each of them.
        """
        if height >= self.max_height:
            return False
        target_ms = self._target_ms(self._batch)
        if not len(target_ms) or self._probing:
            return True
        reach = 0.0
        for row in confidences:
            product = 1.0
            for confidence in row:
                product *= self.calibration.rate(confidence)
            reach += product
        rows = self._batch * (height + 1)
        extra = self._draft_ms(self._batch) + target_ms(rows + self._batch) - target_ms(rows)
        return reach * self.acceptance.mean > extra * self._rate(self._batch)

    def observe(
        self,
        heights: Sequence[int],
        accepted: Sequence[int],
        target_ms: float | None = None,
        draft_ms: float | None = None,
        confidences: Sequence[Sequence[float]] | None = None,
        height: int | None = None,
    ) -> None:
        """Record one step.

        Args:
            heights: for each text, the height of its staircase (0: none).
            accepted: for each text, how many of its drafts were kept.
            target_ms: milliseconds of the target pass; None if it is no measure of a
                usual step (it read a prompt, say).
            draft_ms: milliseconds of all draft passes together; None likewise (the
                draft had to catch up on a text that it had not followed, say).
            confidences: for each text, the draft's confidence in each of its tokens.
            height: the height that the passes had, where rows are padded to one shape;
                None if a row costs what it is tall.
        """
        batch = len(heights)
        rows = batch + sum(heights) if height is None else batch * (height + 1)
        height = max(heights, default=0) if height is None else height
        cost = self._cost(batch)
        if target_ms is not None:
            cost.target.add(rows, target_ms)
            self._any_batch.add(rows, target_ms)
        if draft_ms is not None and height:
            cost.draft.add(draft_ms / height)
        if target_ms is not None and (draft_ms is not None or not height):
            # A spike says nothing of what time is worth.
            usual = cost.target(rows) + height * (cost.draft.value or 0.0)
            cost.tokens = 0.95 * cost.tokens + sum(accepted) + batch
            cost.ms = 0.95 * cost.ms + min(target_ms + (draft_ms or 0.0), 2.0 * usual)
        self.acceptance.observe(heights, accepted)
        for row, drafted, kept in zip(confidences or (), heights, accepted, strict=False):
            for position, confidence in enumerate(row[: min(drafted, kept + 1)]):
                self.calibration.observe(confidence, position < kept)
