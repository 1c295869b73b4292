"""The height policy on synthetic traces: no model, a simulated clock."""

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_stairs.height import (
    Acceptance,
    Calibration,
    FixedHeight,
    HeightPolicy,
    RowCost,
    RunningMedian,
    best_height,
    expected_tokens,
    tokens_per_ms,
)

Clock = Callable[[int], float]


def flat(rows: int) -> float:
    """A target that reads eight rows for little more than one."""
    return 50.0 + 0.5 * rows + max(0, rows - 8) * 4.0


class World:
    """Texts whose drafts are kept with a given probability, and a machine that takes time.

    Args:
        rate: step number to conditional acceptance of every position.
        draft_ms: cost of a draft pass.
        target_ms: rows to cost.
        spikes: share of passes that take ten times as long.
    """

    def __init__(
        self,
        rate: Callable[[int], float],
        draft_ms: float = 6.0,
        target_ms: Clock = flat,
        spikes: float = 0.0,
        batch: int = 1,
        seed: int = 0,
    ) -> None:
        self.rate, self.draft_ms, self.target_ms = rate, draft_ms, target_ms
        self.spikes, self.batch = spikes, batch
        self.random = random.Random(seed)

    def noisy(self, ms: float) -> float:
        value = ms * self.random.uniform(0.95, 1.05)
        return value * 10 if self.random.random() < self.spikes else value

    def run(self, policy: HeightPolicy | FixedHeight, steps: int) -> tuple[float, list[int]]:
        """Tokens per true millisecond (spikes apart), and the heights chosen."""
        tokens, ms, heights = 0, 0.0, []
        for step in range(steps):
            height = policy.choose(self.batch)
            kept = []
            for _ in range(self.batch):
                count = 0
                while count < height and self.random.random() < self.rate(step):
                    count += 1
                kept.append(count)
            target = self.target_ms(self.batch * (height + 1))
            ms += target + height * self.draft_ms
            tokens += sum(kept) + self.batch
            heights.append(height)
            policy.observe(
                [height] * self.batch,
                kept,
                self.noisy(target),
                self.noisy(height * self.draft_ms) if height else None,
            )
        return tokens / ms, heights


def learned(max_height: int = 8) -> HeightPolicy:
    return HeightPolicy(max_height, use_confidence=False)


def best_fixed(rate: float, draft_ms: float = 6.0, batch: int = 1) -> tuple[int, float]:
    height = best_height([rate] * 8, draft_ms, flat, 8, batch)
    return height, tokens_per_ms([rate] * 8, height, draft_ms, flat, batch)


# -- the mathematics ---------------------------------------------------------------------


def test_expected_tokens() -> None:
    assert expected_tokens([0.5, 0.5, 0.5], 0) == 1.0
    assert expected_tokens([0.5, 0.5, 0.5], 3) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert expected_tokens([1.0, 0.0, 1.0], 3) == 2.0


@given(
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8),
    st.floats(0.1, 50.0),
    st.floats(1.0, 100.0),
    st.floats(0.0, 5.0),
    st.integers(1, 32),
)
def test_best_height_is_the_best(
    rates: list[float], draft: float, base: float, slope: float, batch: int
) -> None:
    def cost(rows: int) -> float:
        return base + slope * rows

    best = best_height(rates, draft, cost, len(rates), batch)
    value = tokens_per_ms(rates, best, draft, cost, batch)
    for height in range(len(rates) + 1):
        assert tokens_per_ms(rates, height, draft, cost, batch) <= value


def test_known_cases() -> None:
    assert best_height([0.0] * 8, 5.0, flat, 8) == 0
    assert best_height([1.0] * 8, 5.0, flat, 8) == 8
    assert best_height([0.9] * 8, 500.0, flat, 8) == 0
    assert best_height([0.5] * 8, 1.0, lambda rows: 50.0, 8) > 2


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.integers(1, 9))
def test_running_median(values: list[float], window: int) -> None:
    median = RunningMedian(window)
    for value in values:
        median.add(value)
    last = sorted(values[-window:])
    middle = len(last) // 2
    expected = last[middle] if len(last) % 2 else (last[middle - 1] + last[middle]) / 2
    assert median.value == pytest.approx(expected)
    assert len(median) == len(last)


