"""What the target would keep of a draft, measured on the target's own greedy text.

In greedy text every token is the target's best after those before it. A draft token is kept if
and only if all drafts before it in its staircase were right, so the draft has always seen the
target's text: one pass over the text says which drafts would be right, and walking over that says
what staircases of any height would bring. No engine is needed, and nothing is approximated but
rounding.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_stairs.distill.batching import batches, padded

HEIGHT = 4
"""Draft tokens a step for which figures are stated."""


@dataclass(frozen=True)
class Text:
    """Greedy text to judge on."""

    tokens: npt.NDArray[np.int32]
    """Shape [length]."""
    greedy: npt.NDArray[np.bool_]
    """Which tokens are the target's best. Shape [length]."""
    group: str


@dataclass
class Acceptance:
    """Counts of one group, or of all."""

    right: int = 0
    """Positions at which the draft's best token is the target's."""
    positions: int = 0
    staircases: int = 0
    kept: tuple[int, ...] = (0,) * HEIGHT
    """Staircases whose token at each position was kept."""

    def add(self, right: npt.NDArray[np.bool_]) -> None:
        """Count a stretch of greedy text.

        Args:
            right: whether the draft is right at each of its tokens. The first token is the
                prefill's own: no draft stands before it. Shape [tokens].
        """
        self.right += int(right.sum())
        self.positions += len(right)
        heights = walk(right[1:], HEIGHT)
        self.staircases += len(heights)
        self.kept = tuple(
            kept + sum(h > position for h in heights) for position, kept in enumerate(self.kept)
        )

    @property
    def first_position(self) -> float:
        """Share of the staircases whose first draft is kept."""
        return self.kept[0] / self.staircases if self.staircases else 0.0

    @property
    def length(self) -> float:
        """Tokens a step, the target's own included."""
        return 1 + sum(self.kept) / self.staircases if self.staircases else 1.0

    @property
    def per_position(self) -> tuple[float, ...]:
        """Share of the staircases whose token at each position is kept."""
        return tuple(k / self.staircases if self.staircases else 0.0 for k in self.kept)


def walk(right: npt.NDArray[np.bool_], height: int) -> list[int]:
    """Tokens kept of each staircase on the way through a text.

    Args:
        right: whether the draft is right at each token of the text. Shape [tokens].
        height: draft tokens of a staircase; fewer where fewer tokens are left.
    """
    kept, position = [], 0
    while position < len(right):
        run = 0
        while run < height and position + run < len(right) and right[position + run]:
            run += 1
        kept.append(run)
        position += run + 1
    return kept


def mean(groups: Mapping[str, Acceptance]) -> tuple[float, float]:
    """First-position acceptance and acceptance length, averaged over groups."""
    if not groups:
        return 0.0, 1.0
    return (
        sum(a.first_position for a in groups.values()) / len(groups),
        sum(a.length for a in groups.values()) / len(groups),
    )


def mean_per_position(groups: Mapping[str, Acceptance]) -> tuple[float, ...]:
    """:attr:`Acceptance.per_position`, averaged over groups."""
    shares = [a.per_position for a in groups.values()]
    return tuple(sum(column) / len(shares) for column in zip(*shares, strict=True))


def measure(model: Any, texts: Sequence[Text]) -> dict[str, Acceptance]:
    """Judge a draft.

    Args:
        model: the draft, on its device.
        texts: greedy text of the target.

    Returns:
        The acceptance by group.
    """
    import torch

    found: dict[str, Acceptance] = {}
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for numbers in batches([len(text.tokens) for text in texts]):
            batch = [texts[number] for number in numbers]
            ids = torch.from_numpy(padded([text.tokens for text in batch]))
            hidden = model.model(input_ids=ids.to(model.device)).last_hidden_state
            for row, text in enumerate(batch):
                places = np.flatnonzero(text.greedy[1:])
                if not len(places):
                    continue
                best = model.lm_head(hidden[row, torch.from_numpy(places).to(model.device)])
                right = np.zeros(len(text.tokens), bool)
                right[places + 1] = best.argmax(-1).cpu().numpy() == text.tokens[places + 1]
                group = found.setdefault(text.group, Acceptance())
                for stretch in stretches(text.greedy):
                    group.add(right[stretch])
    model.train(was_training)
    return found


def stretches(greedy: npt.NDArray[np.bool_]) -> Iterable[slice]:
    """The runs of tokens that are greedy."""
    edges = np.flatnonzero(np.diff(np.r_[0, greedy.astype(np.int8), 0]))
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
