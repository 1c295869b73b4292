"""One model reading a batch's text, with its KV cache and exact roll-back."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.utils import ModelOutput

from vllm_stairs.hf.cache import roll_back, select_rows, to_stock, with_roll_back
from vllm_stairs.hf.text import Text

RELATIVE_DECODERS = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "udop", "pop2piano")
"""Encoder-decoder model types whose decoder knows relative positions only."""


def accepts(model: PreTrainedModel, argument: str) -> bool:
    """Whether the model's forward pass takes ``argument``."""
    return argument in inspect.signature(model.forward).parameters


def reads_ragged_rows(model: PreTrainedModel) -> bool:
    """Whether rows of one batch may stand at different positions.

    They may if the model is told each row's positions, or knows distances only. Else (a
    decoder that counts columns, as in BART) all rows of a batch advance in step.
    """
    if model.config.is_encoder_decoder:
        return model.config.model_type in RELATIVE_DECODERS
    return accepts(model, "position_ids")


def unknown_id(model: PreTrainedModel, tokenizer: Any) -> int:
    """What ``model`` reads instead of an id that it lacks: unknown, else padding, else 0."""
    for token in (getattr(tokenizer, "unk_token_id", None), model.generation_config.pad_token_id):
        if isinstance(token, int) and 0 <= token < _vocabulary(model):
            return token
    return 0


def known_ids(model: PreTrainedModel, ids: Tensor, unknown: int) -> Tensor:
    """``ids`` with ``unknown`` for those that the model lacks.

    An assistant with a smaller vocabulary may lack ids that the target reads or writes (added
    tokens, padding of the vocabulary); a wrong guess is all that costs.
    """
    return ids.masked_fill(ids >= _vocabulary(model), unknown)


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _map_rows(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, ModelOutput):
        return type(value)(**{key: _map_rows(item, change) for key, item in value.items()})
    if isinstance(value, tuple):
        return tuple(_map_rows(item, change) for item in value)
    return value


