"""A height policy that decides at random, within what requests allow."""

import random
from collections import Counter
from typing import Any

import torch

from vllm_stairs.height.ragged import RaggedPolicy


class Dice(RaggedPolicy):
    """Decides at random, within what requests allow."""

    def __init__(self, max_height: int, seed: int) -> None:
        super().__init__(max_height)
        self.dice = random.Random(seed)
        self.planned: Counter = Counter()
        self.trimmed = 0

    def reads_the_end(self) -> bool:
        """Of a long text that a draft has not read, or all of it."""
        return self.dice.random() < 0.5

    def plan(self, keys, rooms, holes, remaining, reasons, ends, lengths):  # type: ignore[no-untyped-def]
        plan = super().plan(keys, rooms, holes, remaining, reasons, ends, lengths)
        off = self.dice.random() < 0.3
        plan.active = [
            i for i, room in enumerate(rooms) if room > 0 and not off and self.dice.random() < 0.7
        ]
        for i in range(len(keys)):
            drafts = i in plan.active
            plan.heights[i] = self.dice.randint(1, rooms[i]) if drafts else 0
            plan.reasons[i] = None if drafts else "load"
            self.planned[plan.heights[i]] += 1
        plan.cut = {i: self.reads_the_end() for i in plan.active if ends[i] < holes[i]}
        plan.survival = {i: [] for i in plan.active}
        plan.confidences = {i: [] for i in plan.active}
        return plan

    def proceed(self, plan, confidences=None, elapsed_ms=None):  # type: ignore[no-untyped-def]
        assert all(0.0 <= value <= 1.0001 for value in confidences)
        assert len(confidences) == len(plan.active)
        active = plan.active
        plan.passes.append(len(active))
        depth = len(plan.passes)
        places = [
            place
            for place, index in enumerate(active)
            if plan.heights[index] > depth and self.dice.random() < 0.8
        ]
        plan.active = [active[place] for place in places]
        for index in set(active).difference(plan.active):
            plan.heights[index] = depth
        return places

    def settle(self, plan, may_trim=False):  # type: ignore[no-untyped-def]
        heights = super().settle(plan, False)
        if not may_trim:
            return heights
        trimmed = [self.dice.randint(0, h) if self.dice.random() < 0.2 else h for h in heights]
        self.trimmed += sum(heights) - sum(trimmed)
        return trimmed

    def drafted(self, *_):  # type: ignore[no-untyped-def]
        """Dice learn nothing from prices."""


def roll(worker: Any, seed: int) -> None:
    """Let dice decide on the worker that decides, and draw all else anew on each."""
    roll_in(worker.model_runner, seed)


def roll_in(runner: Any, seed: int) -> Dice | None:
    """The dice that decide from now on; None on a rank that does not decide."""
    # Drafts are drawn by the generator of the process, which other engines use up too.
    torch.manual_seed(seed)
    decider = runner.stairs_decider
    if decider.policy is None:
        return None
    decider.policy = dice = Dice(runner.num_spec_tokens, seed)
    return dice
