import json
import time
from types import SimpleNamespace

import pytest

from vllm_stairs.bench import identity, provenance, results, roofline, settings, summary
from vllm_stairs.bench.errors import BenchError
from vllm_stairs.bench.results import Result


def measurement(arm, batch, repeat, speed, **changes):
    return {
        "arm": arm,
        "batch": batch,
        "temperature": 0.0,
        "repeat": repeat,
        "tokens_per_s": speed,
        "seconds": 10.0,
        "ttft_ms": {"p50": 1.0, "p90": 2.0, "p99": 3.0, "mean": 1.5},
        "itl_ms": {"p50": 1.0, "p90": 2.0, "p99": 3.0, "mean": 1.5},
        "tpot_ms": None,
        "acceptance_length": 1.0,
        "mean_context_tokens": 100.0,
        "groups": {"qa": {"requests": 1, "tokens": 10, "steps": 10}},
        "speculation": {},
        "digests": {"1/0": "aa"},
        **changes,
    }


def example(stairs=(12.0, 13.0), plain=(10.0, 10.0), stock=(11.0, 12.0)):
    drafts = {
        "drafts": 5,
        "draft_tokens": 10,
        "accepted_tokens": 5,
        "accepted_per_position": [3, 2],
    }
    own = {
        **drafts,
        "heights": [0, 0, 5],
        "off": {"weak_draft": 1, "paused": 3, "load": 0},
        "steps": 5,
        "seconds": {"draft": 1.0, "target": 5.0, "validation": 1.0},
    }
    result = Result(
        settings={"target": "t", "draft": "d", "output_tokens": 8, "repeats": len(plain)},
        prompts={"hash": "h", "count": 1, "groups": {"qa": 1}},
        arms={
            "plain": {"method": "plain"},
            "draft_model:k=2": {"method": "draft_model", "speculative_config": {"model": "d"}},
            "stairs:k=2": {"method": "stairs", "speculative_config": {"model": "d"}},
        },
        bandwidth={"bytes_per_s": 1e9},
        models={"t": {"weights": 1e7, "kv_per_token": 0.0}, "d": {"weights": 1e6,
                                                                  "kv_per_token": 0.0}},
    )  # fmt: skip
    for repeat in range(len(plain)):
        result.measurements += [
            measurement("plain", 1, repeat, plain[repeat]),
            measurement("draft_model:k=2", 1, repeat, stock[repeat], speculation=drafts),
            measurement(
                "stairs:k=2", 1, repeat, stairs[repeat], speculation=own, acceptance_length=2.0
            ),
        ]
    result.summary = summary.summarise(result)
    return result


def test_saving_and_loading_is_the_same(tmp_path):
    path = tmp_path / "deep" / "result.json"
    results.save(example(), path)
    assert results.load(path) == example()
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    results.save(example(), path)
    monkeypatch.setattr(results.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        results.save(Result(settings={"a": 2}), path)
    assert results.load(path) == example()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a result file"),
        ("[]", "is not a result of vllm-stairs bench run"),
        ("{}", "is not a result of vllm-stairs bench run"),
        ('{"schema": "vllm-stairs-bench", "version": 99}', "has result version 99, this release"),
    ],
)
def test_bad_result_files_get_one_line(tmp_path, text, message):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(BenchError, match=message):
        results.load(path)
    with pytest.raises(BenchError, match="no result file"):
        results.load(tmp_path / "none.json")


