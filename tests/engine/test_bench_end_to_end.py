"""``vllm-stairs bench run`` on a tiny model: real engines, each arm a process."""

import functools
import json
from pathlib import Path

import pytest

from tests.tiny import TinyModels
from vllm_stairs.bench import cli, record, results, run

HEIGHT = 2
PROMPTS = [
    "the cat sat on the mat",
    "a dog ran from the red moon",
    "yes no true false null",
    "the sky the sun the green blue",
]
ARMS = ["plain", f"draft_model:k={HEIGHT}", "fixed"]


@pytest.fixture(
    scope="module",
    params=["0", pytest.param("1", marks=pytest.mark.full)],
    ids=["in_its_process", "as_users_have_it"],
)
def measured(
    request: pytest.FixtureRequest, tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> tuple[results.Result, Path]:
    """A result and its folder; each arm is a process, its engine in it or in two further ones."""
    folder = tmp_path_factory.mktemp("bench")
    prompts = folder / "prompts.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({"question_id": i, "category": "qa" if i % 2 else "rag", "turns": [text]})
            + "\n"
            for i, text in enumerate(PROMPTS)
        )
    )
    output = folder / "result.json"
    command = [
        "run", "--target", str(tiny.target), "--draft", str(tiny.noisy), "--dtype", "float32",
        "--eager", "--max-model-len", "256", "--prompts", str(prompts),
        "--batch-sizes", "1", "2", "--repeats", "2", "--turns", "2", "--output-tokens", "16",
        "--record", str(folder / "record.jsonl"), "--record-height", "4",
        "--engine", "block_size=32", "--output", str(output),
    ]  # fmt: skip
    for arm in (*ARMS[:2], f"{ARMS[2]}@stairs:k={HEIGHT},height=fixed"):
        command += ["--arm", arm]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", request.param)
        # Times are of no interest here: pauses are left out, engines start at the same time.
        patch.setattr(run, "SETTLE_SECONDS", 0.0)
        patch.setattr(run, "Run", functools.partial(run.Run, together=True))
        assert cli.main(command) == 0
    return results.load(output), folder


def test_every_arm_has_every_figure(measured: tuple[results.Result, Path]) -> None:
    result, _ = measured
    assert len(result.measurements) == len(ARMS) * 2 * 2
    assert result.prompts["groups"] == {"qa": 2, "rag": 2}
    assert result.bandwidth is not None
    assert result.bandwidth["bytes_per_s"] > 1e8
    for row in result.summary:
        assert row["tokens_per_s"] > 0
        assert row["ratio_to_plain"]["median"] > 0
        assert row["best_draft_model"] == ARMS[1]
        assert row["ttft_ms"]["p50"] > 0
        assert row["itl_ms"]["p99"] >= row["itl_ms"]["p50"]
        assert 0 < row["limit"]["share"] < 1
        assert sum(row["time"]["share"].values()) == pytest.approx(1)
    for label in ARMS:
        arm = result.arms[label]
        assert arm["startup_seconds"] > 0
        assert arm["peak_memory_bytes"]["resident"] > 1e8
        assert arm["engine"]["dtype"] == "float32"


def test_passes_were_served_in_turns(measured: tuple[results.Result, Path]) -> None:
    """Engines were held with requests in flight, stopped, and went on; nothing was lost."""
    result, _ = measured
    for measurement in result.measurements:
        (first, _), (second, _) = measurement["turns"]
        assert first + second == 16 * len(PROMPTS)
        # A turn ends with the step that reaches half of the tokens.
        assert 0 <= first - 16 * len(PROMPTS) / 2 <= measurement["batch"] * (HEIGHT + 1)
        assert sum(seconds for _, seconds in measurement["turns"]) == pytest.approx(
            measurement["seconds"]
        )


def test_greedy_output_is_identical_and_the_same_number_of_tokens(
    measured: tuple[results.Result, Path],
) -> None:
    result, _ = measured
    assert {entry["same"] for entry in result.identity} == {len(PROMPTS)}
    assert {m["output_tokens"] for m in result.measurements} == {16 * len(PROMPTS)}


def test_acceptance_is_counted_alike_for_both_methods(
    measured: tuple[results.Result, Path],
) -> None:
    result, _ = measured
    by_key = {(m["arm"], m["batch"], m["repeat"]): m for m in result.measurements}
    plain, stock, stairs = (by_key[arm, 1, 0] for arm in ARMS)
    assert plain["acceptance_length"] == 1
    assert 1 < stairs["acceptance_length"] <= HEIGHT + 1
    # The same draft, the same text: only the last step of a request may be drafted otherwise.
    assert stairs["acceptance_length"] == pytest.approx(stock["acceptance_length"], rel=0.05)
    counted = stairs["speculation"]
    assert counted["staircases"] == sum(counted["heights"])
    assert counted["draft_tokens"] == sum(h * n for h, n in enumerate(counted["heights"]))
    assert set(counted["seconds"]) == {"draft", "target", "validation"}
    # Fixed heights: nobody decides, so there are no reasons.
    assert not any(counted["off"].values())


def test_the_profiled_pass_sees_all_parts(measured: tuple[results.Result, Path]) -> None:
    result, _ = measured
    assert len(result.profiles) == len(ARMS) * 2
    for profile in result.profiles:
        assert profile["seconds"]["target"] > 0
        assert (profile["seconds"]["draft"] > 0) == (profile["method"] != "plain")
        assert profile["target_ms_by_rows"]


def test_the_record_replays(
    measured: tuple[results.Result, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = measured
    found = record.load(folder / "record.jsonl")
    assert found.height == 4
    assert found.measured is not None
    # Two batch sizes; a request's first token comes from its prefill.
    assert sorted(trace.tokens for trace in found.traces)[0] >= 15
    assert len(found.traces) == 2 * len(PROMPTS)
    assert cli.main(["replay", str(folder / "record.jsonl"), "--policy", "fixed:2"]) == 0
    assert cli.main(
        ["replay", str(folder / "record.jsonl"), "--cost", str(folder / "result.json")]
    ) == 0  # fmt: skip
    assert "fixed:4" in capsys.readouterr().out


def test_replayed_acceptance_is_the_measured_one(
    measured: tuple[results.Result, Path],
) -> None:
    from vllm_stairs.bench.policies import Fixed
    from vllm_stairs.bench.replay import replay

    result, folder = measured
    found = record.load(folder / "record.jsonl")
    assert found.measured is not None
    score = replay(found, Fixed(HEIGHT), found.measured)
    real = next(row for row in result.summary if row["arm"] == ARMS[2] and row["batch"] == 1)
    assert score.acceptance_length == pytest.approx(real["acceptance_length"], rel=0.08)


def test_a_failing_engine_is_one_line(
    tiny: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("the cat\n")
    status = cli.main(
        ["run", "--target", str(tiny.target), "--draft", str(tiny.foreign), "--eager",
         "--arm", "stairs:k=2", "--prompts", str(prompts), "--batch-sizes", "1",
         "--output", str(tmp_path / "r.json")]
    )  # fmt: skip
    assert status == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("vllm-stairs bench: error: arm 'stairs:k=2' failed in start")
    assert "tokenizer" in last, last
