"""The orchestration of a run, with arms that answer from a table instead of an engine."""

import itertools
import json
from pathlib import Path

import pytest

from vllm_stairs.bench import cli, online, results, run
from vllm_stairs.bench.errors import BenchError
from vllm_stairs.bench.settings import Settings

PROMPTS = [{"question_id": i, "category": "qa", "turns": [f"question {i}"]} for i in range(4)]


class Silent:
    """A reporter that only remembers."""

    def __init__(self):
        self.notes, self.passes, self.expected = [], 0, None

    def total(self, measurements):
        self.expected = measurements

    def note(self, text):
        self.notes.append(text)

    def doing(self, text):
        pass

    def done(self):
        self.passes += 1


class FakeArm:
    """Stands in for ArmClient; ``calls`` is shared by all arms of a test."""

    calls: list = []  # noqa: RUF012
    alive = 0
    most_alive = 0
    fail_at = None
    wrong: dict = {}  # noqa: RUF012

    def __init__(self, arm, engine, environment, log):
        self.arm, self.engine = arm, engine
        self.facts = {}
        FakeArm.alive += 1
        FakeArm.most_alive = max(FakeArm.most_alive, FakeArm.alive)

    def wait_until_ready(self):
        self.facts = {
            "max_model_len": 100, "dtype": "float32", "startup_seconds_with_process": 1.0,
        }  # fmt: skip
        return self.facts

    def close(self):
        FakeArm.alive -= 1

    def call(self, name, **arguments):
        FakeArm.calls.append((self.arm.label, name, arguments))
        if FakeArm.fail_at is not None and len(FakeArm.calls) > FakeArm.fail_at:
            raise KeyboardInterrupt
        return getattr(self, name)(**arguments)

    def bandwidth(self, **_):
        return {"bytes_per_s": 1e10}

    def memory(self):
        return {"resident": 10}

    def logprobs(self, tokens, **_):
        last = FakeArm.wrong.get(self.arm.label, 3)
        return [[1, {"1": -0.1, "2": -3.0}], [last, {"3": -0.69, "4": -0.6900001}]]

    def freeze(self):
        FakeArm.calls.append((self.arm.label, "freeze", {}))

    def begin(self, **arguments):
        self.begun, self.turns = arguments, 0

    def turn(self, until_tokens):
        self.turns += 1
        return until_tokens is None

    def end(self):
        figures = self.measure(**self.begun, profile=False)
        del figures["profile"]
        return {**figures, "turns": [[4, 1.0]] * self.turns}

    def measure(self, work, batch, temperature, profile, **_):
        last = FakeArm.wrong.get(self.arm.label, 3)
        names = [f"{item['id']}/0" for item in work]
        table = {"p50": 1.0, "p90": 1.0, "p99": 1.0, "mean": 1.0}
        return {
            "requests": len(work), "seconds": 2.0, "tokens_per_s": 10.0 * batch,
            "ttft_ms": table, "itl_ms": table, "tpot_ms": table,
            "acceptance_length": 1.0, "mean_context_tokens": 5.0,
            "groups": {"qa": {"requests": len(work), "tokens": 4, "steps": 4}},
            "digests": {name: str(last) for name in names},
            "speculation": {}, "outputs": {name: [1, last] for name in names},
            "later_prompts": {},
            "profile": {
                "seconds": {"draft": 0.1, "target": 1.0, "validation": 0.1}, "steps": 10,
                "target_ms_by_rows": {"1": [1.0, 3]}, "draft_ms_by_batch": {},
            } if profile else None,
        }  # fmt: skip


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ArmClient", FakeArm)
    monkeypatch.setattr(run, "SETTLE_SECONDS", 0)
    for name, value in (("calls", []), ("alive", 0), ("most_alive", 0), ("fail_at", None)):
        monkeypatch.setattr(FakeArm, name, value)
    monkeypatch.setattr(FakeArm, "wrong", {})
    monkeypatch.setattr(run.environment, "runs_on_cpu", lambda: True)

    def tokenise(self, room):
        self.work = [
            {"id": p.id, "group": p.group, "tokens": [1], "turns": list(p.turns), "chat": True}
            for p in self.chosen
        ]

    monkeypatch.setattr(run.Run, "_tokenise", tokenise)
    for name in ("target", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))

    def make(output="r.json", options=None, **changes):
        settings = Settings(
            **{
                "target": str(tmp_path / "target"),
                "draft": str(tmp_path / "draft"),
                "arms": ("plain", "draft_model:k=2", "stairs:k=2"),
                "prompts": str(prompts),
                "batches": (1, 2),
                "repeats": 2,
                **changes,
            }
        )
        reporter = Silent()
        made = run.Run(settings, tmp_path / output, reporter, **(options or {}))
        return made, reporter

    return make


