"""The draft model in the engine.

Loading, compilation, attention groups and graph dispatch are vLLM's ``DraftModelProposer``;
what it reads and when is ours. Stock drafting re-reads the whole target batch, rejected drafts
included, and writes K tokens for every request. Here a draft pass reads exactly the tokens that
are missing in the draft's KV cache, per request; heights are ragged, and a request that is not
to draft costs nothing.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from vllm.forward_context import set_forward_context
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.llm_base_proposer import compute_probs_and_sample_next_token

from vllm_stairs.proposer.plan import plan_passes


@dataclass(frozen=True)
class DraftBatch:
    """The requests that are to draft, one array entry each.

    Attributes:
        rows: ``[n]``, int64: their rows in vLLM's input batch.
        num_tokens: ``[n]``, int64: length of the text, newest token included.
        num_valid: ``[n]``, int64: leading tokens whose draft KV is valid; less than
            ``num_tokens``.
        heights: ``[n]``, int64: tokens to draft, each >= 1.
    """

    rows: np.ndarray
    num_tokens: np.ndarray
    num_valid: np.ndarray
    heights: np.ndarray

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


class StairsProposer(DraftModelProposer):
    """Writes the drafts of a batch of requests."""

    def __init__(self, vllm_config: Any, device: torch.device, runner: Any) -> None:
        super().__init__(vllm_config=vllm_config, device=device, runner=runner)
        self.target_vocab_size = vllm_config.model_config.get_vocab_size()
        self.draft_vocab_size = self.draft_model_config.get_vocab_size()

    def _raise_if_padded_drafter_batch_disabled(self) -> None:
        """Nothing is padded here, so vLLM's restriction does not apply."""

    def weights_bytes(self) -> int:
        """Bytes of the draft's weights on this rank.

        Taken from the checkpoint's headers where it is a local folder: on CPU vLLM repacks linear
        layers out of ``parameters()``.
        """
        files = sorted(Path(self.draft_model_config.model).glob("*.safetensors"))
        if not files:
            return sum(p.numel() * p.element_size() for p in self.model.parameters())
        total = 0
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    total += math.prod(tensors.get_slice(name).get_shape())
        ranks = self.speculative_config.draft_parallel_config.tensor_parallel_size
        return total * self.dtype.itemsize // ranks

    @torch.inference_mode()
    def draft(
        self,
        batch: DraftBatch,
        token_ids: np.ndarray,
        block_table: Any,
        sampling_metadata: Any,
        want_confidences: bool = False,
    ) -> Drafts:
        """Fill the holes and write the staircases.

        Args:
            batch: who drafts how much; at least one request.
            token_ids: ``[max requests, max_model_len]``: vLLM's token ids on the host.
            block_table: vLLM's ``BlockTable`` of the draft's KV cache group.
            sampling_metadata: of vLLM's whole input batch.
            want_confidences: also return the probability of every drafted token.
        """
        sampling = self._select(sampling_metadata, batch.rows)
        hidden_states = self._read_text(batch, token_ids, block_table)
        drafted, probs, confidence = self._sample(hidden_states, sampling, want_confidences)

        # [still drafting] indices into the batch; compacted when requests reach their height.
        active = np.arange(len(batch))
        columns = [(active, drafted, probs, confidence)]
        for height in range(1, int(batch.heights.max())):
            still = batch.heights[active] > height
            if not still.all():
                keep = async_tensor_h2d(np.flatnonzero(still), device=self.device)
                drafted = drafted[keep]
                active = active[still]
                sampling = self._select(sampling_metadata, batch.rows[active])
            positions = batch.num_tokens[active] + (height - 1)
            hidden_states = self._forward(
                rows=batch.rows[active],
                query_lens=np.ones(len(active), dtype=np.int64),
                positions=positions,
                input_ids=drafted,
                block_table=block_table,
            )
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
        query_lens: np.ndarray,
        positions: np.ndarray,
        input_ids: torch.Tensor,
        block_table: Any,
    ) -> torch.Tensor:
        """One pass of the draft model.

        Args:
            rows: ``[n]``: requests, as rows of the input batch.
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
        seq_lens_np = (positions[ends - 1] + 1).astype(np.int32)
        seq_lens_cpu = torch.from_numpy(seq_lens_np)

        block_size = block_table.block_size
        blocks = block_table.get_numpy_array()
        of_token = np.repeat(rows, query_lens) if num_tokens != num_reqs else rows
        slots = (
            blocks[of_token, positions // block_size].astype(np.int64) * block_size
            + positions % block_size
        )

        mode, num_padded, num_across_dp = self._determine_batch_execution_and_padding(num_tokens)
        if self.vocab_mapping is not None:
            input_ids = self.vocab_mapping.map_target_to_draft_ids(input_ids)
        elif self.draft_vocab_size < self.target_vocab_size:
            # Only padding ids of the target lie outside, and no tokenizer writes them.
            input_ids = input_ids.clamp(max=self.draft_vocab_size - 1)
        self.input_ids[:num_tokens] = input_ids
        self.positions[:num_tokens] = async_tensor_h2d(positions, device=self.device)

        device_blocks = block_table.get_device_tensor(int(rows.max()) + 1)
        metadata = CommonAttentionMetadata(
            query_start_loc=async_tensor_h2d(query_start_loc_cpu, device=self.device),
            query_start_loc_cpu=query_start_loc_cpu,
            seq_lens=async_tensor_h2d(seq_lens_cpu, device=self.device),
            seq_lens_cpu_upper_bound=seq_lens_cpu,
            num_reqs=num_reqs,
            num_actual_tokens=num_tokens,
            max_query_len=int(query_lens.max()),
            max_seq_len=int(seq_lens_np.max()),
            block_table_tensor=device_blocks[async_tensor_h2d(rows, device=self.device)],
            slot_mapping=async_tensor_h2d(slots, device=self.device),
            causal=True,
            positions=self.positions[:num_tokens],
        )
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
        if not self._enable_probabilistic_draft_probs or sampling_metadata.all_greedy:
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
            Ids ``[n]`` in the target's vocabulary; probabilities ``[n, target vocabulary]``
            where the drafts were sampled; confidences ``[n]`` where asked for.
        """
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
            token_ids = logits.argmax(-1)
        confidence = None
        if want_confidences:
            full = probs if probs is not None else logits.softmax(-1, dtype=torch.float32)
            confidence = full.gather(-1, token_ids[:, None].long()).squeeze(-1)
        if self.vocab_mapping is not None:
            token_ids = self.vocab_mapping.map_draft_to_target_ids(token_ids)
        if probs is not None and probs.shape[-1] < self.target_vocab_size:
            missing = self.target_vocab_size - probs.shape[-1]
            probs = torch.nn.functional.pad(probs, (0, missing))
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
            probabilities = first.new_empty(size, len(columns), first.shape[-1])
            for height, (active, _, probs, _) in enumerate(columns):
                probabilities[async_tensor_h2d(active, device=self.device), height] = probs
        return Drafts(token_ids, probabilities, confidences)
