r"""What a staircase brings, measured: how often drafts are kept.

Three things tell whether a draft will be kept, and each is learned online:

- its *position*: :math:`a_j`, given that all drafts before it were kept. Position j is drawn to
  position j - 1, the first one to a prior that fades as evidence comes in;
- its *request*: code accepts, prose does not. What a request's own drafts say is mixed with the
  whole, by how much requests have turned out to differ (beta-binomial, empirical Bayes);
- the draft's own *confidence* in it, where the host can read it: calibrated in bins, so that a
  draft that is confident and wrong is found out.

All counts are capped, which is forgetting: old evidence fades in proportion to new.
"""

from bisect import bisect_right
from collections.abc import Hashable, Sequence
from math import sqrt

_EDGES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
_CENTRES = tuple((low + high) / 2 for low, high in zip((0.0, *_EDGES), (*_EDGES, 1.0), strict=True))
_NOVELTY = tuple((1.0 + earlier / 4.0) ** -2 for earlier in range(25))
"""What a staircase tells of other requests, after so many of the same one."""
_ESTIMATE_EVERY = 4
"""Steps after which what was learned is taken into the estimates, once there is much evidence."""
_OWN_WEIGHT = 8.0
"""Trials after which a request's own record weighs as much as calibration."""


class Rate:
    """Successes of trials, the past fading in proportion to what is new.

    Attributes:
        successes, trials: the past, worth a limited number of trials.
        new_successes, new_trials: of this step, not yet part of it.
    """

    __slots__ = ("new_successes", "new_trials", "successes", "trials")

    def __init__(self) -> None:
        self.successes = self.trials = self.new_successes = self.new_trials = 0.0

    def absorb(self, cap: float) -> None:
        """Take in what is new; all counts together are worth ``cap`` trials at most."""
        self.successes += self.new_successes
        self.trials += self.new_trials
        self.new_successes = self.new_trials = 0.0
        self.weaken(cap)

    def weaken(self, cap: float) -> None:
        """Let the evidence be worth ``cap`` trials at most."""
        if self.trials > cap:
            self.successes *= cap / self.trials
            self.trials = cap

    def mean(self, prior: float, weight: float) -> float:
        """The rate, with a prior that is worth ``weight`` trials."""
        return (self.successes + prior * weight) / (self.trials + weight)


def shifted(probability: float, odds: float) -> float:
    """A probability whose odds are multiplied by ``odds``."""
    scaled = probability * odds
    return scaled / (1.0 - probability + scaled)


def odds_ratio(rate: float, base: float) -> float:
    """By what the odds of ``base`` must be multiplied to get ``rate``; both kept off 0 and 1."""
    rate = min(max(rate, 0.005), 0.995)
    base = min(max(base, 0.02), 0.98)
    return rate * (1.0 - base) / (base * (1.0 - rate))


class _Request:
    """What is known of one request.

    Attributes:
        kept, tried: drafts, fading.
        by_position, by_confidence: how many of the tried ones were expected to be kept.
        odds, confident_odds: multiply the odds of an outlook and of a calibrated confidence.
        step: when it was last seen.
        staircases, surplus, variance: verified in all; first drafts kept beyond what was expected,
            and the variance of that: for how much requests differ.
    """

    __slots__ = (
        "by_confidence",
        "by_position",
        "confident_odds",
        "kept",
        "odds",
        "staircases",
        "step",
        "surplus",
        "tried",
        "variance",
    )

    def __init__(self, step: int) -> None:
        self.kept = self.tried = self.by_position = self.by_confidence = 0.0
        self.odds = self.confident_odds = 1.0
        self.step = step
        self.staircases = 0
        self.surplus = self.variance = 0.0


