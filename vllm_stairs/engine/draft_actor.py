"""The draft on a device of its own: a Ray actor with vLLM's engine round one ordinary model.

Worker, runner, attention backend, KV cache, compilation and graphs are vLLM's, set up for the draft
as for any model that is served. Its scheduler does nothing: what a pass reads is said by
:class:`~vllm_stairs.placement.texts.Texts`, and the passes are those of
:class:`~vllm_stairs.engine.proposer.StairsProposer`, so the drafts are those of a colocated draft.

One thread owns the model. Ray's threads hand it messages, and between two passes it looks whether
there is one: what is asked for comes first, writing ahead fills the time between.
"""

import copy
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from vllm.config import set_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_stairs.engine.cpu import free_memory
from vllm_stairs.engine.draft_weights import settle_weights
from vllm_stairs.engine.frames import with_room
from vllm_stairs.engine.proposer import DraftBatch, StairsProposer
from vllm_stairs.placement.patience import Foresight
from vllm_stairs.placement.protocol import Reply, Step, Text, decode_step, encode
from vllm_stairs.placement.texts import Row, Texts

logger = init_logger("vllm.stairs.draft_actor")

DELAY_VARIABLE = "VLLM_STAIRS_DRAFT_DELAY_MS"
"""Environment variable, for measurements: milliseconds that each pass of the draft takes longer."""

_SWITCH_SECONDS = 1e-4
"""How long the model's thread may keep Python from the thread that receives a message."""


class DraftActor:
    """What Ray calls, from threads of its own.

    Args:
        vllm_config: the draft's, as an ordinary model.
        speculative_config: the target's ``StairsSpeculativeConfig``.
    """

    def __init__(self, vllm_config: Any, speculative_config: Any) -> None:
        self._messages: queue.SimpleQueue[tuple[bytes, float, Future[bytes]]] = queue.SimpleQueue()
        self._built: Future[dict[str, Any]] = Future()
        sys.setswitchinterval(_SWITCH_SECONDS)
        threading.Thread(
            target=self._run, args=(vllm_config, speculative_config), daemon=True
        ).start()

    def ready(self) -> dict[str, Any]:
        """Wait until drafts can be asked for; see :meth:`Writer.facts`."""
        return self._built.result()

    def step(self, message: bytes) -> bytes:
        """Answer a :class:`~vllm_stairs.placement.protocol.Step` with a ``Reply``."""
        answer: Future[bytes] = Future()
        self._messages.put((message, time.perf_counter(), answer))
        return answer.result()

    @with_room
    def _run(self, vllm_config: Any, speculative_config: Any) -> None:
        """The thread of the model."""
        try:
            writer = Writer(vllm_config, speculative_config)
        except Exception as error:
            self._built.set_exception(error)
            return
        self._built.set_result(writer.facts())
        try:
            while True:
                message, arrived, answer = self._messages.get()
                step = decode_step(message)
                answer.set_result(encode(writer.answer(step, arrived)))
                writer.write_ahead(step, lambda: not self._messages.empty())
        except BaseException:
            # Whoever waits for an answer learns it from Ray, and starts another.
            logger.exception("Stairs: the draft fails.")
            logging.shutdown()
            os._exit(1)


