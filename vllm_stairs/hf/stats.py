"""What a run of stairs did, in the field's usual terms."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class StairsStats:
    """Counters over all calls since the last `reset`.

    ``acceptance_length`` counts the target's own token; ``acceptance`` is the probability
    that a draft which was reached by the validation was kept.
    """

    steps: int = 0
    """Target passes."""
    staircases: int = 0
    """Rows of all passes: one staircase each, height 0 included."""
    drafted: int = 0
    accepted: int = 0
    refused: int = 0
    """Staircases that ended at a disagreement; those that ended with the draft do not count."""
    heights: Counter[int] = field(default_factory=Counter)
    accepted_at: Counter[int] = field(default_factory=Counter)
    drafted_at: Counter[int] = field(default_factory=Counter)
    draft_ms: float = 0.0
    target_ms: float = 0.0
    validation_ms: float = 0.0

    def reset(self) -> None:
        """Set every counter to zero."""
        fresh = StairsStats()
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(fresh, name))

    @property
    def acceptance_length(self) -> float:
        """Tokens per staircase, the target's own included."""
        return 1.0 + self.accepted / max(1, self.staircases)

    @property
    def acceptance(self) -> float:
        """Kept drafts per draft that the validation reached."""
        return self.accepted / max(1, self.accepted + self.refused)

    @property
    def mean_height(self) -> float:
        """Drafts per staircase."""
        return self.drafted / max(1, self.staircases)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for a JSON file."""
        return {
            "steps": self.steps,
            "staircases": self.staircases,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance": round(self.acceptance, 4),
            "acceptance_length": round(self.acceptance_length, 4),
            "mean_height": round(self.mean_height, 4),
            "heights": {str(key): self.heights[key] for key in sorted(self.heights)},
            "acceptance_per_position": {
                str(key + 1): round(self.accepted_at[key] / self.drafted_at[key], 4)
                for key in sorted(self.drafted_at)
            },
            "draft_ms": round(self.draft_ms, 2),
            "target_ms": round(self.target_ms, 2),
            "validation_ms": round(self.validation_ms, 2),
        }
