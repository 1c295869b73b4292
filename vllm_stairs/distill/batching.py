"""Texts of like length side by side: many in one forward pass, with little padding."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

TOKENS_AT_ONCE = 4096
"""Tokens of one forward pass, padding included."""


def batches(lengths: Sequence[int], tokens_at_once: int = TOKENS_AT_ONCE) -> Iterator[list[int]]:
    """Which texts to read together, the shortest first; each text is in one batch.

    Args:
        lengths: of the texts, in tokens.
        tokens_at_once: of a batch, padding included; a text that is longer gets its own batch.

    Yields:
        Indices into ``lengths``.
    """
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[number] > tokens_at_once:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def padded(texts: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int64]:
    """Token ids as rows. Padding (0) stands at the end, where causal attention does not see it.

    Args:
        texts: token ids, at least one text.

    Returns:
        Shape [texts, longest].
    """
    rows = np.zeros((len(texts), max(len(text) for text in texts)), np.int64)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    return rows
