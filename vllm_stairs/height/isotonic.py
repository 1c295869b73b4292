"""Isotonic regression: the never falling sequence nearest to noisy values. One pure function."""

from collections.abc import Sequence


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The non-decreasing values nearest to ``values`` by weighted least squares.

    Pool adjacent violators: neighbours in the wrong order take their weighted mean, until there
    are none; each value joins a pool once, so the time is linear (Ayer, Brunk, Ewing, Reid and
    Silverman, *An empirical distribution function for sampling with incomplete information*, Ann.
    Math. Statist. 26, 1955; Barlow, Bartholomew, Bremner and Brunk, *Statistical Inference under
    Order Restrictions*, 1972).

    Args:
        values: ``[n]``, in the order in which they may not fall.
        weights: ``[n]``, above 0.

    Returns:
        ``[n]`` values.

    Raises:
        ValueError: there are not as many weights as values.
    """
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many values
    for value, weight in zip(values, weights, strict=True):
        mean, total, many = value, weight, 1
        while pools and pools[-1][0] > mean:
            left, m, n = pools.pop()
            mean, total, many = (left * m + mean * total) / (m + total), m + total, many + n
        pools.append((mean, total, many))
    return [mean for mean, _, many in pools for _ in range(many)]
