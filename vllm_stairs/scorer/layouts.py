"""The two layouts of a staircase in a paged-attention batch. Plain tensors, no vLLM.

*Packed*: one query of K + 1 tokens per request. A causal mask lets token i see the prefix and
d1..di, which is exactly stair i. This is what vLLM builds anyway.

*Expanded*: K + 1 queries of one token that repeat one block-table line, with growing sequence
lengths: the published batch of growing prefixes. Every layer writes keys and values into the
paged cache before attention reads it, so stair i finds d1..di there, and both layouts compute
the same numbers.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ExpandedRows:
    """The rows of an expanded batch.

    Attributes:
        source: ``[rows]``, int64: the request that each row came from.
        query_start_loc: ``[rows + 1]``, int32: first token of each row, and the end.
        seq_lens: ``[rows]``, int32: tokens that each row attends to, its own included.
    """

    source: np.ndarray
    query_start_loc: np.ndarray
    seq_lens: np.ndarray


def expand_rows(
    query_start_loc: np.ndarray, seq_lens: np.ndarray, is_staircase: np.ndarray
) -> ExpandedRows:
    """Give every stair a row of its own; leave other requests (prefill) as they are.

    Tokens stay where they are in the flattened batch, so that input ids, positions and slots
    need no change.

    Args:
        query_start_loc: ``[batch + 1]``, integer: first token of each request, and the end.
        seq_lens: ``[batch]``, integer: tokens that the last token of a request attends to,
            itself included.
        is_staircase: ``[batch]``, bool: the request's query is a staircase.
    """
    query_lens = np.diff(query_start_loc)
    rows_of = np.where(is_staircase, query_lens, 1)
    source = np.repeat(np.arange(len(query_lens)), rows_of)
    stair = np.arange(len(source)) - np.repeat(np.cumsum(rows_of) - rows_of, rows_of)
    first_token = query_start_loc[:-1][source] + stair
    # The first stair of a staircase is query_len - 1 tokens shorter than the last.
    below_top = np.where(is_staircase, query_lens - 1, 0)[source] - stair
    return ExpandedRows(
        source=source,
        query_start_loc=np.append(first_token, query_start_loc[-1]).astype(np.int32),
        seq_lens=(seq_lens[source] - np.where(is_staircase[source], below_top, 0)).astype(np.int32),
    )
