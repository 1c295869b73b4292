"""The speculative configuration of the method ``stairs``.

A subclass of vLLM's own, built with ``method="draft_model"``: it pickles to vLLM's processes, and
every part of vLLM that asks for a draft model's KV cache, lookahead
slots or attention groups gets the right answer. ``isinstance`` is the marker everywhere.
"""

from typing import Any

from pydantic import Field
from vllm.config.speculative import SpeculativeConfig
from vllm.config.utils import config

from vllm_stairs.config import METHOD, StairsOptions
from vllm_stairs.proposer.vocabulary import DraftVocabulary


@config
class StairsSpeculativeConfig(SpeculativeConfig):
    """vLLM's ``SpeculativeConfig`` for the method ``stairs``."""

    stairs: StairsOptions = Field(default_factory=StairsOptions)
    """The method's own options."""

    stairs_vocabulary: DraftVocabulary | None = None
    """The ids that the draft may write, chosen from ``stairs.draft_vocab``; None: all."""

    stairs_counters_file: str | None = None
    """Where worker and server share the counters (see :mod:`vllm_stairs.engine.metrics`)."""

    stairs_ray_address: str | None = None
    """``HOST:PORT`` of the Ray cluster of a dedicated draft; None: the draft is not dedicated."""

    stairs_ray_gpus: list[str] = Field(default_factory=list)
    """Ids of the target's GPUs, on a cluster that may count them too."""

    def verify_equal_vocab_size_if_draft_model(self) -> None:
        """Allow another padded vocabulary size.

        Models of one family may pad their embedding to different sizes (Qwen2.5: 151,936 and
        152,064 rows for one tokenizer). What has to agree is the tokenizer, which
        :mod:`vllm_stairs.engine.arguments` compares; the proposer keeps ids inside both sizes.
        """

    @property
    def max_num_new_slots_for_drafting(self) -> int:
        """No draft pass reads more tokens than fit the budget (``plan_passes``).

        vLLM takes slots off the scheduler's budget for the tokens that its own drafting adds to
        the target's batch. Stairs schedules exactly as plain vLLM does.
        """
        return 0

    def compute_hash(self) -> str:
        """Graphs of a draft depend on its shards, which need not be those of the target.

        vLLM keeps compiled drafts in the target's folder, and tells targets apart by its own
        tensor parallel size alone.
        """
        return f"{super().compute_hash()}-{self.draft_tensor_parallel_size}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A process that receives this configuration serves requests of the method."""
        from vllm_stairs.engine import frontend

        self.__dict__.update(state)
        frontend.install()

    def __repr__(self) -> str:
        model = self.draft_model_config.model if self.draft_model_config else self.model
        return (
            f"SpeculativeConfig(method={METHOD!r}, model={model!r}, "
            f"num_spec_tokens={self.num_speculative_tokens}, layout={self.stairs.layout!r})"
        )


def is_stairs(speculative_config: Any) -> bool:
    """Whether the method ``stairs`` was asked for."""
    return isinstance(speculative_config, StairsSpeculativeConfig)
