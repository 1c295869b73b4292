"""The simulator's draft on a device of its own, against a clock that is followed pass by pass."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_stairs.bench import policies, replay
from vllm_stairs.bench.costs import CostModel, Curve
from vllm_stairs.bench.dedicated import Dedicated, passes_ms, written_ahead
from vllm_stairs.bench.errors import BenchError
from vllm_stairs.bench.record import Record, Trace


def record(*texts: list[bool]) -> Record:
    """Requests whose draft holds where it is said."""
    return Record(
        tuple(
            Trace(
                str(number),
                np.array(held),
                np.ones(len(held), dtype=bool),
                np.full(len(held), 0.9),
                {},
            )
            for number, held in enumerate(texts)
        ),
        8,
        None,
    )


def costs(draft_ms: float, target_ms: float, overhead_ms: float = 0.0) -> CostModel:
    return CostModel(Curve({1: draft_ms}), Curve({1: target_ms}), overhead_ms)


def clock(held: list[bool], height: int, draft: float, target: float, handover: float) -> float:
    """Milliseconds for one request with overlap, event by event."""
    now = free_at = 0.0
    position = 0
    begun: list[float] = []  # When each pass that was written ahead ends.
    guesses_hold = False
    while position < len(held):
        want = min(height, len(held) - position - 1)
        if want:
            now += handover / 2
            begun = [end for end in begun if end - draft < now - 1e-9]  # Begun before it was asked.
            now = max(now, begun[-1] if begun else free_at)
            ready = min(max(len(begun) - 1, 0), want) if guesses_hold else 0
            now += draft * (want - ready)
            free_at = now
            begun = [now + draft * (number + 1) for number in range(want + 1)]
            now += handover / 2
        now += target
        run = 0
        while run < want and held[position + run]:
            run += 1
        guesses_hold = run == want and want > 0 and held[position + want]
        position += run + 1
    return now


@given(
    st.integers(0, 10**6),
    st.integers(1, 60),
    st.floats(0, 1),
    st.integers(0, 5),
    st.sampled_from([0.5, 1.0, 2.5, 4.0, 30.0]),
    st.sampled_from([0.0, 0.7, 3.0]),
)
def test_as_by_the_clock(
    seed: int, length: int, rate: float, height: int, draft: float, handover: float
) -> None:
    source = random.Random(seed)
    held = [source.random() < rate for _ in range(length)]
    score = replay.replay(
        record(held), policies.Fixed(height), costs(draft, 10.0), 1, Dedicated(handover)
    )
    took = score.draft_ms + score.target_ms
    assert took == pytest.approx(clock(held, height, draft, 10.0, handover))


def test_the_ideal() -> None:
    """A draft that holds and takes a quarter of a step per token: 2 steps become 1.25."""
    found = record([True] * 5001)
    off, on = (
        replay.replay(found, policies.Fixed(4), costs(2.5, 10.0), 1, Dedicated(0.0, overlap))
        for overlap in (False, True)
    )
    assert off.steps == on.steps
    assert on.tokens_per_s / off.tokens_per_s == pytest.approx(1.6, rel=0.002)


def test_without_overlap_it_is_the_colocated_draft_and_the_hand_over() -> None:
    source = random.Random(1)
    found = record(*[[source.random() < 0.7 for _ in range(80)] for _ in range(6)])
    beside = replay.replay(found, policies.Fixed(3), costs(2.0, 10.0, 1.0), 3)
    apart = replay.replay(found, policies.Fixed(3), costs(2.0, 10.0, 1.0), 3, Dedicated(0.5, False))
    assert apart.heights == beside.heights
    drafting = round((apart.draft_ms - beside.draft_ms) / 0.5)
    assert apart.draft_ms == pytest.approx(beside.draft_ms + 0.5 * drafting)
    assert apart.steps - len(found.traces) <= drafting <= apart.steps


def test_what_does_not_hold_is_of_no_use() -> None:
    found = record([False] * 100)
    off, on, slow = (
        replay.replay(found, policies.Fixed(2), costs(draft, 10.0), 1, Dedicated(0.0, overlap))
        for draft, overlap in ((3.0, False), (3.0, True), (4.0, True))
    )
    assert on.draft_ms == off.draft_ms
    # Its third pass begins before the target is done, and ends 2 ms after.
    assert slow.draft_ms == pytest.approx(off.draft_ms / 3 * 4 + 2 * 98, abs=3)


@pytest.mark.parametrize(
    ("free", "each", "wanted", "expected"),
    [
        (10.0, 2.5, 5, (3, 0.0)),
        (10.0, 2.0, 5, (4, 0.0)),
        (10.0, 1.0, 5, (4, 0.0)),
        (10.0, 4.0, 5, (2, 2.0)),
        (10.0, 30.0, 5, (0, 20.0)),
        (0.0, 1.0, 5, (0, 0.0)),
    ],
)
def test_written_ahead(free: float, each: float, wanted: int, expected: tuple[int, float]) -> None:
    assert written_ahead(free, each, wanted) == expected


def test_passes_are_for_those_that_lack_something() -> None:
    curve = Curve({1: 1.0, 3: 3.0})
    assert passes_ms([2, 2, 4], [0, 2, 2], curve) == 2.0 + 2.0
    assert passes_ms([2, 2], [2, 2], curve) == passes_ms([], [], curve) == 0


def test_what_is_refused() -> None:
    for handover in (-1.0, float("nan"), float("inf")):
        with pytest.raises(BenchError, match="hand-over must be a number"):
            Dedicated(handover)
    found = record([True] * 9)
    model = costs(1.0, 10.0)
    with pytest.raises(BenchError, match="auto is not simulated"):
        replay.replay(found, policies.Auto(4, model), model, 1, Dedicated(1.0))


def test_the_planning_table_of_the_documentation_is_what_the_script_prints() -> None:
    import subprocess
    import sys

    root = Path(__file__).resolve().parents[2]
    script = root / "examples" / "plan_placement.py"
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=300
    )
    assert run.stdout.strip() in (root / "docs" / "placement.md").read_text()
