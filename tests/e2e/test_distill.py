"""``vllm-stairs distill`` as a user runs it: killed, gone on with, better than untrained."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import WORDS, TinyModels
from vllm_stairs import cli
from vllm_stairs.proposer.vocabulary import FREQUENCIES_FILE, read_frequencies

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


def with_its_data(out: Path, folder: Path) -> Path:
    """A new ``--work`` folder with the data that the draft in ``out`` was made from."""
    work = folder / "work"
    shutil.copytree(out.with_name("draft.work") / "data", work / "data")
    return work


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
    made: tuple[Path, str], common: list[object], carried_out: Callable[..., str]
) -> None:
    out, _ = made
    before = (out / "model.safetensors").read_bytes()
    assert "the training has ended" in carried_out(*common, "--out", out)
    assert (out / "model.safetensors").read_bytes() == before


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process; returns its exit status, output and errors."""

    def here(*arguments: object) -> tuple[int, str, str]:
        for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
            monkeypatch.setenv(name, "1")  # Put back when the test is over.
        status = cli.main(["distill", *map(str, arguments)])
        return status, *capsys.readouterr()

    return here


@pytest.fixture
def carried_out(here: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Runs a command in this process; returns what it printed."""

    def carried_out(*arguments: object) -> str:
        status, output, errors = here(*arguments)
        assert status == 0, errors
        return output

    return carried_out


@pytest.fixture
def refused(here: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Runs a command that is refused, in this process; returns the one line that says why."""

    def refused(*arguments: object) -> str:
        status, _, errors = here(*arguments)
        assert status == 2
        lines = errors.strip().splitlines()
        assert lines[-1].startswith("vllm-stairs distill: error: ")
        assert len([line for line in lines if "rror" in line]) == 1
        return lines[-1]

    return refused


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
        (["--patience", "0"], "--patience must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--epochs", "0"], "--epochs must be above 0"),
        (["--learning-rate", "nan"], "--learning-rate must be above 0"),
        (["--keep", "97"], "the target has 96 ids"),
        (["--tied"], "leave out the tying"),
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
    refused: Callable[..., str],
) -> None:
    assert message in refused(*common, *arguments, "--out", tmp_path / "draft")
    assert list(tmp_path.iterdir()) == []


def test_a_draft_is_stored_as_what_differs_and_judged(
    made: tuple[Path, str],
    tiny: TinyModels,
    prompt_file: Path,
    tmp_path: Path,
    carried_out: Callable[..., str],
    refused: Callable[..., str],
) -> None:
    out, _ = made
    delta, draft = tmp_path / "delta", tmp_path / "draft"
    target = ("--target", tiny.target)
    carried_out("delta", *target, "--draft", out, "--delta", delta)
    carried_out("assemble", *target, "--delta", delta, "--out", draft)
    assert (draft / "README.md").read_text() == (out / "README.md").read_text()

    judged = (
        "evaluate", "--draft", draft, "--judge-prompts", prompt_file, "--limit", 8,
        "--judge-tokens", 24, "--generator", "transformers", "--device", "cpu",
    )  # fmt: skip
    first, again = carried_out(*judged, *target), carried_out(*judged, *target)
    assert "| **mean of the groups** |" in first
    assert first.startswith("8 answers of the target in")
    assert again == first.split("\n", 1)[1]  # The answers are kept;
    other = carried_out(*judged, "--target", tiny.noisy)
    assert other.startswith("8 answers of the target in")  # but another target has its own.

    before = {path: path.read_bytes() for path in tiny.target.iterdir()}
    assert "not made by" in refused("delta", *target, "--draft", out, "--delta", tiny.target)
    assert {path: path.read_bytes() for path in tiny.target.iterdir()} == before
    assert "choose another --out" in refused("train", *target, "--out", delta)
    assert (delta / "delta.safetensors").is_file()
    assert "no draft in" in refused("evaluate", *target, "--draft", delta)
    long = refused(*judged, *target, "--judge-tokens", 600)
    assert "the target goes up to 512" in long


