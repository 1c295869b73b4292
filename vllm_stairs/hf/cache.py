"""KV caches that rows can be rolled back in, each by its own number of tokens.

In a batch every row keeps another number of drafts. The cache stays *right-aligned*: its
last column is the last cached token of every row, whatever the row's length, as with left
padding. Then a row's keys have the same distance to its next query as if it were alone,
which is what relative position biases (T5) look at, while rotary keys carry their own
position and absolute positions are told through position ids. Rolling row *b* back by
:math:`k_b` tokens is: drop :math:`\\min_b k_b` columns (a crop, which costs nothing), then
move the rows that lose more than that to the right by the difference. What is left of a
row's first token is stale and masked.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    EncoderDecoderCache,
)


class StairsLayer(DynamicLayer):
    """A `DynamicLayer` in a buffer with room to grow.

    Same contents as the stock layer (keys and values ``[B, H, L, D]``), but appending
    writes the new columns only, where the stock layer copies all of them, and rows can be
    rolled back apart.
    """

    _k: Tensor | None = None
    _v: Tensor | None = None
    _start = 0
    _end = 0

    def _grow(self, like: Tensor, old: Tensor | None, capacity: int) -> Tensor:
        batch, heads, _, width = like.shape
        fresh = like.new_empty((batch, heads, capacity, width))
        if old is not None:
            fresh[:, :, : self._end - self._start] = old[:, :, self._start : self._end]
        return fresh

    def _set_views(self) -> None:
        assert self._k is not None
        assert self._v is not None
        self.keys = self._k[:, :, self._start : self._end]
        self.values = self._v[:, :, self._start : self._end]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``key_states`` and ``value_states`` ``[B, H, q, D]``; return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        if self._k is None or self._end + new > self._k.shape[2]:
            live = self._end - self._start
            capacity = live + new + max(32, (live + new) // 2)
            self._k = self._grow(key_states, self._k, capacity)
            self._v = self._grow(value_states, self._v, capacity)
            self._start, self._end = 0, live
        assert self._v is not None
        self._k[:, :, self._end : self._end + new] = key_states
        self._v[:, :, self._end : self._end + new] = value_states
        self._end += new
        self._set_views()
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Number of columns."""
        return self._end - self._start

    def roll_back(self, columns: int, moves: list[tuple[int, Tensor]], trim: int) -> None:
        """Drop the last ``columns``, move rows right, drop the first ``trim`` columns.

        Args:
            columns: what every row loses.
            moves: pairs of a distance and the rows (int64) that move right by it.
            trim: columns that no row needs any more.
        """
        if self._k is None or self._v is None:
            return
        self._end -= columns
        for distance, rows in moves:
            rows = rows.to(self._k.device)
            source = slice(self._start, self._end - distance)
            target = slice(self._start + distance, self._end)
            self._k[rows, :, target] = self._k[rows, :, source]
            self._v[rows, :, target] = self._v[rows, :, source]
        self._start += trim
        self._set_views()

    def _replace(self, keys: Tensor, values: Tensor) -> None:
        self._k, self._v = keys, values
        self._start, self._end = 0, keys.shape[2]
        self._set_views()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``abs(tokens_to_remove)`` columns."""
        self.roll_back(abs(tokens_to_remove), [], 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        if self._k is not None:
            self._replace(self.keys[indices], self.values[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        if self._k is not None:
            self._replace(
                self.keys.repeat_interleave(repeats, 0), self.values.repeat_interleave(repeats, 0)
            )


def _decoder_cache(cache: Cache) -> Cache:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def with_roll_back(cache: Any, owner: str) -> Cache:
    """Give a fresh stock cache layers that can be rolled back, or say why it cannot.

    Args:
        cache: what `generate` prepared: `DynamicCache` or `EncoderDecoderCache`, empty.
        owner: "target" or "assistant", for the message.
    """
    inner = _decoder_cache(cache) if isinstance(cache, Cache) else cache
    if type(inner) is not DynamicCache or inner.offloading:
        kind = "an offloaded one" if type(inner) is DynamicCache else type(inner).__name__
        raise ValueError(
            f"stairs rolls the {owner}'s KV cache back and can do so with a DynamicCache on the "
            f"model's device only, not {kind}: leave cache_implementation unset"
        )
    kinds = {type(layer) for layer in inner.layers} - {DynamicLayer}
    if kinds:
        raise ValueError(
            f"stairs needs full attention in every layer; the {owner} has "
            f"{', '.join(sorted(kind.__name__ for kind in kinds))} (a sliding window or a "
            "recurrent state cannot be rolled back exactly): generate without stairs"
        )
    inner.layers = [StairsLayer() for _ in inner.layers]
    if not inner.layers:
        inner.layer_class_to_replicate = StairsLayer
    return cache


def roll_back(cache: Cache, lost: Tensor, keep: int) -> None:
    """Roll row *b* back by ``lost[b]`` tokens and leave ``keep`` columns.

    Args:
        cache: right-aligned, with `StairsLayer`s.
        lost: int64 ``[B]``, at least 0.
        keep: columns of the longest row afterwards; what lies before is dropped.
    """
    counts = lost.tolist()
    columns = min(counts)
    moves = [
        (distance - columns, torch.tensor([b for b, n in enumerate(counts) if n == distance]))
        for distance in sorted(set(counts))
        if distance > columns
    ]
    inner = _decoder_cache(cache)
    trim = inner.get_seq_length() - columns - keep
    for layer in inner.layers:
        layer.roll_back(columns, moves, trim)


def select_rows(cache: Cache, rows: Tensor, cross: bool = True) -> None:
    """Keep ``rows`` of the cache; of cross-attention's too if ``cross``."""
    if isinstance(cache, EncoderDecoderCache):
        cache.self_attention_cache.batch_select_indices(rows)
        if cross:
            cache.cross_attention_cache.batch_select_indices(rows)
    else:
        cache.batch_select_indices(rows)


def to_stock(cache: Cache) -> Cache:
    """The same contents in stock layers, to hand out."""
    inner = _decoder_cache(cache)
    layers = []
    for layer in inner.layers:
        stock = DynamicLayer()
        if layer.is_initialized:
            stock.update(layer.keys.contiguous(), layer.values.contiguous())
        layers.append(stock)
    inner.layers = layers
    return cache
