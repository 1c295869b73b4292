"""Tensor parallel 2: two worker processes, one answer."""

import random
from pathlib import Path

import numpy as np
import pytest

from tests.engine.engines import (
    greedy,
    plain,
    sampled,
    stairs,
    statistics,
    tensor_parallel_2,
    token_ids,
)
from tests.engine.test_heights import wild
from tests.engine.test_identity import prompts
from tests.tiny import WORDS, TinyModels


def test_tensor_parallel_2(tiny: TinyModels, tmp_path: Path) -> None:
    """As users have it: front end, engine and workers are processes."""
    texts = prompts(5, seed=50)
    outputs, statistics = tensor_parallel_2(
        tiny.target, tiny.noisy, texts, [[4] * 5, [0, 1, 2, 3, 4]], max_tokens=30, folder=tmp_path
    )
    expected = [samples[0] for samples in token_ids(plain(tiny.target), texts, greedy(30))]
    assert outputs == [expected, expected]
    assert 0 < statistics["accepted_per_position"][0] < statistics["drafted_per_position"][0]


@pytest.mark.full  # The last one shows the same but for what is refused.
def test_one_rank_decides_heights_for_both(tiny: TinyModels) -> None:
    """Heights from dice on one rank: the other verifies the same staircases (the helper looks)."""
    texts = prompts(5, seed=51)
    outputs, counted = tensor_parallel_2(
        tiny.target, tiny.target, texts, [[4] * 5], max_tokens=40, dice=7, stairs_height="auto"
    )
    assert outputs == [[samples[0] for samples in token_ids(plain(tiny.target), texts, greedy(40))]]
    assert all(counted["heights"])
    # The target's own drafts: nothing is refused, whatever was left out before.
    assert counted["accepted_per_position"] == counted["drafted_per_position"]


@pytest.mark.full
def test_both_ranks_read_the_end_of_the_same_texts(tiny: TinyModels) -> None:
    """Else their halves of the draft's KV cache would not fit each other."""
    draws = random.Random(52)
    texts = [*prompts(5, seed=51), *(" ".join(draws.choices(WORDS[3:], k=200)) for _ in range(3))]
    outputs, parallel = tensor_parallel_2(
        tiny.target, tiny.target, texts, [[4] * 8], max_tokens=40, dice=11, stairs_height="auto"
    )
    assert outputs == [[samples[0] for samples in token_ids(plain(tiny.target), texts, greedy(40))]]
    assert 0 < parallel["cut_contexts"] < 3
    # The same dice in one process: the same drafts are kept, of the same ones.
    alone = stairs(tiny.target, tiny.target, height=4, stairs_height="auto")
    alone.reset_prefix_cache()
    wild(alone, seed=11)
    before = statistics(alone)
    token_ids(alone, texts, greedy(40))
    after = statistics(alone)
    for name in ("heights", "drafted_per_position", "accepted_per_position", "cut_contexts"):
        assert np.subtract(after[name], before[name]).tolist() == parallel[name]


def test_both_ranks_draw_the_same(tiny: TinyModels) -> None:
    """Drafts and outputs are drawn on each rank, and only one rank's outputs are returned."""
    texts = prompts(5, seed=53)
    seeds = list(range(5))
    options = {"stairs_height": "auto", "draft_sample_method": "probabilistic"}
    # The helper sees to it that both ranks have accepted the same numbers of drafts.
    (seeded, unseeded, written), counted = tensor_parallel_2(
        tiny.target, tiny.noisy, texts, [[4] * 5],
        max_tokens=40, seeds=[seeds, [None] * 5], dice=13, **options,
    )  # fmt: skip
    assert written == [samples[0] for samples in token_ids(plain(tiny.target), texts, greedy(40))]
    assert all(len(set(text)) > 5 for text in unseeded)
    assert 0 < counted["accepted_per_position"][0] < counted["drafted_per_position"][0]
    # One process with the same dice draws the same from the same seeds.
    alone = stairs(tiny.target, tiny.noisy, height=4, **options)
    alone.reset_prefix_cache()
    wild(alone, seed=13)
    params = [sampled(40, seed) for seed in seeds]
    assert seeded == [samples[0] for samples in token_ids(alone, texts, params)]
