import json
import struct

import pytest

from vllm_stairs.bench import report, results, roofline, settings
from vllm_stairs.bench.errors import BenchError
from vllm_stairs.bench.results import Result
from vllm_stairs.bench.summary import summarise


def measurement(arm, batch=1, speculation=None, staircases=10):
    return {
        "arm": arm,
        "batch": batch,
        "temperature": 0.0,
        "repeat": 0,
        "tokens_per_s": 10.0,
        "seconds": 10.0,
        "ttft_ms": {"p50": 1.0, "p90": 2.0, "p99": 3.0},
        "itl_ms": {"p50": 1.0, "p90": 2.0, "p99": 3.0},
        "tpot_ms": None,
        "acceptance_length": 2.0,
        "mean_context_tokens": 100.0,
        "groups": {"qa": {"requests": 1, "tokens": 20, "steps": staircases}},
        "speculation": speculation or {},
        "digests": {"1/0": "aa"},
    }


OWN = {"steps": 5, "seconds": {"draft": 1.0, "target": 5.0, "validation": 1.0}}


def profile(arm, batch=1):
    return {
        "arm": arm,
        "method": "any",
        "batch": batch,
        "steps": 4,
        "seconds": {"draft": 0.1, "target": 0.2, "validation": 0.04, "rest": 0.06},
    }


def example(measurements, profiles=(), config=None, **changes):
    made = Result(
        settings={"target": "t", "draft": "d", "output_tokens": 8, "repeats": 1, **changes},
        prompts={"hash": "h", "count": 1, "groups": {"qa": 1}},
        arms={
            "draft_model:k=4": {"method": "draft_model", "speculative_config": config},
            "stairs:k=4": {"method": "stairs", "speculative_config": config},
        },
        bandwidth={"bytes_per_s": 1e9},
        models={
            "t": {"weights": 1e7, "kv_per_token": 0.0},
            "d": {"weights": 1e6, "kv_per_token": 0.0},
        },
        measurements=list(measurements),
        profiles=list(profiles),
    )
    made.summary = summarise(made)
    return made


ARMS = ("draft_model:k=4", "stairs:k=4")


def both():
    return [measurement(ARMS[0]), measurement(ARMS[1], speculation=OWN)]


def test_times_of_all_arms_come_from_the_profiled_pass_where_there_is_one():
    for row in summarise(example(both(), map(profile, ARMS))):
        assert row["time"]["source"] == "profiled pass"
        assert row["time"]["ms_per_step"] == pytest.approx(
            {"draft": 25.0, "target": 50.0, "validation": 10.0, "rest": 15.0}
        )


def test_without_a_profile_stairs_own_clocks_are_used_and_said(capsys):
    pytest.importorskip("rich")
    result = example(both())
    stock, stairs = summarise(result)
    assert stock["time"] is None
    assert stairs["time"]["source"] == "timed passes"
    assert stairs["time"]["ms_per_step"]["rest"] == pytest.approx(600)
    report.show(result)
    printed = " ".join(capsys.readouterr().out.split())
    assert "measured ms/step from the timed passes, prefill steps included" in printed
    assert "(t)" not in printed


def test_a_table_with_two_sources_marks_the_rows_of_the_timed_passes(capsys):
    pytest.importorskip("rich")
    report.show(example(both(), [profile(ARMS[0])]))
    printed = " ".join(capsys.readouterr().out.split())
    assert "from the profiled pass or (t) timed passes" in printed
    assert "200.0+1000.0+200.0+600.0 (t)" in printed.replace("( t)", "(t)")
    assert "25.0+50.0+10.0+15.0 (t)" not in printed


def test_tables_are_made_from_the_measurements_of_the_file(tmp_path, capsys):
    """Not from its summary, which an earlier release may have made."""
    pytest.importorskip("rich")
    result = example(both(), map(profile, ARMS))
    result.summary = []
    results.save(result, tmp_path / "r.json")
    report.show(results.load(tmp_path / "r.json"))
    assert "25.0+50.0+10.0+15.0" in capsys.readouterr().out


def served_in_turns(arm, repeat, turns):
    tokens, seconds = (sum(column) for column in zip(*turns, strict=True))
    made = {**measurement(arm), "repeat": repeat, "turns": turns, "tokens_per_s": tokens / seconds}
    made["groups"]["qa"].update(output_tokens=tokens, seconds=seconds)
    return made


