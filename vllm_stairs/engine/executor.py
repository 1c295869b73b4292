"""vLLM's executor for worker processes, which does not wait to ask for drafts.

vLLM asks the workers for drafts after every step. A message to another process and back costs
tenths of a millisecond. So after a step with drafts the question of the next one is sent along
with the step itself: workers draft while the engine handles the step's tokens. After a step without
drafts nothing is asked: a step at height 0 is to cost what a plain one costs. Whether there are
drafts is known when the step's tokens come back, and travels with them.

Named by ``ParallelConfig.distributed_executor_backend``, which takes a class.
"""

from concurrent.futures import Future
from typing import Any

from vllm import envs
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

DRAFTS_FOLLOW = "stairs_drafts_follow"
"""Attribute of our workers' ``ModelRunnerOutput``: whether drafts are to be taken."""


class StairsMultiprocExecutor(MultiprocExecutor):
    """vLLM's executor, which asks for drafts ahead of time, and only where there are any."""

    _drafts_follow = True
    # The drafts of the step under way, if they were asked for with it.
    _asked: "Future[Any] | None" = None

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """See ``Executor.execute_model``."""
        output = self._watch(super().execute_model(scheduler_output, non_block))
        if (
            self._drafts_follow
            and non_block
            and scheduler_output.total_num_scheduled_tokens
            # Sampling is then a message of its own, before the drafts.
            and not scheduler_output.has_structured_output_requests
        ):
            self._asked = self.collective_rpc(
                "take_draft_token_ids",
                # It counts from now: for the step, and for drafting.
                timeout=2 * envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS,
                unique_reply_rank=self.output_rank,
                non_block=True,
            )
        return output

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """See ``Executor.sample_tokens``."""
        return self._watch(super().sample_tokens(grammar_output, non_block))

    def take_draft_token_ids(self) -> Any:
        """See ``Executor.take_draft_token_ids``."""
        asked, self._asked = self._asked, None
        if asked is not None:
            return asked.result()
        return super().take_draft_token_ids() if self._drafts_follow else None

    def _watch(self, output: Any) -> Any:
        if isinstance(output, Future):
            output.add_done_callback(self._note_result)
        else:
            self._note(output)
        return output

    def _note_result(self, future: "Future[Any]") -> None:
        if future.exception() is None:
            self._note(future.result())

    def _note(self, output: Any) -> None:
        self._drafts_follow = getattr(output, DRAFTS_FOLLOW, True)
