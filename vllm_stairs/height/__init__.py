"""How tall the next staircase is: pure functions over measured acceptance and cost.

Nothing here knows a model, a tensor or an engine: numbers in, a height out. The vLLM
plugin and :mod:`vllm_stairs.hf` use the same policy. The mathematics is stated in
:mod:`vllm_stairs.height.policy`.
"""

from vllm_stairs.height.estimates import Acceptance, Calibration, RowCost, RunningMedian
from vllm_stairs.height.policy import (
    FixedHeight,
    HeightPolicy,
    best_height,
    expected_tokens,
    tokens_per_ms,
)

__all__ = [
    "Acceptance",
    "Calibration",
    "FixedHeight",
    "HeightPolicy",
    "RowCost",
    "RunningMedian",
    "best_height",
    "expected_tokens",
    "tokens_per_ms",
]
