"""What may be lost: probes while speculation is off, and speculation that does not pay.

Both are kept in *plain steps*: the time of one step without drafts at the batch size of the
moment. Together they bound what a draft can cost, whatever it does and however wrong the
estimates are (see ``docs/height-policy.md``).
"""

_FIRST_WAIT = 16
_LONGEST_WAIT = 1024
_LONGEST_CLOSE_WAIT = 64
_STRANGE_WAIT = 512
_USELESS_WAIT = 4096
_BURST = 8
_FIRST_PAUSE = 64
_LONGEST_PAUSE = 4096
_PAUSE_PER_LOSS = 32
_KEPT_SHARE = 0.25
_HALVING_LEAD = 8.0
"""Plain steps ahead that halve the longest pause; twice as many make a third of it, and so on."""
_LEADERS_PAUSE = 240
"""What the longest pause is at least."""


class Prober:
    """When to draft although it is not expected to pay, to learn whether that has changed.

    Probes wait 16 steps, and follow each other while they succeed, eight at most; after each such
    series the wait is twice as long. They are paid from a credit that grows by ``share`` of a step
    in each step.

    Args:
        credit: plain steps that may be spent from the beginning; twice that is the most that is
            saved up.
        share: the share of time that probes may cost in the long run.
    """

    def __init__(self, credit: float, share: float) -> None:
        self.credit = credit
        self._most = 2.0 * credit
        self._share = share
        self._wait, self._idle, self._burst = _FIRST_WAIT, 0, 0

    def tick(self, off: bool) -> None:
        """A step begins, with speculation off or on; on, it ends a series of probes."""
        self.credit = min(self.credit + self._share, self._most)
        self._idle += 1
        if not off:
            self._idle = self._burst = 0

    def due(
        self,
        known: bool,
        useful: bool = True,
        close: bool = False,
        patience: int = _USELESS_WAIT,
    ) -> bool:
        """Whether enough steps have passed for a probe.

        Args:
            known: whether the draft has ever run.
            useful: whether a better draft would pay. Else the costs that say so are looked at
                again after a long time, for they may be stale; a series that has begun goes on.
            close: whether drafting would nearly pay: then other requests may well be worth it.
            patience: steps after which costs are looked at again that no draft would pay for; more
                if the wait for a probe is longer.
        """
        wait = self._wait if known else _STRANGE_WAIT
        if close:
            wait = min(wait, _LONGEST_CLOSE_WAIT)
        return self._idle > (wait if useful or self._burst else max(wait, patience))

    def affords(self, cost: float) -> bool:
        """Whether a probe of this expected cost (plain steps) can be paid.

        What costs more than can be saved up is allowed on a full purse, which it overdraws.
        """
        return self.credit >= min(cost, self._most)

    @property
    def fresh(self) -> bool:
        """Whether the next probe is the first after a wait."""
        return self._burst == 0

    def made(self, won: float, promising: bool) -> None:
        """A probe has been verified.

        Args:
            won: plain steps that it brought beyond its cost; negative where it cost.
            promising: whether another one should follow at once.
        """
        self.credit = min(self.credit + won, self._most)
        self._burst += 1
        if promising and self._burst < _BURST:
            self._idle = self._wait
            return
        self._burst = self._idle = 0
        self._wait = min(2 * self._wait, _LONGEST_WAIT)

    def reset(self) -> None:
        """Speculation pays: should it stop to pay, the first probe is soon again."""
        self._wait, self._burst = _FIRST_WAIT, 0


class Account:
    """What speculation has won and lost; overdrawn, it pauses.

    The balance is at most the allowance and a quarter of what speculation is ahead, that up to as
    much again: requests differ, and those for which drafting loses come in a row now and then.
    Pauses double until what was lost beyond the allowance has been won back; the further ahead
    speculation is, the shorter is the longest of them, for that is what they risk.

    Args:
        allowance: plain steps that may be lost before the first pause.
    """

    def __init__(self, allowance: float) -> None:
        self.balance = self._full = allowance
        # Wins net of losses, never negative: what could be lost again without being slower.
        self._earned = 0.0
        self._owed = 0.0
        self._pause = _FIRST_PAUSE
        self._left = 0

    @property
    def blocked(self) -> bool:
        """Whether speculation has to pause."""
        return self._left > 0

    @property
    def stake(self) -> float:
        """What may be spent at once on what is to pay back later: of what was won, half."""
        return 2.0 * min(max(self.balance, 0.0), self._full) + 0.5 * self._earned

    @property
    def patience(self) -> int:
        """Steps of the longest pause: the fewer, the more was won that they risk."""
        return max(int(_LONGEST_PAUSE / (1.0 + self._earned / _HALVING_LEAD)), _LEADERS_PAUSE)

    @property
    def full(self) -> bool:
        """Whether nothing was lost of late."""
        return self.balance >= self._full

    def tick(self) -> None:
        """A step begins. After a pause half the allowance is lent."""
        if self._left:
            self._left -= 1
            lent = 0.5 * self._full - self.balance
            if not self._left and lent > 0.0:
                self.balance += lent
                self._owed += lent

    def write_off(self, lost: float) -> None:
        """An investment will not come back: what was won before bears it first.

        Args:
            lost: plain steps.
        """
        covered = min(lost, self._earned)
        self._earned -= covered
        if lost > covered:
            self.book(covered - lost)

    def book(self, won: float) -> None:
        """Record a step: plain steps won against plain decoding; negative: lost."""
        self.balance += won
        self._earned = max(self._earned + won, 0.0)
        surplus = self.balance - self._full
        if surplus >= 0.0:
            # What was lent first, the rest is kept for losses to come.
            repaid = min(surplus, self._owed)
            self._owed -= repaid
            kept = min(_KEPT_SHARE * self._earned, self._full)
            self.balance = self._full + min(surplus - repaid, kept)
            if self._owed <= 0.0:
                self._owed = 0.0
                self._pause = _FIRST_PAUSE
        elif self.balance < 0.0 and not self._left:
            wanted = max(self._pause, int(-_PAUSE_PER_LOSS * self.balance))
            self._left = min(wanted, self.patience)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
