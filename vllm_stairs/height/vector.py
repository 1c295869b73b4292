r"""The best heights of a batch, given what they bring and cost. One pure function.

Request *i* keeps its drafts 1..j with probability :math:`u_{ij}`, which falls with j. A vector of
heights h brings and costs

.. math::

    T(h) = B + \sum_i \sum_{j \le h_i} u_{ij}, \qquad
    C(h) = S\Big(B + \sum_i h_i\Big) + D_1 + (\max_i h_i - 1)\,D

with *S* the target's step by rows, :math:`D_1` and *D* the first and each further draft pass, which
cost next to the same whether one request takes part or all. For a given tallest height *H* and a
given number of drafts *m* the best choice are the *m* largest :math:`u_{ij}` with :math:`j \le H`
(as u falls with j, they always form staircases), so T / C is maximised by trying all (H, m): a
sort and a sum for each H. Extending the tallest staircase thereby pays its whole pass,
every other stair only its row.
"""

from collections.abc import Sequence
from itertools import accumulate
from operator import truediv


def best_vector(
    survivals: Sequence[Sequence[float]],
    tokens: float,
    rows_ms: Sequence[float],
    first_ms: float,
    next_ms: float,
) -> tuple[float, list[int]]:
    """The heights of the highest rate among those that draft at all.

    Args:
        survivals: for each request that may draft, the probabilities that its drafts 1, 2, ... are
            kept with all before them; as many as it may draft, non-increasing.
        tokens: what the step brings without any draft (requests in the batch).
        rows_ms: milliseconds of a speculating step with 0, 1, 2, ... drafts; as many as there are
            survivals in all, and one.
        first_ms: the first draft pass and whatever else the step costs more once.
        next_ms: each further pass.

    Returns:
        The rate (tokens per millisecond) and a height for each request; at least one is not 0
        unless there is nothing to draft, which has the rate 0.
    """
    if len(survivals) == 1:
        return _best_alone(survivals[0], tokens, rows_ms, first_ms, next_ms)
    best, height, count = 0.0, 0, 0
    pool: list[float] = []
    drafting = first_ms
    worse = 0
    for level in range(max(map(len, survivals), default=0)):
        pool += [own[level] for own in survivals if len(own) > level]
        pool.sort(reverse=True)
        sums = list(accumulate(pool, initial=tokens))
        rates = list(map(truediv, sums, map(drafting.__add__, rows_ms)))
        rates[0] = 0.0
        rate = max(rates)
        if rate > best:
            best, height, count, worse = rate, level + 1, rates.index(rate), 0
            least = pool[count - 1]
        else:
            # Where no row is cheaper than the one before, each level brings less than the one
            # before it; two failures end the search.
            worse += 1
            if worse == 2:
                break
        drafting += next_ms
    if not count:
        return 0.0, [0] * len(survivals)
    heights = [sum(value > least for value in own[:height]) for own in survivals]
    missing = count - sum(heights)
    for index, own in enumerate(survivals):
        while missing and heights[index] < min(height, len(own)) and own[heights[index]] == least:
            heights[index] += 1
            missing -= 1
    return best, heights


def _best_alone(
    survival: Sequence[float],
    tokens: float,
    rows_ms: Sequence[float],
    first_ms: float,
    next_ms: float,
) -> tuple[float, list[int]]:
    """The same where one request may draft: row and pass go together."""
    best, height = 0.0, 0
    for level, value in enumerate(survival, 1):
        tokens += value
        rate = tokens / (rows_ms[level] + first_ms)
        if rate > best:
            best, height = rate, level
        first_ms += next_ms
    return best, [height]


def best_prefix(values: Sequence[float], rows_ms: Sequence[float], rate: float) -> int:
    """How many of some drafts are worth their rows at a rate.

    Args:
        values: probabilities of being kept, falling.
        rows_ms: milliseconds of a step with 0, 1, 2, ... of them.
        rate: tokens per millisecond that the time would bring otherwise.

    Returns:
        The number n that maximises ``sum(values[:n]) - rate * rows_ms[n]``.
    """
    best, count, brought = -rate * rows_ms[0], 0, 0.0
    for number, value in enumerate(values, 1):
        brought += value
        net = brought - rate * rows_ms[number]
        if net > best:
            best, count = net, number
    return count
