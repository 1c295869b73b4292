"""How far the draft's KV cache is valid, per request and per block.

Target and draft share vLLM's blocks: a block id means one slot range in both caches. The target
fills every slot it is scheduled for; the draft fills a slot only when it drafts. So the draft's
cache has *holes*: after steps without drafts, after preemption, and in blocks that a request
inherits from the prefix cache, where an earlier request may have left one. Drafting over a hole
reads stale keys and values. That never makes the output wrong, it makes drafts bad, and nobody
sees why. This ledger knows the holes, so that the proposer fills them before it drafts.

A draft may also leave the beginning of a long text unread (:meth:`DraftKVLedger.begin_at`): its
context is then the rest, and what it wrote without the beginning does not count as valid for
others.
"""

from collections.abc import Sequence


class DraftKVLedger:
    """Valid slots of the draft's KV cache.

    Args:
        num_blocks: number of blocks in the cache.
        block_size: tokens per block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        # Leading slots of each block whose draft keys and values belong to the tokens that
        # vLLM associates with the block now.
        self._filled = [0] * num_blocks
        # Request -> leading tokens that are known to be valid; absent: look at the blocks.
        self._valid: dict[str, int] = {}
        # Request -> leading tokens whose blocks are marked as far as they are filled.
        self._marked: dict[str, int] = {}
        # Request -> first token of the draft's context, where that is not the text's first one.
        self._first: dict[str, int] = {}
        # Requests whose last staircase the target has not judged yet.
        self._unsettled: set[str] = set()

    def admit(self, request_id: str, block_ids: Sequence[int], num_inherited: int) -> None:
        """A request enters the batch, for the first time or again after preemption.

        Args:
            request_id: the request.
            block_ids: all its blocks.
            num_inherited: leading tokens that it need not compute, because their blocks came
                from the prefix cache; the blocks behind are fresh.
        """
        self.release(request_id)
        self._forget(block_ids[num_inherited // self.block_size :])

    def extend(self, block_ids: Sequence[int]) -> None:
        """A running request gets fresh blocks: whatever they held is gone."""
        self._forget(block_ids)

    def release(self, request_id: str) -> None:
        """A request left the batch. Its blocks may live on in the prefix cache."""
        self._valid.pop(request_id, None)
        self._marked.pop(request_id, None)
        self._first.pop(request_id, None)
        self._unsettled.discard(request_id)

    def begin_at(self, request_id: str, first: int) -> None:
        """The draft is to read a settled request's text from ``first`` on only.

        Where others share a block, what it writes there is theirs too: the same tokens, read with
        less before them.

        Args:
            request_id: the request.
            first: a multiple of the block size, beyond the tokens that are valid.
        """
        self._first[request_id] = self._valid[request_id] = first

    def first_token(self, request_id: str) -> int:
        """First token of the draft's context of a request."""
        return self._first.get(request_id, 0)

    def wrote(self, request_id: str, num_tokens: int) -> None:
        """The draft wrote its KV for the first ``num_tokens`` tokens of text and drafts."""
        self._valid[request_id] = num_tokens
        self._unsettled.add(request_id)

    def settle(self, request_id: str, block_ids: Sequence[int], num_confirmed: int) -> None:
        """The target has judged the request's last staircase: forget rejected drafts.

        Must be called in the first step after :meth:`wrote` in which the request takes part,
        also if nothing is drafted then: later the rejected drafts would pass for text.

        Args:
            request_id: the request.
            block_ids: all its blocks.
            num_confirmed: length of its text without the newest token, which no draft pass
                can have read yet.
        """
        if request_id not in self._unsettled:
            return
        self._unsettled.discard(request_id)
        valid = min(self._valid[request_id], num_confirmed)
        self._valid[request_id] = valid
        if request_id in self._first:
            return
        self._mark(block_ids, self._marked.get(request_id, 0), valid)
        self._marked[request_id] = valid

    def valid_tokens(self, request_id: str, block_ids: Sequence[int], num_confirmed: int) -> int:
        """Leading tokens whose draft KV is valid, or not wanted, for a settled request.

        Args:
            request_id: the request.
            block_ids: all its blocks.
            num_confirmed: length of its text without the newest token.

        Returns:
            A number from 0 to ``num_confirmed``.
        """
        valid = self._valid.get(request_id, 0)
        if request_id in self._first:
            return valid
        if valid < num_confirmed:
            # A hole, or the last draft of a staircase that was kept whole. Another request may
            # have filled shared blocks meanwhile.
            first = valid // self.block_size
            length = first * self.block_size
            for block_id in block_ids[first:]:
                filled = self._filled[block_id]
                length += filled
                if filled < self.block_size:
                    break
            valid = min(max(valid, length), num_confirmed)
            self._valid[request_id] = valid
        self._marked[request_id] = valid
        return valid

    def _mark(self, block_ids: Sequence[int], start: int, end: int) -> None:
        """Slots from ``start`` to ``end`` hold text: who inherits their blocks may rely on them.

        Blocks before ``start`` are left alone: with a sliding window they may be another's by now.
        """
        size = self.block_size
        for block in range(start // size, -(-end // size)):
            block_id = block_ids[block]
            self._filled[block_id] = max(self._filled[block_id], min(end - block * size, size))

    def _forget(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            self._filled[block_id] = 0