class Reader:
    """Reads text incrementally: tokens it has not seen yet go through the model.

    What was read and is no longer wanted (refused drafts) is forgotten lazily: the next
    `read` rolls the cache back to where the wanted text and the cached text agree.

    Args:
        model: the target or the assistant.
        kwargs: what its forward pass gets besides ids, mask, positions and cache
            (encoder outputs and mask, ...), batch first.
        cache: an empty stock cache as `generate` prepares it, or None to read all of the
            text at every pass.
        owner: "target" or "assistant", for messages.
        unknown: the id that the model reads instead of one that it lacks; None to let it
            fail, as it does under `generate`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kwargs: dict[str, Any],
        cache: Cache | None,
        owner: str,
        unknown: int | None = None,
    ) -> None:
        self.model = model
        self.unknown = unknown
        self.kwargs = {key: value for key, value in kwargs.items() if value is not None}
        self.cache = None if cache is None else with_roll_back(cache, owner)
        self.kwargs["use_cache"] = cache is not None
        self.seen: Tensor | None = None
        self.passes = 0
        self._cached: Tensor | None = None
        self._stairs_cache: Cache | None = None
        self._spread: tuple[tuple[int, int], dict[str, Any], Cache | None] | None = None
        self._is_seq2seq = bool(model.config.is_encoder_decoder)
        self._takes_positions = accepts(model, "position_ids") and not self._is_seq2seq
        self._keeps_logits = accepts(model, "logits_to_keep")

    def forget(self, ends: Tensor) -> None:
        """Say that of each row only the first ``ends[a]`` tokens still stand."""
        if self.seen is not None:
            self.seen = torch.minimum(self.seen, ends)

    def keep_rows(self, keep: Tensor) -> None:
        """Go on with the rows ``keep`` (int64, among the present ones) only."""
        if self.seen is not None:
            self.seen = self.seen[keep]
        if self._cached is not None:
            self._cached = self._cached[keep]
        keep = keep.to(self.model.device)
        if self.cache is not None:
            select_rows(self.cache, keep)
        self.kwargs = {
            key: _map_rows(value, lambda tensor: tensor[keep] if tensor.ndim else tensor)
            for key, value in self.kwargs.items()
        }
        self._spread = None

    def _align(self, ends: Tensor) -> int:
        """Roll every row of the cache back to end at ``ends``; its width afterwards."""
        assert self.cache is not None
        assert self._cached is not None
        width = int(ends.max())
        lost = self._cached - ends
        if bool(lost.any()) or self.cache.get_seq_length() != width:
            roll_back(self.cache, lost, width)
            self._cached = ends.clone()
        return width

    def unread(self, ends: Tensor) -> int:
        """How many tokens a `read` up to ``ends`` passes through the model."""
        if self.cache is None or self.seen is None:
            return int(ends.max())
        return int((ends - self.seen).max())

    def _forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        kwargs: dict[str, Any],
        cache: Cache | None,
        keep: int,
    ) -> Tensor:
        """One pass; logits float32 ``[rows, keep, V]`` of the last ``keep`` tokens."""
        device, home = self.model.device, ids.device
        kwargs = dict(kwargs)
        kwargs["decoder_attention_mask" if self._is_seq2seq else "attention_mask"] = (
            None if mask is None else mask.to(device)
        )
        if positions is not None:
            kwargs["position_ids"] = positions.to(device)
        if self._keeps_logits:
            kwargs["logits_to_keep"] = keep
        if cache is not None:
            kwargs["past_key_values"] = cache
        if self.unknown is not None:
            ids = known_ids(self.model, ids, self.unknown)
        inputs = self.model.prepare_inputs_for_generation(
            ids.to(device),
            next_sequence_length=ids.shape[1],
            is_first_iteration=self.passes == 0,
            **kwargs,
        )
        self.passes += 1
        logits: Tensor = self.model(**inputs, return_dict=True).logits
        return logits[:, -keep:].to(home, torch.float32)

    def read(self, text: Text, rows: Tensor, ends: Tensor, keep: int) -> Tensor:
        """Read ``rows`` up to ``ends``; the logits after each of the last ``keep`` tokens.

        Args:
            text: the batch's text.
            rows: int64 ``[A]``, the rows this reader goes on with.
            ends: int64 ``[A]``, where to stop reading.
            keep: how many logits are wanted; at most what is unread, for every row.

        Returns:
            float32 ``[A, keep, V]``.
        """
        new = max(self.unread(ends), keep)
        width = 0
        if self.cache is not None:
            if self._cached is None:
                self._cached = torch.zeros_like(ends)
            width = self._align(ends - new)
        ids = text.read(rows, ends, new)
        mask = text.read_mask(rows, ends, width + new)
        positions = text.read_positions(rows, ends, new) if self._takes_positions else None
        logits = self._forward(ids, mask, positions, self.kwargs, self.cache, keep)
        self.seen = ends.clone()
        if self.cache is not None:
            self._cached = ends.clone()
        return logits

    def read_stairs(self, text: Text, rows: Tensor, starts: Tensor, height: int) -> Tensor:
        """The paper's literal batch: ``height + 1`` growing sequences per row.

        Stair *i* of a row is its text up to ``starts`` and the first *i* of the drafts
        that stand after it. All stairs of all rows form one batch of ``A * (height + 1)``
        sequences, padded on the right to one length (a causal model never looks at what
        comes later), over copies of the cached prefix. Afterwards :meth:`keep_stairs`
        says which of them goes on.

        Returns:
            float32 ``[A, height + 1, V]``: the logits after each stair.
        """
        count, stairs = rows.shape[0], height + 1
        new = max(self.unread(starts), 1)
        width = 0
        if self.cache is not None:
            if self._cached is None:
                self._cached = torch.zeros_like(starts)
            width = self._align(starts - new)
        kwargs, cache = self._spread_over(count, stairs)
        ids = text.read(rows, starts + height, new + height).repeat_interleave(stairs, 0)
        step = torch.arange(height, device=ids.device)
        level = torch.arange(stairs, device=ids.device)
        beyond = (step[None] >= level[:, None]).repeat(count, 1)
        ids[:, new:] = ids[:, new:].masked_fill(beyond, 0)  # any id
        mask = text.read_mask(rows, starts + height, width + new + height)
        if mask is not None:
            mask = mask.repeat_interleave(stairs, 0)
        positions = None
        if self._takes_positions:
            positions = text.read_positions(rows, starts + height, new + height)
            positions = positions.repeat_interleave(stairs, 0)
        logits = self._forward(ids, mask, positions, kwargs, cache, stairs)
        self.seen = starts + height
        if self.cache is not None:
            self._cached = starts + height
            self._stairs_cache = cache
        every = torch.arange(count * stairs, device=logits.device)
        return logits[every, level.repeat(count).to(logits.device)].view(count, stairs, -1)

    def keep_stairs(self, kept: Tensor, height: int) -> None:
        """Go on from stair ``kept[a]`` of each row: its keys and values are the row's."""
        if self.cache is None:
            return
        assert self._stairs_cache is not None
        chosen = torch.arange(kept.shape[0], device=kept.device) * (height + 1) + kept
        chosen = chosen.to(self.model.device)
        if isinstance(self.cache, EncoderDecoderCache):
            assert isinstance(self._stairs_cache, EncoderDecoderCache)
            wide = self._stairs_cache.self_attention_cache
            own = self.cache.self_attention_cache
            if not any(self.cache.is_updated.values()):
                # The first pass has filled cross-attention's cache in the copies only.
                first = torch.arange(kept.shape[0], device=chosen.device) * (height + 1)
                self._take(self.cache.cross_attention_cache, first)
        else:
            wide = own = self.cache
        wide.batch_select_indices(chosen)
        if own is not wide:
            own.layers = wide.layers
            wide.layers = []
        self._stairs_cache = None

    def _take(self, cross: Cache, rows: Tensor) -> None:
        assert isinstance(self.cache, EncoderDecoderCache)
        assert isinstance(self._stairs_cache, EncoderDecoderCache)
        for index, layer in enumerate(self._stairs_cache.cross_attention_cache.layers):
            cross.update(layer.keys[rows], layer.values[rows], index)
            self.cache.is_updated[index] = True

    def _spread_over(self, count: int, stairs: int) -> tuple[dict[str, Any], Cache | None]:
        """Arguments and cache repeated for every stair.

        Cross-attention's keys and values do not change, so their copies are made once per
        shape; the self-attention cache is copied at every step.
        """

        def repeat(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(stairs, 0) if tensor.ndim else tensor

        if self._spread is None or self._spread[0] != (count, stairs):
            kwargs = {key: _map_rows(value, repeat) for key, value in self.kwargs.items()}
            wide: Cache | None = None
            if isinstance(self.cache, EncoderDecoderCache):
                cross = DynamicCache()
                for index, layer in enumerate(self.cache.cross_attention_cache.layers):
                    if layer.is_initialized and layer.get_seq_length():
                        cross.update(repeat(layer.keys), repeat(layer.values), index)
                wide = EncoderDecoderCache(DynamicCache(), cross)
            self._spread = ((count, stairs), kwargs, wide)
        _, kwargs, wide = self._spread
        if self.cache is None:
            return kwargs, None
        if not isinstance(self.cache, EncoderDecoderCache):
            self.cache.batch_repeat_interleave(stairs)
            return kwargs, self.cache
        assert isinstance(wide, EncoderDecoderCache)
        own = self.cache.self_attention_cache
        own.batch_repeat_interleave(stairs)
        wide.self_attention_cache.layers = own.layers
        wide.self_attention_cache.layer_class_to_replicate = own.layer_class_to_replicate
        return kwargs, wide

    def cache_up_to(self, end: int) -> Cache | None:
        """The cache rolled back to ``end`` tokens per row, in stock layers, to hand out."""
        if self.cache is None or self._cached is None:
            return None
        self._align(torch.full_like(self._cached, end))
        return to_stock(self.cache)