def test_resume_needs_the_same_settings(tmp_path):
    path = tmp_path / "result.json"
    chosen = settings.Settings(target="t", batches=(1, 2))
    stored = results.open_for(path, chosen.as_dict(), resume=False, overwrite=False)
    stored.prompts, stored.arms = {"count": 1, "groups": {"qa": 1}}, {"plain": {"method": "plain"}}
    stored.measurements.append(measurement("plain", 1, 0, 10.0))
    results.save(stored, path)
    with pytest.raises(BenchError, match="exists: pass --resume"):
        results.open_for(path, chosen.as_dict(), resume=False, overwrite=False)
    again = results.open_for(path, chosen.as_dict(), resume=True, overwrite=False)
    assert again.has(arm="plain", batch=1, temperature=0.0, repeat=0)
    assert not again.has(arm="plain", batch=2, temperature=0.0, repeat=0)
    other = settings.Settings(target="t", batches=(1, 4))
    with pytest.raises(BenchError, match="made with batches"):
        results.open_for(path, other.as_dict(), resume=True, overwrite=False)
    assert not results.open_for(path, other.as_dict(), resume=False, overwrite=True).measurements
    with pytest.raises(BenchError, match="pass one of them"):
        results.open_for(path, chosen.as_dict(), resume=True, overwrite=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.pop("settings"), "settings"),
        (lambda d: d["settings"].pop("output_tokens"), "output_tokens is not a number"),
        (lambda d: d["provenance"].update(models=[1]), "provenance: models is not an object"),
        (lambda d: d.update(prompts={}), "no 'groups'|no 'count'|count is not"),
        (lambda d: d.update(measurements={}), "measurements is not a list"),
        (lambda d: d["measurements"].append(3), "measurement 6 is not an object"),
        (lambda d: d["measurements"][1].pop("groups"), "no 'groups'"),
        (lambda d: d["measurements"][1].update(tokens_per_s=0), "tokens_per_s is not a number ab"),
        (lambda d: d["measurements"][1].update(tokens_per_s=float("nan")), "tokens_per_s is not"),
        (lambda d: d["measurements"][1].update(arm="gone"), "unknown arm 'gone'"),
        (lambda d: d["measurements"][1].update(ttft_ms={"p50": 1}), "ttft_ms: p90 is not a number"),
        (lambda d: d["measurements"][1].update(speculation={"drafts": "many"}), "is damaged"),
        (lambda d: d["arms"]["plain"].pop("method"), "no 'method'"),
        (lambda d: d.update(bandwidth={"bytes_per_s": "fast"}), "bytes_per_s is not a number"),
        (lambda d: d["models"].update(t={"weights": 1}), "is damaged"),
        (lambda d: d.update(identity=[{"arm": "plain"}]), "batch is not a number"),
        (lambda d: d.update(profiles=[{"arm": "plain", "batch": 1, "steps": 2}]), "no 'seconds'"),
        (lambda d: d.update(online=[{"arm": "plain"}]), "temperature is not a number"),
    ],
)
def test_a_damaged_result_gets_one_line(tmp_path, damage, message):
    path = tmp_path / "result.json"
    results.save(example(), path)
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(BenchError, match=message) as caught:
        results.load(path)
    assert "\n" not in str(caught.value)


def test_result_files_are_json_without_infinity(tmp_path):
    path = tmp_path / "result.json"
    rates = settings.Settings(target="t", online=True, request_rates=(2.0, float("inf")))
    stored = results.open_for(path, rates.as_dict(), resume=False, overwrite=False)
    stored.prompts = {"count": 1, "groups": {"qa": 1}, "odd": float("nan")}
    results.save(stored, path)

    def refuse(constant):
        raise AssertionError(constant)

    document = json.loads(path.read_text(), parse_constant=refuse)
    assert document["settings"]["request_rates"] == [2.0, "inf"]
    assert document["prompts"]["odd"] is None
    assert results.load(path).settings["request_rates"] == [2.0, float("inf")]
    results.open_for(path, rates.as_dict(), resume=True, overwrite=False)


def test_a_path_that_cannot_be_written_gets_one_line(tmp_path):
    results.check_writable(tmp_path / "deep" / "r.json", "--output")
    assert not list((tmp_path / "deep").iterdir())
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "r.json"):
        with pytest.raises(BenchError, match="--output"):
            results.check_writable(path, "--output")


def test_summary_ratios_and_shares():
    rows = {row["arm"]: row for row in example().summary}
    stairs = rows["stairs:k=2"]
    assert stairs["ratio_to_plain"]["median"] == pytest.approx(1.25)
    assert stairs["best_draft_model"] == "draft_model:k=2"
    assert stairs["ratio_to_best_draft_model"]["median"] == pytest.approx((12 / 11 + 13 / 12) / 2)
    assert rows["plain"]["ratio_to_plain"]["median"] == 1
    assert stairs["acceptance_per_position"] == [0.6, 0.4]
    assert stairs["heights"] == [0, 0, 10]
    assert list(stairs["off"].items()) == [("paused", 6), ("weak_draft", 2)]
    assert rows["plain"]["off"] == {}
    assert stairs["time"]["share"] == {
        "draft": 0.1, "target": 0.5, "validation": 0.1, "rest": pytest.approx(0.3),
    }  # fmt: skip
    assert rows["plain"]["time"] is None


def test_limit_in_the_summary_uses_measured_acceptance_and_drafts():
    rows = {row["arm"]: row for row in example().summary}
    assert rows["plain"]["limit"]["tokens_per_s"] == pytest.approx(100)
    assert rows["plain"]["limit"]["share"] == pytest.approx(0.1)
    # 2 tokens a step; 10 ms target and, with 10 draft tokens in 10 steps, 1 ms of draft.
    assert rows["stairs:k=2"]["limit"]["tokens_per_s"] == pytest.approx(2 / 0.011)
    assert rows["stairs:k=2"]["limit"]["free_draft_tokens_per_s"] == pytest.approx(200)


