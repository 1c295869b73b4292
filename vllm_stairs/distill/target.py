"""The target: where it lies, its configuration and tokenizer, the model itself."""

import functools
from pathlib import Path
from typing import Any

from vllm_stairs.distill.device import device_of, dtype_of
from vllm_stairs.distill.draft import SUPPORTED, VOCABULARY_FILES
from vllm_stairs.distill.errors import DistillError, first_line
from vllm_stairs.distill.settings import Settings


def target_folder(target: str) -> str:
    """The target's folder; a model of a hub is fetched.

    Raises:
        DistillError: there is no such model.
    """
    if Path(target).is_dir():
        return target
    if target.startswith(("/", ".", "~")) or target.count("/") > 1:  # No id of a hub.
        raise DistillError(f"no target {target!r}: there is no such folder")
    try:
        from huggingface_hub import snapshot_download

        return snapshot_download(
            target, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]
        )
    except Exception as error:
        raise DistillError(f"no target {target!r}: {first_line(error)}") from None


@functools.cache
def check_target(target: str) -> Any:
    """The target's configuration.

    Raises:
        DistillError: there is no such model, it has no tokenizer or no weights, or Transformers
            does not know its type.
    """
    from transformers import AutoConfig

    if not (Path(target) / "config.json").is_file():
        raise DistillError(f"no target {target!r}: no config.json there")
    try:
        # Nobody is asked whether a model's own code may run: no draft is made of such types.
        config = AutoConfig.from_pretrained(target, trust_remote_code=False)
    except OSError as error:
        raise DistillError(f"no target {target!r}: {first_line(error)}") from None
    except (KeyError, ValueError):
        raise DistillError(
            f"the target {target!r} is of a type that Transformers does not know; these work: "
            f"{', '.join(SUPPORTED)}"
        ) from None
    load_tokenizer(target)
    if not any(any(Path(target).glob(f"*.{kind}")) for kind in ("safetensors", "bin")):
        raise DistillError(f"the target {target!r} has no weights (model.safetensors)")
    return config


@functools.cache
def load_tokenizer(target: str) -> Any:
    """The target's tokenizer.

    Raises:
        DistillError: it has none.
    """
    from transformers import AutoTokenizer

    # Asked for a tokenizer that is not there, Transformers makes one that knows three tokens.
    if not any((Path(target) / name).is_file() for name in VOCABULARY_FILES):
        raise DistillError(f"no tokenizer with the target {target!r} (tokenizer.json)")
    try:
        return AutoTokenizer.from_pretrained(target)
    except Exception as error:
        raise DistillError(
            f"no tokenizer with the target {target!r}: {first_line(error)}"
        ) from None


def load_target(settings: Settings) -> Any:
    """The target, ready to label."""
    import torch
    from transformers import AutoModelForCausalLM

    device = device_of(settings.device)
    dtype = getattr(torch, dtype_of(settings.dtype, device))
    return AutoModelForCausalLM.from_pretrained(settings.target, dtype=dtype).to(device).eval()
