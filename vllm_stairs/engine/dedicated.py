"""The draft in a process of its own (``stairs_placement=dedicated``), as the target sees it.

The target's first rank asks, when a step's tokens are known, and takes the drafts when the engine
wants them: messages travel while the tokens leave. The other ranks do nothing; the scheduler hands
all of them the first one's drafts. A draft that does not answer in time is done without. Requests
never depend on it.
"""

import contextlib
import copy
import os
import re
import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.config.utils import replace
from vllm.logger import init_logger
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from vllm_stairs.engine.metrics import Counters
from vllm_stairs.engine.proposer import DraftBatch, Drafts
from vllm_stairs.placement import cluster
from vllm_stairs.placement.patience import hung_after_seconds
from vllm_stairs.placement.protocol import Reply, Step, Text, decode_reply, encode
from vllm_stairs.placement.supervisor import Supervisor

logger = init_logger("vllm.stairs.dedicated")

START_SECONDS = 540.0
"""For loading and compiling a draft; longer means that it hangs. vLLM waits 600 for an engine."""

_SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
"""Names of variables that the draft does not get."""

_HAND_OVER_MS = 1.0
"""A guess, until it is measured."""


class AbsentDrafter(DraftModelProposer):
    """Where vLLM's runner expects a draft model: there is none in this process.

    Nothing is loaded, no KV cache asked for, nothing run.
    """

    def __init__(self, vllm_config: Any, device: Any, runner: Any) -> None:
        # Not vLLM's, which allocates the buffers of a draft.
        self.speculative_config = vllm_config.speculative_config
        # As it is before the target is loaded into it.
        self.vllm_config = copy.deepcopy(vllm_config)
        self.draft_attn_groups: list[Any] = []
        self.kv_cache_gid = 0
        self._draft_attn_layer_names: set[str] = set()

    def draft_config(self) -> Any:
        """The draft's ``VllmConfig`` as an ordinary model, with what it has of the target's."""
        own = self.vllm_config
        own.cache_config.enable_prefix_caching = False
        own.cache_config.num_gpu_blocks_override = None
        own.cache_config.kv_cache_memory_bytes = None
        # One group of blocks, whatever kinds of attention the draft has.
        own.scheduler_config.disable_hybrid_kv_cache_manager = True
        config = self._create_draft_vllm_config()
        model = copy.copy(config.model_config)
        model.model, model.tokenizer = _findable(model.model), _findable(model.tokenizer)
        return replace(
            config,
            model_config=model,
            speculative_config=None,
            parallel_config=replace(
                config.parallel_config, distributed_executor_backend="uni", placement_group=None
            ),
        )

    def load_model(self, target_model: Any) -> None:
        """Nothing to load."""

    def dummy_run(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to run."""

    def initialize_attn_backend(self, *args: Any, **kwargs: Any) -> None:
        """Nothing that attends."""

    def initialize_cudagraph_keys(self, *args: Any, **kwargs: Any) -> None:
        """No graphs."""


def _findable(model: str) -> str:
    """A model's name; of a folder the whole path, for a cluster's processes start elsewhere."""
    return os.path.abspath(model) if os.path.isdir(model) else model


@dataclass
class _Request:
    """What the draft has of a request.

    Attributes:
        number: what it is called in messages.
        sent: leading tokens of its text that it is known to have.
        read: leading tokens that are in its KV cache.
    """

    number: int
    sent: int = 0
    read: int = 0


@dataclass(frozen=True)
class _Question:
    """A step that was sent.

    Attributes:
        answer: Ray's reference to the reply, or what was wrong with asking.
        req_ids: its requests.
        num_tokens: length of each text.
        began: when asking began (``time.perf_counter``).
        asked: when it was sent.
        patience_ms: how long to wait.
        hung: when an answer cannot be expected any more.
    """

    answer: Any
    req_ids: Sequence[str]
    num_tokens: list[int]
    began: float
    asked: float
    patience_ms: float
    hung: float


class DedicatedDraft:
    """Asks the draft's actor, and looks after it.

    Not thread-safe; one per engine.

    Args:
        speculative_config: ``StairsSpeculativeConfig``.
        draft_config: of :meth:`AbsentDrafter.draft_config`.
        counters: get what becomes of the questions.

    Attributes:
        ahead: drafts that are to be written on, for each request, while the target verifies.
    """

    def __init__(self, speculative_config: Any, draft_config: Any, counters: Counters) -> None:
        options = speculative_config.stairs
        self._speculative_config = speculative_config
        self._draft_config = draft_config
        self._counters = counters
        self._vocab_size = speculative_config.target_model_config.get_vocab_size()
        height = speculative_config.num_speculative_tokens
        # The bonus token and the next staircase.
        self.ahead = height + 1 if options.overlap == "auto" else 0
        self._bundle = cluster.DraftBundle.of(options.draft_resources or {}, options.draft_node)
        self._group: Any = None
        # With the target's workers, whom vLLM's Ray executor starts.
        self._is_shared = False
        self._supervisor: Supervisor[Any] = Supervisor(self._start, self._wait, self._end)
        self._engine = uuid.uuid4().hex[:8]
        self._requests: dict[str, _Request] = {}
        self._numbers = 0
        self._finished: list[int] = []
        self._question: _Question | None = None
        self._draft: Any = None
        self._hand_over_ms = _HAND_OVER_MS

    # ------------------------------------------------------------------- start and end

    def begin(self) -> None:
        """Reserve the draft's place and start it; returns while it loads.

        Raises:
            ClusterError: there is no place.
        """
        config = self._speculative_config
        cluster.join(config.stairs_ray_address)
        self._group = config.target_parallel_config.placement_group
        self._is_shared = self._group is not None
        if not self._is_shared:
            self._group = cluster.reserve(self._bundle, target_gpus=config.stairs_ray_gpus)
        self._supervisor.begin()

    def wait_until_ready(self) -> None:
        """Wait until the draft can be asked.

        Raises:
            Exception: it cannot be started.
        """
        facts = self._supervisor.first(START_SECONDS)
        logger.info(
            "Stairs: draft %s runs by itself (process %d); its KV cache holds %d tokens.",
            self._speculative_config.draft_model_config.model,
            facts["pid"],
            facts["kv_tokens"],
        )

    @property
    def facts(self) -> dict[str, Any] | None:
        """See :meth:`Writer.facts`; None while there is no draft."""
        return self._supervisor.facts

    def close(self) -> None:
        """End the draft and give its place back."""
        self._supervisor.close()
        if self._group is not None and not self._is_shared:
            cluster.release(self._group)

    def _start(self) -> Any:
        import ray
        from vllm.ray.ray_env import get_env_vars_to_copy
        from vllm.v1.executor.ray_utils import WORKER_SPECIFIC_ENV_VARS

        from vllm_stairs.engine.cpu import draft_environment
        from vllm_stairs.engine.draft_actor import DELAY_VARIABLE, DraftActor

        names = get_env_vars_to_copy(WORKER_SPECIFIC_ENV_VARS, {DELAY_VARIABLE}, "the draft")
        # Ray shows and logs it.
        environment = {
            name: os.environ[name]
            for name in names
            if name in os.environ and not _SECRET.search(name)
        }
        if cluster.is_own(self._speculative_config.stairs_ray_address):
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        if cluster.draft_is_here(self._group):
            environment |= draft_environment()
        actor = ray.remote(DraftActor).options(
            **self._bundle.actor_options(self._group),
            # One call waits for the model's thread, the other for its beginning.
            max_concurrency=2,
            max_restarts=0,
            runtime_env={"env_vars": environment},
        )
        return actor.remote(self._draft_config, self._speculative_config)

    def _wait(self, draft: Any) -> dict[str, Any]:
        import ray

        facts: dict[str, Any] = ray.get(draft.ready.remote(), timeout=START_SECONDS)
        return facts

    def _end(self, draft: Any) -> None:
        import ray

        # Ray ends by itself when the process does, and would start anew to end the draft.
        if ray.is_initialized():
            with contextlib.suppress(Exception):
                ray.kill(draft)

    # ----------------------------------------------------------------------- requests

    def forget(self, req_ids: Collection[str]) -> None:
        """Requests have ended."""
        for req_id in req_ids:
            request = self._requests.pop(req_id, None)
            if request is not None:
                self._finished.append(request.number)

    def read(self, req_id: str) -> int:
        """Leading tokens of a request's text that need not be read by the draft any more."""
        request = self._requests.get(req_id)
        return request.read if request else 0

    def is_free(self) -> bool:
        """Whether the draft can be asked: it is there and has answered the last question."""
        if self._question is not None:
            self._receive(0.0)
        if self._question is not None:
            if time.perf_counter() > self._question.hung:
                self._lose("it does not answer")
            return False
        draft = self._supervisor.draft
        if draft is not self._draft and draft is not None:
            if self._draft is not None:
                self._counters.count_dedicated("restarts")
            # Another one, which knows nothing.
            self._draft = draft
            self._requests.clear()
            self._finished.clear()
        return draft is not None

    # ---------------------------------------------------------------- question, answer

    def ask(
        self,
        req_ids: Sequence[str],
        batch: DraftBatch,
        token_ids: np.ndarray,
        patience_ms: float,
        want_confidences: bool,
    ) -> None:
        """Ask for drafts; only where :meth:`is_free`.

        Args:
            req_ids: ``[n]``: who drafts.
            batch: the same requests: rows, lengths and heights.
            token_ids: ``[max requests, max_model_len]``: vLLM's token ids on the host.
            patience_ms: how long the drafts are worth waiting for.
            want_confidences: also ask for their probabilities.
        """
        began = time.perf_counter()
        lengths = batch.num_tokens.tolist()
        texts = []
        for req_id, row, length, height in zip(
            req_ids, batch.rows.tolist(), lengths, batch.heights.tolist(), strict=True
        ):
            request = self._requests.get(req_id)
            if request is None:
                self._numbers += 1
                request = self._requests[req_id] = _Request(self._numbers)
            new = token_ids[row, request.sent : length].tolist()
            texts.append(Text(request.number, request.sent, new, height))
        step = Step(
            engine=self._engine,
            texts=texts,
            finished=self._finished,
            patience_ms=max(patience_ms - self._hand_over_ms, patience_ms / 2),
            ahead=self.ahead,
            confidences=want_confidences,
        )
        try:
            answer = self._draft.step.remote(encode(step))
        except Exception as error:  # Whatever may be wrong with Ray: decoding goes on.
            answer = error
        self._finished = []
        unread = sum(len(text.token_ids) for text in texts)
        asked = time.perf_counter()
        self._question = _Question(
            answer=answer,
            req_ids=req_ids,
            num_tokens=lengths,
            began=began,
            asked=asked,
            patience_ms=patience_ms,
            hung=asked + hung_after_seconds(patience_ms, unread),
        )

    def collect(self) -> Drafts:
        """Take the answer to the last question, or go without: then there are no drafts.

        Returns:
            Drafts per request, as many as there are.
        """
        question = self._question
        assert question is not None
        start = time.perf_counter()
        reply = self._receive(question.patience_ms / 1e3)
        waited = time.perf_counter() - start
        spent = waited + question.asked - question.began
        self._counters.count_dedicated("wait_seconds", spent)
        if reply is None:
            self._counters.count_dedicated("late")
            nothing: list[list[int]] = [[] for _ in question.req_ids]
            return Drafts(nothing, None, [[] for _ in nothing])
        drafting = max(reply.busy_ms / 1e3 - (start - question.asked), 0.0)
        hand_over = spent - min(drafting, waited)
        self._hand_over_ms += 0.1 * (hand_over * 1e3 - self._hand_over_ms)
        self._counters.count_dedicated("answers")
        self._counters.count_dedicated("ready", float(reply.ready))
        self._counters.count_dedicated("hand_over_seconds", hand_over)
        return Drafts(reply.token_ids, None, reply.confidences or None)

    def _receive(self, timeout: float) -> Reply | None:
        """The reply, if it is there within so many seconds; else None."""
        import ray
        from ray.exceptions import GetTimeoutError

        question = self._question
        assert question is not None
        try:
            if isinstance(question.answer, Exception):
                raise question.answer
            reply = decode_reply(ray.get(question.answer, timeout=timeout))
            reply.check(len(question.req_ids), self._vocab_size)
        except GetTimeoutError:
            return None
        except Exception as error:
            self._lose(str(error))
            return None
        self._question = None
        self._supervisor.answered()
        missing = set(reply.missing)
        for req_id, length, drafts in zip(
            question.req_ids, question.num_tokens, reply.token_ids, strict=True
        ):
            request = self._requests.get(req_id)
            if request is None:
                continue
            if request.number in missing:
                request.sent = request.read = 0
            else:
                request.sent = length
                if drafts:
                    request.read = length + len(drafts) - 1
        return reply

    def _lose(self, why: str) -> None:
        self._question = None
        self._supervisor.lost(" ".join(why.split())[:300])
