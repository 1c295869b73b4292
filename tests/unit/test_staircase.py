"""The method against its definition, and the fast paths against the method."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vllm_stairs.acceptor.greedy import validate_batch
from vllm_stairs.acceptor.sampled import validate_sampled_batch
from vllm_stairs.scorer.layouts import expand_rows
from vllm_stairs.staircase import expand, validate

TOKEN = st.integers(0, 3)


def target(text: list[int]) -> int:
    """A deterministic 'model' over four tokens."""
    return (sum((i + 1) * token for i, token in enumerate(text)) * 7 + len(text)) % 4


@given(prefix=st.lists(TOKEN, max_size=6), draft=st.lists(TOKEN, max_size=6))
def test_validation_yields_the_targets_own_text(prefix: list[int], draft: list[int]) -> None:
    stairs = expand(prefix, draft)
    assert [len(row) for row in stairs] == list(range(len(prefix), len(prefix) + len(draft) + 1))
    accepted = validate(draft, [target(row) for row in stairs])
    alone = list(prefix)
    for _ in accepted:
        alone.append(target(alone))
    assert prefix + accepted == alone
    assert 1 <= len(accepted) <= len(draft) + 1
    # Nothing that agrees is thrown away.
    agreeing = 0
    while agreeing < len(draft) and draft[agreeing] == accepted[agreeing]:
        agreeing += 1
    assert len(accepted) == agreeing + 1


def test_validation_step_by_step() -> None:
    assert validate([], [5]) == [5]
    assert validate([1, 2], [1, 2, 3]) == [1, 2, 3]
    assert validate([1, 9, 3], [1, 2, 3, 4]) == [1, 2]
    assert validate([9, 2], [1, 2, 3]) == [1]
    with pytest.raises(ValueError, match="shorter|longer"):
        validate([1, 2], [1])


STAIRCASES = st.lists(
    st.integers(0, 6).flatmap(
        lambda height: st.tuples(
            st.lists(st.integers(-1, 2), min_size=height, max_size=height),
            st.lists(st.integers(0, 2), min_size=height + 1, max_size=height + 1),
        )
    ),
    min_size=1,
    max_size=8,
)


@given(staircases=STAIRCASES)
@settings(max_examples=300)
def test_batch_validation_is_the_reference(
    staircases: list[tuple[list[int], list[int]]],
) -> None:
    heights = [len(draft) for draft, _ in staircases]
    output = validate_batch(
        torch.tensor([token for draft, _ in staircases for token in draft], dtype=torch.int32),
        torch.tensor(heights, dtype=torch.int32),
        torch.tensor([token for _, row in staircases for token in row]),
        max(heights),
    )
    assert output.dtype == torch.int32
    assert output.shape == (len(staircases), max(heights) + 1)
    for row, (draft, predictions) in zip(output.tolist(), staircases, strict=True):
        expected = validate(draft, predictions)
        assert row == expected + [-1] * (max(heights) + 1 - len(expected))


@given(staircases=STAIRCASES, greedy_rows=st.lists(st.booleans(), min_size=8, max_size=8))
@settings(max_examples=100)
def test_greedy_rows_of_a_sampled_batch(
    staircases: list[tuple[list[int], list[int]]], greedy_rows: list[bool]
) -> None:
    heights = [len(draft) for draft, _ in staircases]
    if not max(heights):
        return
    batch = len(staircases)
    logits = torch.full((sum(heights), 3), -5.0)
    flat = [token for _, row in staircases for token in row[:-1]]
    logits[torch.arange(sum(heights)), torch.tensor(flat, dtype=torch.int64)] = 5.0
    is_greedy = torch.tensor(greedy_rows[:batch])
    output = validate_sampled_batch(
        draft_token_ids=torch.tensor([t for draft, _ in staircases for t in draft]),
        num_drafts=torch.tensor(heights),
        target_logits=logits,
        draft_probs=None,
        next_token_ids=torch.tensor([row[-1] for _, row in staircases]),
        uniform=torch.rand(sum(heights), dtype=torch.float64),
        noise=torch.empty(batch, 3).exponential_(),
        is_greedy=is_greedy,
        max_height=max(heights),
    )
    for row, is_row_greedy, (draft, predictions) in zip(
        output.tolist(), greedy_rows, staircases, strict=False
    ):
        kept = [token for token in row if token >= 0]
        assert 1 <= len(kept) <= len(draft) + 1
        assert row[len(kept) :] == [-1] * (len(row) - len(kept))
        assert kept[:-1] == draft[: len(kept) - 1]
        if is_row_greedy:
            assert kept == validate(draft, predictions)


@pytest.mark.parametrize("sampled_drafts", [True, False])
def test_sampled_validation_keeps_the_distribution(sampled_drafts: bool) -> None:
    """20,000 staircases of height 2 over 5 tokens, against the product of the target's rows."""
    torch.manual_seed(0)
    batch, vocabulary = 20_000, 5
    target_logits = torch.randn(3, vocabulary)
    p = target_logits.softmax(-1)
    q = torch.randn(2, vocabulary).softmax(-1)
    if sampled_drafts:
        drafts = torch.stack([torch.multinomial(q[i], batch, replacement=True) for i in (0, 1)], 1)
        draft_probs = q.repeat(batch, 1)
    else:
        drafts = q.argmax(-1).expand(batch, 2)
        draft_probs = None
    output = validate_sampled_batch(
        draft_token_ids=drafts.reshape(-1),
        num_drafts=torch.full((batch,), 2),
        target_logits=target_logits[:2].repeat(batch, 1),
        draft_probs=draft_probs,
        next_token_ids=torch.multinomial(p[2], batch, replacement=True),
        uniform=torch.rand(2 * batch, dtype=torch.float64),
        noise=torch.empty(batch, vocabulary).exponential_(),
        is_greedy=None,
        max_height=2,
    )
    # A token's distribution, given that it was reached, is the target's in that row.
    for position in range(3):
        reached = output[:, position][output[:, position] >= 0]
        counts = torch.bincount(reached.long(), minlength=vocabulary).numpy()
        expected = p[position].numpy() * len(reached)
        statistic = float(((counts - expected) ** 2 / expected).sum())
        assert stats.chi2.sf(statistic, vocabulary - 1) > 1e-4
    # And it does not depend on what came before it.
    pairs = Counter((row[0], row[1]) for row in output.tolist() if row[1] >= 0)
    assert len(pairs) >= vocabulary
    assert math.isclose(sum(pairs.values()), int((output[:, 1] >= 0).sum()))


@given(
    requests=st.lists(
        st.tuples(st.integers(1, 6), st.integers(0, 40), st.booleans()), min_size=1, max_size=8
    )
)
def test_expanded_rows_are_the_stairs(requests: list[tuple[int, int, bool]]) -> None:
    query_lens = np.array([length for length, _, _ in requests])
    context = np.array([context for _, context, _ in requests])
    staircase = np.array([flag for _, _, flag in requests])
    starts = np.concatenate([[0], np.cumsum(query_lens)])
    rows = expand_rows(starts, context + query_lens, staircase)
    expected = []
    for index, (length, before, flag) in enumerate(requests):
        if flag:
            prefix = list(range(before + 1))
            stairs = expand(prefix, list(range(length - 1)))
            expected += [
                (index, starts[index] + i, 1, len(stair)) for i, stair in enumerate(stairs)
            ]
        else:
            expected.append((index, starts[index], length, before + length))
    actual = list(
        zip(
            rows.source,
            rows.query_start_loc[:-1],
            np.diff(rows.query_start_loc),
            rows.seq_lens,
            strict=True,
        )
    )
    assert actual == expected
