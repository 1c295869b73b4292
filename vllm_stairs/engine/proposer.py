"""The draft model in the engine.

Loading, compilation, attention groups and graph dispatch are vLLM's ``DraftModelProposer``;
what it reads and when is ours. Stock drafting re-reads the whole target batch, rejected drafts
included, and writes K tokens for every request. Here a draft pass reads exactly the tokens that
are missing in the draft's KV cache, per request; heights are ragged, and a request that is not
to draft costs nothing.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.llm_base_proposer import compute_probs_and_sample_next_token

from vllm_stairs.acceptor.greedy import most_likely
from vllm_stairs.engine.draft_weights import BFloat16Weights, becomes_bfloat16, settle_weights
from vllm_stairs.engine.placement import in_draft_group
from vllm_stairs.engine.trimmed_head import CannotTrimError, pack_whole_head, trim_head
from vllm_stairs.proposer.plan import plan_passes
from vllm_stairs.proposer.vocabulary import FREQUENCIES_FILE

logger = init_logger("vllm.stairs.proposer")

_STORED_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16"), 2),
    **dict.fromkeys(("U32", "I32"), 4),
    **dict.fromkeys(("U64", "I64"), 8),
}
"""Of the types of a checkpoint that loading does not change."""


@dataclass(frozen=True)
class DraftBatch:
    """The requests that are to draft, one array entry each.

    Attributes:
        rows: ``[n]``, int64: their rows in vLLM's input batch.
        num_tokens: ``[n]``, int64: length of the text, newest token included.
        num_valid: ``[n]``, int64: leading tokens whose draft KV is valid; less than
            ``num_tokens``.
        heights: ``[n]``, int64: tokens to draft, each >= 1.
        first: ``[n]``, int64: first token of the draft's context, a multiple of the block size.
    """

    rows: np.ndarray
    num_tokens: np.ndarray
    num_valid: np.ndarray
    heights: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Drafts:
    """What the draft model wrote.

    Attributes:
        token_ids: per request its drafted ids, at most as many as its height.
        probabilities: ``[n, max height, vocabulary]``, float32, what the drafts were sampled
            from; None where they were the most likely tokens. Places above a request's own
            height are undefined.
        confidences: per request the draft's probability of each token it wrote; only when
            asked for.
    """

    token_ids: list[list[int]]
    probabilities: torch.Tensor | None
    confidences: list[list[float]] | None


@dataclass(frozen=True)
class _Passes:
    """The next passes of requests that read one token each, prepared at once.

    Between them nothing changes but the token, its position, its slot and the sequence lengths,
    and these are known beforehand. Tensors are on the device unless they say otherwise.

    Attributes:
        query_start_loc: ``[n + 1]``, int32.
        query_start_loc_cpu: the same on the host.
        block_table: ``[n, blocks]``, int32: blocks of these requests.
        positions: ``[passes, n]``, int64.
        slots: ``[passes, n]``, int64.
        seq_lens: ``[passes, n]``, int32.
        seq_lens_cpu: the same on the host.
        max_seq_lens: per pass the longest sequence (tokens).
        execution: what ``_determine_batch_execution_and_padding`` says of n tokens.
    """

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    block_table: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor
    max_seq_lens: list[int]
    execution: tuple[Any, int, Any]


class StairsProposer(DraftModelProposer):
    """Writes the drafts of a batch of requests."""

    def __init__(self, vllm_config: Any, device: torch.device, runner: Any) -> None:
        super().__init__(vllm_config=vllm_config, device=device, runner=runner)
        # Whole on every rank, instead of sharded as the target is.
        self.replicated = self.speculative_config.stairs.placement == "replicated"
        self.is_first_rank = get_tensor_model_parallel_rank() == 0
        self.target_vocab_size = self.speculative_config.target_model_config.get_vocab_size()
        self.draft_vocab_size = self.draft_model_config.get_vocab_size()
        # Of the draft's linear layers; None: they are as the draft was loaded.
        self.matrices: BFloat16Weights | None = None
        # [kept], int64: the id that each logit of a trimmed head stands for; None: all ids.
        self.kept_ids: torch.Tensor | None = None

    @in_draft_group
    def load_model(self, target_model: Any) -> None:
        """Also make the draft cheaper, where it is to be."""
        super().load_model(target_model)
        self._settle_head()

    def _create_draft_vllm_config(self) -> Any:
        """The draft's ``VllmConfig`` (``stairs_draft_weights``)."""
        config = super()._create_draft_vllm_config()
        self.matrices = settle_weights(config, self.speculative_config)
        return config

    def _settle_head(self) -> None:
        """Trim the output head of the loaded draft, and pack it.

        See ``stairs_draft_vocab`` and ``stairs_draft_weights``.
        """
        say = logger.info if self.is_first_rank else logger.debug
        if self.matrices is not None:
            say(
                "Stairs: the draft's matrices are in bfloat16, %.1f MiB less than in float32.",
                self.matrices.saved_bytes / 2**20,
            )
        described = (
            self.draft_model_config.get_hidden_size(),
            self.draft_model_config.dtype,
            self.device,
        )
        vocabulary = self.speculative_config.stairs_vocabulary
        if vocabulary is not None:
            try:
                head = trim_head(
                    self.model, vocabulary.ids, *described, bfloat16=self.matrices is not None
                )
            except CannotTrimError as reason:
                say("Stairs: the draft's output head stays whole: %s.", reason)
                vocabulary = None
        if vocabulary is None:
            if self.matrices is not None:
                try:
                    pack_whole_head(self.model, *described)
                except CannotTrimError as reason:
                    say("Stairs: the draft's output head stays float32: %s.", reason)
            return
        self.kept_ids = head.ids
        share = vocabulary.share
        say(
            "Stairs: the draft's output head keeps %d of %d ids%s: %.1f MiB more memory (per "
            "rank), read in each draft pass in place of %.1f MiB.",
            len(vocabulary.ids),
            self.draft_vocab_size,
            "" if share is None else f" ({100 * share:.2f} % of the counted tokens)",
            head.num_bytes / 2**20,
            head.whole_bytes / 2**20,
        )

    @in_draft_group
    def dummy_run(self, *args: Any, **kwargs: Any) -> None:
        """See ``SpecDecodeBaseProposer.dummy_run``: profiling, compilation, capture of graphs."""
        super().dummy_run(*args, **kwargs)

    def _raise_if_padded_drafter_batch_disabled(self) -> None:
        """Nothing is padded here, so vLLM's restriction does not apply."""

    def _raise_if_draft_tp_mismatch(self) -> None:
        """A draft of tensor parallel size 1 may run under any target (``placement``)."""

    def weights_bytes(self) -> int:
        """Bytes of the draft's weights on this rank.

        Taken from the checkpoint's headers where it is a local folder: on CPU vLLM repacks linear
        layers out of ``parameters()``.
        """
        weights = _checkpoint_bytes(self.draft_model_config.model, self.dtype.itemsize)
        if weights is None:
            return sum(p.numel() * p.element_size() for p in self.model.parameters())
        ranks = self.speculative_config.draft_parallel_config.tensor_parallel_size
        saved = 0 if self.matrices is None else self.matrices.saved_bytes
        return weights // ranks - saved

    @in_draft_group
    @torch.inference_mode()
    def draft(
        self,
        batch: DraftBatch,
        token_ids: np.ndarray,
        block_table: Any,
        sampling_metadata: Any,
        want_confidences: bool = False,
        go_on: Callable[[list[float]], Sequence[int]] | None = None,
        is_over: Callable[[], bool] | None = None,
    ) -> Drafts:
        """Fill the holes and write the staircases.

        Args:
            batch: who drafts how much; at least one request.
            token_ids: ``[max requests, max_model_len]``: vLLM's token ids on the host.
            block_table: vLLM's ``BlockTable`` of the draft's KV cache group.
            sampling_metadata: of vLLM's whole input batch; None: drafts are the most likely tokens.
            want_confidences: also return the probability of every drafted token.
            go_on: decides after each pass who takes part in the next, from the probabilities of
                the tokens just drafted; returns places among these, rising. Requests at their
                height may not be among them. None: all go on up to their heights.
            is_over: asked after each pass: whether to stop with what there is.
        """
        want_confidences = want_confidences or go_on is not None
        sampling = self._select(sampling_metadata, batch.rows)
        hidden_states = self._read_text(batch, token_ids, block_table)
        drafted, probs, confidence = self._sample(hidden_states, sampling, want_confidences)

        # [still drafting] indices into the batch; compacted when requests stop.
        active = np.arange(len(batch))
        columns = [(active, drafted, probs, confidence)]
        passes: _Passes | None = None
        first = 0
        for height in itertools.count(1):
            if go_on is None:
                still = np.flatnonzero(batch.heights[active] > height)
            else:
                assert confidence is not None
                still = np.asarray(go_on(confidence.tolist()), dtype=np.int64)
            if not len(still) or (is_over is not None and is_over()):
                break
            if len(still) < len(active):
                drafted = drafted[async_tensor_h2d(still, device=self.device)]
                active = active[still]
                sampling = self._select(sampling_metadata, batch.rows[active])
                passes = None
            if passes is None:
                passes, first = self._prepare(batch, active, height, block_table), height
            hidden_states = self._pass(passes, height - first, drafted)
            drafted, probs, confidence = self._sample(hidden_states, sampling, want_confidences)
            columns.append((active, drafted, probs, confidence))
        return self._collect(len(batch), columns)

    # ------------------------------------------------------------------ the model's passes

    def _read_text(
        self, batch: DraftBatch, token_ids: np.ndarray, block_table: Any
    ) -> torch.Tensor:
        """Read the missing text; returns hidden states ``[n, hidden]`` after the newest tokens."""
        read = batch.num_valid.copy()
        backlogs = (batch.num_tokens - batch.num_valid).tolist()
        hidden_states = None
        for chunk in plan_passes(backlogs, self.max_num_tokens):
            query_lens = np.asarray(chunk, dtype=np.int64)
            part = np.flatnonzero(query_lens)
            query_lens = query_lens[part]
            rows = batch.rows[part]
            first = np.repeat(np.cumsum(query_lens) - query_lens, query_lens)
            positions = np.repeat(read[part], query_lens) + np.arange(len(first)) - first
            ids = token_ids[np.repeat(rows, query_lens), positions]
            hidden_states = self._forward(
                rows=rows,
                context=batch.first[part],
                query_lens=query_lens,
                positions=positions,
                input_ids=async_tensor_h2d(ids, device=self.device),
                block_table=block_table,
            )
            read[part] += query_lens
        assert hidden_states is not None
        if len(hidden_states) == len(batch):
            return hidden_states
        last = async_tensor_h2d(np.cumsum(query_lens) - 1, device=self.device)
        return hidden_states[last]

    def _forward(
        self,
        rows: np.ndarray,
        context: np.ndarray,
        query_lens: np.ndarray,
        positions: np.ndarray,
        input_ids: torch.Tensor,
        block_table: Any,
    ) -> torch.Tensor:
        """One pass of the draft model.

        Args:
            rows: ``[n]``: requests, as rows of the input batch.
            context: ``[n]``: where the context of each begins.
            query_lens: ``[n]``: tokens of each, all >= 1.
            positions: ``[tokens]``: their positions, the requests one after the other.
            input_ids: ``[tokens]``: their ids, in the target's vocabulary, on the device.
            block_table: of the draft's KV cache group.

        Returns:
            Hidden states ``[tokens, hidden]``.
        """
        num_tokens = len(positions)
        num_reqs = len(rows)
        query_start_loc_cpu = torch.zeros(num_reqs + 1, dtype=torch.int32)
        ends = np.cumsum(query_lens)
        query_start_loc_cpu[1:] = torch.from_numpy(ends)
        seq_lens_np = (positions[ends - 1] + 1 - context).astype(np.int32)
        seq_lens_cpu = torch.from_numpy(seq_lens_np)

        block_size = block_table.block_size
        blocks = block_table.get_numpy_array()
        of_token = np.repeat(rows, query_lens) if num_tokens != num_reqs else rows
        slots = (
            blocks[of_token, positions // block_size].astype(np.int64) * block_size
            + positions % block_size
        )

        if self.vocab_mapping is None and self.draft_vocab_size < self.target_vocab_size:
            # Only padding ids of the target lie outside, and no tokenizer writes them.
            input_ids = input_ids.clamp(max=self.draft_vocab_size - 1)
        metadata = CommonAttentionMetadata(
            query_start_loc=async_tensor_h2d(query_start_loc_cpu, device=self.device),
            query_start_loc_cpu=query_start_loc_cpu,
            seq_lens=async_tensor_h2d(seq_lens_cpu, device=self.device),
            seq_lens_cpu_upper_bound=seq_lens_cpu,
            num_reqs=num_reqs,
            num_actual_tokens=num_tokens,
            max_query_len=int(query_lens.max()),
            max_seq_len=int(seq_lens_np.max()),
            block_table_tensor=self._blocks(block_table, rows, context),
            slot_mapping=async_tensor_h2d(slots, device=self.device),
            causal=True,
        )
        return self._run(
            metadata,
            input_ids,
            async_tensor_h2d(positions, device=self.device),
            self._determine_batch_execution_and_padding(num_tokens),
        )

    def _blocks(self, block_table: Any, rows: np.ndarray, context: np.ndarray) -> torch.Tensor:
        """Blocks of some requests, each from where its context begins.

        What lies before it is not there for attention: the sequence is shorter by as much. Its
        tokens keep their positions.

        Args:
            block_table: of the draft's KV cache group.
            rows: ``[n]``: requests, as rows of the input batch.
            context: ``[n]``: first tokens of their contexts, multiples of the block size.

        Returns:
            ``[n, blocks]``, int32, on the device.
        """
        blocks = block_table.get_device_tensor(int(rows.max()) + 1)
        if not context.any():
            return blocks[async_tensor_h2d(rows, device=self.device)]
        width = blocks.shape[1]
        left_out = async_tensor_h2d(context // block_table.block_size, device=self.device)
        places = torch.arange(width, device=self.device) + left_out[:, None]
        return blocks[
            async_tensor_h2d(rows, device=self.device)[:, None], places.clamp_(max=width - 1)
        ]

    def _prepare(
        self, batch: DraftBatch, active: np.ndarray, height: int, block_table: Any
    ) -> _Passes:
        """Prepare the passes of some requests until the first of them reaches its height.

        Args:
            batch: the batch.
            active: ``[n]``: the requests, as indices into the batch.
            height: tokens that each of them has drafted; less than each is to draft.
            block_table: of the draft's KV cache group.
        """
        rows = batch.rows[active]
        num_passes = int(batch.heights[active].min()) - height
        positions = (
            batch.num_tokens[active] + (height - 1) + np.arange(num_passes, dtype=np.int64)[:, None]
        )
        block_size = block_table.block_size
        blocks = block_table.get_numpy_array()[rows, positions // block_size]
        slots = blocks.astype(np.int64) * block_size + positions % block_size
        context = batch.first[active]
        seq_lens = positions + 1 - context
        seq_lens_cpu = torch.from_numpy(seq_lens.astype(np.int32))
        query_start_loc_cpu = torch.arange(len(rows) + 1, dtype=torch.int32)
        return _Passes(
            query_start_loc=async_tensor_h2d(query_start_loc_cpu, device=self.device),
            query_start_loc_cpu=query_start_loc_cpu,
            block_table=self._blocks(block_table, rows, context),
            positions=async_tensor_h2d(positions, device=self.device),
            slots=async_tensor_h2d(slots, device=self.device),
            seq_lens=async_tensor_h2d(seq_lens_cpu, device=self.device),
            seq_lens_cpu=seq_lens_cpu,
            max_seq_lens=seq_lens.max(1).tolist(),
            execution=self._determine_batch_execution_and_padding(len(rows)),
        )

    def _pass(self, passes: _Passes, index: int, input_ids: torch.Tensor) -> torch.Tensor:
        """One of some prepared passes: each request reads the token that it wrote last.

        Args:
            passes: the passes.
            index: which of them, from 0.
            input_ids: ``[n]``: the tokens, in the target's vocabulary, on the device.

        Returns:
            Hidden states ``[n, hidden]``.
        """
        num_reqs = len(input_ids)
        metadata = CommonAttentionMetadata(
            query_start_loc=passes.query_start_loc,
            query_start_loc_cpu=passes.query_start_loc_cpu,
            seq_lens=passes.seq_lens[index],
            seq_lens_cpu_upper_bound=passes.seq_lens_cpu[index],
            num_reqs=num_reqs,
            num_actual_tokens=num_reqs,
            max_query_len=1,
            max_seq_len=passes.max_seq_lens[index],
            block_table_tensor=passes.block_table,
            slot_mapping=passes.slots[index],
            causal=True,
        )
        return self._run(metadata, input_ids, passes.positions[index], passes.execution)

    def _run(
        self,
        metadata: Any,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        execution: tuple[Any, int, Any],
    ) -> torch.Tensor:
        """Run the draft model.

        Args:
            metadata: ``CommonAttentionMetadata`` of the pass, without positions.
            input_ids: ``[tokens]``, in the target's vocabulary, on the device.
            positions: ``[tokens]``, int64, on the device.
            execution: see :class:`_Passes`.

        Returns:
            Hidden states ``[tokens, hidden]``.
        """
        mode, num_padded, num_across_dp = execution
        num_tokens = metadata.num_actual_tokens
        if self.vocab_mapping is not None:
            input_ids = self.vocab_mapping.map_target_to_draft_ids(input_ids)
        # Where CUDA graphs and compiled code expect their inputs.
        self.input_ids[:num_tokens] = input_ids
        self.positions[:num_tokens] = positions
        metadata.positions = self.positions[:num_tokens]
        _, attn_metadata = self.build_per_group_and_layer_attn_metadata(metadata)
        with set_forward_context(
            attn_metadata,
            self.vllm_config,
            num_tokens=num_padded,
            num_tokens_across_dp=num_across_dp,
            cudagraph_runtime_mode=mode,
            slot_mapping=self._get_slot_mapping(num_padded, metadata.slot_mapping),
        ):
            hidden_states = self.model(
                input_ids=self.input_ids[:num_padded],
                positions=self._get_positions(num_padded),
                inputs_embeds=None,
            )
        return hidden_states[:num_tokens]

    # ------------------------------------------------------------------------- sampling

    def _select(self, sampling_metadata: Any, rows: np.ndarray) -> Any:
        """The sampling metadata of some rows, as far as drafting needs it."""
        if (
            not self._enable_probabilistic_draft_probs
            or sampling_metadata is None
            or sampling_metadata.all_greedy
        ):
            return None
        index = async_tensor_h2d(rows, device=self.device)
        return dataclasses.replace(
            sampling_metadata, temperature=sampling_metadata.temperature[index]
        )

    def _sample(
        self, hidden_states: torch.Tensor, sampling: Any, want_confidences: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Choose the next draft token of each row.

        Args:
            hidden_states: ``[n, hidden]``.
            sampling: sampling metadata of these rows, or None to take the most likely token.
            want_confidences: also return the probability of the token chosen.

        Returns:
            Ids ``[n]`` in the target's vocabulary; probabilities ``[n, logits]`` where the drafts
            were sampled; confidences ``[n]`` where asked for.
        """
        # [n, logits]: of the kept ids, or of the draft's own vocabulary.
        logits = self.model.compute_logits(hidden_states)
        if self.vocab_mapping is not None:
            logits = self.vocab_mapping.constrain_draft_logits(logits)
        elif logits.shape[-1] > self.target_vocab_size:
            logits = logits[:, : self.target_vocab_size]
        probs = None
        if sampling is not None:
            token_ids, probs = compute_probs_and_sample_next_token(
                logits.float(), sampling, self.use_fp64_gumbel
            )
        else:
            token_ids = most_likely(logits)
        confidence = None
        if want_confidences:
            full = probs if probs is not None else logits.softmax(-1, dtype=torch.float32)
            confidence = full.gather(-1, token_ids[:, None].long()).squeeze(-1)
        if self.kept_ids is not None:
            token_ids = self.kept_ids.index_select(0, token_ids)
        elif self.vocab_mapping is not None:
            token_ids = self.vocab_mapping.map_draft_to_target_ids(token_ids)
        return token_ids, probs, confidence

    def _collect(self, size: int, columns: Sequence[tuple[Any, ...]]) -> Drafts:
        """Put the steps together, with one transfer to the host."""
        ids = torch.cat([drafted for _, drafted, _, _ in columns]).tolist()
        who = np.concatenate([active for active, _, _, _ in columns]).tolist()
        token_ids: list[list[int]] = [[] for _ in range(size)]
        for index, token_id in zip(who, ids, strict=True):
            token_ids[index].append(token_id)

        confidences: list[list[float]] | None = None
        if columns[0][3] is not None:
            confidences = [[] for _ in range(size)]
            values = torch.cat([confidence for _, _, _, confidence in columns]).tolist()
            for index, value in zip(who, values, strict=True):
                confidences[index].append(value)

        probabilities = None
        if columns[0][2] is not None:
            first = columns[0][2]
            # What the draft cannot write has the probability 0.
            probabilities = first.new_zeros(size, len(columns), self.target_vocab_size)
            for height, (active, _, probs, _) in enumerate(columns):
                who = async_tensor_h2d(active, device=self.device)
                if self.kept_ids is None:
                    probabilities[who, height, : probs.shape[-1]] = probs
                else:
                    probabilities[who[:, None], height, self.kept_ids] = probs
        return Drafts(token_ids, probabilities, confidences)


def weights_share(config: Any) -> float | None:
    """The bytes of a draft's weights as a share of the target's, on a rank; None: not known.

    What a pass of the one is likely to take beside the other's where memory is the limit.

    Args:
        config: ``StairsSpeculativeConfig``.
    """
    draft, target = config.draft_model_config, config.target_model_config
    packed = becomes_bfloat16(draft.dtype, draft.quantization is not None, config)
    itemsize = torch.bfloat16.itemsize if packed else draft.dtype.itemsize
    draft_bytes = _checkpoint_bytes(draft.model, itemsize)
    target_bytes = _checkpoint_bytes(target.model, target.dtype.itemsize)
    if not draft_bytes or not target_bytes:
        return None
    draft_ranks = config.draft_parallel_config.tensor_parallel_size
    target_ranks = config.target_parallel_config.tensor_parallel_size
    return draft_bytes / draft_ranks / (target_bytes / target_ranks)


def _checkpoint_bytes(model: str, itemsize: int) -> int | None:
    """Weights of a model in a local folder, from its files' headers; None if it is elsewhere.

    Floating-point numbers take ``itemsize`` bytes once they are loaded, quantized ones (8-bit
    floating-point too) what they take in the file.
    """
    total = 0
    for file in Path(model).glob("*.safetensors"):
        if file.name != FREQUENCIES_FILE:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    found = tensors.get_slice(name)
                    size = _STORED_BYTES.get(found.get_dtype(), itemsize)
                    total += size * math.prod(found.get_shape())
    return total or None
