"""Stairs validation in place of vLLM's rejection sampler.

Greedy requests whose logits need no treatment are validated here; everything else (sampling,
logprobs, penalties, bad words, ...) goes to vLLM's own rejection sampler, which is lossless in
distribution (Leviathan et al., arXiv 2211.17192).
"""

from typing import Any

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.rejection_sampler import RejectionSampler

from vllm_stairs.acceptor.greedy import validate_batch


class StairsRejectionSampler(RejectionSampler):
    """vLLM's rejection sampler with stairs validation for plain greedy batches."""

    def forward(
        self,
        metadata: Any,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: Any,
    ) -> SamplerOutput:
        """See ``RejectionSampler.forward``; same shapes, same result."""
        if self.synthetic_mode or not _takes_raw_argmax(sampling_metadata):
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        # vLLM lays the rows of the logits out request by request: a staircase each.
        predictions = self.sampler.greedy_sample(logits.to(torch.float32))
        num_drafts = metadata.cu_num_draft_tokens.diff(
            prepend=metadata.cu_num_draft_tokens.new_zeros(1)
        )
        return SamplerOutput(
            sampled_token_ids=validate_batch(
                metadata.draft_token_ids, num_drafts, predictions, metadata.max_spec_len
            ),
            logprobs_tensors=None,
        )


def _takes_raw_argmax(sampling_metadata: Any) -> bool:
    """Whether every request of the batch is greedy over unprocessed logits."""
    holder = sampling_metadata.thinking_budget_state_holder
    return (
        sampling_metadata.all_greedy
        and sampling_metadata.max_num_logprobs is None
        and not sampling_metadata.logprob_token_ids
        and sampling_metadata.no_penalties
        and not sampling_metadata.bad_words_token_ids
        and sampling_metadata.allowed_token_ids_mask is None
        and (holder is None or not holder.has_tracked_requests())
        and all(
            _is_idle(processor) for processor in sampling_metadata.logitsprocs.non_argmax_invariant
        )
    )


def _is_idle(processor: Any) -> bool:
    if isinstance(processor, MinTokensLogitsProcessor):
        return not processor.min_toks
    if isinstance(processor, LogitBiasLogitsProcessor):
        return not processor.biases
    return False
