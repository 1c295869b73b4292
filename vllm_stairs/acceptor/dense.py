"""Staircases of one height in a batch: greedy stairs validation, and lossless sampling.

What :mod:`vllm_stairs.hf` uses, where a batch drafts in step; the engine's ragged staircases are in
:mod:`.greedy` and :mod:`.sampled`. Tested against :func:`vllm_stairs.staircase.validate`.
``p`` is the target's distribution, ``q`` the draft's.
"""

import torch
from torch import Tensor

from vllm_stairs.acceptor.greedy import count_approved


def accept_greedy(drafts: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor]:
    """Stairs validation of one staircase per row.

    Row *i* of a staircase is approved if its last token is the ground truth's last token.
    All drafts before it being approved, that is: if draft *i* equals the prediction of
    row *i - 1*. So the text kept is a prefix of the predictions.

    Args:
        drafts: int64 ``[B, K]``.
        predictions: int64 ``[B, K + 1]``, the target's own next token after each stair.

    Returns:
        Tokens int64 ``[B, K + 1]`` and the number of drafts kept, int64 ``[B]``: row *b*
        adds ``tokens[b, : kept[b] + 1]``.
    """
    agree = drafts == predictions[:, :-1]
    return predictions, count_approved(agree)


def accept_sampled(drafts: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Speculative sampling (Leviathan et al., 2023): distributed as the target's samples.

    Draft *x* ~ q is kept with probability min(1, p(x) / q(x)). The first that is not kept
    is replaced by a sample of the residual max(0, p - q), normalised; after a draft kept
    whole, one more token is sampled of the last row's p. Then P(x) = min(p, q)(x) +
    (1 - sum min(p, q)) * residual(x) = p(x).

    Args:
        drafts: int64 ``[B, K]``, sampled of ``q``.
        q: float ``[B, K, V]``, the draft's distributions.
        p: float ``[B, K + 1, V]``, the target's.

    Returns:
        As :func:`accept_greedy`.
    """
    batch, height = drafts.shape
    p_draft = p[:, :height].gather(2, drafts[..., None])[..., 0]
    q_draft = q.gather(2, drafts[..., None])[..., 0]
    # u < p / q without the division; rand() lies in [0, 1), so p = 0 never passes.
    agree = torch.rand_like(p_draft) * q_draft < p_draft
    kept = count_approved(agree)
    rows = torch.arange(batch, device=drafts.device)
    last = p[rows, kept]
    if height:
        refused = kept < height
        q_last = q[rows, kept.clamp(max=height - 1)] * refused[:, None]
        residual = (last - q_last).clamp_(min=0)
        # p = q up to rounding leaves nothing to sample from; p itself is right then.
        empty = residual.sum(1, keepdim=True) <= 0
        last = torch.where(empty, last, residual)
    token = torch.multinomial(last, 1)
    tokens = torch.cat([drafts, token], 1)
    tokens[rows, kept] = token[:, 0]
    return tokens, kept
