"""Heights that are the same on every rank.

The policy decides from times, and no two ranks measure the same. So the first rank of a tensor
parallel group asks it, and tells the others what to do: a few numbers over the group's channel on
the host, once a step and once a draft pass. A group of one sends nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_stairs.height.ragged import Plan, RaggedPolicy
from vllm_stairs.placement.patience import worth_ms


class HeightDecider:
    """Asks the policy, or is told what it said.

    Args:
        policy: on the first rank; None on the others.
        group: vLLM's ``GroupCoordinator`` of the ranks that run the same draft.
    """

    def __init__(self, policy: RaggedPolicy | None, group: Any) -> None:
        self.policy = policy
        self._group = group if group.world_size > 1 else None
        self._plan: Plan | None = None

    @property
    def gain(self) -> float:
        """See :attr:`RaggedPolicy.gain`; 0 on a rank that does not decide."""
        return 0.0 if self.policy is None else self.policy.gain

    def observe(
        self,
        keys: Sequence[str],
        heights: Sequence[int],
        accepted: Sequence[int],
        target_ms: float,
        rows: int,
        refused: Sequence[bool] | None,
    ) -> None:
        """See :meth:`RaggedPolicy.observe`."""
        if self.policy is not None:
            self.policy.observe(keys, heights, accepted, target_ms, rows, refused)

    def forget(self, keys: Sequence[str]) -> None:
        """See :meth:`RaggedPolicy.forget`."""
        if self.policy is not None:
            self.policy.forget(keys)

    def plan(
        self,
        keys: Sequence[str],
        rooms: Sequence[int],
        holes: Sequence[int],
        remaining: Sequence[int],
        reasons: Sequence[str | None],
        ends: Sequence[int],
        lengths: Sequence[int],
    ) -> tuple[list[int], list[int], list[str | None]]:
        """Who drafts, and at most how far; arguments as in :meth:`RaggedPolicy.plan`.

        Returns:
            ``[B]`` heights, 0 for those who do not draft; of those who do, the indices of the ones
            whose draft is to read the end of what it has missed only; and ``[B]`` why the others do
            not (on the deciding rank only).
        """
        batch = len(keys)
        heights, cut = [0] * batch, [0] * batch
        why: list[str | None] = [None] * batch
        if self.policy is not None:
            plan = self._plan = self.policy.plan(
                keys, rooms, holes, remaining, reasons, ends, lengths
            )
            for index in plan.active:
                heights[index] = plan.heights[index]
                cut[index] = plan.cut.get(index, False)
            why = plan.reasons
        agreed = self._agree(heights + cut)
        return agreed[:batch], [i for i, yes in enumerate(agreed[batch:]) if yes], why

    def proceed(self, confidences: Sequence[float], elapsed_ms: float) -> list[int]:
        """Who takes part in the next draft pass; see :meth:`RaggedPolicy.proceed`.

        Args:
            confidences: ``[n]``: of those who took part in the last one.
            elapsed_ms: since the step began to draft.

        Returns:
            Places among these, rising.
        """
        goes_on = [0] * len(confidences)
        if self.policy is not None:
            assert self._plan is not None
            for place in self.policy.proceed(self._plan, confidences, elapsed_ms):
                goes_on[place] = 1
        return [place for place, yes in enumerate(self._agree(goes_on)) if yes]

    def patience_ms(self) -> float | None:
        """How long the planned drafts are worth waiting for, where they come all at once.

        Returns:
            Milliseconds; None where the target's steps are not measured yet.
        """
        assert self.policy is not None
        assert self._plan is not None
        target, plan = self.policy.target, self._plan
        if not target.known:
            return None
        # A probe is to find out: to wait only for what is expected would leave it at that.
        tokens = sum(plan.heights) if plan.probe else self.policy.expected_tokens(plan)
        return worth_ms(tokens, len(plan.keys), target(len(plan.keys)))

    def arrived(self, confidences: Sequence[Sequence[float]]) -> None:
        """See :meth:`RaggedPolicy.arrived`."""
        assert self.policy is not None
        assert self._plan is not None
        self.policy.arrived(self._plan, confidences)

    def settle(self, batch: int, may_trim: bool) -> list[int]:
        """How many drafts the target is to verify; see :meth:`RaggedPolicy.settle`.

        Args:
            batch: requests that were planned for, B.
            may_trim: whether drafts may be left out.

        Returns:
            ``[B]`` heights.
        """
        heights = [0] * batch
        if self.policy is not None:
            assert self._plan is not None
            heights = self.policy.settle(self._plan, may_trim=may_trim)
        return self._agree(heights)

    def drafted(self, first_ms: float, further_ms: float | None) -> None:
        """What drafting took; see :meth:`RaggedPolicy.drafted`."""
        if self.policy is not None:
            assert self._plan is not None
            self.policy.drafted(self._plan, first_ms, further_ms)

    def _agree(self, numbers: list[int]) -> list[int]:
        """The first rank's numbers, on every rank."""
        if self._group is None or not numbers:
            return numbers
        message = torch.tensor(numbers, dtype=torch.int32)
        torch.distributed.broadcast(message, src=self._group.ranks[0], group=self._group.cpu_group)
        return message.tolist()