def test_roofline_of_a_batch_reads_the_weights_once():
    model = roofline.ModelBytes(weights=1e9, kv_per_token=1e3)
    found = roofline.limit(bandwidth=1e10, target=model, batch=4, context=250, measured=20)
    assert found.target_ms == pytest.approx((1e9 + 4 * 250 * 1e3) / 1e10 * 1e3)
    assert (
        found.tokens_per_s == found.plain_tokens_per_s == pytest.approx(4 / found.target_ms * 1e3)
    )
    assert found.share == pytest.approx(20 / found.tokens_per_s)


def write_model(folder, tensors, **config):
    import struct

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({name: {"dtype": "F32", "shape": shape} for name, shape in tensors.items()})
    data = struct.pack("<Q", len(header)) + header.encode()
    (folder / "model.safetensors").write_bytes(data)


def test_model_bytes_count_a_tied_embedding_and_leave_out_a_looked_up_one(tmp_path):
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "hidden_size": 128}  # fmt: skip
    tied = {"model.embed_tokens.weight": [100, 8], "model.layers.0.w": [8, 8]}
    write_model(tmp_path / "tied", tied, **config)
    write_model(tmp_path / "untied", {**tied, "lm_head.weight": [100, 8]}, **config)
    tied_bytes = roofline.model_bytes(tmp_path / "tied", "float32")
    assert tied_bytes.weights == roofline.model_bytes(tmp_path / "untied", "float32").weights
    assert tied_bytes.weights == 4 * (800 + 64)
    assert tied_bytes.kv_per_token == 2 * 2 * 2 * 32 * 4


def test_models_are_described_with_a_hash_of_their_weights(tmp_path):
    write_model(tmp_path / "one", {"w": [2]}, architectures=["LlamaForCausalLM"])
    write_model(tmp_path / "two", {"w": [3]})
    one, two = (provenance.describe_model(str(tmp_path / name)) for name in ("one", "two"))
    assert one["architecture"] == "LlamaForCausalLM"
    assert one["weights_hash"] != two["weights_hash"]


