"""What the height policy measures: acceptance, confidence and cost.

Every estimate forgets, so that it follows a drifting text or machine, and every estimate
has a prior, so that it can be asked before anything was measured.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

from vllm_stairs.height.isotonic import isotonic


class RunningMedian:
    """Median of the last ``window`` values: a cost spike moves it by one rank at most.

    Args:
        window: how many values are remembered.
    """

    def __init__(self, window: int = 31) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}")
        self._order: deque[float] = deque()
        self._sorted: list[float] = []
        self._window = window

    def __len__(self) -> int:
        return len(self._order)

    def add(self, value: float) -> None:
        """Remember ``value``, forget the oldest one beyond the window."""
        if len(self._order) == self._window:
            oldest = self._order.popleft()
            del self._sorted[bisect_left(self._sorted, oldest)]
        self._order.append(value)
        insort(self._sorted, value)

    @property
    def value(self) -> float | None:
        """The median, or None if nothing was measured yet."""
        if not self._sorted:
            return None
        middle = len(self._sorted) // 2
        if len(self._sorted) % 2:
            return self._sorted[middle]
        return (self._sorted[middle - 1] + self._sorted[middle]) / 2


class _Beta:
    """A success rate with a Beta prior and exponential forgetting."""

    __slots__ = ("failures", "successes")

    def __init__(self) -> None:
        self.successes = 0.0
        self.failures = 0.0

    def add(self, successes: float, failures: float, keep: float) -> None:
        self.successes = self.successes * keep + successes
        self.failures = self.failures * keep + failures

    def mean(self, prior_mean: float, prior_weight: float) -> float:
        weight = self.successes + self.failures + prior_weight
        return (self.successes + prior_mean * prior_weight) / weight


class Acceptance:
    r"""Per-position acceptance :math:`a_i`, conditional on all drafts before being kept.

    A staircase of height *h* of which *n* drafts were kept is *n* successes, at positions
    1..n, and, if *n < h*, one failure at position *n + 1*; later positions were not
    tried. With successes :math:`s_i` and failures :math:`f_i`, each multiplied by
    ``keep`` before a new observation of that position, the estimate is the mean of a
    Beta distribution

    .. math:: a_i = \frac{s_i + m w}{s_i + f_i + w}

    where the prior mean :math:`m` of position *i* is the acceptance pooled over all
    positions (itself with prior mean ``prior_mean``) and :math:`w` is ``prior_weight``.
    Positions never tried so inherit what is known of the others.

    Args:
        positions: the largest height.
        keep: what a past observation still counts after a newer one (0..1).
        prior_mean: the acceptance assumed before anything was seen.
        prior_weight: how many observations the prior is worth.
    """

    def __init__(
        self,
        positions: int,
        *,
        keep: float = 0.98,
        prior_mean: float = 0.7,
        prior_weight: float = 4.0,
    ) -> None:
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"keep must lie in (0, 1], not {keep}")
        self._positions = [_Beta() for _ in range(positions)]
        self._pooled = _Beta()
        self._keep = keep
        self._prior_mean = prior_mean
        self._prior_weight = prior_weight

    def observe(self, heights: Sequence[int], accepted: Sequence[int]) -> None:
        """Record one step: for each row its staircase's height and the drafts kept."""
        tried = [0] * len(self._positions)
        kept = [0] * len(self._positions)
        for height, count in zip(heights, accepted, strict=True):
            for position in range(min(height, count + 1, len(tried))):
                tried[position] += 1
                kept[position] += position < count
        for beta, trials, successes in zip(self._positions, tried, kept, strict=True):
            if trials:
                beta.add(successes, trials - successes, self._keep)
        if trials := sum(tried):
            self._pooled.add(sum(kept), trials - sum(kept), self._keep)

    @property
    def mean(self) -> float:
        """Acceptance pooled over all positions."""
        return self._pooled.mean(self._prior_mean, self._prior_weight)

    @property
    def rates(self) -> list[float]:
        """The estimates :math:`a_1..a_K`."""
        pooled = self.mean
        return [beta.mean(pooled, self._prior_weight) for beta in self._positions]


