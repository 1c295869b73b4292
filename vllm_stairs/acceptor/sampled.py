"""Lossless sampling over a batch of staircases, without a loop over requests.

Source: Y. Leviathan, M. Kalman, Y. Matias, "Fast inference from transformers via speculative
decoding", arXiv 2211.17192. With target distribution p and draft distribution q, a drafted token
d is kept with probability min(1, p(d) / q(d)); at the first that is not, a token is drawn from
max(p - q, 0), normalised, and the rest of the staircase is dropped. What comes out is distributed
as p. A draft that was not sampled but chosen has q(d) = 1. A greedy request is the limit of
temperature 0: stairs validation.
"""

import torch

from vllm_stairs.acceptor.greedy import REJECTED, count_approved, most_likely


def validate_sampled_batch(
    draft_token_ids: torch.Tensor,
    num_drafts: torch.Tensor,
    target_logits: torch.Tensor,
    draft_probs: torch.Tensor | None,
    next_token_ids: torch.Tensor,
    uniform: torch.Tensor,
    noise: torch.Tensor,
    is_greedy: torch.Tensor | None,
    max_height: int,
) -> torch.Tensor:
    """Keep drafts so that the output is distributed as the target's own.

    Args:
        draft_token_ids: ``[drafts]``, integer; an id of -1 is never kept.
        num_drafts: ``[batch]``, integer: height of each staircase.
        target_logits: ``[drafts, vocabulary]``, float32: of the rows that drafts stand for,
            after temperature, penalties, masks.
        draft_probs: ``[drafts, vocabulary]``, float32: what the drafts were sampled from; None
            where they were chosen.
        next_token_ids: ``[batch]``, integer: the target's token after the whole staircase.
        uniform: ``[drafts]``, float64 in [0, 1).
        noise: ``[batch, vocabulary]``, float: exponentially distributed; argmax(p / noise) is a
            draw from p.
        is_greedy: ``[batch]``, bool; None: nobody is.
        max_height: largest of ``num_drafts``, known on the host.

    Returns:
        ``[batch, max_height + 1]``, int32: per request the kept tokens, then -1.
    """
    batch, device = num_drafts.shape[0], target_logits.device
    request = torch.repeat_interleave(
        torch.arange(batch, device=device), num_drafts, output_size=draft_token_ids.shape[0]
    )
    drafts = draft_token_ids.to(torch.int64)
    known = drafts >= 0
    drafts = drafts.clamp(min=0)[:, None]

    probs = target_logits.softmax(-1, dtype=torch.float32)
    target_prob = probs.gather(1, drafts).squeeze(1)
    if draft_probs is None:
        kept = uniform < target_prob
        # The excess of p over q: all of p but the draft itself.
        excess = probs.scatter(1, drafts, 0.0)
    else:
        draft_prob = draft_probs.gather(1, drafts).squeeze(1)
        kept = (uniform * draft_prob < target_prob) & (draft_prob > 0)
        excess = (probs - draft_probs).clamp_(min=0.0)
    # A draft of -1 takes nothing away from p.
    excess = torch.where(known[:, None], excess, probs)
    replacement = (excess / noise[request]).argmax(-1)
    if is_greedy is not None:
        greedy = is_greedy[request]
        best = most_likely(target_logits)
        kept = torch.where(greedy, drafts.squeeze(1) == best, kept)
        replacement = torch.where(greedy, best, replacement)
    kept &= known
    token = torch.where(kept, drafts.squeeze(1), replacement)

    # [drafts] -> [batch, max_height + 1]; the place behind a staircase holds the target's own
    # token, and places after that are never reached.
    first = torch.cumsum(num_drafts, 0) - num_drafts
    place = torch.arange(draft_token_ids.shape[0], device=device) - first[request]
    output = next_token_ids.to(torch.int64)[:, None].repeat(1, max_height + 1)
    output[request, place] = token
    agrees = torch.zeros(batch, max_height + 1, dtype=torch.bool, device=device)
    agrees[request, place] = kept
    num_kept = count_approved(agrees)
    stair = torch.arange(max_height + 1, device=device)
    return torch.where(stair <= num_kept[:, None], output, REJECTED).to(torch.int32)
