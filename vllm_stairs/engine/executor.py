"""vLLM's executor for worker processes, less one message where nobody drafted.

vLLM asks the workers for drafts after every step. A message to another process and back costs
tenths of a millisecond, and a step at height 0 is to cost what a plain one costs. Whether there
are drafts is known when the step's tokens come back, and travels with them.

Named by ``ParallelConfig.distributed_executor_backend``, which takes a class.
"""

from concurrent.futures import Future
from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

DRAFTS_FOLLOW = "stairs_drafts_follow"
"""Attribute of our workers' ``ModelRunnerOutput``: whether drafts are to be taken."""


class StairsMultiprocExecutor(MultiprocExecutor):
    """vLLM's executor, which takes drafts only where there are any."""

    _drafts_follow = True

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """See ``Executor.execute_model``."""
        return self._watch(super().execute_model(scheduler_output, non_block))

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """See ``Executor.sample_tokens``."""
        return self._watch(super().sample_tokens(grammar_output, non_block))

    def take_draft_token_ids(self) -> Any:
        """See ``Executor.take_draft_token_ids``."""
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