def timed():
    """Arms and batches of the timed passes, in their order; a warm-up is 16 tokens long."""
    return [
        (label, arguments["batch"])
        for label, name, arguments in FakeArm.calls
        if name == "measure" and not arguments["profile"] and arguments["output_tokens"] > 16
    ]


def test_turns_are_interleaved(bench):
    made, reporter = bench(turns=3)
    result = made.execute()
    assert len(result.measurements) == 2 * 2 * 3
    assert reporter.passes == reporter.expected
    turns = [
        (label, arguments["until_tokens"])
        for label, name, arguments in FakeArm.calls
        if name == "turn"
    ]
    cells = [turns[start : start + 9] for start in range(0, len(turns), 9)]
    labels = {"plain", "draft_model:k=2", "stairs:k=2"}
    for cell in cells:
        for number, until in enumerate((128, 256, None)):
            part = cell[3 * number : 3 * number + 3]
            assert {label for label, _ in part} == labels
            assert {tokens for _, tokens in part} == {until}  # Of 4 requests of 96 tokens.
    assert len({tuple(cell) for cell in cells}) > 1  # Orders are drawn.
    # Nobody looks for work while another one has its turn.
    for (label, name, _), (after, then, _) in itertools.pairwise(FakeArm.calls):
        if name == "turn":
            assert (after, then) == (label, "freeze")
    row = result.summary[1]
    assert row["ratio_to_plain"]["noise"] == 0


def test_resumed_turns_measure_what_is_missing(bench):
    made, _ = bench(turns=2)
    FakeArm.fail_at = 40
    with pytest.raises(KeyboardInterrupt):
        made.execute()
    kept = results.load(made.output).measurements
    assert len(kept) % 3 == 0
    FakeArm.fail_at = None
    made, reporter = bench(turns=2, options={"resume": True})
    result = made.execute()
    assert result.measurements[: len(kept)] == kept
    assert len(result.measurements) == 12
    assert reporter.passes == reporter.expected


def test_passes_in_turns_are_kept_together_or_not_at_all(bench, monkeypatch):
    made, _ = bench(turns=2)
    kept = []

    def save(result, path):
        kept.append(len(result.measurements))

    monkeypatch.setattr(results, "save", save)
    made.execute()
    assert max(kept) == 12
    assert all(count % 3 == 0 for count in kept)


def test_a_result_from_before_there_were_turns_is_resumed(bench):
    made, _ = bench()
    made.execute()
    document = json.loads(made.output.read_text())
    del document["settings"]["turns"]
    made.output.write_text(json.dumps(document))
    again, _ = bench(options={"resume": True})
    assert len(again.execute().measurements) == 12
    with pytest.raises(BenchError, match="turns=1, not 2"):
        bench(turns=2, options={"resume": True})


def test_turns_need_all_arms_alive(bench):
    with pytest.raises(BenchError, match="does not go with --sequential"):
        bench(turns=2, options={"sequential": True})
    with pytest.raises(BenchError, match="--turns must be at least 1"):
        bench(turns=0)
    with pytest.raises(BenchError, match="does not go with --online"):
        bench(turns=2, online=True, request_rates=(1.0,))
    with pytest.raises(BenchError, match="does not go with --stop-at-eos"):
        bench(turns=2, stop_at_eos=True)
    with pytest.raises(BenchError, match="has a device of its own"):
        bench(turns=2, arms=("plain", "stairs:k=2,placement=dedicated"))


def test_repeats_are_interleaved(bench):
    made, reporter = bench()
    result = made.execute()
    assert timed() == 2 * [
        (arm, batch)
        for batch in (1, 2)
        for arm in ("plain", "draft_model:k=2", "stairs:k=2")
    ]  # fmt: skip
    assert FakeArm.most_alive == 3
    assert FakeArm.alive == 0
    assert reporter.passes == reporter.expected == 12 + 6
    assert {entry["same"] for entry in result.identity} == {4}
    assert results.load(made.output).summary == json.loads(json.dumps(result.summary))


