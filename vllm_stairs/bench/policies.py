"""Height policies for the simulator: how tall the next staircase is. Plain numbers only."""

from collections.abc import Sequence
from typing import Protocol

from vllm_stairs.bench.costs import CostModel
from vllm_stairs.bench.errors import BenchError
from vllm_stairs.height.ragged import RaggedPolicy


class Policy(Protocol):
    """Decides a height, before drafting by :meth:`ceiling` and while drafting by :meth:`go_on`."""

    name: str
    reads_probabilities: bool
    """Whether :meth:`go_on` has to be asked at all."""

    def ceiling(self, request: int, batch: int) -> int:
        """The most tokens to draft now for ``request``, with ``batch`` requests running."""

    def go_on(self, probabilities: Sequence[float]) -> bool:
        """Given the draft's own probabilities so far, whether to draft one more token."""

    def observe(self, request: int, drafted: int, accepted: int) -> None:
        """Learn what became of a staircase."""


class Fixed:
    """Always the same height."""

    reads_probabilities = False

    def __init__(self, height: int) -> None:
        self.height = height
        self.name = f"fixed:{height}"

    def ceiling(self, request: int, batch: int) -> int:
        """The height."""
        return self.height

    def go_on(self, probabilities: Sequence[float]) -> bool:
        """Up to the ceiling."""
        return True

    def observe(self, request: int, drafted: int, accepted: int) -> None:
        """Nothing to learn."""


class Threshold(Fixed):
    """Stop after a token of which the draft is less sure than ``least``."""

    reads_probabilities = True

    def __init__(self, least: float, height: int) -> None:
        super().__init__(height)
        self.least = least
        self.name = f"threshold:{least:g}:{height}"

    def go_on(self, probabilities: Sequence[float]) -> bool:
        """Whether the last token was sure enough."""
        return probabilities[-1] >= self.least


class Product(Fixed):
    """Stop where the draft doubts that all of its tokens hold (product of probabilities)."""

    reads_probabilities = True

    def __init__(self, least: float, height: int) -> None:
        super().__init__(height)
        self.least = least
        self.name = f"product:{least:g}:{height}"

    def go_on(self, probabilities: Sequence[float]) -> bool:
        """Whether the whole draft is still likely enough."""
        product = 1.0
        for probability in probabilities:
            product *= probability
        return product >= self.least


class Heuristic:
    """Hugging Face's: two more after a draft that held in full, one less after another."""

    reads_probabilities = False

    def __init__(self, start: int, height: int) -> None:
        self.start = start
        self.height = height
        self.name = f"heuristic:{start}:{height}"
        self._heights: dict[int, int] = {}

    def ceiling(self, request: int, batch: int) -> int:
        """The request's present height."""
        return min(self._heights.get(request, self.start), self.height)

    def go_on(self, probabilities: Sequence[float]) -> bool:
        """Up to the ceiling."""
        return True

    def observe(self, request: int, drafted: int, accepted: int) -> None:
        """Move the request's height."""
        height = self._heights.get(request, self.start)
        step = 2 if accepted == drafted else -1
        self._heights[request] = max(1, min(self.height, height + step))


class Gain:
    """The height with the best expected tokens per millisecond.

    From a running estimate, over all requests, of how often position i holds once its
    predecessors do, and from the cost model. A height of 0 is among the choices; to keep
    learning, every 32nd staircase is at least one high.
    """

    reads_probabilities = False
    _PRIOR = 4.0
    _DECAY = 0.995

    def __init__(self, height: int, costs: CostModel) -> None:
        self.height = height
        self.costs = costs
        self.name = f"gain:{height}"
        self._reached = [self._PRIOR] * height
        self._held = [self._PRIOR * 0.6] * height
        self._asked = 0

    def ceiling(self, request: int, batch: int) -> int:
        """The best height for this batch."""
        self._asked += 1
        best, best_rate = 0, 1.0 / self.costs.step_ms(0, 0, batch)
        survival, expected = 1.0, 1.0
        for height in range(1, self.height + 1):
            survival *= self._held[height - 1] / self._reached[height - 1]
            expected += survival
            rate = expected / self.costs.step_ms(batch, height, batch * (height + 1))
            if rate > best_rate:
                best, best_rate = height, rate
        return best or int(self._asked % 32 == 0)

    def go_on(self, probabilities: Sequence[float]) -> bool:
        """Up to the ceiling."""
        return True

    def observe(self, request: int, drafted: int, accepted: int) -> None:
        """Update the estimates of the positions that were reached."""
        for position in range(min(drafted, accepted + 1, self.height)):
            self._reached[position] = self._reached[position] * self._DECAY + 1
            held = 1.0 if position < accepted else 0.0
            self._held[position] = self._held[position] * self._DECAY + held


class Auto:
    """The engine's own policy (:class:`vllm_stairs.height.ragged.RaggedPolicy`).

    It decides for all requests of a step together, and learns the costs from the times that the
    cost model gives, as the engine would from its clock.
    """

    def __init__(self, height: int, costs: CostModel) -> None:
        self.height = height
        self.name = f"auto:{height}"
        self.costs = costs
        self.policy = RaggedPolicy(height, draft_share=costs.draft_ms(1) / costs.target_ms(1))


def parse(text: str, *, height: int, costs: CostModel) -> Policy | Auto:
    """Read a policy.

    Args:
        text: ``fixed:K``, ``threshold:P[:K]``, ``product:P[:K]``, ``heuristic[:START[:K]]``,
            ``gain[:K]`` or ``auto[:K]``; K is the largest height, the record's where left out.
        height: the record's largest height. No policy may be taller: what it would have drafted
            above is not in the record.
        costs: for the policies that weigh costs.
    """
    policy = _parse(text, height, costs)
    if policy.height > height:
        raise BenchError(
            f"policy {text!r} is taller than the record (height {height}): record again with "
            f"--record-height {policy.height} or more"
        )
    return policy


def _parse(text: str, height: int, costs: CostModel) -> Fixed | Heuristic | Gain | Auto:
    name, *numbers = text.split(":")
    try:
        if name == "fixed" and len(numbers) == 1:
            return Fixed(_height(numbers[0], least=0))
        if name in ("threshold", "product") and len(numbers) in (1, 2):
            kind = Threshold if name == "threshold" else Product
            least = float(numbers[0])
            if not 0 <= least <= 1:  # Not a number neither.
                raise BenchError(f"policy {text!r}: P is a probability, 0 to 1")
            return kind(least, _height(numbers[1]) if numbers[1:] else height)
        if name == "heuristic" and len(numbers) <= 2:
            start = _height(numbers[0]) if numbers else min(4, height)
            return Heuristic(start, _height(numbers[1]) if numbers[1:] else height)
        if name == "gain" and len(numbers) <= 1:
            return Gain(_height(numbers[0]) if numbers else height, costs)
        if name == "auto" and len(numbers) <= 1:
            return Auto(_height(numbers[0]) if numbers else height, costs)
    except ValueError:
        pass
    raise BenchError(
        f"unknown policy {text!r}: expected fixed:K, threshold:P[:K], product:P[:K], "
        "heuristic[:START[:K]], gain[:K] or auto[:K]"
    )


def _height(text: str, least: int = 1) -> int:
    height = int(text)
    if height < least:
        raise ValueError(text)
    return height
