"""Stairs validation in place of vLLM's rejection sampler.

Greedy requests whose logits need no treatment take the short way. Everything else goes through
vLLM's own treatment of logits (penalties, bad words, masks, top-k, top-p) and of logprobs, and
our acceptance in between: vLLM 0.32 reads the temperature of drafted positions from
uninitialised memory on CPU (``cpu_triton_utils._expand_kernel_impl`` writes to an integer copy),
so that sampled output under its speculation does not follow the target there; and it leaves
``min_p`` and ``logit_bias`` out, so that it has to refuse them.
"""

from dataclasses import replace
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import RejectionSampler, generate_uniform_probs

from vllm_stairs.acceptor.greedy import most_likely, validate_batch
from vllm_stairs.acceptor.sampled import validate_sampled_batch


class StairsRejectionSampler(RejectionSampler):
    """vLLM's rejection sampler with our acceptance."""

    def forward(
        self,
        metadata: Any,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: Any,
    ) -> SamplerOutput:
        """See ``RejectionSampler.forward``: same shapes, same meaning.

        Args:
            metadata: ``SpecDecodeMetadata``: drafts and the rows that they stand for.
            draft_probs: ``[drafts, vocabulary]`` or None.
            logits: ``[drafts + batch, vocabulary]``, the staircases one after the other.
            sampling_metadata: of the batch.
        """
        if self.synthetic_mode:
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        num_drafts = metadata.cu_num_draft_tokens.diff(
            prepend=metadata.cu_num_draft_tokens.new_zeros(1)
        ).to(torch.int64)
        if needs_plain_sampling(sampling_metadata):
            # The runner drafts for nobody beside such a request, but it may arrive between a draft
            # and its validation: then only the first stairs count.
            first = metadata.bonus_logits_indices - num_drafts
            return self.sampler(logits=logits[first], sampling_metadata=sampling_metadata)
        if _takes_raw_argmax(sampling_metadata):
            predictions = most_likely(logits.to(torch.float32))
            return SamplerOutput(
                sampled_token_ids=validate_batch(
                    metadata.draft_token_ids, num_drafts, predictions, metadata.max_spec_len
                ),
                logprobs_tensors=None,
            )
        return self._validate_processed(
            metadata, num_drafts, draft_probs, logits, sampling_metadata
        )

    def _validate_processed(
        self,
        metadata: Any,
        num_drafts: torch.Tensor,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: Any,
    ) -> SamplerOutput:
        # The target's token after a whole staircase: an ordinary sample.
        top = self.sampler(
            logits=logits[metadata.bonus_logits_indices],
            sampling_metadata=replace(sampling_metadata, max_num_logprobs=-1),
            predict_bonus_token=True,
            logprobs_mode_override="processed_logits"
            if self.is_processed_logprobs_mode
            else "raw_logits",
        )
        raw = logits[metadata.target_logits_indices].to(torch.float32)
        request = torch.repeat_interleave(
            torch.arange(len(num_drafts), device=logits.device),
            num_drafts,
            output_size=raw.shape[0],
        )
        # Before penalties, as in vLLM's sampler: a repetition penalty depends on the sign.
        processed = _add_bias(raw.clone(), request, sampling_metadata)
        processed = self.apply_logits_processors(processed, sampling_metadata, metadata)
        processed = _constrain(processed, request, sampling_metadata)

        sampled_token_ids = validate_sampled_batch(
            draft_token_ids=metadata.draft_token_ids,
            num_drafts=num_drafts,
            target_logits=processed,
            draft_probs=draft_probs,
            next_token_ids=top.sampled_token_ids[:, 0],
            uniform=generate_uniform_probs(
                metadata.draft_token_ids.shape[0],
                metadata.num_draft_tokens,
                sampling_metadata.generators,
                logits.device,
            ),
            noise=_exponential_noise(metadata.num_draft_tokens, processed, sampling_metadata),
            is_greedy=_is_greedy(sampling_metadata, num_drafts),
            max_height=metadata.max_spec_len,
        )
        if draft_probs is not None:
            # Every rank has its own, which a whole draft or a trimmed head made there; should they
            # round differently, ranks must not keep different tokens.
            sampled_token_ids = get_tp_group().broadcast(sampled_token_ids)
        logprobs = None
        if sampling_metadata.max_num_logprobs is not None:
            logprobs = self._get_logprobs_tensors(
                sampling_metadata.max_num_logprobs,
                metadata,
                logits,
                processed if self.is_processed_logprobs_mode else raw,
                top.logprobs_tensors.logprobs,
                sampled_token_ids,
            )
        return SamplerOutput(sampled_token_ids=sampled_token_ids, logprobs_tensors=logprobs)