def test_every_arm_is_warmed_up_once_a_batch_size_before_it_is_timed(bench):
    bench()[0].execute()
    seen = set()
    for label, name, arguments in FakeArm.calls:
        if name != "measure" or arguments["profile"]:
            continue
        if arguments["output_tokens"] == 16:
            assert (label, arguments["batch"]) not in seen
            seen.add((label, arguments["batch"]))
        else:
            assert (label, arguments["batch"]) in seen
    assert len(seen) == 6


def test_arms_differ_in_nothing_but_the_method(bench, monkeypatch):
    engines = []
    original = FakeArm.__init__

    def remember(self, arm, engine, environment, log):
        engines.append((engine, environment))
        original(self, arm, engine, environment, log)

    monkeypatch.setattr(FakeArm, "__init__", remember)
    bench()[0].execute()
    assert len(engines) == 3
    assert all(engine == engines[0] for engine in engines)


def test_an_interrupted_run_keeps_what_it_has_and_is_resumed(bench):
    made, _ = bench()
    FakeArm.fail_at = 12
    with pytest.raises(KeyboardInterrupt):
        made.execute()
    assert FakeArm.alive == 0
    kept = [(m["arm"], m["batch"], m["repeat"]) for m in results.load(made.output).measurements]
    assert 0 < len(kept) < 12
    FakeArm.fail_at = None
    FakeArm.calls.clear()
    result = bench(options={"resume": True})[0].execute()
    assert len(timed()) == 12 - len(kept)
    measured = [(m["arm"], m["batch"], m["repeat"]) for m in result.measurements]
    assert sorted(measured) == sorted(
        itertools.product(("plain", "draft_model:k=2", "stairs:k=2"), (1, 2), (0, 1))
    )


def test_a_run_is_not_resumed_with_other_weights(bench, tmp_path):
    bench()[0].execute()
    result = bench(options={"resume": True})[0].execute()
    assert len(result.provenance["earlier_sessions"]) == 1
    (tmp_path / "draft" / "model.safetensors").write_bytes(b"2\0\0\0\0\0\0\0{}")
    with pytest.raises(BenchError, match="models changed since it was begun"):
        bench(options={"resume": True})[0].execute()


def test_sequential_keeps_one_engine_alive(bench):
    result = bench(options={"sequential": True})[0].execute()
    assert FakeArm.most_alive == 1
    assert [label for label, _ in timed()[:4]] == ["plain", "plain", *["draft_model:k=2"] * 2]
    assert len(result.measurements) == 12
    assert len(result.profiles) == 6


@pytest.mark.parametrize("sequential", [False, True])
def test_a_mismatch_is_run_again_with_logprobs_outside_the_timed_pass(bench, sequential):
    FakeArm.wrong = {"stairs:k=2": 4}
    result = bench(options={"sequential": sequential})[0].execute()
    by_arm = {(entry["arm"], entry["batch"]): entry for entry in result.identity}
    assert by_arm["draft_model:k=2", 1]["same"] == 4
    found = by_arm["stairs:k=2", 1]
    assert found["same"] == 0
    assert found["explained"][0]["position"] == 1
    assert found["explained"][0]["position_in_timed_pass"] == 1
    assert found["explained"][0]["verdict"].startswith("a tie")
    names = [name for _, name, _ in FakeArm.calls]
    assert "measure" not in names[names.index("logprobs") :]


def test_on_a_gpu_engines_share_memory_only_if_it_was_divided(bench, monkeypatch):
    monkeypatch.setattr(run.environment, "runs_on_cpu", lambda: False)
    made, reporter = bench()
    assert made.sequential
    assert "one at a time" in reporter.notes[0]
    assert not bench(kv_cache_gib=4.0)[0].sequential
    assert not bench(engine=(("gpu_memory_utilization", 0.2),))[0].sequential


def test_engines_can_be_started_together(bench):
    made, _ = bench(options={"together": True})
    made.execute()
    assert FakeArm.most_alive == 3
    assert len(timed()) == 12


def test_the_prompts_may_not_change_between_sessions(bench, tmp_path):
    made, _ = bench()
    made.execute()
    (tmp_path / "p.jsonl").write_text(json.dumps(PROMPTS[0]) + "\n" + json.dumps(PROMPTS[1]))
    again, _ = bench(options={"resume": True})
    with pytest.raises(BenchError, match="the prompts have changed"):
        again.execute()


