import math
import random
from itertools import pairwise

import pytest

from vllm_stairs.bench import statistics


def test_median_and_percentile():
    assert statistics.median([3, 1, 2]) == 2
    assert statistics.median([4, 1, 2, 3]) == 2.5
    assert statistics.percentile([10, 20, 30], 0.5) == 20
    assert statistics.percentile([0, 10], 0.9) == pytest.approx(9)
    assert statistics.percentile([7], 0.99) == 7
    with pytest.raises(ValueError):
        statistics.median([])


def test_spread_is_relative_to_the_median():
    assert statistics.spread([9, 10, 12]) == pytest.approx(0.3)
    assert statistics.spread([5]) == 0


def test_noise_is_unknown_with_one_repeat_and_zero_without_variation():
    assert statistics.repeat_noise([10]) is None
    assert statistics.repeat_noise([10, 10, 10]) == 0


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_second_run_lies_within_the_stated_noise_19_times_in_20(count):
    source = random.Random(count)
    inside = total = 0
    for _ in range(3000):
        first, second = ([math.exp(source.gauss(3, 0.02)) for _ in range(count)] for _ in range(2))
        means = [math.exp(sum(map(math.log, run)) / count) for run in (first, second)]
        inside += abs(math.log(means[1] / means[0])) <= math.log1p(statistics.repeat_noise(first))
        total += 1
    assert 0.93 < inside / total < 0.97


def test_pairing_removes_what_slows_both_arms():
    base = [10.0, 5.0, 8.0]
    ratio = statistics.paired_ratio([value * 1.2 for value in base], base)
    assert ratio.median == pytest.approx(1.2)
    assert ratio.noise == pytest.approx(0, abs=1e-9)
    assert (ratio.low, ratio.high) == (pytest.approx(1.2), pytest.approx(1.2))
    with pytest.raises(ValueError):
        statistics.paired_ratio([1], [])


@pytest.mark.parametrize(("repeats", "turns"), [(1, 8), (2, 6), (3, 4)])
def test_a_second_run_in_turns_lies_within_the_stated_noise(repeats, turns):
    """Whatever the texts of the turns do to a ratio, where there is more than one repeat."""
    source = random.Random(10 * repeats + turns)
    texts = [source.gauss(0, 0.3) if repeats > 1 else 0.0 for _ in range(turns)]
    inside = 0
    for _ in range(3000):
        runs = [
            [[math.exp(text + source.gauss(0, 0.02)) for text in texts] for _ in range(repeats)]
            for _ in range(2)
        ]
        logs = [sum(math.log(v) for values in run for v in values) for run in runs]
        distance = abs(logs[1] - logs[0]) / (repeats * turns)
        inside += distance <= math.log1p(statistics.turn_noise(runs[0]))
    assert 0.93 < inside / 3000 < 0.97


def test_the_noise_of_turns_is_unknown_without_two_values():
    assert statistics.turn_noise([]) is None
    assert statistics.turn_noise([[1.0]]) is None


def test_quantiles_are_students_beyond_the_table_too():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 20, 21, 25, 40, 200):
        expected = stats.t.ppf(0.975, degrees)
        assert statistics.t_quantile(degrees) == pytest.approx(expected, abs=1e-3)


def test_quantiles_fall_without_a_jump_at_the_end_of_the_table():
    found = [statistics.t_quantile(degrees) for degrees in range(15, 40)]
    steps = [before - after for before, after in pairwise(found)]
    assert all(0 < step < 0.02 for step in steps)


@pytest.mark.parametrize("count", [3, 5, 6])
def test_the_median_of_a_second_run_lies_within_the_noise_92_to_95_times_in_100(count):
    source = random.Random(count)
    inside = 0
    for _ in range(4000):
        first, second = ([math.exp(source.gauss(3, 0.02)) for _ in range(count)] for _ in range(2))
        ratio = statistics.median(second) / statistics.median(first)
        inside += abs(math.log(ratio)) <= math.log1p(statistics.repeat_noise(first))
    assert 0.91 < inside / 4000 < 0.96