@given(st.dictionaries(st.integers(1, 40), st.floats(1.0, 100.0), min_size=1, max_size=8))
def test_more_rows_never_cost_less(seen: dict[int, float]) -> None:
    cost = RowCost()
    for rows, ms in seen.items():
        cost.add(rows, ms)
    values = [cost(rows) for rows in range(1, 60)]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(values))
    assert min(values) > 0


def test_row_cost_interpolates() -> None:
    cost = RowCost(prior_weight=1e-9)
    cost.add(1, 10.0)
    assert cost(3) == pytest.approx(10.4)
    cost.add(5, 18.0)
    assert cost(3) == pytest.approx(14.0)
    assert cost(7) == pytest.approx(22.0)
    with pytest.raises(ValueError, match="no cost"):
        RowCost()(1)


def test_sizes_hardly_seen_are_drawn_to_a_flat_line() -> None:
    cost = RowCost(prior_weight=2.0)
    cost.add(1, 10.0)
    cost.add(5, 40.0)
    assert cost(5) < 25.0
    for _ in range(20):
        cost.add(5, 40.0)
    assert cost(5) > 30.0


def test_a_slower_machine_moves_every_size() -> None:
    """Sizes that are not visited any more are not remembered as cheap, or as dear."""
    cost = RowCost()
    for _ in range(12):
        cost.add(2, 100.0)
        cost.add(6, 130.0)
    before = cost(6) / cost(2)
    for _ in range(12):
        cost.add(2, 30.0)
    assert cost(2) == pytest.approx(30.0, rel=0.05)
    assert cost(6) / cost(2) == pytest.approx(before, rel=0.05)


def test_acceptance_is_conditional() -> None:
    acceptance = Acceptance(3, keep=1.0, prior_weight=1e-6)
    acceptance.observe([3, 3, 3, 3], [0, 1, 3, 3])
    assert acceptance.rates == pytest.approx([0.75, 2 / 3, 1.0], abs=1e-3)


def test_acceptance_forgets() -> None:
    acceptance = Acceptance(1, keep=0.9)
    for _ in range(100):
        acceptance.observe([1], [1])
    for _ in range(30):
        acceptance.observe([1], [0])
    assert acceptance.rates[0] < 0.15


def test_calibration() -> None:
    calibration = Calibration()
    assert calibration.rate(0.95) == pytest.approx(0.95)
    for _ in range(200):
        calibration.observe(0.93, False)
        calibration.observe(0.15, True)
    assert calibration.rate(0.99) < 0.1
    assert calibration.rate(0.11) > 0.9
    assert calibration.rate(0.55) == pytest.approx(0.55)


# -- the policy --------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.5, 0.7, 0.85, 0.95])
@pytest.mark.parametrize("draft_ms", [1.0, 6.0, 20.0])
def test_regret_against_the_best_fixed_height(rate: float, draft_ms: float) -> None:
    """In 3,000 steps the policy loses at most 5 % against the best constant in hindsight."""
    _, value = best_fixed(rate, draft_ms)
    reached, _ = World(lambda _: rate, draft_ms).run(learned(), 3000)
    assert reached >= 0.95 * value


@pytest.mark.parametrize("batch", [4, 16])
def test_regret_in_batches(batch: int) -> None:
    _, value = best_fixed(0.7, 6.0, batch)
    reached, _ = World(lambda _: 0.7, 6.0, batch=batch).run(learned(), 1000)
    assert reached >= 0.95 * value


def test_a_bad_draft_is_left_alone() -> None:
    """Probes back off: of the last 2,000 steps next to none drafts."""
    reached, heights = World(lambda _: 0.02).run(learned(), 3000)
    assert sum(height > 0 for height in heights[-2000:]) <= 12
    assert reached >= 0.97 / flat(1)


def test_a_draft_that_becomes_good_is_found() -> None:
    world = World(lambda step: 0.02 if step < 300 else 0.9)
    _, heights = world.run(learned(), 1500)
    assert sum(heights[200:300]) / 100 < 0.5
    assert sum(heights[-300:]) / 300 >= best_fixed(0.9)[0] - 1


def test_drift() -> None:
    """Acceptance falls from 0.95 to 0.1 and comes back."""

    def rate(step: int) -> float:
        return 0.1 + 0.85 * abs(1.0 - (step % 4000) / 2000)

    reached, _ = World(rate).run(learned(), 4000)
    for height in range(9):
        fixed, _ = World(rate).run(FixedHeight(height), 4000)
        assert reached >= 0.98 * fixed


