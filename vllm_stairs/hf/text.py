"""The text that a batch has written so far, rows of different lengths included."""

import torch
from torch import Tensor

_FIRST_COLUMNS = 64
"""Columns reserved after the prompt, before anything is written."""


class Text:
    """Token ids of a batch, prompt first, as `generate` would return them.

    Rows may have different lengths while stairs are climbed. Storage is left-aligned:
    column *c* of every row is its *c*-th token, the prompt's left padding counted, so the
    first ``length[b]`` columns of row *b* are what `generate` would hold for it. Columns
    beyond may hold drafts, or the pad token. Storage doubles when it is full: a length limit
    may be far above what is ever written.

    Args:
        prompt: int64 ``[B, P]``.
        prompt_mask: ``[B, P]``, 0 at padding, or None.
        positions: int64 ``[B or 1, P]`` position ids of the prompt, or None if neither
            model takes any.
        pad_token: what unused columns hold.
    """

    def __init__(
        self,
        prompt: Tensor,
        prompt_mask: Tensor | None,
        positions: Tensor | None,
        pad_token: int,
    ) -> None:
        batch, self.prompt_length = prompt.shape
        self.pad_token = pad_token
        self.tokens = prompt
        self.length = torch.full(
            (batch,), self.prompt_length, dtype=torch.long, device=prompt.device
        )
        if prompt_mask is None or bool(prompt_mask.all()):
            self.mask = None
        else:
            self.mask = prompt_mask.to(torch.bool)
        self.positions = None if positions is None else positions.expand(batch, -1)
        self._grow(self.prompt_length + _FIRST_COLUMNS)

    def _grow(self, columns: int) -> None:
        """Make room for ``columns`` columns."""
        more = columns - self.capacity
        self.tokens = torch.cat(
            [self.tokens, self.tokens.new_full((self.batch, more), self.pad_token)], 1
        )
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones((self.batch, more))], 1)
        if self.positions is not None:
            later = torch.arange(1, more + 1, device=self.positions.device)
            self.positions = torch.cat([self.positions, self.positions[:, -1:] + later], 1)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.tokens.shape[0]

    @property
    def capacity(self) -> int:
        """Columns reserved now."""
        return self.tokens.shape[1]

    def columns(self, ends: Tensor, width: int) -> Tensor:
        """Column numbers of the ``width`` tokens before each end: int64 ``[A, width]``.

        Negative where a row is shorter than the width.
        """
        return ends[:, None] + torch.arange(-width, 0, device=ends.device)

    def read(self, rows: Tensor, ends: Tensor, width: int) -> Tensor:
        """The ``width`` tokens of ``rows`` that end before column ``ends``: ``[A, width]``."""
        return self.tokens[rows[:, None], self.columns(ends, width).clamp_(min=0)]

    def read_positions(self, rows: Tensor, ends: Tensor, width: int) -> Tensor:
        """Their position ids, int64 ``[A, width]``."""
        assert self.positions is not None
        return self.positions[rows[:, None], self.columns(ends, width).clamp_(min=0)]

    def read_mask(self, rows: Tensor, ends: Tensor, width: int) -> Tensor | None:
        """Their attention mask, int64 ``[A, width]``, or None if all of it is text."""
        columns = self.columns(ends, width)
        valid = columns >= 0
        if self.mask is not None:
            valid &= self.mask[rows[:, None], columns.clamp(min=0)]
        return None if bool(valid.all()) else valid.long()

    def write(self, rows: Tensor, at: Tensor, tokens: Tensor) -> None:
        """Write ``tokens`` ``[A, n]`` into ``rows``, from columns ``at`` ``[A]`` on."""
        end = int(at.max()) + tokens.shape[1]
        if end > self.capacity:
            self._grow(max(end, 2 * self.capacity))
        columns = at[:, None] + torch.arange(tokens.shape[1], device=at.device)
        self.tokens[rows[:, None], columns] = tokens
