"""A draft's matrices in bfloat16 (``stairs_draft_weights``).

On CPU a draft's pass takes about as long as its weights take to be read. Where the target runs in
float32, so does its draft, whose KV cache lies in the target's blocks; but what the draft writes is
only proposed, so its weights need not be that exact. Half the bytes take about half the time. On a
processor without bfloat16 arithmetic they would take longer.

Linear layers are reached by vLLM's own hook for quantization. The output head is not: tied, it is
the embeddings too. Its packed copy is replaced.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform

from vllm_stairs.processor import fast_bfloat16

logger = init_logger("vllm.stairs.proposer")


class BFloat16Weights(QuantizationConfig):
    """Linear layers hold their matrices in bfloat16 and multiply in it.

    Attributes:
        saved_bytes: what they are smaller by than in float32, once the model is made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.saved_bytes = 0

    def get_name(self) -> Any:
        """See ``QuantizationConfig``."""
        return "stairs_bfloat16"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """See ``QuantizationConfig``."""
        return [torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """See ``QuantizationConfig``: of a GPU."""
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        """See ``QuantizationConfig``: the checkpoint is an ordinary one."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BFloat16Weights":
        """See ``QuantizationConfig``."""
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """See ``QuantizationConfig``."""
        return _BFloat16LinearMethod(self) if isinstance(layer, LinearBase) else None


def becomes_bfloat16(dtype: torch.dtype, is_quantized: bool, speculative_config: Any) -> bool:
    """Whether a draft's matrices are to be bfloat16 on the processor of this process.

    Args:
        dtype: of the draft's weights otherwise.
        is_quantized: whether its checkpoint is.
        speculative_config: ``StairsSpeculativeConfig``.
    """
    choice = speculative_config.stairs.draft_weights
    if not current_platform.is_cpu() or choice == "full":
        return False
    if dtype != torch.float32 or is_quantized:
        return False
    return choice == "bfloat16" or fast_bfloat16()


def settle_weights(draft_config: Any, speculative_config: Any) -> BFloat16Weights | None:
    """Decide for the processor of this process, before a draft is loaded in it.

    Args:
        draft_config: the draft's ``VllmConfig``; gets what makes its matrices bfloat16.
        speculative_config: ``StairsSpeculativeConfig``.

    Returns:
        What it got; None where the matrices stay as they are.
    """
    is_quantized = draft_config.quant_config is not None
    if not becomes_bfloat16(draft_config.model_config.dtype, is_quantized, speculative_config):
        return None
    if not isinstance(draft_config.additional_config, dict):
        logger.info("Stairs: the draft's matrices stay float32: additional_config is an object.")
        return None
    found = BFloat16Weights()
    draft_config.quant_config = found
    # vLLM tells compiled models apart by a quantization that a checkpoint states, and by this.
    draft_config.additional_config = {
        **draft_config.additional_config,
        "stairs_draft_weights": found.get_name(),
    }
    return found


class _BFloat16LinearMethod(UnquantizedLinearMethod):
    """vLLM's own method for ordinary layers, which the layer gives and gets float32."""

    def __init__(self, config: BFloat16Weights) -> None:
        super().__init__()
        self._config = config

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """See ``LinearMethodBase``: what is loaded is rounded on the way in."""
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            torch.bfloat16,  # The type that is given is that of the bias.
            **extra_weight_attrs,
        )
        self._config.saved_bytes += 2 * sum(output_partition_sizes) * input_size_per_partition

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See ``LinearMethodBase``."""
        multiply = super().apply
        return _multiplied(lambda rows: multiply(layer, rows), x, bias)


def _multiplied(
    linear: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """What a bfloat16 matrix makes of float32; the bias is added in float32."""
    out = linear(x.to(torch.bfloat16)).to(x.dtype)
    return out if bias is None else out + bias


@torch.no_grad()
def pack_head(head: Any) -> int:
    """Let a draft's float32 output head multiply in bfloat16; its weight stays for lookups.

    Args:
        head: a ``ParallelLMHead`` or ``VocabParallelEmbedding`` that is not quantised, on CPU.

    Returns:
        Bytes that each pass reads of it.
    """
    packed: Any = SimpleNamespace(weight=head.weight.to(torch.bfloat16))
    num_bytes: int = packed.weight.numel() * packed.weight.element_size()
    dispatch_cpu_unquantized_gemm(packed, remove_weight=True)

    def linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        return _multiplied(lambda rows: packed.cpu_linear(rows, packed.weight, None), x, bias)

    head.cpu_linear = linear
    return num_bytes
