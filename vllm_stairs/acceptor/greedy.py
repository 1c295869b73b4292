"""Stairs validation of a batch of staircases at once, without a loop over requests.

The reference is :func:`vllm_stairs.staircase.validate`; this says the same in tensors.
"""

import torch

REJECTED = -1
"""Fills the places behind the accepted tokens, as in vLLM's rejection sampler."""


def count_approved(agrees: torch.Tensor) -> torch.Tensor:
    """Approved stairs of each staircase.

    A stair is approved if its last token is the ground truth's last token and all stairs below it
    are approved.

    Args:
        agrees: ``[batch, K]``, bool: draft i + 1 is the prediction of row i.

    Returns:
        ``[batch]``, int64.
    """
    return agrees.to(torch.int64).cumprod(1).sum(1)


def validate_batch(
    draft_token_ids: torch.Tensor,
    num_drafts: torch.Tensor,
    predictions: torch.Tensor,
    max_height: int,
) -> torch.Tensor:
    """Keep what the target itself would have written.

    Staircases are flattened one after the other, each with its own height; a height of 0 is a
    plain decoding step.

    Args:
        draft_token_ids: ``[sum(num_drafts)]``, integer; an id of -1 is never accepted.
        num_drafts: ``[batch]``, integer: height of each staircase, 0 to ``max_height``.
        predictions: ``[sum(num_drafts) + batch]``, integer: the target's next token of every
            row of every staircase.
        max_height: largest of ``num_drafts``, known on the host: the call does not
            synchronise with the device.

    Returns:
        ``[batch, max_height + 1]``, int32: per request the accepted tokens, then -1.
    """
    batch = num_drafts.shape[0]
    device = predictions.device
    num_drafts = num_drafts.to(torch.int64)
    stair = torch.arange(max_height + 1, device=device)
    # Row i of request r is the (first_row[r] + i)-th prediction, and draft i + 1 of request r
    # is the (first_row[r] - r + i)-th drafted id: every request has one row more than drafts.
    first_row = torch.cumsum(num_drafts + 1, 0) - (num_drafts + 1)
    rows = first_row[:, None] + stair
    predicted = predictions[rows.clamp_(max=predictions.shape[0] - 1)]
    if max_height == 0:
        return predicted.to(torch.int32)
    first_draft = first_row - torch.arange(batch, device=device)
    drafts = (first_draft[:, None] + stair[:-1]).clamp_(max=draft_token_ids.shape[0] - 1)
    drafted = draft_token_ids[drafts]
    agrees = (drafted == predicted[:, :-1]) & (stair[:-1] < num_drafts[:, None])
    num_approved = count_approved(agrees)
    # The ground truth: predictions up to the one after the last approved stair.
    return torch.where(stair <= num_approved[:, None], predicted, REJECTED).to(torch.int32)


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """``logits.argmax(-1)``, ten times as fast on CPU, where torch's does not use wide registers.

    Args:
        logits: ``[rows, ids]``.

    Returns:
        ``[rows]``, int64: the first of the largest in each row.
    """
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)