def test_bimodal_texts() -> None:
    """Long spells of easy and of hard text: better than every constant height."""

    def rate(step: int) -> float:
        return 0.95 if (step // 250) % 2 else 0.05

    reached, _ = World(rate).run(learned(), 6000)
    for height in range(9):
        fixed, _ = World(rate).run(FixedHeight(height), 6000)
        assert reached >= 1.01 * fixed


def test_cost_spikes() -> None:
    """Every twentieth pass takes ten times as long: the medians do not move."""
    _, value = best_fixed(0.8)
    reached, _ = World(lambda _: 0.8, spikes=0.05).run(learned(), 3000)
    assert reached >= 0.93 * value


def test_a_machine_that_changes() -> None:
    """Rows become sixty times as dear: the policy comes down, and loses little meanwhile."""
    dear = [False]

    def cost(rows: int) -> float:
        return 50.0 + 30.0 * rows if dear[0] else flat(rows)

    world, policy = World(lambda _: 0.7, target_ms=cost), learned()
    _, before = world.run(policy, 500)
    dear[0] = True
    world.run(policy, 500)
    reached, after = world.run(policy, 1500)
    best = best_height([0.7] * 8, 6.0, cost, 8)
    assert reached >= 0.9 * tokens_per_ms([0.7] * 8, best, 6.0, cost)
    assert sum(after[-300:]) < sum(before[-300:])


class Confident:
    """Tokens of two kinds, told apart by the draft's confidence."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)

    def run(self, policy: HeightPolicy | FixedHeight, steps: int) -> float:
        tokens, ms = 0, 0.0
        for _ in range(steps):
            chosen = policy.choose(1)
            sure: list[float] = []
            while chosen and len(sure) < policy.limit(chosen):
                if sure and policy.uses_confidence and not policy.go_on(len(sure), [sure]):
                    break
                sure.append(0.97 if self.random.random() < 0.7 else 0.25)
            kept = 0
            while kept < len(sure) and self.random.random() < sure[kept]:
                kept += 1
            target, draft = flat(len(sure) + 1), 6.0 * len(sure)
            policy.observe([len(sure)], [kept], target, draft if sure else None, [sure])
            tokens += kept + 1
            ms += target + draft
        return tokens / ms


def test_confidence_pays() -> None:
    """Stopping inside a draft beats every constant height, and the policy without it."""
    with_confidence = Confident().run(HeightPolicy(8), 4000)
    for height in range(1, 9):
        assert with_confidence > 1.05 * Confident().run(FixedHeight(height), 4000)
    assert with_confidence > 1.03 * Confident().run(learned(), 4000)


def test_a_spike_does_not_cheapen_time() -> None:
    """What one more token must bring is a matter of the usual rate."""
    policy, sure = HeightPolicy(8), [0.9, 0.9]
    for _ in range(30):
        policy.observe([2], [1], 50.0, 12.0, [sure])
    assert not policy.go_on(2, [[0.9, 0.25]])
    policy.observe([2], [1], 5000.0, 12.0, [sure])
    assert not policy.go_on(2, [[0.9, 0.25]])


def test_a_shrinking_batch_is_not_learned_anew() -> None:
    policy = learned()
    for batch in (16, 12):
        World(lambda _: 0.7, batch=batch).run(policy, 200)
    _, value = best_fixed(0.7, 6.0, 10)
    reached, _ = World(lambda _: 0.7, batch=10, seed=5).run(policy, 40)
    assert reached >= 0.85 * value


def test_a_machine_that_gets_faster_after_the_first_steps() -> None:
    """What was measured under load does not pin the height."""
    speed = [4.0]
    world = World(lambda _: 0.8, target_ms=lambda rows: flat(rows) * speed[0])
    policy = learned()
    world.run(policy, 12)
    speed[0] = 1.0
    reached, _ = world.run(policy, 300)
    assert reached >= 0.93 * best_fixed(0.8)[1]


def test_interface() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        HeightPolicy(0)
    policy = HeightPolicy(1)
    assert policy.choose() == 1
    policy.observe([1], [1])  # nothing was timed: still an answer
    assert policy.choose(7) in (0, 1)
    assert FixedHeight(3).choose(4) == 3