def needs_plain_sampling(sampling_metadata: Any) -> bool:
    """Whether a request of the batch asks for what vLLM has in its plain sampler only.

    Logprobs of chosen ids, and thinking budgets: vLLM's speculation forces the end of thinking at
    other places than plain decoding does.
    """
    holder = sampling_metadata.thinking_budget_state_holder
    return bool(sampling_metadata.logprob_token_ids) or (
        holder is not None and holder.has_tracked_requests()
    )


def _add_bias(logits: torch.Tensor, request: torch.Tensor, sampling_metadata: Any) -> torch.Tensor:
    """Apply ``logit_bias`` to drafted rows.

    Args:
        logits: ``[drafts, vocabulary]``; changed in place.
        request: ``[drafts]``, int64: the request of each row.
    """
    for processor in sampling_metadata.logitsprocs.non_argmax_invariant:
        if isinstance(processor, LogitBiasLogitsProcessor):
            for index, bias in processor.biases.items():
                rows = (request == index).nonzero()
                ids = torch.tensor(list(bias), device=logits.device)
                logits[rows, ids] += torch.tensor(list(bias.values()), device=logits.device)
    return logits


def _constrain(logits: torch.Tensor, request: torch.Tensor, sampling_metadata: Any) -> torch.Tensor:
    """Apply temperature, ``min_p``, ``top_k`` and ``top_p`` to drafted rows, in vLLM's order.

    Args:
        logits: ``[drafts, vocabulary]``; changed in place.
        request: ``[drafts]``, int64: the request of each row.
    """
    if sampling_metadata.all_greedy:
        return logits
    temperature = sampling_metadata.temperature[request]
    logits.div_(torch.where(temperature == 0, 1.0, temperature)[:, None])
    for processor in sampling_metadata.logitsprocs.argmax_invariant:
        if isinstance(processor, MinPLogitsProcessor) and processor.min_p_count:
            probs = logits.softmax(-1)
            least = probs.amax(-1, keepdim=True) * processor.min_p[request]
            logits.masked_fill_(probs < least, -float("inf"))
    top_k, top_p = sampling_metadata.top_k, sampling_metadata.top_p
    return apply_top_k_top_p(
        logits,
        None if top_k is None else top_k[request],
        None if top_p is None else top_p[request],
    )


def _is_greedy(sampling_metadata: Any, num_drafts: torch.Tensor) -> torch.Tensor | None:
    """``[batch]``, bool, or None where nobody is greedy."""
    if sampling_metadata.all_random:
        return None
    if sampling_metadata.all_greedy:
        return torch.ones_like(num_drafts, dtype=torch.bool)
    return sampling_metadata.temperature == 0


def _exponential_noise(
    num_draft_tokens: list[int], logits: torch.Tensor, sampling_metadata: Any
) -> torch.Tensor:
    """``[batch, vocabulary]``; one draw per request is enough, for one token is replaced."""
    noise = torch.empty(
        len(num_draft_tokens), logits.shape[-1], dtype=torch.float32, device=logits.device
    ).exponential_()
    for index, generator in sampling_metadata.generators.items():
        # As in vLLM: a request without drafts must not use its generator up.
        if num_draft_tokens[index] > 0:
            noise[index].exponential_(generator=generator)
    return noise


def _takes_raw_argmax(sampling_metadata: Any) -> bool:
    """Whether every request of the batch is greedy over unprocessed logits."""
    return (
        sampling_metadata.all_greedy
        and sampling_metadata.max_num_logprobs is None
        and sampling_metadata.no_penalties
        and not sampling_metadata.bad_words_token_ids
        and sampling_metadata.allowed_token_ids_mask is None
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
