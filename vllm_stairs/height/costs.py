r"""What a step costs, measured: the target's pass, the draft's passes, filling holes.

A machine gets slower and faster as a whole (other load, clock, longer texts) far more often
than the price of a row changes relative to that of a pass. So every cost is a product
:math:`L\,s(n)`: the *level* L, milliseconds, follows every step; the *shape* s(n), relative and
by size, is learned slowly and stays valid for sizes that were not visited for long.

Both are running medians, L over fewer steps than s. A size's first sample is what was *predicted*
for it: one dear step (a first-time compilation) is never believed, two are. Where nothing was
measured the prediction is optimistic, so that it gets tried and thereby corrected.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log2

from vllm_stairs.height.isotonic import isotonic, weighted_median

_NEWS = 1.15
"""By how much a plain step may differ from what was expected."""
_LEVEL_WINDOW = 15
_BELIEF = 3
"""Comparisons that what is believed of texts of a new length counts as."""
_SETTLED = 8
"""Samples of a size after which what still differs is told to be due to the texts' length."""
_ALONE = 2 / 3
"""Share of a size in the last steps beyond which there is nothing to tell its cost apart from."""
_MANY_ROWS = 64
_EXACT = 16
"""Sizes up to here have a bucket each, larger ones share eight to the octave."""


def bucket(size: int) -> int:
    """The bucket of a size: sizes in one bucket differ by at most a ninth."""
    return size if size <= _EXACT else _EXACT + int(8 * log2(size / _EXACT))


