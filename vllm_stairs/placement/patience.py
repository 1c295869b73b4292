"""How long to wait for a draft, when it writes on, when to give it up, when to try again.

Arithmetic on numbers.
"""

import math

SLOWEST_READING_MS = 10.0
"""Milliseconds per token of text that a draft may take to read it before it counts as hung."""

HUNG_SECONDS = 10.0
"""Seconds without an answer, beside the time for reading, after which a draft counts as hung."""

_SHORTEST_WAIT_MS = 50.0
_LONGEST_WAIT_MS = 1000.0
_GENEROSITY = 4.0


def worth_ms(tokens: float, batch: int, plain_ms: float) -> float:
    """Milliseconds that plain decoding would take to write so many tokens.

    Waiting longer for them never pays.

    Args:
        tokens: that are expected of the drafts.
        batch: requests in a step, each of which a plain step gives one token.
        plain_ms: milliseconds of a plain step.
    """
    return tokens * plain_ms / batch


def fixed_patience_ms(heights: int, batch: int, step_ms: float) -> float:
    """How long to wait where the user wants drafts whatever they cost: long, but not for ever.

    Args:
        heights: drafts wanted, all requests together.
        batch: requests.
        step_ms: milliseconds of a step of the target of late; 0 where unknown.
    """
    wait = _GENEROSITY * worth_ms(heights, batch, step_ms)
    return min(max(wait, _SHORTEST_WAIT_MS), _LONGEST_WAIT_MS)


def hung_after_seconds(patience_ms: float, unread: int) -> float:
    """When a question without an answer means that the draft will not answer any more.

    Args:
        patience_ms: that it was asked with.
        unread: tokens of text that it had to read.
    """
    return HUNG_SECONDS + (patience_ms + SLOWEST_READING_MS * unread) / 1e3


class Foresight:
    """Whether a draft should write on after its answer, from what that has brought of late.

    It brings the passes that are not needed any more, where every request of the next question
    goes on as was foreseen; one answer serves them all. It costs half a pass on average where it
    was in vain, because a pass under way is not broken off.
    """

    _WORTH = 0.5
    _NEWS = 0.1
    _TRIAL = 16

    def __init__(self) -> None:
        self._saved = 1.0
        self._wrote = False
        self._idle = 0

    def pays(self) -> bool:
        """Whether to write on now. If it has not paid, one time in 16 it is tried again."""
        self._idle = 0 if self._saved >= self._WORTH else self._idle + 1
        self._wrote = self._idle % self._TRIAL == 0
        return self._wrote

    def saw(self, drafts: int) -> None:
        """A question has come.

        Args:
            drafts: that were there already, for each of its requests.
        """
        if self._wrote:
            self._saved += self._NEWS * (drafts - self._saved)


class BackOff:
    """How long to wait before a draft is started again: longer after each failure in a row.

    Args:
        first: seconds after the first failure.
        longest: seconds at the most.
        proof: answers after which a draft counts as sound, and failures are counted anew.
    """

    def __init__(self, first: float = 1.0, longest: float = 60.0, proof: int = 16) -> None:
        self._first, self._longest, self._proof = first, longest, proof
        self._failures = 0
        self._answers = 0

    def answered(self) -> None:
        """The draft has answered."""
        self._answers += 1
        if self._answers >= self._proof:
            self._failures = 0

    def failed(self) -> float:
        """The draft has failed: seconds until it may be started again."""
        seconds = math.ldexp(self._first, min(self._failures, 16))
        self._failures += 1
        self._answers = 0
        return min(seconds, self._longest)
