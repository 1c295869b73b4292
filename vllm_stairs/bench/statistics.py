"""Medians, spreads and ratios, with the noise they carry. Pure functions of numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
"""97.5 % quantiles of Student's t distribution for 1 to 20 degrees of freedom."""

_Z_975 = 1.959964
"""The same of the normal distribution."""


@dataclass(frozen=True)
class Ratio:
    """A ratio between two arms, from paired measurements."""

    median: float
    low: float
    """The smallest of the paired ratios."""
    high: float
    """The largest of the paired ratios."""
    noise: float | None
    """Relative half-width: the same command run again is expected, about 19 times in 20, to
    give a ratio within ``median * (1 +- noise)`` (see :func:`repeat_noise`). None with a single
    repeat: unknown."""


def median(values: Sequence[float]) -> float:
    """The middle value; the mean of the middle two where there are two."""
    if not values:
        raise ValueError("the median of nothing")
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of the values lie, linearly interpolated."""
    if not values:
        raise ValueError("a percentile of nothing")
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def spread(values: Sequence[float]) -> float:
    """Largest minus smallest, as a share of the median; 0 for a single value."""
    return (max(values) - min(values)) / median(values)


def repeat_noise(values: Sequence[float]) -> float | None:
    """How far a second, equal series is expected to lie from this one, relatively.

    The 95 % prediction interval for the geometric mean of as many values again, that is
    t * s * sqrt(2 / n) on the logarithms. It knows only the variation within this run: what
    changes between two runs (another load of the machine, another day) is not in it. The median,
    which is what is printed, scatters more than the geometric mean from three values on: a second
    run's lies within the interval 92 to 95 times in 100.

    Returns:
        The relative half-width, or None for a single value.
    """
    count = len(values)
    if count < 2:
        return None
    logarithms = [math.log(value) for value in values]
    mean = sum(logarithms) / count
    variance = sum((value - mean) ** 2 for value in logarithms) / (count - 1)
    return math.expm1(t_quantile(count - 1) * math.sqrt(2 * variance / count))


def turn_noise(passes: Sequence[Sequence[float]]) -> float | None:
    """:func:`repeat_noise` of passes that were served in turns.

    The same turn of all passes is the same text: by how much turns differ from each other, because
    one text is easier to draft than another, is no noise. With a single pass it cannot be told
    apart and counts with it.

    Args:
        passes: for each repeat its values, turn by turn; as many in each.

    Returns:
        The relative half-width of the 95 % prediction interval for the geometric mean of all
        values; None for less than two values.
    """
    if len(passes) < 2:
        return repeat_noise(passes[0]) if passes else None
    deviations = []
    for column in zip(*([math.log(value) for value in values] for values in passes), strict=True):
        mean = sum(column) / len(column)
        deviations += [value - mean for value in column]
    degrees = len(deviations) - len(passes[0])
    variance = sum(value**2 for value in deviations) / degrees
    return math.expm1(t_quantile(degrees) * math.sqrt(2 * variance / len(deviations)))


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t distribution.

    Args:
        degrees: degrees of freedom, 1 or more. Up to 20 from a table, beyond by the first terms
            of the expansion about the normal quantile (off by less than 0.001).
    """
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = _Z_975
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def paired_ratio(
    values: Sequence[float], base: Sequence[float], turns: Sequence[Sequence[float]] = ()
) -> Ratio:
    """The ratio of two arms whose repeats were interleaved.

    Args:
        values: one figure a repeat, of the arm in question.
        base: the figures of the arm it is compared with, in the same repeats: what slows the
            machine for a while slows both of a pair.
        turns: for each repeat the ratios of its turns, where the arms took any: there are more of
            them, and each pair lies closer together, so they tell the noise.
    """
    if len(values) != len(base) or not values:
        raise ValueError("paired_ratio needs two equally long, non-empty series")
    ratios = [value / reference for value, reference in zip(values, base, strict=True)]
    noise = turn_noise(turns) if turns else repeat_noise(ratios)
    return Ratio(median(ratios), min(ratios), max(ratios), noise)
