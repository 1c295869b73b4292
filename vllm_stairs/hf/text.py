"""The text that a batch has written so far, rows of different lengths included."""

import torch
from torch import Tensor


class Text:
    """Token ids of a batch, prompt first, as `generate` would return them.

    Rows may have different lengths while stairs are climbed. Storage is left-aligned:
    column *c* of every row is its *c*-th token, the prompt's left padding counted, so the
    first ``length[b]`` columns of row *b* are what `generate` would hold for it. Columns
    beyond may hold drafts, or the pad token; always a valid id.

    Args:
        prompt: int64 ``[B, P]``.
        capacity: columns to reserve; at least the final length plus the largest height.
        prompt_mask: ``[B, P]``, 0 at padding, or None.
        positions: int64 ``[B or 1, P]`` position ids of the prompt, or None if neither
            model takes any.
        pad_token: what unused columns hold.
    """

    def __init__(
        self,
        prompt: Tensor,
        capacity: int,
        prompt_mask: Tensor | None,
        positions: Tensor | None,
        pad_token: int,
    ) -> None:
        batch, self.prompt_length = prompt.shape
        device = prompt.device
        rest = capacity - self.prompt_length
        self.pad_token = pad_token
        self.tokens = torch.cat(
            [prompt, torch.full((batch, rest), pad_token, dtype=prompt.dtype, device=device)], 1
        )
        self.length = torch.full((batch,), self.prompt_length, dtype=torch.long, device=device)
        if prompt_mask is None or bool(prompt_mask.all()):
            self.mask = None
        else:
            ones = torch.ones((batch, rest), dtype=torch.bool, device=device)
            self.mask = torch.cat([prompt_mask.to(torch.bool), ones], 1)
        self.positions: Tensor | None = None
        if positions is not None:
            positions = positions.expand(batch, -1)
            later = torch.arange(1, rest + 1, device=device)
            self.positions = torch.cat([positions, positions[:, -1:] + later], 1)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.tokens.shape[0]

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
        columns = at[:, None] + torch.arange(tokens.shape[1], device=at.device)
        self.tokens[rows[:, None], columns] = tokens
