"""``vllm-stairs distill`` as a user runs it: killed, gone on with, better than untrained."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import WORDS, TinyModels
from vllm_stairs import cli

COMMAND = [sys.executable, "-m", "vllm_stairs.cli", "distill"]


def distill(*arguments: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=600, **kwargs
    )


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    words = WORDS[3:70]
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text(
        "".join(" ".join(draw.choices(words, k=draw.randint(2, 6))) + "\n" for _ in range(1200))
    )
    return file


@pytest.fixture(scope="module")
def common(tiny: TinyModels, prompt_file: Path) -> list[object]:
    return [
        "--target", tiny.target, "--prompts", prompt_file, "--generator", "transformers",
        "--tokens", 30_000, "--answer-tokens", 48, "--max-length", 128, "--layers", 2,
        "--device", "cpu", "--target-dtype", "float32", "--full-precision",
        "--epochs", 10, "--batch", 32, "--learning-rate", "3e-3", "--evaluations", 6,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(common: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A draft, and what was printed after the run had been killed once."""
    out = tmp_path_factory.mktemp("distill") / "draft"
    process = subprocess.Popen(
        [*COMMAND, *map(str, common), "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    work = out.with_name("draft.work")
    deadline = time.monotonic() + 400
    while not list(work.glob("training/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    again = distill(*common, "--out", out)
    assert again.returncode == 0, again.stdout + again.stderr
    return out, again.stdout


def test_a_killed_run_goes_on_and_ends_better_than_untrained(made: tuple[Path, str]) -> None:
    out, printed = made
    assert "going on from step" in printed
    assert "tokens are there" in printed  # Nothing was written twice.
    curve = json.loads((out / "distill.json").read_text())["curve"]
    steps = [point["step"] for point in curve]
    assert steps == sorted(set(steps))
    assert steps[0] == 0
    untrained = curve[0]["eval_acceptance"]
    best = max(point["eval_acceptance"] for point in curve)
    # Over some 400 staircases one standard error is 0.02.
    assert best > untrained + 0.06, curve


def test_the_draft_is_a_standard_model(made: tuple[Path, str], tiny: TinyModels) -> None:
    out, _ = made
    names = {file.name for file in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert "token_frequencies.safetensors" in names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl", ".py"))]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == 2
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == 96
    tokenizer = AutoTokenizer.from_pretrained(out)
    target = AutoTokenizer.from_pretrained(tiny.target)
    assert tokenizer.get_vocab() == target.get_vocab()
    card = (out / "README.md").read_text()
    assert "| **mean of the groups** |" in card
    assert str(out.parent) not in card


def test_the_same_command_again_changes_nothing(
    made: tuple[Path, str], common: list[object]
) -> None:
    out, _ = made
    again = distill(*common, "--out", out)
    assert again.returncode == 0, again.stderr
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "/nowhere/model"], "no target"),
        (["--tokens", "0"], "--tokens 0 needs --text"),
        (["--preset", "huge"], "choose one of"),
        (["--layers", "4"], "layers"),
        (["--layers", "0"], "layers"),
        (["--greedy-share", "2"], "--greedy-share"),
        (["--head-coverage", "0"], "--head-coverage"),
        (["--head-coverage", "1.5"], "--head-coverage"),
        (["--max-minutes", "0"], "--max-minutes must be"),
        (["--max-minutes", "5", "--on-policy-rounds", "1"], "does not go with"),
        (["--evaluations", "0"], "--evaluations must be at least 1"),
        (["--max-length", "100000"], "the target goes up to 512"),
        (["--max-length", "50"], "--max-length must leave room"),
        (["--prompts", "/nowhere/prompts"], "cannot read"),
    ],
)
def test_bad_input_gets_one_line(
    common: list[object],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")  # Put back when the test is over.
    given = [*map(str, common), *arguments, "--out", str(tmp_path / "draft")]
    assert cli.main(["distill", *given]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("vllm-stairs distill: error: ")
    assert message in lines[-1]
    assert len([line for line in lines if "rror" in line]) == 1


def test_another_runs_folder_is_refused_and_kept(
    made: tuple[Path, str], common: list[object], tmp_path: Path
) -> None:
    out, _ = made
    work = out.with_name("draft.work")
    before = sorted(str(f) for f in work.rglob("*"))
    done = distill(*common, "--out", tmp_path / "draft", "--work", work, "--seed", 5)
    assert done.returncode == 2
    assert "another run" in done.stderr
    done = distill("train", *common, "--out", tmp_path / "draft", "--work", work, "--epochs", 1)
    assert done.returncode == 2
    assert "training of another run" in done.stderr
    assert sorted(str(f) for f in work.rglob("*")) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "file").write_text("mine")
    done = distill("train", *common, "--out", foreign, "--work", work)
    assert done.returncode == 2
    assert "not made by this command" in done.stderr
    assert (foreign / "file").read_text() == "mine"
