"""Where and in which precision models run."""

from collections.abc import Iterator
from contextlib import contextmanager

from vllm_stairs.distill.errors import DistillError
from vllm_stairs.heap import keep_freed_memory
from vllm_stairs.processor import fast_bfloat16


def device_of(name: str) -> str:
    """``cpu`` or ``cuda``.

    Raises:
        DistillError: there is no such device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise DistillError("--device cuda: torch sees no CUDA device here")
    return name


def dtype_of(name: str, device: str) -> str:
    """The precision in which the target runs: bfloat16 wherever that is fast."""
    import torch

    if name != "auto":
        return name
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return "bfloat16" if fast_bfloat16() else "float32"


def prepare_memory(device: str) -> None:
    """See to it that many passes over large batches cost no page faults."""
    if device == "cpu":
        keep_freed_memory()


@contextmanager
def limited_memory(advice: str) -> Iterator[None]:
    """Say what to lower when memory runs out.

    Raises:
        DistillError: it has run out.
    """
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise DistillError(f"out of memory: {advice}") from None
    except (OSError, RuntimeError) as error:  # "can't" of an allocator, "Cannot" of the system.
        if "allocate memory" in str(error):
            raise DistillError(f"out of memory: {advice}") from None
        raise
