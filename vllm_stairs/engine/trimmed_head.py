"""A draft model's output head with some of its rows only, or in bfloat16.

The model's own ``compute_logits`` stays in use, with whatever it does to logits (scale, soft cap):
only the head that its ``LogitsProcessor`` multiplies with is another. Which head that is, and
whether nothing in the model depends on the width of the logits, is found out by asking the model
for logits, before and after.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from vllm_stairs.engine.draft_weights import pack_head


class CannotTrimError(Exception):
    """The head has to stay whole; the message says why, as the end of a sentence."""


@dataclass(frozen=True)
class TrimmedHead:
    """What became of a head.

    Attributes:
        ids: ``[kept]``, int64, on the model's device: the id that each logit stands for.
        num_bytes: size of the trimmed head, which every rank holds whole.
        whole_bytes: size of the head that it stands in for, on this rank.
    """

    ids: torch.Tensor
    num_bytes: int
    whole_bytes: int


@torch.no_grad()
def trim_head(
    model: Any,
    token_ids: tuple[int, ...],
    hidden_size: int,
    dtype: torch.dtype,
    device: Any,
    *,
    bfloat16: bool = False,
) -> TrimmedHead:
    """Let a loaded model compute logits of some ids only.

    Every rank of a tensor-parallel group must call this, with the same ids. Each gets all rows:
    a head this small is cheaper to compute than to gather the logits of.

    Args:
        model: a vLLM model; its ``compute_logits`` then returns ``[rows, kept]``, in the order of
            ``token_ids``, on every rank.
        token_ids: ids to keep.
        hidden_size: width of its hidden states.
        dtype: their type.
        device: where it is.
        bfloat16: of a float32 model on CPU: multiply in bfloat16 (``draft_weights``).

    Raises:
        CannotTrimError: the model is as it was.
    """
    ids = torch.tensor(token_ids, dtype=torch.int64)
    probe = _probe(hidden_size, dtype, device)
    processor, head, bias, logits = _find_head(model, probe)
    if len(logits) != len(probe) or logits.shape[-1] <= int(ids.max()):
        raise CannotTrimError(f"its logits have the shape {tuple(logits.shape)}")
    expected = logits[:, ids.to(device)]

    trimmed = _copy_rows(head, bias, ids, device)
    num_bytes = sum(p.numel() * p.element_size() for p in trimmed.parameters())
    # A head that computes in another type than it is stored in is not packed, and reads its weight.
    in_dtype = _computes_in(processor, dtype)
    bfloat16 = bfloat16 and in_dtype
    if current_platform.is_cpu():
        # As UnquantizedEmbeddingMethod does, but without keeping the rows twice.
        dispatch_cpu_unquantized_gemm(trimmed, remove_weight=in_dtype and not bfloat16)

    org_vocab_size = processor.org_vocab_size
    processor.forward = functools.partial(_with_head, processor.forward, trimmed)
    processor.org_vocab_size = len(token_ids)
    try:
        same = _agree(model.compute_logits(probe), expected)
    except Exception as error:  # whatever a model does with logits of another width
        same, reason = False, f"its compute_logits fails on it ({type(error).__name__})"
    else:
        reason = "its compute_logits depends on the width of the logits"
    if not same:
        del processor.forward
        processor.org_vocab_size = org_vocab_size
        raise CannotTrimError(reason)
    if current_platform.is_cpu():
        # Nobody multiplies with the whole head any more: let go of vLLM's packed copy of it.
        head.cpu_linear = torch.nn.functional.linear
    if bfloat16:
        num_bytes = pack_head(trimmed)
        trimmed.weight = torch.nn.Parameter(trimmed.weight.new_empty(0), requires_grad=False)
    return TrimmedHead(ids.to(device), num_bytes, head.weight.numel() * head.weight.element_size())


@torch.no_grad()
def pack_whole_head(model: Any, hidden_size: int, dtype: torch.dtype, device: Any) -> None:
    """Let a loaded model on CPU compute its logits with bfloat16 matrices; see :func:`trim_head`.

    Raises:
        CannotTrimError: the model is as it was.
    """
    processor, head, _, _ = _find_head(model, _probe(hidden_size, dtype, device))
    if not _computes_in(processor, dtype):
        raise CannotTrimError("it computes in another type than it is stored in")
    pack_head(head)


def _computes_in(processor: LogitsProcessor, dtype: torch.dtype) -> bool:
    """Whether a head computes in the type of the model."""
    return getattr(processor, "head_dtype", None) in (None, dtype)


def _probe(hidden_size: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(2, hidden_size, generator=generator, device="cpu").to(device, dtype)


def _find_head(
    model: Any, probe: torch.Tensor
) -> tuple[LogitsProcessor, VocabParallelEmbedding, torch.Tensor | None, torch.Tensor]:
    """The one call that a model makes to a logits processor, and the logits of the probe."""
    calls: list[tuple[Any, Any, Any]] = []
    processors = [m for m in model.modules() if isinstance(m, LogitsProcessor)]
    for processor in processors:
        processor.forward = functools.partial(_record, calls, processor, processor.forward)
    try:
        logits = model.compute_logits(probe)
    except Exception as error:  # whatever a model may do
        raise CannotTrimError(f"its compute_logits fails ({type(error).__name__})") from error
    finally:
        for processor in processors:
            del processor.forward
    if len(calls) != 1 or logits is None:
        raise CannotTrimError("its logits do not come from one LogitsProcessor")
    processor, head, bias = calls[0]
    if not isinstance(head, VocabParallelEmbedding):
        raise CannotTrimError(f"it is a {type(head).__name__}")
    method = head.quant_method
    if not isinstance(method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
        raise CannotTrimError(f"it is quantised ({type(method).__name__})")
    if head.weight.shape != (head.num_embeddings_per_partition, head.embedding_dim):
        raise CannotTrimError("its weight is packed")
    if head.num_added_embeddings:
        raise CannotTrimError("it has added rows")
    return processor, head, bias, logits


def _record(
    calls: list[tuple[Any, Any, Any]],
    processor: LogitsProcessor,
    forward: Callable[..., Any],
    lm_head: Any,
    hidden_states: torch.Tensor,
    embedding_bias: torch.Tensor | None = None,
    skip_gather: bool = False,
) -> Any:
    """In place of ``LogitsProcessor.forward``, for one probe."""
    calls.append((processor, lm_head, embedding_bias))
    return forward(lm_head, hidden_states, embedding_bias, skip_gather)


def _with_head(
    forward: Callable[..., Any],
    trimmed: ParallelLMHead,
    lm_head: Any,
    hidden_states: torch.Tensor,
    embedding_bias: torch.Tensor | None = None,
    skip_gather: bool = False,
) -> Any:
    """In place of ``LogitsProcessor.forward``: with another head than the model hands in."""
    return forward(trimmed, hidden_states, trimmed.bias, skip_gather)


def _copy_rows(
    head: VocabParallelEmbedding, bias: torch.Tensor | None, ids: torch.Tensor, device: Any
) -> ParallelLMHead:
    """A head with the rows of some ids, unsharded, and rows of zeros up to a multiple of 64."""
    with torch.device(device):
        trimmed = ParallelLMHead(
            len(ids),
            head.embedding_dim,
            bias=bias is not None,
            params_dtype=head.weight.dtype,
            disable_tp=True,
        )
    for parameter, source in ((trimmed.weight, head.weight), (trimmed.bias, bias)):
        if source is not None:
            parameter.zero_()
            parameter[: len(ids)] = _gather(head, source, ids.to(source.device))
    return trimmed


def _gather(head: VocabParallelEmbedding, shard: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of a tensor that is sharded as the head is, whole on every rank.

    Args:
        head: whose shards they are.
        shard: ``[rows of this rank, ...]``.
        ids: ``[kept]``, int64.

    Returns:
        ``[kept, ...]``.
    """
    first = head.shard_indices.org_vocab_start_index
    own = (ids >= first) & (ids < head.shard_indices.org_vocab_end_index)
    rows = shard.new_zeros(len(ids), *shard.shape[1:])
    rows[own] = shard[ids[own] - first]
    if head.tp_size == 1:
        return rows
    # One rank has each row, the others add zero: exact.
    group = getattr(head, "parallel_group", None)
    gathered = tensor_model_parallel_all_reduce(rows) if group is None else group.all_reduce(rows)
    assert isinstance(gathered, torch.Tensor)
    return gathered


def _agree(logits: Any, expected: torch.Tensor) -> bool:
    """Whether two ways of computing logits gave the same, within rounding."""
    if not isinstance(logits, torch.Tensor) or logits.shape != expected.shape:
        return False
    tolerance = 1e-3 if expected.dtype == torch.float32 else 3e-2
    finite = expected[expected.isfinite()].abs()
    scale = float(finite.max()) if len(finite) else 1.0
    return torch.allclose(
        logits.float(), expected.float(), rtol=tolerance, atol=tolerance * scale, equal_nan=True
    )
