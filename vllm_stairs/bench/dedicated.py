"""A draft on a device of its own, for the simulator: hand-over, and writing ahead.

After its answer the draft has until the next question, a step of the target and the hand-over, to
write on. Its first further token is its guess of the target's own one; if the whole staircase and
this guess hold, the tokens after it are the beginning of the next staircase. A pass that has begun
is ended, whether it is of use or not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_stairs.bench.costs import Curve
from vllm_stairs.bench.errors import BenchError


@dataclass(frozen=True)
class Dedicated:
    """How the draft is placed.

    Attributes:
        handover_ms: round trip between target and draft without the drafting, milliseconds.
        overlap: whether the draft writes ahead.
    """

    handover_ms: float
    overlap: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.handover_ms) and self.handover_ms >= 0):
            raise BenchError("the hand-over must be a number of milliseconds of at least 0")


def written_ahead(free_ms: float, pass_ms: float, wanted: int) -> tuple[int, float]:
    """What the draft wrote until it was asked again.

    Args:
        free_ms: milliseconds between its answer and the next question.
        pass_ms: of one pass.
        wanted: passes after which it stops.

    Returns:
        Tokens of the next staircase that are there when the pass that had begun has ended, if the
        guesses before them hold; and how long it takes until then, milliseconds.
    """
    begun = min(math.ceil(free_ms / pass_ms - 1e-9), wanted)
    return max(begun - 1, 0), max(begun * pass_ms - free_ms, 0.0)


def passes_ms(heights: Sequence[int], ahead: Sequence[int], draft_ms: Curve) -> float:
    """Milliseconds of the passes that a batch still needs.

    Args:
        heights: drafts wanted, per request.
        ahead: of these, those that are there.
        draft_ms: one pass, by requests in it.
    """
    left = [height - there for height, there in zip(heights, ahead, strict=True)]
    return sum(draft_ms(sum(n > depth for n in left)) for depth in range(max(left, default=0)))
