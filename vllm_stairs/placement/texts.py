"""What a draft with a device of its own knows of the texts: tokens, drafts and KV cache.

Each request has a row: its text, and behind it the drafts that were written on. New text is
compared with what the row holds. As far as the two agree the drafts were right, and with them the
keys and values that were computed; from the first difference on they are overwritten. This one rule
covers text that was accepted, text that was not drafted, text that is sent again, and drafts that
were written ahead of the question.

```
row        t0 t1 t2 t3 | d1 d2 d3 d4 d5 d6      text of 4 tokens, 6 drafts
                         new text: d1 d2 d3     all as written: d4 d5 d6 are drafts after it
                         new text: d1 d2 x      d3 is gone and what follows it
KV cache   x  x  x  x    x  x  x  x  x  .       the last token is read by the next pass
```
"""

from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Row:
    """One request.

    Attributes:
        index: its row in the arrays.
        length: of its text (tokens).
        written: of text and drafts together.
        valid: leading tokens whose keys and values are in the cache; less than ``written``, but
            for a row without text.
        blocks: of the KV cache.
    """

    index: int
    length: int = 0
    written: int = 0
    valid: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def ready(self) -> int:
        """Drafts that are written."""
        return self.written - self.length


class Texts:
    """The requests that a draft knows, and where their keys and values lie.

    Rows and blocks that run out are taken from the request that was asked about least recently:
    its text is then unknown and has to be sent again.

    Args:
        token_ids: ``[rows, max_length]``, int32: to keep texts and drafts in.
        block_table: ``[rows, blocks]``, int32: gets the blocks of each row.
        num_blocks: blocks of the KV cache; number 0 is left alone, as vLLM does.
        block_size: tokens per block.
    """

    def __init__(
        self, token_ids: np.ndarray, block_table: np.ndarray, num_blocks: int, block_size: int
    ) -> None:
        self.token_ids = token_ids
        self.confidences = np.zeros(token_ids.shape, np.float32)
        self._block_table = block_table
        self._block_size = block_size
        self._free_rows = list(reversed(range(len(token_ids))))
        self._free_blocks = list(reversed(range(1, num_blocks)))
        # The least recently used first.
        self._rows: OrderedDict[Hashable, Row] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def extend(
        self,
        key: Hashable,
        start: int,
        token_ids: Sequence[int],
        keep: Collection[Hashable] = (),
    ) -> Row | None:
        """Note that a text goes on with ``token_ids`` from place ``start``, and ends there.

        Args:
            key: the request.
            start: tokens before these.
            token_ids: the rest of the text.
            keep: requests whose row must not be taken for a new one.

        Returns:
            Its row; None if the text is not known up to ``start`` or too long, or without room.
        """
        end = start + len(token_ids)
        row = self._rows.get(key)
        if start > (row.length if row else 0) or not 0 < end <= self.token_ids.shape[1]:
            return None
        if row is None:
            row = self._admit(key, keep)
            if row is None:
                return None
        self._rows.move_to_end(key)
        written = self.token_ids[row.index]
        new = np.asarray(token_ids, np.int32)
        old = written[start : min(row.written, end)]
        differences = np.flatnonzero(old != new[: len(old)])
        agreed = int(differences[0]) if len(differences) else len(old)
        if agreed < len(new):
            written[start:end] = new
            row.written = end
            row.valid = min(row.valid, start + agreed)
        row.length = end
        return row

    def reserve(self, row: Row, tokens: int, keep: Collection[Hashable] = ()) -> int:
        """Get blocks for the keys and values of so many tokens.

        Args:
            row: the request.
            tokens: of text and drafts.
            keep: requests whose blocks must not be taken.

        Returns:
            For how many tokens there is room, at most ``tokens``.
        """
        tokens = min(tokens, self.token_ids.shape[1])
        missing = -(-tokens // self._block_size) - len(row.blocks)
        while missing > len(self._free_blocks) and self._evict(keep, row):
            pass
        for _ in range(min(missing, len(self._free_blocks))):
            self._block_table[row.index, len(row.blocks)] = block = self._free_blocks.pop()
            row.blocks.append(block)
        return min(tokens, len(row.blocks) * self._block_size)

    def wrote(
        self, row: Row, token_ids: Sequence[int], confidences: Sequence[float] | None = None
    ) -> None:
        """Append drafts; for each, what stood before it was read into the KV cache.

        Args:
            row: the request.
            token_ids: its drafts.
            confidences: the draft's probability of each.
        """
        if not token_ids:
            return
        end = row.written + len(token_ids)
        self.token_ids[row.index, row.written : end] = token_ids
        if confidences is not None:
            self.confidences[row.index, row.written : end] = confidences
        row.written, row.valid = end, end - 1

    def drafts(self, row: Row, height: int) -> list[int]:
        """The drafts after the text, at most ``height``."""
        return self.token_ids[row.index, row.length : self._end(row, height)].tolist()

    def confidences_of(self, row: Row, height: int) -> list[float]:
        """The probabilities of :meth:`drafts`."""
        return self.confidences[row.index, row.length : self._end(row, height)].tolist()

    def forget(self, key: Hashable) -> None:
        """A request has ended."""
        row = self._rows.pop(key, None)
        if row is not None:
            self._free_rows.append(row.index)
            self._free_blocks.extend(row.blocks)

    def _end(self, row: Row, height: int) -> int:
        return min(row.written, row.length + height)

    def _admit(self, key: Hashable, keep: Collection[Hashable]) -> Row | None:
        if not self._free_rows and not self._evict(keep):
            return None
        row = self._rows[key] = Row(self._free_rows.pop())
        return row

    def _evict(self, keep: Collection[Hashable], own: Row | None = None) -> bool:
        """Forget the least recently used request that may go; False if there is none."""
        oldest = next(
            (key for key, row in self._rows.items() if key not in keep and row is not own), None
        )
        if oldest is None:
            return False
        self.forget(oldest)
        return True
