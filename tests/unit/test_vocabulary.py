"""Which ids a draft may write: frequencies, files of ids, and every error about them."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from vllm_stairs import config
from vllm_stairs.proposer.vocabulary import (
    COVERAGE,
    FREQUENCIES_FILE,
    by_frequency,
    check_index,
    choose_vocabulary,
    covering_ids,
    read_frequencies,
    read_ids,
    save_frequencies,
)

COUNTS = np.array([10, 0, 500, 30, 0, 460, 0, 0, 0, 0])


@given(
    counts=st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any),
    share=st.floats(0.001, 1.0),
)
def test_covering_ids_are_the_fewest(counts: list[int], share: float) -> None:
    ids = covering_ids(np.array(counts), share)
    kept = sorted((counts[i] for i in ids), reverse=True)
    assert len(set(ids.tolist())) == len(ids)
    assert kept == sorted(counts, reverse=True)[: len(kept)]
    # Within the rounding of share * total.
    assert sum(kept) >= share * sum(counts) * (1 - 1e-9)
    assert sum(kept[:-1]) < share * sum(counts) * (1 + 1e-9)


def test_ties_go_to_the_smaller_id() -> None:
    assert by_frequency(np.array([1, 3, 1, 3, 0])).tolist() == [1, 3, 0, 2, 4]


def test_auto_keeps_what_covers_the_counts() -> None:
    counts = np.zeros(100, np.int64)
    counts[[7, 3, 50, 99]] = [5000, 4000, 997, 3]
    kept = choose_vocabulary("auto", counts, 100)
    assert kept is not None
    assert kept.ids == (3, 7, 50)
    assert COVERAGE <= kept.share < 1
    kept = choose_vocabulary("auto", counts, 100, always=[2, 3, 120])
    assert kept is not None
    assert kept.ids == (2, 3, 7, 50)


def test_auto_leaves_a_head_alone() -> None:
    assert choose_vocabulary("auto", None, 100) is None
    assert choose_vocabulary("auto", np.ones(100, np.int64), 100) is None
    assert choose_vocabulary("full", COUNTS, 10) is None
    # Half of the vocabulary is not too much, one id more is.
    half = np.array([1, 1, 1, 1, 0, 0, 0, 0])
    assert choose_vocabulary("auto", half, 8) is not None
    assert choose_vocabulary("auto", half, 8, always=[7]) is None


def test_a_number_of_ids() -> None:
    kept = choose_vocabulary(3, COUNTS, 10)
    assert kept is not None
    assert kept.ids == (2, 3, 5)
    assert kept.share == pytest.approx(0.99)
    # Ids without a count come last, the padding behind the counts among them.
    kept = choose_vocabulary(12, COUNTS, 12)
    assert kept is not None
    assert kept.ids == tuple(range(12))


@pytest.mark.parametrize(
    ("name", "text"),
    [("ids.json", "[5, 3, 5]"), ("ids", " [5,\n3]"), ("ids.txt", "5\n\n3\n5\n")],
)
def test_files_of_ids(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    kept = choose_vocabulary(str(tmp_path / name), None, 10, always=[9])
    assert kept is not None
    assert kept.ids == (3, 5, 9)
    assert kept.share is None
    kept = choose_vocabulary(str(tmp_path / name), COUNTS, 10)
    assert kept is not None
    assert kept.share == pytest.approx(0.49)


def test_a_safetensors_file_of_ids(tmp_path: Path) -> None:
    save_file({"ids": np.array([8, 1], np.int32)}, tmp_path / "ids.safetensors")
    assert read_ids(tmp_path / "ids.safetensors") == [8, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ids", None, "there is no such file; give 'auto', 'full', a number of ids or a file"),
        ("ids.json", "[]", "there is no id in it"),
        ("ids.txt", "\n", "there is no id in it"),
        ("ids.json", "[1, 2", "not JSON"),
        ("ids.json", '{"ids": [1]}', "must be a JSON list of whole numbers"),
        ("ids.json", "[1, 2.5]", "must be a JSON list of whole numbers"),
        ("ids.json", "[true]", "must be a JSON list of whole numbers"),
        ("ids.txt", "1\ntwo\n", "line 2 is no id: 'two'"),
        ("ids.txt", "1\n10\n", "id 10 lies outside the vocabulary (0 to 9)"),
        ("ids.txt", "1\n-1\n", "id -1 lies outside the vocabulary (0 to 9)"),
        ("ids.txt", b"\xff\xfe", "cannot be read"),
        ("ids.safetensors", "no safetensors", "must hold a tensor 'ids'"),
        ("ids.safetensors", {"ids": np.ones((2, 2), np.int64)}, "must hold a tensor 'ids'"),
        ("ids.safetensors", {"ids": np.ones(2, np.float32)}, "must hold a tensor 'ids'"),
        ("ids.safetensors", {"counts": np.ones(2, np.int64)}, "must hold a tensor 'ids'"),
    ],
)
def test_bad_files_of_ids(tmp_path: Path, name: str, content: object, message: str) -> None:
    file = tmp_path / name
    if isinstance(content, dict):
        save_file(content, file)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        file.write_text(str(content))
    with pytest.raises(ValueError) as raised:
        choose_vocabulary(str(file), None, 10)
    assert str(raised.value).startswith(f"stairs_draft_vocab={file}")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bad_numbers() -> None:
    with pytest.raises(ValueError, match="stairs_draft_vocab=11: the vocabulary has 10 ids; .*1"):
        choose_vocabulary(11, COUNTS, 10)
    with pytest.raises(ValueError, match=f"stairs_draft_vocab=5: .*{FREQUENCIES_FILE}.*'full'"):
        choose_vocabulary(5, None, 10)
    with pytest.raises(ValueError, match="counts id 5, outside the vocabulary of 5 ids"):
        choose_vocabulary("auto", COUNTS, 5)


@pytest.mark.parametrize("value", [0, -3, "0", "", True, 2.5, [1, 2]])
def test_values_that_the_option_does_not_take(value: object) -> None:
    with pytest.raises(ValueError, match=r"stairs_draft_vocab=.*: must be 'auto', 'full'"):
        config.parse_options({"stairs_draft_vocab": value})


def test_values_that_the_option_takes() -> None:
    for value, expected in (
        ("auto", "auto"), ("full", "full"), (300, 300), ("300", 300), ("a/b.json", "a/b.json"),
        (Path("a/b.json"), "a/b.json"),
    ):  # fmt: skip
        assert config.parse_options({"stairs_draft_vocab": value}).draft_vocab == expected
    assert config.parse_options({}).draft_vocab == "auto"


@pytest.mark.parametrize(
    "tensors",
    [
        {"counts": np.zeros(4, np.int64)},
        {"counts": np.array([3, -1])},
        {"counts": np.ones(4, np.float32)},
        {"counts": np.ones((2, 2), np.int64)},
        {"ids": np.ones(4, np.int64)},
    ],
)
def test_bad_frequencies(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    file = tmp_path / FREQUENCIES_FILE
    save_file(tensors, file)
    with pytest.raises(ValueError, match="is not a file of token frequencies"):
        read_frequencies(file)


def test_frequencies_beside_weights(tmp_path: Path) -> None:
    """vLLM must be told that they are none."""
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    save_file({"counts": COUNTS}, tmp_path / FREQUENCIES_FILE)
    with pytest.raises(ValueError, match=r"load token_frequencies.*save_frequencies"):
        check_index(tmp_path)
    save_frequencies(tmp_path, COUNTS + 1)
    check_index(tmp_path)
    assert load_file(tmp_path / FREQUENCIES_FILE)["counts"].dtype == np.int64
    assert read_frequencies(tmp_path / FREQUENCIES_FILE).tolist() == (COUNTS + 1).tolist()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"w": "model.safetensors"}
    # An index that is there already stays.
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    save_frequencies(tmp_path, COUNTS)
    assert (tmp_path / "model.safetensors.index.json").read_text() == "{}"
