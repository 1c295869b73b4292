"""A step's decision: what :class:`~vllm_stairs.height.ragged.RaggedPolicy` says, and why not."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

WEAK_DRAFT = "weak_draft"
"""Drafts are kept too seldom, or cost too much, to pay even for a request alone."""
PAUSED = "paused"
"""Speculation has lost more of late than it may, and pauses."""
LOAD = "load"
"""Drafting would pay for the request alone; in this batch rows are too dear."""
CATCHING_UP = "catching_up"
"""Reading the text that the draft has missed would not pay back before the request's end."""
MEASURING = "measuring"
"""A step to learn from: plain, to know its cost, or with drafts of other requests."""
LIMIT = "limit"
"""The caller left no room and gave no reason of its own."""
REASONS = (WEAK_DRAFT, PAUSED, LOAD, CATCHING_UP, MEASURING, LIMIT)


@dataclass(slots=True)
class Plan:
    """One step's decision; see :meth:`RaggedPolicy.plan`. Costs are relative to the target's level.

    Attributes:
        keys: ``[B]``: the requests.
        heights: ``[B]``: how far each may draft: with confidences a ceiling, else the height.
        reasons: ``[B]``: why a height is 0 (:data:`REASONS` or the caller's), else None.
        active: indices of the requests in the next draft pass, rising.
        probe: whether this step drafts to learn, whatever it brings.
        rate: tokens per unit of cost that rows and passes have to bring; 0 where off.
        rows: cost of a speculating step with 0, 1, 2, ... drafts.
        first, further: cost of the first and of each further draft pass.
        filled: tokens of missing text that the first pass reads beside the usual.
        cut: index of each request whose draft could read the end of what it has missed only ->
            whether it is to.
        holes: request's index -> tokens that it has to catch up, milliseconds of an instalment.
        passes: requests in each draft pass so far.
        confidences: request's index -> the draft's confidences; empty where unknown.
        survival: request's index -> probabilities that all its drafts up to each are kept.
    """

    keys: Sequence[Hashable]
    heights: list[int]
    reasons: list[str | None]
    active: list[int] = field(default_factory=list)
    probe: bool = False
    rate: float = 0.0
    rows: list[float] = field(default_factory=list)
    first: float = 0.0
    further: float = 0.0
    filled: int = 0
    cut: dict[int, bool] = field(default_factory=dict)
    holes: dict[int, tuple[int, float]] = field(default_factory=dict)
    passes: list[int] = field(default_factory=list)
    confidences: dict[int, list[float]] = field(default_factory=dict)
    survival: dict[int, list[float]] = field(default_factory=dict)

    def begin(self, active: list[int]) -> None:
        """Let these requests take part in the first draft pass."""
        self.active = active
        for index in active:
            self.survival[index], self.confidences[index] = [], []

    def drop(self, index: int) -> None:
        """Take a request out of the next pass, for a reason of the caller's own.

        Its draft has ended (an end-of-text token, say), after so many passes as there were.
        """
        self.active.remove(index)
        self.heights[index] = len(self.passes)