def octave(tokens: int) -> int:
    """The bucket of a text's length: below 128 tokens, then one to the octave."""
    return (tokens // 128).bit_length()


class Median:
    """Lower median of the last ``window`` values (of two the smaller)."""

    __slots__ = ("_order", "_sorted", "value")

    def __init__(self, window: int) -> None:
        self._order: deque[float] = deque(maxlen=window)
        self._sorted: list[float] = []
        self.value = 0.0

    def __len__(self) -> int:
        return len(self._order)

    def add(self, value: float) -> None:
        """Remember ``value``, forget the oldest one beyond the window."""
        order, ranked = self._order, self._sorted
        if len(order) == order.maxlen:
            del ranked[bisect_left(ranked, order[0])]
        order.append(value)
        insort(ranked, value)
        self.value = ranked[(len(ranked) - 1) // 2]

    def scale(self, factor: float) -> None:
        """Multiply all values by a positive factor."""
        self._order = deque((factor * value for value in self._order), self._order.maxlen)
        self._sorted = [factor * value for value in self._sorted]
        self.value *= factor


class _Sizes:
    """Relative costs by size: per bucket its mean size and the median of its samples.

    Args:
        window: length of the medians.
        bucket: a size's bucket.
        belief: samples that the prediction for a new bucket counts as.
    """

    def __init__(self, window: int, bucket: Callable[[int], int] = bucket, belief: int = 1) -> None:
        self._window = window
        self._bucket = bucket
        self._belief = belief
        self._buckets: dict[int, tuple[Median, list[float]]] = {}
        self.samples = 0

    def count(self, size: int) -> int:
        """Samples in the bucket of ``size``, without what was predicted."""
        found = self._buckets.get(self._bucket(size))
        return len(found[0]) - self._belief if found else 0

    def add(self, size: int, value: float, predicted: float) -> None:
        """Record a sample; ``predicted`` is what would have been expected."""
        place = self._bucket(size)
        found = self._buckets.get(place)
        if found is None:
            found = self._buckets[place] = (Median(self._window), [float(size)])
            for _ in range(self._belief):
                found[0].add(predicted)
        found[0].add(value)
        found[1][0] += (size - found[1][0]) / 8
        self.samples += 1

    def median(self, size: int) -> Median:
        """The samples in the bucket of ``size``, of which there are some."""
        return self._buckets[self._bucket(size)][0]

    def sizes(self) -> list[float]:
        """The mean size of each bucket."""
        return [place[0] for _, place in self._buckets.values()]

    def points(self) -> list[tuple[float, float, float]]:
        """Size, relative cost, weight; by size."""
        return [
            (place[0], median.value, float(len(median)))
            for _, (median, place) in sorted(self._buckets.items())
        ]


class _Level(Median):
    """Milliseconds that relative costs are relative to."""

    def __init__(self) -> None:
        super().__init__(_LEVEL_WINDOW)
        # The sizes that were done last.
        self._seen: deque[Median] = deque(maxlen=_LEVEL_WINDOW)

    def learn(
        self, sizes: _Sizes, size: int, value: float, predicted: float, counted: bool = True
    ) -> None:
        """Record a relative cost; what the sizes of late have in common is the level's.

        A level and relative costs that are learned from each other leave a factor open. Where the
        same few sizes are done for long it would wander, and with it, unfounded, all that is not
        done: what drafting costs while nobody drafts.

        Args:
            sizes: of the kind of step that was done.
            size: its size.
            value: its cost relative to the level.
            predicted: what was expected.
            counted: whether the level follows the step.
        """
        if not counted or sizes.count(size) < _SETTLED:
            sizes.add(size, value, predicted)
            return
        own = sizes.median(size)
        self._seen.append(own)
        share = self._seen.count(own) / len(self._seen)
        if share > _ALONE:
            return
        before = own.value
        # Where lines pool sizes, the level is what makes steps cost what the line says.
        sizes.add(size, value * before / predicted, predicted)
        if own.value != before:
            factor = (before / own.value) ** share
            for median in set(self._seen):
                median.scale(factor)


class Line:
    """A non-decreasing, piecewise linear function through weighted points.

    More rows cannot cost less: adjacent points that say otherwise are pooled. Beyond the last
    point it goes on with the slope of the upper part, at most proportionally to the size; before
    the first one with the prior slope.

    Args:
        points: size, value, weight; sizes increasing, at least one.
        slope: assumed increase per unit of size, relative to the value, where one point is all.
    """

    __slots__ = ("_left", "_right", "xs", "ys")

    def __init__(self, points: Sequence[tuple[float, float, float]], slope: float) -> None:
        self.xs = xs = [x for x, _, _ in points]
        values, weights = [y for _, y, _ in points], [weight for _, _, weight in points]
        self.ys = ys = isotonic(values, weights, weighted_median)
        self._left = slope * ys[0]
        last, top = xs[-1], ys[-1]
        below = bisect_right(xs, 0.6 * last) - 1
        grown = slope * top
        if below >= 0:
            grown = (top - ys[below]) / (last - xs[below])
        elif xs[0] <= 0.8 * last:
            # A short way, but measured: where sizes cost little more, larger ones are to be tried.
            grown = min(grown, (top - ys[0]) / (last - xs[0]))
        self._right = min(grown, top / max(last, 1.0))

    def __call__(self, size: float) -> float:
        """The value at ``size``."""
        xs, ys = self.xs, self.ys
        right = bisect_left(xs, size)
        if right == len(xs):
            return ys[-1] + self._right * (size - xs[-1])
        if right == 0:
            return max(ys[0] - self._left * (xs[0] - size), 0.5 * ys[0])
        x, y = xs[right - 1], ys[right - 1]
        return y + (ys[right] - y) * (size - x) / (xs[right] - x)

    def table(self, first: int, count: int) -> list[float]:
        """Values at ``first``, ``first + 1``, ... (``count`` of them)."""
        values: list[float] = []
        end, at = first + count, first
        for (x0, y0), (x1, y1) in pairwise(zip(self.xs, self.ys, strict=True)):
            if x1 <= at:
                continue
            if x0 > at:
                break
            stop = min(end, int(x1) + 1)
            step = (y1 - y0) / (x1 - x0)
            values += [y0 + step * (size - x0) for size in range(at, stop)]
            at = stop
            if at >= end:
                return values
        return values + [self(size) for size in range(at, end)]


class Stretch:
    """How much longer speculating steps are, relative to plain ones, by the length of the texts.

    Attention over several query tokens takes longer than over one, the more so the longer the
    texts. The level of all costs hides it, for it follows whatever kind of step is done. What shows
    it is a step of the one kind after many of the other, over texts of the same length.

    Attributes:
        length: tokens of the texts, on average.
        value: what the cost of a speculating step is multiplied by, for texts of this length.
    """

    def __init__(self) -> None:
        self.length, self.value = 1, 1.0
        self._sizes = _Sizes(11, octave, _BELIEF)
        self._line = Line([(1.0, 1.0, 1.0)], 0.0)
        # Of the last steps, the octave of the texts and whether they speculated.
        self._recent: deque[tuple[int, bool]] = deque(maxlen=_LEVEL_WINDOW)

    @property
    def place(self) -> int:
        """The octave of the texts' length."""
        return octave(self.length)

    @property
    def is_new(self) -> bool:
        """Whether too few comparisons were made over such texts to contradict what is believed."""
        return self._sizes.count(self.length) <= _BELIEF

    def over(self, length: int) -> None:
        """The steps that follow are over texts of so many tokens, on average."""
        self.length = max(length, 1)
        # Noise is not carried beyond what was measured.
        self.value = self._line(min(self.length, self._line.xs[-1]))

    def compares(self, speculating: bool) -> bool:
        """Whether a step of this kind would be a comparison: most of late were of the other."""
        other = (self.place, not speculating)
        return 3 * self._recent.count(other) >= 2 * _LEVEL_WINDOW

    def add(self, ratio: float, speculating: bool) -> None:
        """Record a comparison.

        Args:
            ratio: what the step took to what it would if the two kinds compared as is believed.
            speculating: the step's kind.
        """
        # A single step may take any time.
        ratio = min(max(ratio, 0.5), 2.0)
        seen = self.value * (ratio if speculating else 1.0 / ratio)
        self._sizes.add(self.length, seen, self.value)
        points = self._sizes.points()
        if octave(int(points[0][0])):
            # The curves are those of short texts, until these say otherwise.
            points = [(1.0, 1.0, _BELIEF), *points]
        self._line = Line(points, 0.0)
        self.over(self.length)

    def note(self, speculating: bool) -> None:
        """A step of this kind was done."""
        self._recent.append((self.place, speculating))


class TargetCost:
    """Milliseconds of a step without its drafting, by rows, plain and speculating.

    The two have a curve each, for a step with drafts takes other paths (a rejection sampler,
    attention over several query tokens) before its additional rows cost anything. Where one is
    not measured the other stands in; the curve of speculating steps is nowhere below that of plain
    ones.

    Both go for short texts; speculating ones are multiplied by a :class:`Stretch` for longer ones.

    Args:
        window: length of the medians of the shapes.
        slope: assumed cost of one more row, relative to a pass, until prompts have been read.
    """

    def __init__(self, window: int = 31, slope: float = 0.02) -> None:
        self._prior_slope = slope
        self._per_row = Median(9)
        # Plain steps may be few: their median has to turn with fewer.
        self._plain = _Sizes(window // 2)
        self._speculating = _Sizes(window)
        self._level = _Level()
        self._anchor = 0
        # Whether the last plain step took longer (1) or less long (-1) than was expected.
        self.surprise = 0
        # Milliseconds of a plain step of one row.
        self.unit = 0.0
        self._plain_line = self._speculating_line = Line([(1.0, 1.0, 1.0)], slope)
        self._steps = self._stale = 0
        self._tables: dict[int, list[float]] = {}
        # How much longer speculating steps are, by the length of the texts.
        self.stretch = Stretch()

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return bool(len(self._level))

    @property
    def samples(self) -> int:
        """Steps measured."""
        return self._plain.samples + self._speculating.samples

    @property
    def level(self) -> float:
        """Milliseconds of what the relative costs are relative to."""
        return self._level.value

    @property
    def slope(self) -> float:
        """Assumed cost of one more row beyond those measured, relative to a pass."""
        if not self._per_row or not self._level:
            return self._prior_slope
        measured = self._per_row.value / self._level.value
        # A single prompt may have been the first of its shape: it can lower the guess only.
        return measured if len(self._per_row) > 1 else min(measured, self._prior_slope)

    def knows_plain(self, rows: int) -> bool:
        """Whether plain steps of about so many rows were measured; two, if nothing else was."""
        if self.samples < 2:
            return False
        if rows <= 2:
            return self._plain.count(rows) > 0
        return any(0.8 * rows <= size <= 1.25 * rows for size in self._plain.sizes())

    def knows_plain_well(self, rows: int) -> bool:
        """Whether a plain step of so many rows can be compared with speculating ones."""
        return self._plain.count(rows) >= _SETTLED

    def add(self, rows: int, ms: float, speculating: bool, compared: bool = True) -> None:
        """Record a step.

        Args:
            rows: in it.
            ms: that it took.
            speculating: whether at least one row is a draft.
            compared: whether it may be a comparison of the two kinds of step.
        """
        if len(self._level) == 1 and ms < 0.5 * self._level.value:
            # The first step was dear (it compiled, say) and tells nothing, whatever its size.
            self._level = _Level()
        if not self._level:
            self._anchor = rows
            self._plain_line = self._speculating_line = Line([(rows, 1.0, 1.0)], self.slope)
        sizes = self._speculating if speculating else self._plain
        expected = self.relative(rows, speculating)
        if not speculating:
            usual = expected * self._level.value if self._level else ms
            self.surprise = (ms > _NEWS * usual) - (_NEWS * ms < usual)
        seen = sizes.count(rows)
        compared = compared and seen >= _SETTLED and self.stretch.compares(speculating)
        # Where texts of this length are new, what differs is the stretch, not the shape.
        tells_shape = not (compared and self.stretch.is_new)
        if compared:
            before = self.stretch.value
            self.stretch.add(ms / (expected * self._level.value), speculating)
            expected = self.relative(rows, speculating)
            if not speculating:
                # Speculating steps, of which it was made, are now known to be longer than that.
                self._level.scale(before / self.stretch.value)
        if seen >= 2 or (rows == self._anchor and not speculating) or not self._level:
            self._level.add(ms / expected)
        self.stretch.note(speculating)
        if tells_shape:
            stretch = self.stretch.value if speculating else 1.0
            self._level.learn(sizes, rows, ms / self._level.value / stretch, expected / stretch)
        self._steps += 1
        self._stale += 1
        self.unit = self(1)
        # Medians move little once there are many samples: the lines need not follow each.
        if self._stale >= 4 or self._steps < 64 or sizes.count(rows) < _SETTLED:
            self._draw()

    def add_prompt(self, rows: int, ms: float) -> None:
        """Record a step that read prompts: ``rows`` tokens in all.

        Among hundreds of rows the pass itself is paid many times over, so what remains per row is
        about what one more row costs at the most.
        """
        if rows >= _MANY_ROWS:
            self._per_row.add(max(ms - self._level.value, 0.0) / rows)

    def _draw(self) -> None:
        self._stale = 0
        self._tables.clear()
        self._redraw()
        self.unit = self(1)

    def _redraw(self) -> None:
        plain, speculating = self._plain.points(), self._speculating.points()
        if not plain:
            self._plain_line = self._speculating_line = Line(speculating, self.slope)
            return
        own = Line(plain, self.slope)
        if not speculating:
            self._plain_line = self._speculating_line = own
            return
        first, last = speculating[0][0], plain[-1][0]
        floored = [
            (size, max(value, own(size)) if size <= last else value, weight)
            for size, value, weight in speculating
        ]
        below = [point for point in plain if point[0] < first]
        beyond = [point for point in floored if point[0] > last]
        self._plain_line = Line([*plain, *beyond], self.slope)
        self._speculating_line = Line([*below, *floored], self.slope)

    def relative(self, rows: int, speculating: bool) -> float:
        """The cost of a step in units of :attr:`level`."""
        if speculating:
            return self.stretch.value * self._speculating_line(rows)
        return self._plain_line(rows)

    def table(self, rows: int, count: int) -> list[float]:
        """Relative costs of speculating steps of ``rows``, ``rows + 1``, ... rows (or more)."""
        known = self._tables.get(rows)
        if known is None or len(known) < count:
            known = self._tables[rows] = self._speculating_line.table(rows, count)
        stretch = self.stretch.value
        return known if stretch == 1.0 else [stretch * value for value in known]

    def __call__(self, rows: int, speculating: bool = False) -> float:
        """Milliseconds of a step."""
        return self.level * self.relative(rows, speculating)


class DraftCost:
    """Milliseconds of the draft's passes by requests in them, and of reading missing text.

    The first pass of a step carries what is fixed (deciding, metadata, transfers) and has a
    curve of its own.

    Args:
        share: assumed cost of a draft pass as a share of a plain step, until it is measured.
        window: length of the medians of the shapes.

    Attributes:
        row_share: assumed cost of reading one more token, relative to a pass, until measured.
    """

    def __init__(self, share: float, window: int = 31) -> None:
        self._share = share
        self.row_share = 0.02
        self._first = _Sizes(window)
        self._next = _Sizes(window)
        self._level = _Level()
        # Plain steps since the draft was measured; by what the machine has become slower in them.
        self._plain_steps, self._slower = 0, 1.0
        # The level of the target's steps once it rested on these alone.
        self._pace = 1.0
        self._first_line = self._next_line = Line([(1.0, 1.0, 1.0)], 0.01)
        self._per_token = Median(9)
        self._steps = self._stale = 0

    def scale(self, plain_ms: float) -> float:
        """Milliseconds that the relative costs are relative to."""
        return self._level.value * self._slower if self._level else self._share * plain_ms

    def follow(self, level: float) -> None:
        """A plain step was done: the draft is off, perhaps just because the machine was slow.

        Args:
            level: milliseconds, of the target's steps; only its changes matter.
        """
        self._plain_steps += 1
        # Before, speculating steps are in it: what changes may be what these were taken to cost.
        if self._plain_steps == _LEVEL_WINDOW:
            self._pace = level
        elif self._plain_steps > _LEVEL_WINDOW:
            self._slower = level / self._pace

    def first(self, requests: int, plain_ms: float) -> float:
        """Milliseconds of the first pass; ``plain_ms``: a plain step of one row."""
        return self.scale(plain_ms) * self._first_line(requests)

    def next(self, requests: float, plain_ms: float) -> float:
        """Milliseconds of each further pass."""
        return self.scale(plain_ms) * self._next_line(requests)

    def fill(self, tokens: int, plain_ms: float, sure: bool = True) -> float:
        """Milliseconds of reading ``tokens`` tokens of missing text beside a first pass.

        Where ``sure`` is False and none was measured, twice what would be expected.
        """
        factor = 1.0 if sure or self._per_token else 2.0
        return factor * self._filling(plain_ms) * tokens

    def _filling(self, plain_ms: float) -> float:
        """Milliseconds per token: as measured, else what a row costs the target, scaled down."""
        if self._per_token:
            return self._per_token.value * self._slower
        return self.row_share * self.scale(plain_ms)

    def add(
        self,
        requests: int,
        later: int,
        filled: int,
        plain_ms: float,
        first_ms: float,
        next_ms: float | None,
        later_requests: float = 1.0,
    ) -> None:
        """Record the drafting of a step.

        Args:
            requests: in the first pass.
            later: how many passes followed the first one.
            filled: tokens of missing text that the first pass read beside the usual.
            plain_ms: milliseconds of a plain step of one row.
            first_ms: until the first tokens were there; of all passes if ``next_ms`` is None.
            next_ms: milliseconds of these together.
            later_requests: mean number of requests in these.
        """
        if self._slower != 1.0:
            self._level.scale(self._slower)
            self._per_token.scale(self._slower)
        self._plain_steps, self._slower = 0, 1.0
        if next_ms is None:
            # One figure for all: what the first pass is known to cost more stays with it.
            first = self.first(requests, plain_ms)
            usual = first + later * self.next(later_requests, plain_ms)
            missing = self.fill(filled, plain_ms)
            # Where all together took less than was expected, each did in proportion.
            missing *= min(1.0, first_ms / (usual + missing))
            next_ms = (1.0 - first / usual) * (first_ms - missing)
            first_ms -= next_ms
        if not self._level:
            self._level.add(self._share * plain_ms)
        if filled:
            extra = first_ms - self.first(requests, plain_ms)
            if filled >= 8:
                if not self._per_token:
                    self._per_token.add(self._filling(plain_ms))
                self._per_token.add(max(extra, 0.0) / filled)
        known = not later or self._next.count(round(later_requests)) >= 2
        counted = known and not filled and self._first.count(requests) >= 2
        if counted:
            expected = self._first_line(requests) + later * self._next_line(later_requests)
            self._level.add((first_ms + next_ms) / expected)
        if not filled:
            self._sample(self._first, requests, first_ms, self._first_line(requests), counted)
        if later:
            expected = self._next_line(later_requests)
            self._sample(self._next, round(later_requests), next_ms / later, expected, counted)
        self._steps += 1
        is_new = self._first.count(requests) < _SETTLED
        if self._stale >= 4 or self._steps < 64 or is_new:
            self._draw()

    def _sample(
        self, sizes: _Sizes, requests: int, ms: float, expected: float, counted: bool
    ) -> None:
        self._level.learn(sizes, requests, ms / self._level.value, expected, counted)
        self._stale += 1

    def _draw(self) -> None:
        self._stale = 0
        first, further = self._first.points(), self._next.points()
        if not first and not further:
            return
        self._next_line = Line(further or first, 0.01)
        self._first_line = Line(first or further, 0.01)