def test_bad_input_is_told_before_an_engine_starts(bench, tmp_path):
    for changes, message in (
        ({"target": str(tmp_path / "none")}, "target model .* no such folder"),
        ({"draft": str(tmp_path / "none")}, "draft of .* no such folder"),
        ({"draft": None}, "needs a draft model"),
        ({"groups": ("poems",)}, "unknown group"),
        ({"batches": (8,)}, "a batch of 8 needs as many prompts, there are 4:"),
        (
            {"batches": (2,), "by_group": True, "prompts": "spec-bench", "limit": 7},
            "a batch of 2 needs as many prompts, there are 1 in translation:",
        ),
    ):
        with pytest.raises(BenchError, match=message):
            bench(**changes)
    with pytest.raises(BenchError, match="--record needs --draft"):
        bench(arms=("plain",), draft=None, options={"record": tmp_path / "x.jsonl"})
    assert not FakeArm.calls


def test_command_line_errors_are_one_line_and_status_2(tmp_path, capsys):
    for command, message in (
        (["run", "--target", str(tmp_path / "no"), "--arm", "plain"], "no such folder"),
        (["run", "--target", "t", "--engine", "oops"], "expected KEY=VALUE"),
        (["sweep", "--target", "t"], "a sweep needs --draft"),
        (["compare", str(tmp_path / "a"), str(tmp_path / "b")], "no result file"),
        (["plot", str(tmp_path / "a")], "no result file"),
        (["show", str(tmp_path / "a")], "no result file"),
        (["replay", str(tmp_path / "a")], "no record"),
        (["quick", "--target", str(tmp_path / "no")], "prepares the demo pair"),
    ):
        assert cli.main(command) == 2
        printed = capsys.readouterr().err.strip().splitlines()
        assert len(printed) == 1
        assert printed[0].startswith("vllm-stairs bench: error: ")
        assert message in printed[0]


def test_replay_from_the_command_line(tmp_path, capsys):
    lines = [
        {"request": "r", "position": 2 * i, "draft": [1, 2], "probability": [0.9, 0.1],
         "emitted": [1, 3], "rows": 3, "draft_ms": 2.0, "target_ms": 10.0}
        for i in range(20)
    ]  # fmt: skip
    path = tmp_path / "record.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = tmp_path / "scores.json"
    assert cli.main(["replay", str(path), "--batch-sizes", "1", "--output", str(scores)]) == 0
    names = [score["policy"] for score in json.loads(scores.read_text())["scores"]]
    assert names == ["fixed:0", "fixed:1", "fixed:2"]
    example = Path(cli.__file__).parent / "data" / "h100_example.json"
    assert cli.main(["replay", str(path), "--cost", str(example), "--policy", "gain"]) == 0
    assert "not measured" in capsys.readouterr().out


def test_the_online_client_is_vllms_own(tmp_path):
    settings = Settings(target="t", online=True, request_rates=(2.0, float("inf")))
    command = online.client_command(
        settings, url="http://h:1", dataset=tmp_path / "d.jsonl", chat=True, count=4,
        rate=float("inf"), temperature=0.0, result=tmp_path / "c.json",
    )  # fmt: skip
    text = " ".join(command)
    for flags in ("bench serve", "--request-rate inf", "--ignore-eos", "--num-prompts 4",
                  "--backend openai-chat"):  # fmt: skip
        assert flags in text


def test_the_clients_json_is_read_and_checked(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"completed": 3, "duration": 1.5, "p50_ttft_ms": 4.0, "x": 1}))
    assert online.read_client_result(path) == {"completed": 3, "duration": 1.5, "p50_ttft_ms": 4.0}
    path.write_text('{"completed": 0}')
    with pytest.raises(BenchError, match="completed no request"):
        online.read_client_result(path)
    with pytest.raises(BenchError, match="left no result"):
        online.read_client_result(tmp_path / "none.json")


