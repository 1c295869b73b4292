"""vLLM's V1 model runner with our proposer, scorer and acceptor.

One mixin serves the CPU and the CUDA runner. It takes the place of vLLM's drafting at the one
method where vLLM decides who drafts, ``propose_draft_token_ids``, after vLLM's bookkeeping: the
text of every request is then on the host. There only the decision is made. The drafts are written
in ``take_draft_token_ids``, when the engine asks for them: by then this step's tokens are on their
way to the clients.
"""

import functools
import json
import math
import time
from copy import copy
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from vllm.distributed.parallel_state import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tp_group,
)
from vllm.logger import init_logger
from vllm.utils.torch_utils import PIN_MEMORY, async_tensor_h2d
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_stairs.config import request_max_height
from vllm_stairs.engine.acceptor import StairsRejectionSampler, needs_plain_sampling
from vllm_stairs.engine.decider import HeightDecider
from vllm_stairs.engine.dedicated import AbsentDrafter, DedicatedDraft
from vllm_stairs.engine.executor import DRAFTS_FOLLOW
from vllm_stairs.engine.metrics import AWAY, GRAMMAR, OPT_OUT, SAMPLING, Counters
from vllm_stairs.engine.proposer import DraftBatch, Drafts, StairsProposer, weights_share
from vllm_stairs.engine.speculative import StairsSpeculativeConfig
from vllm_stairs.height.costs import Median
from vllm_stairs.height.ragged import RaggedPolicy
from vllm_stairs.placement.patience import fixed_patience_ms
from vllm_stairs.proposer.draft_kv import DraftKVLedger
from vllm_stairs.proposer.plan import RequestLimits, context_start, height_ceiling
from vllm_stairs.scorer.layouts import expand_rows

logger = init_logger("vllm.stairs.runner")

_LONGEST_GAP = 0.01
"""Seconds between two steps; a longer one was a wait for requests."""
_GAPS = 31
"""Gaps of which the median is taken."""


class _Candidate(NamedTuple):
    """A request that may draft: its row in the input batch, its text, its room.

    ``first``: where the draft's context begins; ``end``: where it would, if the draft read the end
    of the text only, 0 where it is to read all.
    """

    row: int
    num_tokens: int
    num_valid: int
    first: int
    end: int
    room: int
    remaining: int
    reason: str | None


@dataclass(frozen=True)
class _Pending:
    """Who is to draft when the engine asks for it."""

    candidates: list[_Candidate]
    """The requests that go on."""
    heights: list[int]
    """How far each drafts, 0 for those who do not; under a policy a ceiling."""
    sampling_metadata: Any
    """Of vLLM's whole input batch."""

    def chosen(self) -> list[int]:
        """Who drafts, as indices of the candidates."""
        return [index for index, height in enumerate(self.heights) if height]

    @functools.cached_property
    def batch(self) -> DraftBatch:
        """The same for the proposer."""
        columns = [
            (c.row, c.num_tokens, c.num_valid, height, c.first)
            for c, height in zip(self.candidates, self.heights, strict=True)
            if height
        ]
        return DraftBatch(*np.asarray(columns, dtype=np.int64).T)