class Writer:
    """Answers steps with a model.

    Args:
        vllm_config: see :class:`DraftActor`.
        speculative_config: see :class:`DraftActor`.
    """

    def __init__(self, vllm_config: Any, speculative_config: Any) -> None:
        cache_config = vllm_config.cache_config
        if current_platform.is_cpu() and cache_config.kv_cache_memory_bytes is None:
            # vLLM would ask for most of the memory, which the target has already done.
            cache_config.kv_cache_memory_bytes = free_memory().available_memory // 4
        matrices = settle_weights(vllm_config, speculative_config)
        self.core = EngineCore(vllm_config, DraftExecutor, log_stats=False)
        runner = self.core.model_executor.driver_worker.worker.model_runner
        config = copy.copy(vllm_config)
        config.speculative_config = speculative_config
        with set_current_vllm_config(vllm_config):
            self.proposer = ActorProposer(config, runner.device, runner)
            self.proposer.matrices = matrices
            self.proposer.load_model(runner)
        self.block_table = runner.input_batch.block_table[0]
        rows, blocks = self.block_table.get_numpy_array().shape
        self.max_model_len = vllm_config.model_config.max_model_len
        self.num_blocks = cache_config.num_gpu_blocks
        block_size = self.block_table.block_size
        self.texts = Texts(
            np.zeros((rows, min(self.max_model_len, blocks * block_size)), np.int32),
            self.block_table.get_numpy_array(),
            self.num_blocks,
            block_size,
        )
        self._foresight = Foresight()
        # What a pass of one token per request takes, of late.
        self._pass_seconds = 0.0
        # Of the last step: who can be written on, and how far each was asked for.
        self._last: list[tuple[Row, int]] = []
        self._warm_up()

    def facts(self) -> dict[str, Any]:
        """What the target says of its draft when it has started.

        ``pid``, ``kv_tokens``, ``weights``: ``bfloat16`` or ``full``.
        """
        return {
            "pid": os.getpid(),
            "weights": "full" if self.proposer.matrices is None else "bfloat16",
            "kv_tokens": self.num_blocks * self.block_table.block_size,
        }

    def _warm_up(self) -> None:
        """Pay for what happens in first passes only before anybody waits for them."""
        text = Text(request=0, start=0, token_ids=[0] * 16, height=2)
        for confidences in (False, True):
            self.answer(Step("", [text], [0], 1e3, 0, confidences), time.perf_counter())
        self.texts.forget(("", 0))

    def answer(self, step: Step, arrived: float) -> Reply:
        """Take in what is new, and write the drafts that are asked for and not there yet.

        Args:
            step: the question.
            arrived: when it did (``time.perf_counter``).
        """
        for request in step.finished:
            self.texts.forget((step.engine, request))
        keep = {(step.engine, text.request) for text in step.texts}
        rows = [
            self.texts.extend((step.engine, text.request), text.start, text.token_ids, keep)
            for text in step.texts
        ]
        self._last = [(row, text.height) for row, text in zip(rows, step.texts, strict=True) if row]
        ready = all(row.ready >= height for row, height in self._last)
        self._foresight.saw(min((row.ready for row, _ in self._last), default=0))
        if not ready:
            self._write(
                [(row, row.length + height) for row, height in self._last],
                step.confidences,
                keep,
                self._deadline(arrived + step.patience_ms / 1e3),
            )
        return Reply(
            token_ids=[
                self.texts.drafts(row, text.height) if row else []
                for row, text in zip(rows, step.texts, strict=True)
            ],
            confidences=[
                self.texts.confidences_of(row, text.height) if row else []
                for row, text in zip(rows, step.texts, strict=True)
            ]
            if step.confidences
            else [],
            missing=[
                text.request for row, text in zip(rows, step.texts, strict=True) if row is None
            ],
            busy_ms=(time.perf_counter() - arrived) * 1e3,
            ready=ready,
        )

    def write_ahead(self, step: Step, is_over: Callable[[], bool]) -> None:
        """Write on after the answer, as if the target kept all and went on as the draft does.

        Args:
            step: that was answered.
            is_over: asked after each pass.
        """
        if step.ahead and self._foresight.pays() and not is_over():
            self._write(
                [(row, row.length + height + step.ahead) for row, height in self._last],
                step.confidences,
                {(step.engine, text.request) for text in step.texts},
                is_over,
            )

    def _deadline(self, until: float) -> Callable[[], bool]:
        """Whether another pass would end after a time, asked after each.

        Args:
            until: of ``time.perf_counter``.
        """
        last: float | None = None

        def is_over() -> bool:
            nonlocal last
            now = time.perf_counter()
            # The first pass may read much text: it is no measure.
            if last is not None:
                self._pass_seconds += 0.25 * (now - last - self._pass_seconds)
            last = now
            return now + self._pass_seconds > until

        return is_over

    def _write(
        self,
        goals: Sequence[tuple[Row, int]],
        want_confidences: bool,
        keep: set[tuple[str, int]],
        is_over: Callable[[], bool],
    ) -> None:
        """Write drafts until texts and drafts together are so long.

        Args:
            goals: rows and lengths (tokens).
            want_confidences: also keep the drafts' probabilities.
            keep: requests that must not make room.
            is_over: asked after each pass.
        """
        active = [
            (row, self.texts.reserve(row, goal, keep)) for row, goal in goals if goal > row.written
        ]
        active = [(row, goal) for row, goal in active if goal > row.written]
        if not active:
            return
        columns = [
            (row.index, row.written, row.valid, goal - row.written, 0) for row, goal in active
        ]
        batch = DraftBatch(*np.asarray(columns, dtype=np.int64).T)
        self.block_table.commit_block_table(int(batch.rows.max()) + 1)
        written = self.proposer.draft(
            batch,
            self.texts.token_ids,
            self.block_table,
            None,
            want_confidences=want_confidences,
            is_over=is_over,
        )
        confidences = written.confidences or [None] * len(active)
        for (row, _), token_ids, sure in zip(active, written.token_ids, confidences, strict=True):
            self.texts.wrote(row, token_ids, sure)


class DraftExecutor(UniProcExecutor):
    """vLLM's executor in one process, which takes no more KV cache than the target can ask for."""

    def determine_available_memory(self) -> list[int]:
        """See ``Executor.determine_available_memory``."""
        (available,) = super().determine_available_memory()
        (specs,) = self.get_kv_cache_specs()
        block_size = self.vllm_config.cache_config.block_size
        # A block per row more: the draft writes on beyond the text.
        blocks = self.vllm_config.scheduler_config.max_num_seqs * (
            -(-self.vllm_config.model_config.max_model_len // block_size) + 1
        )
        per_token = sum(spec.page_size_bytes / spec.block_size for spec in specs.values())
        return [min(available, int((blocks + 1) * block_size * per_token))]


class ActorProposer(StairsProposer):
    """The passes of a draft that vLLM's runner has loaded as an ordinary model."""

    def load_model(self, runner: Any) -> None:
        """Take over the runner's model, and the buffers that its graphs read."""
        (groups,) = runner.attn_groups
        self.model = runner.model
        self.draft_attn_groups = groups
        self._draft_attn_layer_names = {name for group in groups for name in group.layer_names}
        self.kv_cache_gid = 0
        self.input_ids, self.positions = runner.input_ids.gpu, runner.positions
        self.initialize_cudagraph_keys(self.compilation_config.cudagraph_mode)
        self._delay = float(os.environ.get(DELAY_VARIABLE, 0)) / 1e3
        self._settle_head()

    def _run(self, *args: Any) -> torch.Tensor:
        """See :meth:`StairsProposer._run`."""
        if self._delay:
            time.sleep(self._delay)
        return super()._run(*args)