class Calibration:
    """Acceptance of a draft token given the draft model's own confidence in it.

    Confidence (the draft's probability of the token it wrote) is cut into equal bins;
    each bin is a forgetting Beta estimate whose prior mean is the bin's centre, that is,
    a draft model is believed until measured.

    Args:
        bins: number of bins on [0, 1].
        keep: what a past observation of a bin still counts after a newer one.
        prior_weight: how many observations the prior is worth.
    """

    def __init__(self, bins: int = 10, *, keep: float = 0.99, prior_weight: float = 1.0) -> None:
        self._bins = [_Beta() for _ in range(bins)]
        self._keep = keep
        self._prior_weight = prior_weight

    def _bin(self, confidence: float) -> int:
        return min(int(confidence * len(self._bins)), len(self._bins) - 1)

    def observe(self, confidence: float, accepted: bool) -> None:
        """Record one draft token that was reached by the validation."""
        self._bins[self._bin(confidence)].add(accepted, not accepted, self._keep)

    def rate(self, confidence: float) -> float:
        """The estimated probability that a token of this confidence is kept."""
        index = self._bin(confidence)
        return self._bins[index].mean((index + 0.5) / len(self._bins), self._prior_weight)


class RowCost:
    r"""Milliseconds of one target pass as a function of its rows.

    A machine gets slower and faster as a whole (other load, clock), much more often than
    the price of a row changes relative to that of a pass. So the estimate is a product,
    :math:`t(r) = L\,s(r)`: the *level* L, milliseconds at the first size that was seen, follows
    every pass; the *shape* s, relative to that size, is learned from passes of size r
    and stays valid for sizes that were not visited for long.

    Both are running medians, so that a cost spike moves them by one rank at most: L of
    ms / s(r), over sizes whose shape is known from three passes; s(r) of ms / L, drawn to
    the nearly flat line ``1 + slope * (r - first)`` as strongly as ``prior_weight`` passes
    would. So sizes that were hardly seen invite another try. The shape is made
    non-decreasing (more rows cannot cost less: pooled adjacent violators, weighted by how
    often each size was seen), linear between the sizes seen, the line through the
    outermost two beyond them.

    Args:
        window: length of the running medians.
        slope: assumed cost of one more row, as a fraction of a pass.
        prior_weight: how many passes that assumption is worth.
    """

    def __init__(self, window: int = 9, slope: float = 0.02, prior_weight: float = 2.0) -> None:
        self._shape: dict[int, RunningMedian] = {}
        self._level = RunningMedian(window)
        self._first = 0
        self._window = window
        self._slope = slope
        self._prior_weight = prior_weight
        self._points: list[tuple[int, float]] | None = None

    def __len__(self) -> int:
        """How many sizes were seen."""
        return len(self._shape)

    def add(self, rows: int, ms: float) -> None:
        """Record that a pass over ``rows`` rows took ``ms`` milliseconds."""
        if not self._shape:
            self._first = rows
        shape = self._shape.setdefault(rows, RunningMedian(self._window))
        if rows == self._first or len(shape) >= 3:
            self._level.add(ms / self._relative(rows))
        shape.add(ms / (self._level.value or ms))
        self._points = None

    def _line(self, rows: int) -> float:
        return max(0.1, 1.0 + self._slope * (rows - self._first))

    def _rising(self) -> list[tuple[int, float]]:
        """The shape, non-decreasing."""
        sizes, prior = sorted(self._shape), self._prior_weight
        seen = [len(self._shape[rows]) for rows in sizes]
        drawn = [
            ((self._shape[rows].value or 1.0) * count + self._line(rows) * prior) / (count + prior)
            for rows, count in zip(sizes, seen, strict=True)
        ]
        return list(zip(sizes, isotonic(drawn, seen), strict=True))

    def _relative(self, rows: int) -> float:
        """The shape at ``rows``."""
        if rows == self._first and len(self._shape) == 1:
            return 1.0
        if self._points is None:
            self._points = self._rising()
        points = self._points
        if len(points) == 1:
            return points[0][1] * self._line(rows) / self._line(points[0][0])
        index = bisect_left(points, (rows, float("-inf")))
        index = min(max(index, 1), len(points) - 1)
        (x0, y0), (x1, y1) = points[index - 1], points[index]
        return max(y0 + (y1 - y0) * (rows - x0) / (x1 - x0), 0.1 * points[0][1])

    def __call__(self, rows: int) -> float:
        """The estimated milliseconds of a pass over ``rows`` rows."""
        if self._level.value is None:
            raise ValueError("no cost was measured yet")
        return self._level.value * self._relative(rows)