def test_an_interrupted_recording_is_resumed_and_written_anew(bench, tmp_path, monkeypatch):
    record = tmp_path / "with,comma.jsonl"
    written = []

    def measure(self, work, batch, temperature, profile, **_):
        if self.arm.label == "record":
            written.append(self.arm.speculative_config)
            record.write_text("line\n")
            if len(written) == 3:
                raise KeyboardInterrupt
        return original(self, work, batch, temperature, profile)

    original = FakeArm.measure
    monkeypatch.setattr(FakeArm, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        bench(options={"record": record})[0].execute()
    assert record.exists()
    with pytest.raises(BenchError, match="name another record"):
        bench(output="other.json", options={"record": record})
    FakeArm.calls.clear()
    again, reporter = bench(options={"record": record, "resume": True, "record_height": 3})
    again.execute()
    assert not timed()[0:-2]  # Only the record's own passes, one a batch size.
    assert written[-1]["stairs_record"] == str(record)
    assert written[-1]["num_speculative_tokens"] == 3
    assert "record: 1 staircases" in reporter.notes[-1]


def test_faults_of_a_record_are_told_before_an_engine_starts(bench, tmp_path):
    (tmp_path / "file").write_text("")
    for options, changes, message in (
        ({"record": tmp_path / "x", "record_height": 0}, {}, "--record-height must be at least 1"),
        ({"record": tmp_path / "x", "record_height": -2}, {}, "--record-height"),
        ({"record": tmp_path / "x"}, {"online": True, "request_rates": (1.0,)}, "with --online"),
        ({"record": tmp_path / "r.json"}, {}, "--record and --output are the same file"),
        ({"record": tmp_path / "p.jsonl", "overwrite": True}, {}, "--record and --prompts are"),
        ({"record": tmp_path / "file" / "x"}, {}, "cannot write --record"),
        ({"resume": True, "overwrite": True}, {}, "pass one of them"),
    ):
        with pytest.raises(BenchError, match=message):
            bench(options=options, **changes)
    with pytest.raises(BenchError, match="cannot write --output"):
        bench(output="file/r.json")
    assert not FakeArm.calls


def test_a_run_is_not_resumed_with_other_threads_or_one_engine_at_a_time(bench, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    bench()[0].execute()
    with pytest.raises(BenchError, match="--sequential was False and is True now"):
        bench(options={"resume": True, "sequential": True})[0].execute()
    with monkeypatch.context() as changed:
        changed.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
        with pytest.raises(BenchError, match="VLLM_CPU_OMP_THREADS_BIND was None and is '0' now"):
            bench(options={"resume": True})[0].execute()
    machine = {**run.provenance.machine(), "cores": 999}
    monkeypatch.setattr(run.provenance, "machine", lambda: machine)
    with pytest.raises(BenchError, match="the machine's cores was .* and is 999 now"):
        bench(options={"resume": True})[0].execute()


def test_bench_quick_overwrites_only_what_a_quick_run_made(bench, tmp_path, capsys, monkeypatch):
    target = str(tmp_path / "target")
    seen = []
    monkeypatch.setattr(cli, "_execute", lambda settings, output, **_: seen.append(settings) or 0)
    path = tmp_path / "kept.json"
    made, _ = bench(output="kept.json")
    made.execute()
    before = path.read_bytes()
    assert cli.main(["quick", "--target", target, "--output", str(path)]) == 2
    assert "is no result of bench quick" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert cli.main(["quick", "--target", target, "--output", str(tmp_path / "new.json")]) == 0
    made.result.settings = seen[0].as_dict()
    results.save(made.result, path)
    command = ["quick", "--target", target, "--compiled", "--output", str(path)]
    assert cli.main(command) == 0
    assert len(seen) == 2


def test_replay_does_not_write_over_its_input(tmp_path, capsys):
    path = tmp_path / "record.jsonl"
    path.write_text("kept")
    assert cli.main(["replay", str(path), "--output", str(path)]) == 2
    assert "would overwrite an input" in capsys.readouterr().err
    assert path.read_text() == "kept"


def test_errors_of_the_file_system_are_one_line_and_status_2(bench, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    made, _ = bench()
    made.execute()
    (tmp_path / "file").write_text("")
    bare = tmp_path / "bare"
    bare.write_bytes(made.output.read_bytes())
    for command, message in (
        (["plot", str(made.output), "--folder", str(tmp_path / "file")], "File exists"),
        (["plot", str(bare)], "has no suffix to take off"),
    ):
        assert cli.main(command) == 2
        printed = capsys.readouterr().err.strip().splitlines()
        assert len(printed) == 1
        assert message in printed[0]