def test_turns_tell_the_noise_of_a_ratio_and_passes_the_ratio(capsys):
    """The machine gets slower from turn to turn, for both arms alike."""
    pytest.importorskip("rich")
    passes = []
    for repeat, slow in enumerate((1.0, 3.0)):
        paces = [slow * (1 + number) for number in range(4)]
        passes.append(served_in_turns("plain", repeat, [[10, pace] for pace in paces]))
        passes.append(served_in_turns(ARMS[1], repeat, [[12, pace] for pace in paces]))
    result = example([], turns=4)
    result.arms = {"plain": {"method": "plain"}, **result.arms}
    result.measurements = passes
    result.summary = summarise(result)
    ratio = result.summary[1]["ratio_to_plain"]
    assert ratio["median"] == pytest.approx(1.2)
    assert ratio["noise"] == pytest.approx(0.0, abs=1e-9)
    assert result.summary[1]["ratio_to_plain_by_group"] == {"qa": pytest.approx(1.2)}
    # One turn that took twice as long is noise.
    passes[1]["turns"][2][1] *= 2
    assert summarise(result)[1]["ratio_to_plain"]["noise"] > 0.2
    # A turn that came out empty is left out, and no other is paired with its neighbour.
    passes[1]["turns"][2] = [0, 1e-9]
    assert summarise(result)[1]["ratio_to_plain"]["noise"] == pytest.approx(0.0, abs=1e-9)
    report.show(result)
    printed = " ".join(capsys.readouterr().out.split())
    assert "interleaved in 4 turns each." in printed
    assert "requests of a group against plain" in printed


def draft_ms(batch, config, speculation, staircases, **changes):
    made = example(
        [measurement("stairs:k=4", batch, speculation, staircases)],
        config={"model": "d", "num_speculative_tokens": 4, **config},
        **changes,
    )
    return summarise(made)[0]["limit"]["draft_ms"]


def test_a_batch_makes_as_many_draft_passes_as_its_tallest_draft_is_long():
    # 20 staircases, 16 of which drafted, 50 tokens together: some were cut short by max_tokens.
    speculation = {"drafts": 16, "draft_tokens": 50}
    assert draft_ms(1, {}, speculation, 20) == pytest.approx(50 / 20)
    assert draft_ms(4, {}, speculation, 20) == pytest.approx(4 * 16 / 20)
    # Heights that differ within a step: the mean, a lower bound.
    table = {"num_speculative_tokens_per_batch_size": [[1, 8, 2]]}
    for config in ({"stairs_height": "auto"}, table):
        assert draft_ms(4, config, speculation, 20) == pytest.approx(50 / 20)


def test_the_bandwidth_of_all_tensor_parallel_workers_counts():
    speculation = {"drafts": 10, "draft_tokens": 40}
    one = draft_ms(1, {}, speculation, 10)
    assert draft_ms(1, {}, speculation, 10, tensor_parallel_size=4) == pytest.approx(one / 4)


@pytest.mark.parametrize(
    ("embedding", "output"),
    [
        ("model.embed_tokens.weight", "lm_head.weight"),
        ("gpt_neox.embed_in.weight", "embed_out.weight"),
        ("shared.weight", "lm_head.weight"),
        ("transformer.wte.weight", "lm_head.weight"),
        ("model.tok_embeddings.weight", "output.weight"),
    ],
)
def test_an_embedding_that_is_only_looked_up_is_not_read(tmp_path, embedding, output):
    def weights(name, shapes):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        header = json.dumps({k: {"dtype": "F32", "shape": v} for k, v in shapes.items()}).encode()
        (folder / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        return roofline.model_bytes(folder, "float32").weights

    body = {"model.layers.0.shared_expert.weight": [8, 8], "transformer.wpe.weight": [50, 8]}
    tied = {**body, embedding: [100, 8]}
    assert weights("tied", tied) == 4 * (64 + 800)
    assert weights("untied", {**tied, output: [100, 8]}) == 4 * (64 + 800)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperatures": (float("nan"),)}, "--temperatures must lie"),
        ({"temperatures": (0.0, -1.0)}, "--temperatures must lie"),
        ({"online": True, "request_rates": (float("nan"),)}, "--request-rates above 0"),
        ({"online": True, "request_rates": (1.0, 0.0)}, "--request-rates above 0"),
        ({"request_rates": (1.0,)}, "--request-rates belong to --online"),
        ({"seed": -1}, "--seed must lie"),
        ({"seed": 2**32}, "--seed must lie"),
        ({"kv_cache_gib": 0.0}, "--kv-cache-gib must be"),
        ({"kv_cache_gib": -1.0}, "--kv-cache-gib must be"),
        ({"kv_cache_gib": float("nan")}, "--kv-cache-gib must be"),
        ({"kv_cache_gib": float("inf")}, "--kv-cache-gib must be"),
        ({"max_model_len": 0}, "--max-model-len must be"),
        ({"dtype": "float33"}, "--dtype 'float33': expected one of auto, half"),
        ({"engine": (("model", "x"),)}, "the benchmark sets model itself, use --target"),
        ({"engine": (("worker_extension_cls", "x"),)}, "it cannot be changed"),
        ({"engine": (("block_size", 16), ("block_size", 32))}, "block_size=... is given twice"),
    ],
)
def test_settings_that_no_engine_could_take_are_refused(changes, message):
    with pytest.raises(BenchError, match=message):
        settings.Settings(target="t", **changes)
