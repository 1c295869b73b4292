"""What a dedicated draft knows, how long it is waited for, how it is kept running."""

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from vllm_stairs.placement.patience import (
    HUNG_SECONDS,
    BackOff,
    Foresight,
    fixed_patience_ms,
    hung_after_seconds,
    worth_ms,
)
from vllm_stairs.placement.protocol import (
    Reply,
    Step,
    Text,
    decode_reply,
    decode_step,
    encode,
)
from vllm_stairs.placement.supervisor import Supervisor
from vllm_stairs.placement.texts import Row, Texts


def texts(rows: int = 4, length: int = 32, blocks: int = 33, block_size: int = 4) -> Texts:
    table = np.zeros((rows, -(-length // block_size)), np.int32)
    return Texts(np.zeros((rows, length), np.int32), table, blocks, block_size)


def known(store: Texts, row: Row) -> list[int]:
    return store.token_ids[row.index, : row.written].tolist()


def test_drafts_that_were_right_stay() -> None:
    store = texts()
    row = store.extend("a", 0, [1, 2, 3])
    assert row is not None
    assert (row.length, row.valid, row.ready) == (3, 0, 0)
    store.wrote(row, [4, 5, 6, 7, 8], [0.9, 0.8, 0.7, 0.6, 0.5])
    assert (row.valid, row.ready) == (7, 5)
    # The target kept three and wrote what the draft would have written next.
    assert store.extend("a", 3, [4, 5, 6, 7]) is row
    assert (row.length, row.valid, row.ready) == (7, 7, 1)
    assert store.drafts(row, 4) == [8]
    assert store.confidences_of(row, 4) == pytest.approx([0.5])


def test_what_follows_a_wrong_draft_goes() -> None:
    store = texts()
    row = store.extend("a", 0, [1, 2, 3])
    assert row is not None
    store.wrote(row, [4, 5, 6, 7])
    store.extend("a", 3, [4, 9])
    assert known(store, row) == [1, 2, 3, 4, 9]
    assert (row.length, row.valid, row.ready) == (5, 4, 0)


def test_text_that_is_sent_again_changes_nothing() -> None:
    store = texts()
    row = store.extend("a", 0, [1, 2, 3])
    assert row is not None
    store.wrote(row, [4, 5])
    store.extend("a", 1, [2, 3])
    assert (row.length, row.valid, row.ready) == (3, 4, 2)
    store.extend("a", 1, [2, 3, 4, 8, 9])
    assert known(store, row) == [1, 2, 3, 4, 8, 9]
    assert (row.length, row.valid) == (6, 4)


@pytest.mark.parametrize(("start", "length"), [(1, 2), (4, 1), (0, 33), (0, 0), (3, 30)])
def test_text_that_cannot_be_taken(start: int, length: int) -> None:
    """A gap, or more than there is room for; the request that is known stays as it is."""
    store = texts()
    row = store.extend("known", 0, [1, 2, 3])
    assert row is not None
    key = "known" if start == 3 or start == 4 else "unknown"
    assert store.extend(key, start, [5] * length) is None
    assert known(store, row) == [1, 2, 3]
    assert len(store) == 1


def test_rows_are_taken_from_the_least_recently_used() -> None:
    store = texts(rows=2)
    store.extend("a", 0, [1])
    store.extend("b", 0, [2])
    store.extend("a", 1, [3])
    row = store.extend("c", 0, [4])
    assert row is not None
    assert store.extend("b", 1, [5]) is None, "b is gone"
    assert store.extend("b", 0, [2, 5], keep={"a", "c"}) is None, "there is no other row"
    assert store.extend("a", 2, [6]) is not None


def test_blocks_are_taken_from_the_least_recently_used() -> None:
    store = texts(blocks=5, block_size=4)
    first = store.extend("a", 0, [1] * 8)
    second = store.extend("b", 0, [2] * 4)
    assert first is not None
    assert second is not None
    assert store.reserve(first, 10) == 10
    assert (store.reserve(second, 8, keep={"a"}), len(second.blocks)) == (4, 1)
    assert store.reserve(second, 12) == 12
    assert store.extend("a", 8, [1]) is None
    assert sorted(second.blocks) == sorted(set(second.blocks))
    assert 0 not in second.blocks
    store.forget("b")
    again = store.extend("c", 0, [3])
    assert again is not None
    assert store.reserve(again, 100) == 16, "all four blocks are free again"


def draft_of(text: list[int]) -> int:
    """The token that the draft in the test below writes."""
    return (sum(text) * 7 + len(text)) % 11


@pytest.mark.parametrize("seed", range(20))
def test_any_course_of_events(seed: int) -> None:
    """Whatever is kept, sent again or given up: keys and values are those of the tokens in their
    places, and drafts are what a draft writes that reads the whole text.
    """
    rng = random.Random(seed)
    length, block_size = 48, 4
    store = texts(rows=3, length=length, blocks=20, block_size=block_size)
    # What the cache holds, by slot: the token that was read there.
    cache: dict[int, int] = {}
    wholes: dict[int, list[int]] = {}
    sent: dict[int, int] = {}
    asked = 0
    for _ in range(400):
        key = rng.choice([*wholes, len(wholes)]) if rng.random() < 0.9 else len(wholes)
        key %= 5
        text = wholes.setdefault(key, [rng.randrange(11) for _ in range(rng.randint(1, 12))])
        if len(text) > 30:
            store.forget(key)
            del wholes[key]
            sent.pop(key, None)
            continue
        start = max(sent.get(key, 0) - rng.randint(0, 2), 0)
        row = store.extend(key, start, text[start:], keep={key})
        if row is None:
            assert start, "a text that is sent whole is always taken"
            sent[key] = 0
            continue
        sent[key] = len(text)
        goal = store.reserve(row, len(text) + rng.randint(1, 8), keep={key})
        while row.written < goal:
            for place in range(row.valid, row.written):
                slot = row.blocks[place // block_size] * block_size + place % block_size
                cache[slot] = int(store.token_ids[row.index, place])
            seen = [
                cache[row.blocks[place // block_size] * block_size + place % block_size]
                for place in range(row.written)
            ]
            assert seen == known(store, row), "stale keys and values"
            store.wrote(row, [draft_of(seen)])
            assert row.valid == row.written - 1
        drafts = store.drafts(row, 8)
        expected = list(text)
        for token in drafts:
            assert token == draft_of(expected)
            expected.append(token)
        asked += len(drafts)
        kept = rng.randint(0, len(drafts))
        wrong = rng.randrange(11) if rng.random() < 0.5 else draft_of(text + drafts[:kept])
        text += [*drafts[:kept], wrong]
    assert asked > 200


# ----------------------------------------------------------------------------- messages


def test_messages() -> None:
    step = Step("engine", [Text(3, 17, [5, 70_000], 4)], [1, 2], 12.5, 5, True)
    assert decode_step(encode(step)) == step
    reply = Reply([[1, 2], []], [[0.5, 0.25], []], [3], 1.5, False)
    assert decode_reply(encode(reply)) == reply


def test_bytes_per_token() -> None:
    """What the module's docstring promises, for ids of any size."""
    for token in (1, 200, 70_000, 2**31):
        sizes = [
            len(encode(Step("engine", [Text(1, 10, [token] * n, 4)], [], 1.0, 5, False)))
            for n in (1000, 2000)
        ]
        assert sizes[1] - sizes[0] <= 5 * 1000
    drafts = [len(encode(Reply([[70_000] * n], [[0.5] * n], [], 1.0, True))) for n in (1000, 2000)]
    assert drafts[1] - drafts[0] == 14 * 1000


NO_STEPS = [b"", b"\x80", b"\x95\x01", encode(Reply([], [], [], 1.0, True))]


@pytest.mark.parametrize("message", NO_STEPS)
def test_what_is_no_step_is_refused(message: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_step(message)


# ----------------------------------------------------------------------------- patience


def test_worth() -> None:
    assert worth_ms(2.5, 1, 10.0) == 25.0
    assert worth_ms(2.5, 5, 10.0) == 5.0


def test_fixed_patience_is_bounded() -> None:
    assert fixed_patience_ms(4, 1, 10.0) == 160.0
    assert fixed_patience_ms(4, 1, 0.0) == 50.0
    assert fixed_patience_ms(64, 1, 500.0) == 1000.0
    assert fixed_patience_ms(16, 4, 10.0) == fixed_patience_ms(4, 1, 10.0)


def test_reading_a_long_text_is_not_hanging() -> None:
    assert hung_after_seconds(100.0, 4) < HUNG_SECONDS + 1
    assert hung_after_seconds(100.0, 8000) > HUNG_SECONDS + 60


def test_back_off() -> None:
    back_off = BackOff(first=1.0, longest=60.0, proof=3)
    assert [back_off.failed() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    back_off.answered()
    assert back_off.failed() == 60, "one answer proves nothing"
    for _ in range(3):
        back_off.answered()
    assert back_off.failed() == 1


# --------------------------------------------------------------------------- supervisor


class Drafts:
    """Drafts of the tests: numbers, started in turn."""

    def __init__(self, failing: tuple[int, ...] = ()) -> None:
        self.failing = failing
        self.started = 0
        self.ended: list[int] = []
        self.supervisor: Supervisor[int] = Supervisor(
            self.start, self.wait, self.ended.append, BackOff(first=0.01, longest=0.02)
        )

    def start(self) -> int:
        self.started += 1
        return self.started

    def wait(self, draft: int) -> dict[str, Any]:
        if draft in self.failing:
            raise RuntimeError(f"draft {draft} fails")
        return {"draft": draft}


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_writing_on_stops_where_it_is_in_vain() -> None:
    foresight = Foresight()
    assert foresight.pays()
    for _ in range(20):
        foresight.saw(0)
        foresight.pays()
    # From then on one time in 16.
    assert sum(foresight.pays() for _ in range(160)) == 10


def test_writing_on_goes_on_where_it_saves_passes() -> None:
    """One question in four finds four drafts: a pass a question."""
    foresight = Foresight()
    for number in range(400):
        assert foresight.pays()
        foresight.saw(4 if number % 4 == 0 else 0)


def test_writing_on_is_found_out_to_pay_again() -> None:
    foresight = Foresight()
    for _ in range(50):
        foresight.pays()
        foresight.saw(0)
    for _ in range(200):
        foresight.pays()
        foresight.saw(4)
    assert all(foresight.pays() for _ in range(20))


def test_supervisor_replaces_what_is_lost() -> None:
    before = threading.active_count()
    drafts = Drafts(failing=(2, 3))
    drafts.supervisor.begin()
    assert drafts.supervisor.first(10) == {"draft": 1}
    until(lambda: drafts.supervisor.draft == 1)
    drafts.supervisor.lost("a test")
    drafts.supervisor.lost("said twice")
    assert drafts.supervisor.draft is None
    until(lambda: drafts.supervisor.draft == 4)
    assert drafts.ended == [1, 2, 3]
    drafts.supervisor.close()
    assert drafts.supervisor.draft is None
    assert drafts.ended == [1, 2, 3, 4]
    assert threading.active_count() <= before


def test_supervisor_says_that_the_first_fails() -> None:
    drafts = Drafts(failing=(1,))
    drafts.supervisor.begin()
    with pytest.raises(RuntimeError, match="draft 1 fails"):
        drafts.supervisor.first(10)
    until(lambda: drafts.ended == [1])
    drafts.supervisor.close()
    assert drafts.started == 1


def test_supervisor_ends_what_it_is_starting() -> None:
    drafts = Drafts()
    waiting, ended = threading.Event(), threading.Event()

    def end(draft: int) -> None:
        drafts.ended.append(draft)
        ended.set()

    def wait(draft: int) -> dict[str, Any]:
        waiting.set()
        assert ended.wait(10)
        raise RuntimeError("ended meanwhile")

    supervisor: Supervisor[int] = Supervisor(drafts.start, wait, end)
    supervisor.begin()
    assert waiting.wait(10)
    start = time.monotonic()
    supervisor.close()
    assert time.monotonic() - start < 5
    assert set(drafts.ended) == {1}
