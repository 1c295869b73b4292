"""Tensor parallel 2: two worker processes, one answer."""

from pathlib import Path

from tests.engine.engines import greedy, plain, tensor_parallel_2, token_ids
from tests.engine.test_identity import prompts
from tests.tiny import TinyModels


def test_tensor_parallel_2(tiny: TinyModels, tmp_path: Path) -> None:
    """As users have it: front end, engine and workers are processes."""
    texts = prompts(5, seed=50)
    outputs, statistics = tensor_parallel_2(
        tiny.target, tiny.noisy, texts, [[4] * 5, [0, 1, 2, 3, 4]], max_tokens=30, folder=tmp_path
    )
    expected = [samples[0] for samples in token_ids(plain(tiny.target), texts, greedy(30))]
    assert outputs == [expected, expected]
    assert 0 < statistics["accepted_per_position"][0] < statistics["drafted_per_position"][0]


def test_one_rank_decides_heights_for_both(tiny: TinyModels) -> None:
    """Heights from dice on one rank: the other verifies the same staircases (the helper looks)."""
    texts = prompts(5, seed=51)
    outputs, statistics = tensor_parallel_2(
        tiny.target, tiny.target, texts, [[4] * 5], max_tokens=40, dice=7, stairs_height="auto"
    )
    assert outputs == [[samples[0] for samples in token_ids(plain(tiny.target), texts, greedy(40))]]
    assert all(statistics["heights"])
    # The target's own drafts: nothing is refused, whatever was left out before.
    assert statistics["accepted_per_position"] == statistics["drafted_per_position"]
