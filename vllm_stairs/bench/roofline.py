"""The limit: how fast decoding could be if only reading memory took time.

A decode step must read the target's weights once, whatever the batch, and every running
request's KV cache. A draft token costs a pass over the draft's weights and KV. Divided by
the bandwidth measured in the same run this gives the least time of a step; activations,
arithmetic, sampling and prefill are free here. Where arithmetic and not memory is the limit
(large batches, tall stairs) the true limit lies lower: the ideal is never too low.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_stairs.bench.provenance import parameter_counts, read_config

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1, "float8_e4m3fn": 1, "int8": 1}

_EMBEDDINGS = ("embed_tokens", "embed_in", "shared", "wte", "tok_embeddings", "word_embeddings")
"""Modules that hold the input embedding, by architecture: Llama and most others; GPT-NeoX; T5;
GPT-2; InternLM; Bloom and Falcon."""

_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "embed_tokens_per_layer")
"""Modules that are only ever looked up."""


@dataclass(frozen=True)
class ModelBytes:
    """What one model makes the memory do."""

    weights: float
    """Bytes of weights read per forward pass."""
    kv_per_token: float
    """Bytes of KV cache read per token of context and forward pass."""

    def step(self, batch: float, context: float) -> float:
        """Bytes read by one decode pass over ``batch`` requests of mean length ``context``."""
        return self.weights + batch * context * self.kv_per_token


@dataclass(frozen=True)
class Limit:
    """The roofline of one arm at one batch size."""

    plain_tokens_per_s: float
    """Ideal of plain decoding."""
    tokens_per_s: float
    """Ideal for the acceptance and the number of draft tokens that were measured."""
    free_draft_tokens_per_s: float
    """The same if the draft cost nothing: what a better draft engine could reach at most."""
    target_ms: float
    """Ideal time of the target's part of a step."""
    draft_ms: float
    """Ideal time of the draft's part of a step."""
    share: float
    """Measured tokens/s (prefill counted against it) as a share of ``tokens_per_s``."""

    def as_dict(self) -> dict[str, float]:
        """Plain numbers, for the result file."""
        return asdict(self)


def limit(
    *,
    bandwidth: float,
    target: ModelBytes,
    batch: float,
    context: float,
    measured: float,
    draft: ModelBytes | None = None,
    acceptance_length: float = 1.0,
    draft_passes: float = 0.0,
) -> Limit:
    """Compute the roofline.

    Args:
        bandwidth: bytes per second of all workers together.
        target: the target's bytes.
        batch: requests in flight.
        context: mean context length in tokens.
        measured: tokens per second that were reached.
        draft: the draft's bytes; None where drafts cost no model (plain, ngram).
        acceptance_length: tokens per step and request, the target's own included.
        draft_passes: forward passes of the draft per step, as many as the tallest draft of the
            step has tokens.
    """
    target_seconds = target.step(batch, context) / bandwidth
    draft_seconds = draft.step(batch, context) / bandwidth * draft_passes if draft else 0.0
    ideal = batch * acceptance_length / (target_seconds + draft_seconds)
    return Limit(
        plain_tokens_per_s=batch / target_seconds,
        tokens_per_s=ideal,
        free_draft_tokens_per_s=batch * acceptance_length / target_seconds,
        target_ms=target_seconds * 1e3,
        draft_ms=draft_seconds * 1e3,
        share=measured / ideal,
    )


def model_bytes(folder: Path, dtype: str) -> ModelBytes | None:
    """Bytes of a model from its files; None where they do not say enough.

    A quantised model counts the bytes of its files, any other its elements at ``dtype``. An
    input embedding that is not shared with the output layer is looked up, not read, and does
    not count. All experts of a mixture count: an upper bound there.

    Args:
        folder: the model.
        dtype: what the engine runs it in, e.g. ``float32``.
    """
    config = read_config(folder)
    counts = parameter_counts(folder)
    if counts is None:
        return None
    size = DTYPE_BYTES.get(dtype.removeprefix("torch."), 2)
    untied = any(_is_output_layer(name) for name in counts)
    if config.get("quantization_config"):
        weights = float(sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    else:
        weights = float(
            size * sum(n for name, n in counts.items() if not _is_looked_up(name, untied=untied))
        )
    return ModelBytes(weights, kv_bytes_per_token(config, size))


def _is_output_layer(name: str) -> bool:
    return "lm_head" in name or _module(name) == "embed_out" or name == "output.weight"


def _is_looked_up(name: str, *, untied: bool) -> bool:
    """Whether a tensor's rows are looked up by id or position instead of being read whole."""
    return _module(name) in _POSITIONS or (untied and _module(name) in _EMBEDDINGS)


def _module(name: str) -> str:
    """The module that a tensor belongs to: ``wte`` of ``transformer.wte.weight``."""
    return name.rpartition(".")[0].rpartition(".")[2]


def kv_bytes_per_token(config: Mapping[str, Any], element_bytes: int) -> float:
    """Bytes of KV cache per token: keys and values of every layer and KV head."""
    heads = config.get("num_attention_heads") or 1
    kv_heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or (config.get("hidden_size") or 0) // heads
    layers = config.get("num_hidden_layers") or 0
    return float(2 * layers * kv_heads * head_size * element_bytes)
