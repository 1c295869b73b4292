"""How tall the next staircase is: pure functions over measured acceptance and cost.

Nothing here knows a model, a tensor or an engine: numbers in, a height out. Two policies:

- :class:`~vllm_stairs.height.ragged.RaggedPolicy`, for the vLLM plugin: a height for each request
  of a batch, reconsidered after each draft token (``docs/height-policy.md``);
- :class:`~vllm_stairs.height.policy.HeightPolicy`, for :mod:`vllm_stairs.hf`, whose rows are padded
  to one shape: one height for the batch.
"""

from vllm_stairs.height.estimates import Acceptance, Calibration, RowCost, RunningMedian
from vllm_stairs.height.policy import (
    FixedHeight,
    HeightPolicy,
    best_height,
    expected_tokens,
    tokens_per_ms,
)
from vllm_stairs.height.ragged import REASONS, Plan, RaggedPolicy

__all__ = [
    "REASONS",
    "Acceptance",
    "Calibration",
    "FixedHeight",
    "HeightPolicy",
    "Plan",
    "RaggedPolicy",
    "RowCost",
    "RunningMedian",
    "best_height",
    "expected_tokens",
    "tokens_per_ms",
]
