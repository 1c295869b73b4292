"""The verdict of ``bench compare``: what may not pass for "no regression"."""

import math

import pytest

from tests.unit.test_bench_results import example
from vllm_stairs.bench import cli, results, summary
from vllm_stairs.bench.compare import compare
from vllm_stairs.bench.errors import BenchError


def test_compare_tells_a_fall_from_noise():
    changes = {c.arm: c for c in compare(example(), example(stairs=(9.0, 9.5)), 0.05, force=False)}
    assert changes["stairs:k=2"].fell
    assert changes["stairs:k=2"].quantity == "ratio to plain"
    assert not changes["plain"].fell
    unchanged = compare(example(), example(), 0.0, force=False)
    assert all(not c.fell and c.within_noise for c in unchanged)


def test_a_slower_machine_is_no_regression():
    slow = example(stairs=(6.0, 6.5), plain=(5.0, 5.0), stock=(5.5, 6.0))
    assert not any(change.fell for change in compare(example(), slow, 0.05, force=False))


def test_compare_refuses_other_prompts_and_tolerances():
    other = example()
    other.prompts["hash"] = "other"
    with pytest.raises(BenchError, match="differ in prompts"):
        compare(example(), other, 0.05, force=False)
    assert compare(example(), other, 0.05, force=True)
    with pytest.raises(BenchError, match="--tolerance"):
        compare(example(), example(), 5, force=False)


def without(arm):
    less = example()
    del less.arms[arm]
    less.measurements = [m for m in less.measurements if m["arm"] != arm]
    less.summary = summary.summarise(less)
    return less


def test_a_missing_arm_is_a_failure():
    changes = {c.arm: c for c in compare(example(), without("stairs:k=2"), 0.05, force=False)}
    assert changes["stairs:k=2"].problem == "not in the newer result"
    assert changes["stairs:k=2"].failed
    assert not changes["draft_model:k=2"].failed


def test_a_missing_plain_is_a_failure_of_every_arm():
    changes = {c.arm: c for c in compare(example(), without("plain"), 0.05, force=False)}
    assert changes["stairs:k=2"].problem == "no plain in the newer result"
    assert all(change.failed for change in changes.values())


def test_without_plain_in_the_older_result_tokens_per_second_are_judged():
    slow = without("plain")
    for measurement in slow.measurements:
        measurement["tokens_per_s"] /= 2
    for after in (slow, example(stairs=(6.0, 6.5))):
        changes = {c.arm: c for c in compare(without("plain"), after, 0.05, force=False)}
        assert changes["stairs:k=2"].quantity == "tokens/s"
        assert changes["stairs:k=2"].fell


def test_a_figure_that_is_no_number_is_a_failure():
    changes = compare(example(), example(stairs=(math.nan, math.nan)), 0.05, force=False)
    assert {c.arm for c in changes if c.failed} == {"stairs:k=2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.settings.update(target="other"), "differ in target"),
        (lambda r: r.settings.update(engine=[["block_size", 16]]), "differ in engine"),
        (lambda r: r.settings.update(max_model_len=128), "differ in max_model_len"),
        (lambda r: r.settings.update(seed=1), "differ in seed"),
        (
            lambda r: r.arms["stairs:k=2"].update(speculative_config={"model": "e"}),
            "differ in the draft of stairs:k=2",
        ),
        (
            lambda r: r.arms["stairs:k=2"].update(
                speculative_config={"model": "d", "stairs_layout": "expanded"}
            ),
            "differ in the speculative_config of stairs:k=2",
        ),
    ],
)
def test_unlike_results_need_force(change, message):
    other = example()
    change(other)
    with pytest.raises(BenchError, match=message):
        compare(example(), other, 0.05, force=False)
    assert compare(example(), other, 0.05, force=True)


def test_models_are_told_apart_by_their_weights_not_their_paths():
    before, after = example(), example()
    for result, path, weights in ((before, "t", "1"), (after, "elsewhere/t", "1")):
        result.settings["target"] = path
        result.provenance["models"] = {"target": {"weights_hash": weights}}
    assert compare(before, after, 0.05, force=False)
    after.settings["target"] = "t"
    after.provenance["models"] = {"target": {"weights_hash": "2"}}
    with pytest.raises(BenchError, match="differ in target"):
        compare(before, after, 0.05, force=False)


def test_exit_status_1_and_the_reason_for_a_missing_arm(tmp_path, capsys):
    pytest.importorskip("rich")
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    results.save(example(), paths[0])
    results.save(without("stairs:k=2"), paths[1])
    assert cli.main(["compare", *map(str, paths)]) == 1
    assert "not in the newer result" in capsys.readouterr().out
    assert cli.main(["compare", str(paths[0]), str(paths[0])]) == 0