def test_a_missing_model_folder_gets_one_line_and_a_hub_id_is_left_to_vllm(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("models/none", "./none", "none"):
        with pytest.raises(BenchError, match=f"draft model '{name}': no such folder"):
            provenance.check_model(name, "draft")
    provenance.check_model("some-org/some-model", "draft")


def test_provenance_has_what_it_takes_to_repeat_a_run(tmp_path):
    found = provenance.collect({})
    assert {"date", "command", "versions", "commit", "machine", "environment"} <= found.keys()
    assert found["versions"]["vllm-stairs"]
    assert found["machine"]["memory_bytes"] > 0


def test_identity_finds_the_first_difference():
    assert identity.first_difference([1, 2, 3], [1, 2, 3]) is None
    assert identity.first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert identity.first_difference([1, 2], [1, 2, 3]) == 2
    assert identity.differing({"a": "x", "b": "y"}, {"a": "x", "b": "z"}) == ["b"]


def test_a_tie_is_told_from_a_bug():
    common = (7, {7: -0.1, 8: -3.0})
    tie = identity.explain(
        "r", [common, (1, {1: -0.7, 2: -0.70001})], [common, (2, {2: -0.7, 1: -0.70001})],
        "float32", 1,
    )  # fmt: skip
    assert tie["position"] == 1
    assert tie["verdict"].startswith("a tie")
    assert (tie["plain"]["best"], tie["arm"]["best"]) == (1, 2)
    bug = identity.explain("r", [(1, {1: -0.1, 2: -3.0})], [(2, {1: -0.1, 2: -3.0})], "float32", 1)
    assert "a gap of 2.90e+00 is larger than 0.001): suspect a bug" in bug["verdict"]
    assert bug["plain"]["gap"] == pytest.approx(2.9)


def test_another_pair_of_tokens_is_said_to_be_that():
    near = (1, {1: -0.7, 2: -0.70001}), (3, {3: -0.7, 4: -0.70001})
    found = identity.explain("r", near[:1], near[1:], "float32", 1)
    assert "the two best are [1, 2] for plain and [3, 4] for the arm" in found["verdict"]
    assert "larger" not in found["verdict"]


def test_a_difference_that_the_rerun_does_not_have_is_judged_by_the_batch():
    clear, close = (7, {7: -0.1, 8: -3.0}), (7, {7: -0.7, 8: -0.70001})

    def verdict(tokens, batch, position):
        return identity.explain("r", tokens, tokens, "float32", batch, position)["verdict"]

    alone = verdict([close], 1, 0)
    assert "not deterministic or carries state" in alone
    assert "composition" not in alone
    assert "composition (gaps at most 0.001)" in verdict([clear, close], 4, 1)
    assert "a gap of 2.90e+00 is larger than 0.001; suspect a bug" in verdict([clear], 4, 0)
    assert "or with non-determinism" in verdict([clear], 4, None)
    found = identity.explain("r", [close], [close], "float32", 4, 0)
    assert found["plain"]["gap"] == pytest.approx(1e-5)
    shorter = identity.explain("r", [clear], [clear, close], "float32", 4)
    assert "agree for 1 tokens, then one ends" in shorter["verdict"]


def test_plots_are_written_as_png_and_svg(tmp_path):
    pytest.importorskip("matplotlib")
    from vllm_stairs.bench.plot import plot

    written = plot(example(), tmp_path)
    names = {path.name for path in written}
    assert {
        "throughput.png",
        "throughput.svg",
        "acceptance.svg",
        "heights.svg",
        "time.svg",
    } <= names
    assert all(path.stat().st_size > 1000 for path in written)
    with pytest.raises(BenchError, match="no measurement"):
        plot(Result(settings={}), tmp_path)


def test_tables_can_be_printed_from_a_loaded_result(tmp_path, capsys):
    pytest.importorskip("rich")
    from vllm_stairs.bench import report

    result = example()
    result.identity = [
        {"arm": "stairs:k=2", "batch": 1, "temperature": 0.0, "requests": 1, "same": 0,
         "differing": ["1/0"],
         "explained": [{"request": "1/0", "position": 3, "verdict": "a tie within rounding",
                        "plain": {"token": 1, "best": 1, "second": 2, "gap": 1e-5},
                        "arm": {"token": 2, "best": 2, "second": 1, "gap": 1e-5}}]}
    ]  # fmt: skip
    results.save(result, tmp_path / "r.json")
    report.show(results.load(tmp_path / "r.json"))
    printed = capsys.readouterr().out
    for text in (
        "1.250",
        "limit, greedy",
        "paused 6",
        "first at token 3; a tie within rounding",
        "gap 1.00e-05",
    ):
        assert text in printed


def test_settings_are_checked():
    for changes, message in (
        ({"repeats": 0}, "--repeats"),
        ({"batches": (0,)}, "--batch-sizes"),
        ({"temperatures": (3.0,)}, "--temperatures"),
        ({"output_tokens": 1}, "--output-tokens"),
        ({"online": True}, "--request-rates"),
    ):
        with pytest.raises(BenchError, match=message):
            settings.Settings(target="t", **changes)


def test_engine_arguments_are_the_same_as_server_flags():
    chosen = settings.Settings(target="t", eager=True, engine=(("enable_prefix_caching", False),))
    arguments = chosen.engine_arguments(cpu=True)
    assert arguments["kv_cache_memory_bytes"] == 2**30
    assert settings.server_flags(arguments) == [
        "--dtype", "auto", "--seed", "0", "--enforce-eager",
        "--kv-cache-memory-bytes", str(2**30), "--no-enable-prefix-caching",
    ]  # fmt: skip
    assert "kv_cache_memory_bytes" not in chosen.engine_arguments(cpu=False)


def test_profile_sorts_time_into_parts():
    from vllm_stairs.bench.probe import Profile

    class Runner:
        def execute_model(self, scheduled):
            self._sample()  # As stairs does.

        def _sample(self):
            time.sleep(0.02)

        def propose_draft_token_ids(self):
            return [[], []]

        def take_draft_token_ids(self):
            return SimpleNamespace(draft_token_ids=[[1, 2], [3]])

    runner = Runner()
    profile = Profile(runner)
    assert profile.install()
    decode = SimpleNamespace(
        num_scheduled_tokens={"a": 3, "b": 1},
        scheduled_spec_decode_tokens={"a": [1, 2]},
        scheduled_new_reqs=[],
    )
    prefill = SimpleNamespace(
        num_scheduled_tokens={"a": 30}, scheduled_spec_decode_tokens={}, scheduled_new_reqs=["a"]
    )
    for step in (prefill, decode):
        runner.execute_model(step)
        runner.propose_draft_token_ids()
        runner.take_draft_token_ids()
    profile.remove()
    assert "execute_model" not in vars(runner)
    found = profile.report()
    assert found["steps"] == 2
    assert list(found["target_ms_by_rows"]) == ["4"]
    assert found["target_ms_by_rows"]["4"][1] == 1
    assert list(found["draft_ms_by_batch"]) == ["2"]
    assert found["seconds"]["target"] < 0.02 < found["seconds"]["validation"]
