"""Bookkeeping and planning of the proposer."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_stairs.proposer.draft_kv import DraftKVLedger
from vllm_stairs.proposer.plan import (
    CONTEXT_END,
    RequestLimits,
    context_start,
    height_ceiling,
    plan_passes,
)


@given(backlogs=st.lists(st.integers(1, 50), min_size=1, max_size=10), budget=st.integers(10, 60))
def test_passes_read_everything_once_within_the_budget(backlogs: list[int], budget: int) -> None:
    passes = plan_passes(backlogs, budget)
    assert [sum(column) for column in zip(*passes, strict=True)] == backlogs
    assert all(0 < sum(chunk) <= budget for chunk in passes)
    assert all(tokens >= 1 for tokens in passes[-1])


LIMITS = RequestLimits(
    max_height=5, min_tokens=0, max_tokens=100, stop_token_ids=frozenset({2}), draftable=True
)


@pytest.mark.parametrize(
    ("changes", "num_tokens", "newest", "expected"),
    [
        ({}, 10, 7, 4),
        ({"min_tokens": 13}, 10, 7, 2),  # the token after the drafts may not end it either
        ({"min_tokens": 11}, 10, 7, 0),
        ({"min_tokens": 10}, 10, 7, 4),
        ({"max_height": 0}, 10, 7, 0),
        ({"max_height": 2}, 10, 7, 2),
        ({"draftable": False}, 10, 7, 0),
        ({}, 10, 2, 0),  # the request has ended
        ({}, 97, 7, 2),  # three tokens are left: two drafts and the target's own
        ({}, 99, 7, 0),
        ({"max_tokens": 10_000}, 126, 7, 1),  # the target's own limit of 128
        ({"max_tokens": 10_000}, 127, 7, 0),
        ({"max_tokens": 10_000}, 118, 7, 2),  # a draft of 120
    ],
)
def test_height_ceiling(changes: dict, num_tokens: int, newest: int, expected: int) -> None:
    limits = RequestLimits(**{**LIMITS.__dict__, **changes})
    draft_max_len = 120 if num_tokens == 118 else 128
    assert height_ceiling(limits, num_tokens, newest, 4, 128, draft_max_len) == expected


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [([], 0), ([5], 1), ([2], 1), ([5, 6, 7], 3), ([5, 2, 7], 2), ([5, 3, 2], 2), ([2, 2], 1)],
)
def test_what_follows_a_stop_token_is_no_text(token_ids: list[int], expected: int) -> None:
    limits = RequestLimits(8, 0, 100, frozenset({2, 3}), True)
    assert limits.until_end(token_ids) == expected
    assert RequestLimits(8, 0, 100, frozenset(), True).until_end(token_ids) == len(token_ids)


@given(st.integers(1, 5000), st.integers(0, 5000), st.sampled_from([1, 16, 32, 128]))
def test_where_a_context_can_begin(num_tokens: int, num_valid: int, block_size: int) -> None:
    first = context_start(num_tokens, min(num_valid, num_tokens - 1), block_size)
    assert first % block_size == 0
    if first:
        assert CONTEXT_END / 2 <= num_tokens - first < 2 * CONTEXT_END
        assert first - num_valid >= CONTEXT_END / 2
    elif num_valid == 0:
        assert num_tokens < 3 * CONTEXT_END


class TestLedger:
    """Blocks of four tokens."""

    def ledger(self) -> DraftKVLedger:
        return DraftKVLedger(num_blocks=20, block_size=4)

    def test_a_request_that_drafts_every_step(self) -> None:
        ledger, blocks = self.ledger(), [1, 2, 3]
        ledger.admit("a", blocks, 0)
        assert ledger.valid_tokens("a", blocks, 5) == 0
        ledger.wrote("a", 6 + 3)  # six tokens of text, then three of four drafts
        ledger.settle("a", blocks, 7)  # one draft was kept: eight tokens, seven behind the newest
        assert ledger.valid_tokens("a", blocks, 7) == 7
        ledger.wrote("a", 8 + 3)
        ledger.settle("a", blocks, 12)  # all were kept: the last draft was never read
        assert ledger.valid_tokens("a", blocks, 12) == 11

    def test_rejected_drafts_do_not_pass_for_text_later(self) -> None:
        ledger, blocks = self.ledger(), [1, 2, 3, 4]
        ledger.admit("a", blocks, 0)
        ledger.wrote("a", 9)
        ledger.settle("a", blocks, 6)
        # Steps without drafts: the text grows past what the draft has read.
        assert ledger.valid_tokens("a", blocks, 12) == 6

    def test_inherited_blocks(self) -> None:
        ledger = self.ledger()
        ledger.admit("a", [1, 2, 3], 0)
        ledger.wrote("a", 10)
        ledger.settle("a", [1, 2, 3], 10)
        ledger.release("a")
        # Another request shares the two full blocks, and gets a fresh one.
        ledger.admit("b", [1, 2, 7], 8)
        assert ledger.valid_tokens("b", [1, 2, 7], 9) == 8
        # A block that is given to somebody else is not valid any more.
        ledger.extend([2])
        ledger.admit("c", [1, 2, 8], 8)
        assert ledger.valid_tokens("c", [1, 2, 8], 9) == 4

    def test_a_hole_in_a_shared_prefix_is_filled_once(self) -> None:
        ledger = self.ledger()
        ledger.admit("plain", [1, 2], 0)  # never drafts
        ledger.release("plain")
        ledger.admit("a", [1, 2, 3], 8)
        ledger.admit("b", [1, 2, 4], 8)
        assert ledger.valid_tokens("a", [1, 2, 3], 9) == 0
        assert ledger.valid_tokens("b", [1, 2, 4], 9) == 0
        ledger.wrote("a", 10)
        ledger.settle("a", [1, 2, 3], 10)
        assert ledger.valid_tokens("b", [1, 2, 4], 9) == 8

    def test_a_context_that_begins_later(self) -> None:
        ledger, blocks = self.ledger(), [1, 2, 3, 4]
        ledger.admit("a", blocks, 0)
        ledger.begin_at("a", 8)
        assert ledger.first_token("a") == ledger.valid_tokens("a", blocks, 11) == 8
        ledger.wrote("a", 12 + 2)
        ledger.settle("a", blocks, 13)
        assert ledger.valid_tokens("a", blocks, 13) == 13
        # Without its beginning, what was written is no context for anybody else,
        ledger.admit("b", [1, 2, 3, 5], 12)
        assert ledger.valid_tokens("b", [1, 2, 3, 5], 13) == 0
        # and a request that comes again begins anew.
        ledger.admit("a", blocks, 12)
        assert ledger.first_token("a") == ledger.valid_tokens("a", blocks, 13) == 0

    def test_preemption(self) -> None:
        ledger = self.ledger()
        ledger.admit("a", [1, 2], 0)
        ledger.wrote("a", 8)
        ledger.admit("b", [2], 0)  # took one of its blocks while it was out
        ledger.admit("a", [1, 5], 4)
        assert ledger.valid_tokens("a", [1, 5], 7) == 0  # its last drafts were never judged
        ledger.settle("a", [1, 5], 7)

    @pytest.mark.parametrize("seed", range(20))
    def test_never_claims_what_was_not_written(self, seed: int) -> None:
        """Random requests over few blocks against a model that remembers every slot."""
        rng = random.Random(seed)
        size, ledger = 4, DraftKVLedger(12, 4)
        texts: dict[str, list[int]] = {}
        blocks: dict[str, list[int]] = {}
        slots: dict[tuple[int, int], tuple[int, ...]] = {}
        free = list(range(12))
        for step in range(300):
            if free and len(texts) < 3 and rng.random() < 0.3:
                name = f"r{step}"
                texts[name], blocks[name] = [rng.randrange(99), rng.randrange(99)], [free.pop(0)]
                ledger.admit(name, blocks[name], 0)
                continue
            if not texts:
                continue
            name = rng.choice(list(texts))
            text, held = texts[name], blocks[name]
            ledger.settle(name, held, len(text) - 1)
            valid = ledger.valid_tokens(name, held, len(text) - 1)
            for i in range(valid):
                assert slots.get((held[i // size], i % size)) == tuple(text[: i + 1])
            while len(held) * size < len(text) + 6 and free:
                new = free.pop(0)
                held.append(new)
                ledger.extend([new])
            if len(held) * size < len(text) + 6 or rng.random() < 0.1:
                free += held
                ledger.release(name)
                del texts[name], blocks[name]
                continue
            kept = 0
            if rng.random() < 0.6:
                drafts = [rng.randrange(99) for _ in range(4)]
                read = text + drafts[:3]
                for i in range(valid, len(read)):
                    slots[held[i // size], i % size] = tuple(read[: i + 1])
                ledger.wrote(name, len(read))
                kept = rng.randint(0, 4)
                text += drafts[:kept]
            text.append(rng.randrange(99))
