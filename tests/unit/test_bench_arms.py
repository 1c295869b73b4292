import pytest

from vllm_stairs.bench import arms
from vllm_stairs.bench.errors import BenchError
from vllm_stairs.config import StairsOptions


def test_plain_has_no_speculative_config():
    arm = arms.parse("plain", None)
    assert (arm.label, arm.method, arm.speculative_config, arm.height) == (
        "plain",
        "plain",
        None,
        0,
    )


def test_draft_model_with_its_batch_size_table():
    arm = arms.parse("draft_model:k=4,table=1-4:4/5-16:2", "models/d")
    assert arm.speculative_config == {
        "method": "draft_model",
        "model": "models/d",
        "num_speculative_tokens": 4,
        "num_speculative_tokens_per_batch_size": [[1, 4, 4], [5, 16, 2]],
    }


def test_ngram_needs_no_draft():
    config = arms.parse("ngram:k=3,max=5,min=1", None).speculative_config
    assert config == {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 5,
        "prompt_lookup_min": 1,
    }


def test_stairs_options_get_their_prefix_and_labels_can_be_given():
    arm = arms.parse("tall@stairs:k=8,layout=expanded,stairs_height=auto,spec.revision=main", "d")
    assert arm.label == "tall"
    assert arm.speculative_config == {
        "method": "stairs",
        "model": "d",
        "num_speculative_tokens": 8,
        "stairs_layout": "expanded",
        "stairs_height": "auto",
        "revision": "main",
    }
    assert arm.height == 8


def test_stairs_arms_say_how_heights_are_chosen():
    def height(text: str) -> str:
        return (arms.parse(text, "d").speculative_config or {})["stairs_height"]

    assert height("stairs:k=4") == StairsOptions().height == "auto"
    assert height("stairs:k=4,height=fixed") == "fixed"


def test_an_arm_can_name_its_own_draft():
    assert arms.parse("stairs:k=1,draft=other", "d").draft == "other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eagle:k=2", "unknown method 'eagle'"),
        ("plain:k=2", "plain takes no options"),
        ("stairs:k=0", "k must be"),
        ("stairs:k=true", "k must be"),
        ("stairs:k", "expected key=value"),
        ("draft_model:k=2,layout=packed", "unknown option 'layout'"),
        ("draft_model:k=2,table=a-b:c", "a table is written"),
        ("draft_model:k=2,table=4-1:2", "a table starts at batch size 1.*4-1:2"),
        ("draft_model:k=2,table=2-4:2", "a table starts at batch size 1"),
        ("draft_model:k=2,table=1-4:2/3-8:1", "do not overlap.*3-8:1"),
        ("draft_model:k=2,table=1-4:-2", "no height is negative"),
        ("draft_model:k=2,k=3", "k is given twice"),
        ("draft_model:k=2,spec.num_speculative_tokens=5", "set by the arm itself"),
        ("stairs:layout=packed,stairs_layout=packed", "stairs_layout is empty, given twice"),
        ("@plain", "the label before the @ is empty"),
        (" @stairs:k=2", "the label before the @ is empty"),
        ("ngram:k=2,max=2,min=3", r"min \(3\) is greater than max \(2\)"),
        ("ngram:k=2,min=-1", "min must be a whole number"),
        ("ngram:k=2,max=x", "max must be a whole number"),
        ("stairs:k=65", "k must be at most 64"),
        ("stairs:k=2,colour=red", "Unknown option 'stairs_colour'"),
        ("stairs:k=2,layout=tall", "Option stairs_layout='tall'"),
        ("stairs:k=2,spec.stairs_height=high", "Option stairs_height='high'"),
    ],
)
def test_bad_arms_get_one_line(text, message):
    with pytest.raises(BenchError, match=message):
        arms.parse(text, "d")


def test_arms_at_the_edge_of_what_is_allowed_are_read():
    assert arms.parse("stairs:k=64", "d").height == 64
    config = arms.parse("ngram:max=1", None).speculative_config
    assert (config["prompt_lookup_max"], config["prompt_lookup_min"]) == (1, 1)
    table = arms.parse("draft_model:k=2,table=9-16:0/1:2", "d").speculative_config
    assert table["num_speculative_tokens_per_batch_size"] == [[9, 16, 0], [1, 1, 2]]


def test_a_draft_is_asked_for():
    with pytest.raises(BenchError, match="needs a draft model: pass --draft"):
        arms.parse("stairs:k=2", None)


def test_labels_must_differ():
    with pytest.raises(BenchError, match="two arms are called 'stairs:k=2'"):
        arms.parse_all(["stairs:k=2", "stairs:k=2"], "d")


def test_default_and_sweep_arms_parse():
    assert [a.method for a in arms.parse_all(arms.default_arms(None), None)] == ["plain", "ngram"]
    methods = [a.method for a in arms.parse_all(arms.default_arms("d"), "d")]
    assert methods.count("draft_model") == 3
    assert methods.count("stairs") == 2
    sweep = arms.parse_all(arms.sweep_arms(range(1, 9), stock=True), "d")
    assert [a.height for a in sweep] == [0, *range(1, 9), *range(1, 9)]
