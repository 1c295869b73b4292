"""Isotonic regression: the never falling sequence nearest to noisy values. Pure functions."""

from collections.abc import Callable, Sequence

Weighted = tuple[float, float]
"""A value and its weight, above 0."""


def weighted_mean(values: Sequence[Weighted]) -> float:
    """The mean, for least squares; at least one value."""
    return sum(value * weight for value, weight in values) / sum(weight for _, weight in values)


def weighted_median(values: Sequence[Weighted]) -> float:
    """The smallest value that, with those below it, has half of the weight; at least one value.

    For least absolute differences: one value that is ten times too large does not raise those that
    it is pooled with.
    """
    ranked = sorted(values)
    half = sum(weight for _, weight in ranked) / 2.0
    for value, weight in ranked:
        half -= weight
        if half <= 0.0:
            return value
    return ranked[-1][0]


def isotonic(
    values: Sequence[float],
    weights: Sequence[float],
    centre: Callable[[Sequence[Weighted]], float] = weighted_mean,
) -> list[float]:
    """The non-decreasing values nearest to ``values``.

    Pool adjacent violators: neighbours in the wrong order take the centre of all that they hold,
    until there are none (Ayer, Brunk, Ewing, Reid and Silverman, *An empirical distribution
    function for sampling with incomplete information*, Ann. Math. Statist. 26, 1955; for medians
    Robertson and Wright, *Algorithms in order restricted statistical inference and the Cauchy mean
    value property*, Ann. Statist. 8, 1980).

    Args:
        values: ``[n]``, in the order in which they may not fall.
        weights: ``[n]``, above 0.
        centre: of a pool.

    Returns:
        ``[n]`` values.

    Raises:
        ValueError: there are not as many weights as values.
    """
    pools: list[tuple[float, list[Weighted]]] = []  # the centre, and what it is of
    for value, weight in zip(values, weights, strict=True):
        middle, held = value, [(value, weight)]
        while pools and pools[-1][0] > middle:
            held = pools.pop()[1] + held
            middle = centre(held)
        pools.append((middle, held))
    return [middle for middle, held in pools for _ in held]