class StairsModelRunnerMixin:
    """What stairs changes in ``GPUModelRunner``; put before it in the bases."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        # vLLM's own proposer refuses a draft that is not sharded as the target is.
        stock = gpu_model_runner.DraftModelProposer
        dedicated = vllm_config.speculative_config.stairs.placement == "dedicated"
        gpu_model_runner.DraftModelProposer = AbsentDrafter if dedicated else StairsProposer
        try:
            super().__init__(vllm_config, device)  # type: ignore[call-arg]
        finally:
            gpu_model_runner.DraftModelProposer = stock
        self._init_stairs()

    def _init_stairs(self: Any) -> None:
        config = self.speculative_config
        assert isinstance(config, StairsSpeculativeConfig)
        # vLLM then proposes after its bookkeeping, with the accepted tokens on the host.
        config.disable_padded_drafter_batch = True
        self.rejection_sampler = StairsRejectionSampler(self.sampler, config, self.device)
        # vLLM leaves the processors of min_p and logit_bias out under speculation.
        self.input_batch.logitsprocs = LogitsProcessors(
            processor(self.vllm_config, self.device, PIN_MEMORY)
            for processor in BUILTIN_LOGITS_PROCESSORS
        )
        self.input_batch.sampling_metadata = self.input_batch._make_sampling_metadata()
        self._budget_thinking_plainly()

        self.stairs_limits: dict[str, RequestLimits] = {}
        self.stairs_ledger: DraftKVLedger | None = None
        self.stairs_counters = Counters.attach(
            config.stairs_counters_file if get_tensor_model_parallel_rank() == 0 else None,
            config.num_speculative_tokens,
        )
        self.stairs_record: IO[str] | None = None
        if config.stairs.record and get_tensor_model_parallel_rank() == 0:
            self.stairs_record = open(config.stairs.record, "a", buffering=1)  # noqa: SIM115
        self._stairs_drafted: dict[str, tuple[list[int], list[float]]] = {}
        self._stairs_target_seconds = 0.0
        is_dedicated = config.stairs.placement == "dedicated"
        # A dedicated draft's go to the first rank, and from there with the schedule to the others.
        self._stairs_drafts = not is_dedicated or get_tensor_model_parallel_rank() == 0
        self.stairs_decider: HeightDecider | None = None
        if config.stairs.height == "auto" and self._stairs_drafts:
            self.stairs_decider = self._make_decider(config.num_speculative_tokens, is_dedicated)
        self.stairs_dedicated: DedicatedDraft | None = None
        if is_dedicated and self._stairs_drafts:
            self.stairs_dedicated = DedicatedDraft(
                config, self.drafter.draft_config(), self.stairs_counters
            )
            self.stairs_dedicated.begin()
        self._stairs_pending: _Pending | None = None
        # Request with a grammar -> drafts of its coming staircase, of which the scheduler may
        # leave some out.
        self._stairs_under_grammar: dict[str, int] = {}
        self._stairs_draft_seconds = 0.0
        self._stairs_step_start = 0.0
        self._stairs_step_end = -math.inf
        self._stairs_gaps, self._stairs_gaps_before_drafts = Median(_GAPS), Median(_GAPS)
        # Seconds of what the engine did before it asked for the drafts of the coming step.
        self._stairs_between = 0.0

    # ----------------------------------------------------------------------- start-up

    def _make_decider(self: Any, max_height: int, is_dedicated: bool) -> HeightDecider:
        policy = None
        if get_tensor_model_parallel_rank() == 0:
            share = weights_share(self.speculative_config)
            guess = {} if share is None else {"draft_share": min(share, 1.0)}
            # A dedicated draft's confidences come with its drafts, when heights are chosen.
            policy = RaggedPolicy(max_height, use_confidence=not is_dedicated, **guess)
        return HeightDecider(policy, get_pp_group() if is_dedicated else get_tp_group())

    def initialize_kv_cache(
        self: Any, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any
    ) -> None:
        """Also start the ledger of the draft's KV cache, and say what the draft costs."""
        super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)  # type: ignore[misc]
        # vLLM may have made a new input batch for the cache's block sizes.
        self._budget_thinking_plainly()
        if self.speculative_config.stairs.placement == "dedicated":
            if not is_profiling and self.stairs_dedicated is not None:
                self.stairs_dedicated.wait_until_ready()
            return
        group = kv_cache_config.kv_cache_groups[self.drafter.kv_cache_gid]
        self.stairs_ledger = DraftKVLedger(
            kv_cache_config.num_blocks, group.kv_cache_spec.block_size
        )
        if not is_profiling and get_tensor_model_parallel_rank() == 0:
            self._say_what_the_draft_costs(kv_cache_config)

    def _budget_thinking_plainly(self: Any) -> None:
        """Requests with a thinking budget are decoded plainly (``needs_plain_sampling``)."""
        holder = self.input_batch.thinking_budget_state_holder
        if holder is not None:
            holder.in_spec_mode = False

    def _say_what_the_draft_costs(self: Any, kv_cache_config: Any) -> None:
        draft_layers = self.drafter._draft_attn_layer_names
        per_token = {True: 0.0, False: 0.0}
        for group in kv_cache_config.kv_cache_groups:
            specs = getattr(group.kv_cache_spec, "kv_cache_specs", None)
            for name in group.layer_names:
                spec = specs[name] if specs is not None else group.kv_cache_spec
                per_token[name in draft_layers] += spec.page_size_bytes / spec.block_size
        draft, target = per_token[True], per_token[False]
        block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        tokens = kv_cache_config.num_blocks * block_size
        without = tokens * (draft + target) / target if target else tokens
        logger.info(
            "Stairs: draft %s costs %.1f MiB of weights (per rank) and %.1f of %.1f KiB of KV "
            "cache per token; the KV cache holds %d tokens (%.1f requests of %d) instead of %d "
            "(%.1f). Largest height %d, layout %s.",
            self.speculative_config.draft_model_config.model,
            self.drafter.weights_bytes() / 2**20,
            draft / 2**10,
            (draft + target) / 2**10,
            tokens,
            tokens / self.max_model_len,
            self.max_model_len,
            without,
            without / self.max_model_len,
            self.num_spec_tokens,
            self.speculative_config.stairs.layout,
        )
        if self.speculative_config.draft_sample_method == "probabilistic":
            shape = (self.max_num_reqs, self.num_spec_tokens, self.drafter.target_vocab_size)
            logger.info(
                "Stairs: the probabilities of sampled drafts take up to %.1f MiB (%d requests, "
                "%d drafts, %d ids).",
                4 * math.prod(shape) / 2**20,
                *shape,
            )

    # ------------------------------------------------------------------- requests, blocks

    def _update_states(self: Any, scheduler_output: Any) -> Any:
        """Also follow requests and blocks: which draft KV is gone, what a request allows."""
        finished = scheduler_output.finished_req_ids
        for req_id in finished:
            self.stairs_limits.pop(req_id, None)
            self._stairs_drafted.pop(req_id, None)
        if self.stairs_decider is not None:
            self.stairs_decider.forget(list(finished))
        for new in scheduler_output.scheduled_new_reqs:
            self.stairs_limits[new.req_id] = _limits(new, self.num_spec_tokens)
        if self.stairs_ledger is not None:
            self._follow_blocks(scheduler_output)
        elif self.stairs_dedicated is not None:
            # A request that comes again under its name may bring another text.
            new_ids = [new.req_id for new in scheduler_output.scheduled_new_reqs]
            self.stairs_dedicated.forget([*finished, *new_ids])
        return super()._update_states(scheduler_output)  # type: ignore[misc]

    def _follow_blocks(self: Any, scheduler_output: Any) -> None:
        """Tell the ledger which blocks requests get and give up."""
        ledger = self.stairs_ledger
        group = self.drafter.kv_cache_gid
        for req_id in scheduler_output.finished_req_ids:
            ledger.release(req_id)
        for new in scheduler_output.scheduled_new_reqs:
            ledger.admit(new.req_id, new.block_ids[group], new.num_computed_tokens)
        cached = scheduler_output.scheduled_cached_reqs
        for req_id, new_blocks, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if new_blocks is None:
                continue
            if req_id in cached.resumed_req_ids:
                ledger.admit(req_id, new_blocks[group], num_computed)
            else:
                ledger.extend(new_blocks[group])

    # --------------------------------------------------------------------------- scorer

    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Also time the target's pass; and sample at once where no grammar is awaited."""
        start = time.perf_counter()
        gap = self._since_last_step(start, self._stairs_gaps)
        self._stairs_step_start = start - gap - self._stairs_between
        self._stairs_between = 0.0
        self._stairs_pending = None
        output = super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        if not scheduler_output.total_num_scheduled_tokens:
            return output
        self._stairs_target_seconds = time.perf_counter() - start
        self.stairs_counters.add_time("target", self._stairs_target_seconds)
        if self.execute_model_state is not None and not (
            scheduler_output.has_structured_output_requests
        ):
            # The engine would ask for it next; only a grammar is worth a message of its own.
            return self.sample_tokens(None)
        return output

    def _since_last_step(self: Any, now: float, gaps: Median) -> float:
        """Seconds of scheduling and messages since the worker's last work.

        Each step has to bear them: before the step, and also before its drafts are written.
        """
        gap = now - self._stairs_step_end
        if not 0.0 <= gap <= _LONGEST_GAP:
            return gaps.value
        gaps.add(gap)
        return min(gap, 3.0 * gaps.value)

    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Also lay the stairs out as rows of their own, where the expanded layout is wanted."""
        metadata, common = super()._build_attention_metadata(*args, **kwargs)  # type: ignore[misc]
        if (
            self.speculative_config.stairs.layout == "expanded"
            and common is not None
            and kwargs.get("use_spec_decode")
            and not kwargs.get("for_cudagraph_capture")
        ):
            self._expand(metadata, common, kwargs.get("slot_mappings"))
        return metadata, common

    def _expand(self: Any, metadata: dict[str, Any], common: Any, slot_mappings: Any) -> None:
        """Replace the target's attention metadata by that of the expanded batch."""
        num_reqs = common.num_reqs
        is_staircase = self.num_decode_draft_tokens.np[:num_reqs] > 0
        if not is_staircase.any():
            return
        rows = expand_rows(
            common.query_start_loc_cpu.numpy(),
            common.seq_lens_cpu_upper_bound.numpy()[:num_reqs],
            is_staircase,
        )
        source = async_tensor_h2d(rows.source, device=self.device)
        query_start_loc_cpu = torch.from_numpy(rows.query_start_loc)
        seq_lens_cpu = torch.from_numpy(rows.seq_lens)
        expanded = copy(common)
        expanded.num_reqs = len(rows.source)
        expanded.query_start_loc_cpu = query_start_loc_cpu
        expanded.query_start_loc = async_tensor_h2d(query_start_loc_cpu, device=self.device)
        expanded.seq_lens = async_tensor_h2d(seq_lens_cpu, device=self.device)
        expanded.seq_lens_cpu_upper_bound = seq_lens_cpu
        expanded.max_query_len = int(np.diff(rows.query_start_loc).max())
        if common.is_prefilling is not None:
            expanded.is_prefilling = common.is_prefilling[
                torch.from_numpy(rows.source).to(common.is_prefilling.device)
            ]
        expanded._num_computed_tokens_cache = None
        expanded._token_to_req_indices_cache = None
        for gid, groups in enumerate(self.attn_groups):
            table = self.input_batch.block_table[gid].get_device_tensor(num_reqs)
            expanded.block_table_tensor = table[source]
            if gid > 0:
                expanded.slot_mapping = slot_mappings[gid]
            for group in groups:
                if set(group.layer_names) <= self.drafter._draft_attn_layer_names:
                    continue
                group_metadata = group.build_metadata(copy(expanded))
                for layer in group.layer_names:
                    metadata[layer] = group_metadata

    # ------------------------------------------------------------------------- acceptor

    def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        """Also time validation; a step without any draft is sampled as in plain vLLM."""
        start = time.perf_counter()
        if spec_decode_metadata is not None and spec_decode_metadata.max_spec_len == 0:
            spec_decode_metadata = None
        output = super()._sample(logits, spec_decode_metadata)  # type: ignore[misc]
        self.stairs_counters.add_time("validation", time.perf_counter() - start)
        return output

    # ------------------------------------------------------------------------- proposer

    def _input_fits_in_drafter(self: Any, common_attn_metadata: Any) -> bool:
        """Decided per request in :meth:`propose_draft_token_ids`, not by the longest one."""
        return common_attn_metadata is not None

    def propose_draft_token_ids(
        self: Any,
        scheduler_output: Any,
        sampled_token_ids: list[list[int]],
        sampling_metadata: Any,
        hidden_states: Any,
        sample_hidden_states: Any,
        aux_hidden_states: Any,
        spec_decode_metadata: Any,
        common_attn_metadata: Any,
        slot_mappings: Any,
    ) -> list[list[int]]:
        """Decide who drafts; see ``GPUModelRunner.propose_draft_token_ids``.

        Args:
            sampled_token_ids: per row the tokens of this step, empty in mid-prefill; vLLM's
                bookkeeping has appended them to the host's token ids already.

        Returns:
            Per row no drafts: they are written when they are taken.
        """
        start = time.perf_counter()
        heights_before = self.num_decode_draft_tokens.np[: len(sampled_token_ids)]
        self._observe(sampled_token_ids, heights_before, scheduler_output)

        if self._stairs_drafts:
            candidates = self._candidates(
                sampled_token_ids, scheduler_output.num_spec_tokens_to_schedule, sampling_metadata
            )
            heights = self._plan(candidates) if candidates else []
            if any(heights):
                if self._has_grammar(candidates):
                    # A draft that was drawn and that a grammar refuses counts as a refusal, and
                    # nobody would be told: the most likely one can be left out for any reason.
                    sampling_metadata = None
                self._stairs_pending = _Pending(candidates, heights, sampling_metadata)
                if self.stairs_dedicated is not None:
                    self._ask(self._stairs_pending)
        self._stairs_step_end = time.perf_counter()
        self._stairs_draft_seconds = self._stairs_step_end - start
        self.stairs_counters.add_time("draft", self._stairs_draft_seconds)
        return [[] for _ in self.input_batch.req_ids]

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        """Also say whether there will be drafts to take."""
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        setattr(output, DRAFTS_FOLLOW, self._stairs_pending is not None)
        return output

    def take_draft_token_ids(self: Any) -> Any:
        """Write the next staircases; see ``GPUModelRunner.take_draft_token_ids``."""
        pending, self._stairs_pending = self._stairs_pending, None
        if pending is not None:
            start = time.perf_counter()
            self._stairs_between = self._since_last_step(start, self._stairs_gaps_before_drafts)
            # The time that deciding took is part of what drafting costs.
            self._write(pending, start - self._stairs_draft_seconds)
            self._stairs_step_end = time.perf_counter()
            seconds = self._stairs_step_end - start
            self._stairs_draft_seconds += seconds
            self.stairs_counters.add_time("draft", seconds)
        return super().take_draft_token_ids()  # type: ignore[misc]

    def _plan(self: Any, candidates: list[_Candidate]) -> list[int]:
        """Who drafts how far: all they can, or what the policy says."""
        decider: HeightDecider | None = self.stairs_decider
        if decider is None:
            self.stairs_counters.count_off(c.reason for c in candidates if c.reason == AWAY)
            return [c.room for c in candidates]
        req_ids = self.input_batch.req_ids
        heights, cut, reasons = decider.plan(
            [req_ids[c.row] for c in candidates],
            [c.room for c in candidates],
            # The usual step leaves the newest token, and the last draft if all were kept.
            [max(c.num_tokens - c.num_valid - 2, 0) for c in candidates],
            [c.remaining for c in candidates],
            [c.reason for c in candidates],
            [max(c.num_tokens - max(c.num_valid, c.end) - 2, 0) for c in candidates],
            [c.num_tokens for c in candidates],
        )
        for index in cut:
            candidate = candidates[index]
            first = candidate.end
            self.stairs_ledger.begin_at(req_ids[candidate.row], first)
            candidates[index] = candidate._replace(num_valid=first, first=first)
        self.stairs_counters.count_cut(len(cut))
        self.stairs_counters.count_off(reasons)
        self.stairs_counters.set_gain(decider.gain)
        return heights

    def _has_grammar(self: Any, candidates: list[_Candidate]) -> bool:
        req_ids = self.input_batch.req_ids
        return any(self.stairs_limits[req_ids[c.row]].has_grammar for c in candidates)

    def _ask(self: Any, pending: _Pending) -> None:
        """Ask the dedicated draft, and say how long its drafts are worth waiting for."""
        patience_ms = None
        if self.stairs_decider is not None:
            patience_ms = self.stairs_decider.patience_ms()
        if patience_ms is None:
            patience_ms = fixed_patience_ms(
                sum(pending.heights), len(pending.candidates), self._stairs_target_seconds * 1e3
            )
        batch = pending.batch
        self.stairs_dedicated.ask(
            [self.input_batch.req_ids[row] for row in batch.rows.tolist()],
            batch,
            self.input_batch.token_ids_cpu,
            patience_ms,
            want_confidences=self.stairs_decider is not None or self.stairs_record is not None,
        )

    def _write(self: Any, pending: _Pending, start: float) -> None:
        """Write drafts; a policy also decides when each stops and what the target verifies.

        Args:
            pending: who drafts.
            start: when this step's drafting began (``time.perf_counter``).
        """
        decider: HeightDecider | None = self.stairs_decider
        after_first: float | None = None
        if self.stairs_dedicated is not None:
            written: Drafts = self.stairs_dedicated.collect()
            if decider is not None:
                decider.arrived(written.confidences or [])
        else:

            def go_on(confidences: list[float]) -> list[int]:
                nonlocal after_first
                assert decider is not None
                elapsed = time.perf_counter() - start
                after_first = after_first or elapsed
                return decider.proceed(confidences, elapsed * 1e3)

            written = self.drafter.draft(
                pending.batch,
                self.input_batch.token_ids_cpu,
                self.input_batch.block_table[self.drafter.kv_cache_gid],
                pending.sampling_metadata,
                want_confidences=self.stairs_record is not None,
                go_on=go_on if decider else None,
            )
        self._after_drafting(pending, written)
        heights = pending.heights
        if decider is not None:
            # Which drafts to verify may depend on their confidence only where none was drawn.
            heights = decider.settle(len(heights), may_trim=written.probabilities is None)
            total = time.perf_counter() - start
            if after_first is None:
                decider.drafted(total * 1e3, None)
            else:
                decider.drafted(after_first * 1e3, (total - after_first) * 1e3)
        req_ids = self.input_batch.req_ids
        for i, token_ids in zip(pending.chosen(), written.token_ids, strict=True):
            row = pending.candidates[i].row
            self._draft_token_ids[row] = token_ids[: heights[i]]
            if decider is not None and self.stairs_limits[req_ids[row]].has_grammar:
                self._stairs_under_grammar[req_ids[row]] = len(self._draft_token_ids[row])

    def _candidates(
        self: Any, sampled_token_ids: list[list[int]], max_height: int, sampling_metadata: Any
    ) -> list[_Candidate]:
        """The requests that have written a token and go on, and how far each may draft."""
        req_ids = self.input_batch.req_ids
        num_tokens = self.input_batch.num_tokens_no_spec[: len(req_ids)].tolist()
        plainly = needs_plain_sampling(sampling_metadata)
        reason = SAMPLING if plainly else None
        if self.stairs_dedicated is not None and not self.stairs_dedicated.is_free():
            reason = reason or AWAY
        found: list[_Candidate] = []
        for row, req_id in enumerate(req_ids):
            confirmed = num_tokens[row] - 1
            if self.stairs_ledger is not None:
                self.stairs_ledger.settle(req_id, self._blocks_of(req_id), confirmed)
            if not sampled_token_ids[row]:
                continue
            limits = self.stairs_limits[req_id]
            newest = sampled_token_ids[row][-1]
            remaining = limits.max_tokens - num_tokens[row]
            has_ended = not limits.stop_token_ids.isdisjoint(sampled_token_ids[row])
            if remaining <= 0 or has_ended:
                continue
            room = 0
            if reason is None:
                room = height_ceiling(
                    limits,
                    num_tokens[row],
                    newest,
                    max_height,
                    self.max_model_len,
                    self.effective_drafter_max_model_len,
                )
            valid, first, end = confirmed, 0, 0
            if room:
                valid = self._valid_tokens(req_id, confirmed)
                if self.stairs_ledger is not None:
                    first = self.stairs_ledger.first_token(req_id)
                    end = context_start(num_tokens[row], valid, self.stairs_ledger.block_size)
            found.append(
                _Candidate(
                    row=row,
                    num_tokens=num_tokens[row],
                    num_valid=valid,
                    first=first,
                    end=end,
                    room=room,
                    remaining=remaining,
                    reason=reason if limits.max_height else OPT_OUT,
                )
            )
        return found

    def _blocks_of(self: Any, req_id: str) -> list[int]:
        """The blocks of a request in the draft's KV cache."""
        block_ids: list[int] = self.requests[req_id].block_ids[self.drafter.kv_cache_gid]
        return block_ids

    def _valid_tokens(self: Any, req_id: str, confirmed: int) -> int:
        """Leading tokens, at most ``confirmed``, whose draft KV is valid."""
        if self.stairs_ledger is None:
            return min(self.stairs_dedicated.read(req_id), confirmed)
        return self.stairs_ledger.valid_tokens(req_id, self._blocks_of(req_id), confirmed)

    def _after_drafting(self: Any, pending: _Pending, written: Drafts) -> None:
        req_ids = self.input_batch.req_ids
        batch = pending.batch
        num_tokens = batch.num_tokens.tolist()
        for index, row in enumerate(batch.rows.tolist()):
            if self.stairs_ledger is not None:
                # The last draft is never read by the draft model itself.
                read = num_tokens[index] + max(len(written.token_ids[index]) - 1, 0)
                self.stairs_ledger.wrote(req_ids[row], read)
            if self.stairs_record is not None and written.confidences is not None:
                self._stairs_drafted[req_ids[row]] = (
                    written.token_ids[index],
                    written.confidences[index],
                )
        if written.probabilities is not None:
            self._draft_probs = written.probabilities
            self._draft_prob_req_ids = [req_ids[row] for row in batch.rows.tolist()]

    # -------------------------------------------------------------------------- counters

    def _observe(
        self: Any,
        sampled_token_ids: list[list[int]],
        heights: np.ndarray,
        scheduler_output: Any,
    ) -> None:
        """Count what became of the staircases of this step (``heights`` -1: prefill)."""
        req_ids = self.input_batch.req_ids
        written = (
            self.stairs_limits[req_id].until_end(token_ids)
            for req_id, token_ids in zip(req_ids, sampled_token_ids, strict=True)
        )
        emitted = np.fromiter(written, np.int64, len(sampled_token_ids))
        staircases = (heights >= 0) & (emitted > 0)
        self.stairs_counters.observe(heights[staircases], emitted[staircases] - 1)
        if self.stairs_decider is not None:
            rows = np.flatnonzero(staircases).tolist()
            refused = None
            if self._stairs_under_grammar:
                wanted = [self._stairs_under_grammar.get(req_ids[row], 0) for row in rows]
                cut = heights[rows] < wanted
                # The step's budget of tokens, where it was spent, may have cut them as well.
                cut &= scheduler_output.total_num_scheduled_tokens < self.max_num_tokens
                refused = cut & (emitted[rows] - 1 == heights[rows])
                without = int((cut & (heights[rows] == 0)).sum())
                self.stairs_counters.count_off([GRAMMAR] * without)
                self._stairs_under_grammar.clear()
            self.stairs_decider.observe(
                [req_ids[row] for row in rows],
                heights[rows].tolist(),
                (emitted[rows] - 1).tolist(),
                target_ms=(time.perf_counter() - self._stairs_step_start) * 1e3,
                rows=scheduler_output.total_num_scheduled_tokens,
                refused=None if refused is None else refused.tolist(),
            )
        if self.stairs_record is None:
            return
        for row in np.flatnonzero(staircases).tolist():
            req_id = req_ids[row]
            draft, confidence = self._stairs_drafted.pop(req_id, ([], []))
            height = int(heights[row])
            line = {
                "request": req_id,
                "position": int(self.input_batch.num_tokens_no_spec[row])
                - len(sampled_token_ids[row]),
                "draft": draft[:height],
                "probability": [round(value, 6) for value in confidence[:height]],
                "emitted": sampled_token_ids[row][: emitted[row]],
                "rows": scheduler_output.total_num_scheduled_tokens,
                "draft_ms": round(self._stairs_draft_seconds * 1e3, 3),
                "target_ms": round(self._stairs_target_seconds * 1e3, 3),
            }
            self.stairs_record.write(json.dumps(line) + "\n")

    def stairs_close(self: Any) -> None:
        """End what was started outside of this process."""
        if self.stairs_dedicated is not None:
            self.stairs_dedicated.close()

    def stairs_statistics(self: Any) -> dict[str, Any]:
        """The counters since start-up (see :class:`vllm_stairs.engine.metrics.Counters`).

        Beside them ``draft_weights``: what became of that option in this rank's draft, ``bfloat16``
        or ``full``; None where a dedicated draft is not there, or is another rank's.
        """
        if isinstance(self.drafter, AbsentDrafter):
            dedicated = self.stairs_dedicated
            weights = ((dedicated and dedicated.facts) or {}).get("weights")
        else:
            weights = "full" if self.drafter.matrices is None else "bfloat16"
        return {**self.stairs_counters.as_dict(), "draft_weights": weights}