class Gain:
    """Probabilities that drafts are kept, by position, request and confidence.

    Args:
        positions: the largest height, K.
        prior: acceptance assumed before anything was seen.
        prior_weight: trials that this is worth at the beginning.
        cap: trials that the past is worth, per position and per bin of confidence.
    """

    def __init__(
        self,
        positions: int,
        *,
        prior: float = 0.75,
        prior_weight: float = 3.0,
        cap: float = 200.0,
    ) -> None:
        self._prior, self._prior_weight, self._cap = prior, prior_weight, cap
        self._positions = [Rate() for _ in range(positions)]
        # Kept at each position, of what the requests' own records promised there.
        self._profile = [Rate() for _ in range(positions)]
        self._bins = [Rate() for _ in _CENTRES]
        self._after = [Rate() for _ in _CENTRES]
        # First drafts of requests whose draft has read all of a long text, or its end only.
        self._contexts = {True: Rate(), False: Rate()}
        # Of these, what is hoped for, and by what the odds differ from those of all texts.
        self._hopes: dict[bool, float] = {}
        self._odds: dict[bool, float] = {}
        self._confident = Rate()  # kept of tried, where the confidence was known
        self._believed = 0.0  # what the draft believed of these
        # Rates with something new in this step.
        self._touched: list[Rate] = []
        self._requests: dict[Hashable, _Request] = {}
        # Trials of its own after which a request counts as much as all others do.
        self._shrinkage = 4.0
        self._spread = [0.8, 4.0]
        # The step of now, and of the last estimates that took in what was new.
        self._step = self._estimated = 0
        # Whether there is something that they have not taken in.
        self._news = False
        self.evidence = 0.0
        self.rates: list[float] = []
        self._bold: list[float] = []
        self._sober: list[float] = []
        self._shape: list[float] = []
        self._calibrated: list[float] = []
        self._outlook: list[float] = []
        self._estimate()

    # ------------------------------------------------------------------------- forecasts

    def forecast(
        self, request: Hashable, height: int, bold: bool = True, whole: bool | None = None
    ) -> list[float]:
        """Conditional acceptance of positions 1..``height`` before anything is drafted.

        Added is half a standard deviation of what is not known of the request: requests differ,
        one that turns out well is drafted for to its end, and one that does not is left alone soon.

        Args:
            request: whose draft it would be.
            height: how many positions.
            bold: take the rates of the positions half a standard deviation above their estimates,
                as what may be better than it looks is worth a try that costs little; else as much
                below them.
            whole: whether the draft reads all of a long text, or its end only; None: it is short.
        """
        rates = (self._bold if bold else self._sober)[:height]
        if whole is not None:
            rates = [shifted(rate, self._odds[whole]) for rate in rates]
        known = self._requests.get(request)
        if known is None or not known.tried:
            return rates
        # Not drafting, a request drifts back to the whole: half the way in some 70 steps.
        idle = self._step - known.step
        tried = known.tried * 0.99 ** (idle - 1) if idle > 1 else known.tried
        own = tried / (tried + self._shrinkage)
        rest = 1.0 - own
        rate = min(max(known.kept / known.tried, 0.02), 0.98)
        odds = rate / (1.0 - rate)
        return [
            rest * other + own * odds * shape / (1.0 + odds * shape)
            for other, shape in zip(rates, self._shape, strict=False)
        ]

    def with_context(self, whole: bool) -> float:
        """How often first drafts are kept where a long text was read, hopefully.

        Added is half a standard deviation of what is not known: both ways are tried.

        Args:
            whole: all of it was read; else its end only.
        """
        return self._hopes[whole]

    def knows(self, request: Hashable) -> bool:
        """Whether a request has been observed at all."""
        return request in self._requests

    def after(self, request: Hashable, confidence: float) -> tuple[float, float]:
        """What a token's confidence says.

        Returns:
            The probability that the token is kept, given those before it; and, given that it is,
            the probability that the one after it is kept too, whose confidence is not known yet.
        """
        index = bisect_right(_EDGES, confidence)
        kept, further = self._calibrated[index], self._outlook[index]
        known = self._requests.get(request)
        if known is None:
            return kept, further
        own, odds = kept * known.confident_odds, further * known.odds
        return own / (1.0 - kept + own), odds / (1.0 - further + odds)

    # -------------------------------------------------------------------------- learning

    def tick(self) -> None:
        """A step begins."""
        self._step += 1
        if self._news and self._step - self._estimated > _ESTIMATE_EVERY:
            self._take_in()

    def observe(
        self,
        request: Hashable,
        height: int,
        accepted: int,
        confidences: Sequence[float] = (),
        whole: bool | None = None,
    ) -> None:
        """Record one verified staircase; :meth:`learned` after the last one of a step.

        Args:
            request: whose it was.
            height: drafts that the target judged.
            accepted: drafts kept.
            confidences: the draft's own, of its tokens; empty where unknown.
            whole: whether the draft has read all of a long text, or its end only; None: it is not
                long.
        """
        tried = min(height, accepted + 1, len(self._positions))
        if tried < 1:
            return
        known = self._requests.get(request)
        if known is None:
            known = self._requests[request] = _Request(self._step)
        kept = accepted if accepted < tried else tried
        first = self.rates[0]
        self.evidence += 1
        # The drafts of a request resemble each other: many tell little more of others than few.
        weight = _NOVELTY[min(known.staircases, len(_NOVELTY) - 1)]
        own = known.kept / known.tried if known.tried > 4.0 else 0.0
        if whole is not None:
            # What is not tried was true of other texts, and may become so again.
            other = self._contexts[not whole]
            other.weaken((1.0 - 0.004 * weight) * other.trials)
            self._count(self._contexts[whole], weight * (kept > 0), weight)
        for position in range(tried):
            held = position < kept
            self._count(self._positions[position], weight * held, weight)
            if own:
                self._count(self._profile[position], held, own)
        known.staircases += 1
        known.surplus += (kept > 0) - first
        known.variance += first * (1.0 - first)
        idle = self._step - known.step
        known.step = self._step
        fade = 0.9 * 0.99 ** (idle - 1) if idle > 1 else 0.9
        known.kept = known.kept * fade + kept
        known.tried = known.tried * fade + tried
        known.by_position = known.by_position * fade + sum(self.rates[:tried])
        known.by_confidence *= fade
        if confidences:
            self._observe_confidences(known, kept, confidences[:tried])
        known.odds = self._own_odds(known, known.by_position / known.tried)

    def _count(self, rate: Rate, successes: float, trials: float) -> None:
        """Something new of a rate, which :meth:`learned` takes in."""
        if not rate.new_trials:
            self._touched.append(rate)
        rate.new_successes += successes
        rate.new_trials += trials

    def _observe_confidences(
        self, known: _Request, kept: int, confidences: Sequence[float]
    ) -> None:
        before = -1
        for position, confidence in enumerate(confidences):
            held = position < kept
            index = bisect_right(_EDGES, confidence)
            self._count(self._bins[index], held, 1.0)
            if before >= 0:
                self._count(self._after[before], held, 1.0)
            before = index
            known.by_confidence += self._calibrated[index]
        self._believed += sum(confidences)
        self._confident.successes += min(kept, len(confidences))
        self._confident.trials += len(confidences)
        known.confident_odds = self._own_odds(known, known.by_confidence / known.tried)

    @staticmethod
    def _own_odds(known: _Request, base: float) -> float:
        """By what a request's odds differ, as its own record and ``_OWN_WEIGHT`` usual ones say."""
        kept = known.kept + _OWN_WEIGHT * base
        lost = known.tried - known.kept + _OWN_WEIGHT * (1.0 - base)
        return kept * (1.0 - base) / (lost * base)

    def learned(self) -> None:
        """All staircases of a step were observed: bring the estimates up to date."""
        for rate in self._touched:
            rate.absorb(self._cap)
        self._touched.clear()
        self._weaken_confident(self._cap)
        self._news = True
        # With much evidence the estimates move little in a step.
        if self.evidence < 64 or self._step - self._estimated >= _ESTIMATE_EVERY:
            self._take_in()

    def _take_in(self) -> None:
        self._news = False
        self._estimated = self._step
        self._estimate()

    def _weaken_confident(self, cap: float) -> None:
        if self._confident.trials > cap:
            self._believed *= cap / self._confident.trials
            self._confident.weaken(cap)

    def _estimate(self) -> None:
        weight = self._prior_weight * 16.0 / (16.0 + self.evidence)
        # Probes let little evidence be left: what was hoped for at first must not outweigh it.
        faded = max(weight, 0.5 * self._prior_weight)
        rate, self.rates, self._bold, self._sober = self._prior, [], [], []
        for position in self._positions:
            rate = position.mean(rate, weight)
            variance = rate * (1.0 - rate)
            doubt = 0.5 * sqrt(variance / (position.trials + weight))
            chance = rate + 0.5 * sqrt(variance / (self._shrinkage + 1.0))
            self.rates.append(rate)
            self._bold.append(min(chance + doubt, 0.99))
            self._sober.append(min(max(chance - doubt, 0.0), 0.99))
            weight = 2.0
        for whole, seen in self._contexts.items():
            rate = seen.mean(self._prior, faded)
            doubt = 0.5 * sqrt(rate * (1.0 - rate) / (seen.trials + faded))
            self._hopes[whole] = rate + doubt
            self._odds[whole] = odds_ratio(rate, self.rates[0])
        self._shape = [(seen.successes + 8.0) / (seen.trials + 8.0) for seen in self._profile]
        # A draft is believed until it is measured, then as much as its confidence deserved.
        odds = 1.0
        if self._confident.trials:
            base = self._believed / self._confident.trials
            odds = odds_ratio(self._confident.mean(base, 2.0), base)
        self._calibrated = [
            seen.mean(shifted(centre, odds), 3.0)
            for seen, centre in zip(self._bins, _CENTRES, strict=True)
        ]
        further = self.rates[min(1, len(self.rates) - 1)]
        self._outlook = [seen.mean(further, 4.0) for seen in self._after]

    def doubt(self, cap: float) -> None:
        """Let the evidence be worth ``cap`` trials at most, so that a few new ones can turn it."""
        for rates in (self._positions, self._bins, self._after, self._contexts.values()):
            for rate in rates:
                rate.weaken(cap)
        self._weaken_confident(cap)
        self._estimate()

    def forget(self, request: Hashable) -> None:
        """A request has ended: learn from it how much requests differ."""
        known = self._requests.pop(request, None)
        if known is None or known.staircases < 3:
            return
        # Beta-binomial: Var(kept - expected) = n a (1 - a) (1 + (n - 1) / (shrinkage + 1)).
        excess = known.surplus * known.surplus - known.variance
        self._spread[0] = 0.95 * self._spread[0] + excess / known.staircases
        self._spread[1] = 0.95 * self._spread[1] + known.variance * (1.0 - 1.0 / known.staircases)
        correlation = min(max(self._spread[0] / self._spread[1], 0.03), 0.8)
        self._shrinkage = 1.0 / correlation - 1.0
