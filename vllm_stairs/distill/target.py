"""The target: where it lies, its configuration and tokenizer, the model itself."""

import functools
from pathlib import Path
from typing import Any

from vllm_stairs.distill.device import device_of, dtype_of
from vllm_stairs.distill.errors import DistillError
from vllm_stairs.distill.settings import Settings


def target_folder(target: str) -> str:
    """The target's folder; a model of a hub is fetched.

    Raises:
        DistillError: there is no such model.
    """
    if Path(target).is_dir():
        return target
    try:
        from huggingface_hub import snapshot_download

        return snapshot_download(
            target, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]
        )
    except Exception as error:
        raise DistillError(f"no target {target!r}: {_first_line(error)}") from None


@functools.cache
def check_target(target: str) -> Any:
    """The target's configuration.

    Raises:
        DistillError: there is no such model, or it has no tokenizer.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(target)
    except (OSError, ValueError) as error:
        raise DistillError(f"no target {target!r}: {_first_line(error)}") from None
    load_tokenizer(target)
    return config


@functools.cache
def load_tokenizer(target: str) -> Any:
    """The target's tokenizer.

    Raises:
        DistillError: it has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(target)
    except Exception as error:
        raise DistillError(
            f"no tokenizer with the target {target!r}: {_first_line(error)}"
        ) from None


def load_target(settings: Settings) -> Any:
    """The target, ready to label."""
    import torch
    from transformers import AutoModelForCausalLM

    device = device_of(settings.device)
    dtype = getattr(torch, dtype_of(settings.dtype, device))
    return AutoModelForCausalLM.from_pretrained(settings.target, dtype=dtype).to(device).eval()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