def _limits(request: Any, max_height: int) -> RequestLimits:
    """What a new request allows."""
    params = request.sampling_params
    own = request_max_height(params.extra_args)
    prompt = request.prompt_token_ids
    num_prompt_tokens = len(prompt or ())
    return RequestLimits(
        max_height=max_height if own is None else min(own, max_height),
        min_tokens=num_prompt_tokens + params.min_tokens,
        max_tokens=num_prompt_tokens + params.max_tokens,
        # As vLLM's `check_stop` has it; `ignore_eos` leaves those that were asked for.
        stop_token_ids=frozenset({*(params.stop_token_ids or ()), params.eos_token_id} - {None}),
        # The draft cannot read embeddings, of the whole prompt or (then with ids that stand in
        # their places) of parts of it.
        draftable=request.prompt_embeds is None,
        has_grammar=params.structured_outputs is not None,
    )


class StairsCPUModelRunner(StairsModelRunnerMixin, CPUModelRunner):
    """The runner on CPU.

    What a request with a seed draws while its prompt is read in parts is no token of its, and vLLM
    takes it back by the offset of the request's generator. Generators on CPU have none: the engine
    would die of one such request, as in plain vLLM. Here their state is put back instead.

    Retired by: ``GPUModelRunner._bookkeeping_sync`` doing so on CPU.
    """

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        """Also leave the generators of requests in mid-prefill as they are."""
        drawing = [(g, g.get_state()) for g in self._seeded(in_mid_prefill=True).values()]
        output = super()._sample(logits, spec_decode_metadata)
        for generator, state in drawing:
            generator.set_state(state)
        return output

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        """As in vLLM, which finds no generator whose draw it would take back."""
        generators = self.input_batch.generators
        if generators:
            self.input_batch.generators = self._seeded(in_mid_prefill=False)
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            self.input_batch.generators = generators

    def _seeded(self, in_mid_prefill: bool) -> dict[int, torch.Generator]:
        """Generators by row, of the requests whose sampled token does not count, or of the rest."""
        generators = self.input_batch.generators
        return {
            row: generator
            for row, generator in generators.items()
            if bool(self.discard_request_mask.np[row]) == in_mid_prefill
        }


class StairsGPUModelRunner(StairsModelRunnerMixin, GPUModelRunner):
    """The runner on CUDA and ROCm."""
