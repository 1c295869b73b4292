"""How far a draft's distribution is from the target's, where only its likeliest ids are known.

The target's distribution ``p`` at a position is given by ``k`` ids with their probabilities; all
other ids together are one more outcome, the *rest*. The draft's ``q`` is coarsened alike. Both
losses are then those of two distributions over ``k + 1`` outcomes:

* ``kl``: Kullback-Leibler divergence of ``p`` from ``q``, up to the entropy of ``p``, that is the
  cross-entropy (knowledge distillation);
* ``tv``: total variation, ``1 - sum(min(p, q))``: one minus the probability that a sampled draft
  token is kept (DistillSpec, arXiv 2310.08461).
"""

from typing import Any

LOSSES = ("kl", "tv", "kl+tv")

SMALLEST = 1e-7
"""Probabilities of the rest are kept above it: the logarithm needs it."""


def distance(
    kind: str, logits: Any, ids: Any, log_probabilities: Any, weights: Any | None = None
) -> Any:
    """Mean distance over positions.

    Args:
        kind: one of :data:`LOSSES`.
        logits: the draft's, over the ids that it is trained on. Shape [positions, trained ids].
        ids: columns of ``logits`` of the target's likeliest ids; -1 where the draft is not trained
            on such an id: it counts with the rest. Shape [positions, k], int64.
        log_probabilities: the target's, of the same. Shape [positions, k], float.
        weights: of the positions. Shape [positions].

    Returns:
        A scalar tensor.
    """
    import torch

    known = ids >= 0
    p = log_probabilities.float().exp() * known
    q = (logits.float().log_softmax(-1)).gather(-1, ids.clamp(min=0))
    q_known = q.exp() * known
    p_rest = (1 - p.sum(-1)).clamp(min=0.0)
    q_rest = (1 - q_known.sum(-1)).clamp(min=SMALLEST)
    total = torch.zeros_like(p_rest)
    if kind in ("kl", "kl+tv"):
        total = total - (p * q.masked_fill(~known, 0.0)).sum(-1) - p_rest * q_rest.log()
    if kind in ("tv", "kl+tv"):
        total = total + 1 - torch.minimum(p, q_known).sum(-1) - torch.minimum(p_rest, q_rest)
    if weights is None:
        return total.mean()
    return (total * weights).sum() / weights.sum()