def test_an_on_policy_round_and_given_text(
    tiny: TinyModels, prompt_file: Path, tmp_path: Path, carried_out: Callable[..., str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(prompt_file.read_text().replace("\n", " "))
    command = [
        "--target", tiny.target, "--prompts", prompt_file, "--text", text, "--device", "cpu",
        "--generator", "transformers", "--tokens", 20_000, "--answer-tokens", 16,
        "--max-length", 64, "--layers", 2, "--target-dtype", "float32", "--full-precision",
        "--epochs", 1, "--batch", 64, "--evaluations", 2, "--loss", "kl+tv", "--seed", 3,
        "--on-policy-rounds", 1, "--out", tmp_path / "draft",
    ]  # fmt: skip
    carried_out(*command)
    work = tmp_path / "draft.work"
    assert list((work / "data").glob("shard-5*"))  # The given text,
    assert not list((work / "data-of-draft-1").glob("shard-5*"))  # once.
    card = " ".join((tmp_path / "draft" / "README.md").read_text().split())
    assert "of text.txt and that the target wrote to prompts of prompts.txt" in card
    before = (tmp_path / "draft" / "model.safetensors").read_bytes()
    assert carried_out(*command).count("the training has ended") == 2
    assert (tmp_path / "draft" / "model.safetensors").read_bytes() == before


def test_a_draft_is_gone_on_with(
    made: tuple[Path, str],
    common: list[object],
    tiny: TinyModels,
    tmp_path: Path,
    carried_out: Callable[..., str],
    refused: Callable[..., str],
) -> None:
    out, _ = made
    work = with_its_data(out, tmp_path)
    layers = common.index("--layers")
    shapeless = [*common[:layers], *common[layers + 2 :]]
    given = ["train", *shapeless, "--out", tmp_path / "draft", "--work", work, "--epochs", "0.5"]
    before = (out / "model.safetensors").read_bytes()
    carried_out(*given, "--start-from", out, "--layers", 3)
    assert (out / "model.safetensors").read_bytes() == before
    first, further = (
        json.loads((folder / "distill.json").read_text()) for folder in (out, tmp_path / "draft")
    )
    # It begins where the other one ended, with a layer more.
    best = max(point["eval_acceptance_length"] for point in first["curve"])
    assert further["curve"][0]["eval_acceptance_length"] == pytest.approx(best)
    assert (first["shape"]["layers"], further["shape"]["layers"]) == (2, 3)
    # The same data once more: it counts with what the first one had learned from.
    counts = [read_frequencies(folder / FREQUENCIES_FILE) for folder in (out, tmp_path / "draft")]
    assert (counts[1] == 2 * counts[0]).all()
    assert "gone on with from the draft `draft`" in (tmp_path / "draft" / "README.md").read_text()

    assert "different: start_from" in refused(*given, "--layers", 3)
    other = ["train", *shapeless, "--out", tmp_path / "other", "--work", work]
    assert "--heads does not go with" in refused(*other, "--heads", 2, "--start-from", out)
    assert "2 layers, not 1" in refused(*other, "--layers", 1, "--start-from", out)
    other = ["train", *shapeless, "--out", tmp_path / "other", "--work", work, "--start-from"]
    assert "no draft in" in refused(*other, tmp_path)
    assert "the same folder" in refused(*other, tmp_path / "other")
    foreign = tmp_path / "foreign"
    shutil.copytree(out, foreign)
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "vocab_size": 97}))
    assert "its vocabulary is 97, the target's 96" in refused(*other, foreign)
    (foreign / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert "model.layers.2" in refused(*other, foreign)
    del config["intermediate_size"]
    (foreign / "config.json").write_text(json.dumps(config))
    assert "lacks 'intermediate_size'" in refused(*other, foreign)
    target = ["--target", tiny.noisy]  # Of the same shape, with other embeddings.
    assert "are another target's" in refused(*other[:-1], *target, "--start-from", out)


def test_a_training_without_a_checkpoint_binds_nobody(
    made: tuple[Path, str],
    common: list[object],
    tmp_path: Path,
    carried_out: Callable[..., str],
    refused: Callable[..., str],
) -> None:
    """As after running out of memory: the message says to lower what the training depends on."""
    out, _ = made
    work = with_its_data(out, tmp_path)
    (work / "training").mkdir()
    (work / "training" / "training.json").write_text('{"recipe": {"batch": 512}}')
    given = ["train", *common, "--out", tmp_path / "draft", "--work", work, "--epochs", "0.05"]
    carried_out(*given, "--batch", 8)
    next((work / "data").glob("labels-*")).unlink()
    assert "no whole data in" in refused(*given, "--batch", 8)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    made: tuple[Path, str], common: list[object], tmp_path: Path
) -> None:
    """A limit on the size of files stands for a full disk: writing fails halfway."""
    out, _ = made
    work = with_its_data(out, tmp_path)
    command = ["train", *common, "--out", tmp_path / "draft", "--work", work, "--epochs", "0.1"]
    # More than the weights of a checkpoint, less than the optimizer's state.
    weights = (out / "model.safetensors").stat().st_size
    limit = (weights * 5 // 4, weights * 5 // 4)
    done = distill(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert done.returncode == 2, done.stderr
    assert "vllm-stairs distill: error: the disk is full\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((work / "training").glob("checkpoint-*"))
    assert not (tmp_path / "draft").exists()
    done = distill(*command)
    assert done.returncode == 0, done.stderr


def test_data_inside_the_draft_are_refused(
    common: list[object], tmp_path: Path, refused: Callable[..., str]
) -> None:
    """The draft's folder is replaced as a whole, and they with it."""
    out = tmp_path / "draft"
    for work in (out, out / "work"):
        assert "--work must lie outside --out" in refused(*common, "--out", out, "--work", work)
    assert list(tmp_path.iterdir()) == []


def test_another_runs_folder_is_refused_and_kept(
    made: tuple[Path, str], common: list[object], tmp_path: Path, refused: Callable[..., str]
) -> None:
    out, _ = made
    work = out.with_name("draft.work")
    before = sorted(str(f) for f in work.rglob("*"))
    draft = ["--out", tmp_path / "draft", "--work", work]
    assert "another run" in refused(*common, *draft, "--seed", 5)
    assert "training of another run" in refused("train", *common, *draft, "--epochs", 1)
    assert sorted(str(f) for f in work.rglob("*")) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "file").write_text("mine")
    message = refused("train", *common, "--out", foreign, "--work", work)
    assert "not made by this command" in message
    assert (foreign / "file").read_text() == "mine"
