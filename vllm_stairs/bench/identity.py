"""Token identity with plain: find where outputs part, and say why in numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TIE_GAP = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}
"""Largest gap (natural log) between the two best tokens that rounding can turn round."""


@dataclass(frozen=True)
class Choice:
    """The target's two best tokens at one position, as one arm computed them."""

    token: int
    """The token the arm wrote."""
    best: int
    second: int
    gap: float
    """Log-probability of ``best`` minus that of ``second``."""

    def __str__(self) -> str:
        return f"wrote {self.token}; best {self.best}, second {self.second}, gap {self.gap:.2e}"


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first position at which two outputs differ; None if they are the same."""
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return position
    return None if len(one) == len(other) else min(len(one), len(other))


def choice(token: int, top: Mapping[int, float]) -> Choice | None:
    """The two best of a position's log-probabilities; None with fewer than two."""
    ordered = sorted(top.items(), key=lambda item: -item[1])[:2]
    if len(ordered) < 2:
        return None
    (best, high), (second, low) = ordered
    return Choice(token, best, second, high - low)


def verdict(plain: Choice | None, other: Choice | None, dtype: str) -> str:
    """Whether a difference is a tie within rounding or needs an explanation."""
    if plain is None or other is None:
        return "unexplained: no log-probabilities at this position"
    limit = _limit(dtype)
    largest = max(plain.gap, other.gap)
    if largest > limit:
        return f"not a tie (a gap of {largest:.2e} is larger than {limit:g}): suspect a bug"
    pairs = [sorted((side.best, side.second)) for side in (plain, other)]
    if pairs[0] != pairs[1]:
        return (
            f"not a tie of two tokens (both gaps at most {limit:g}, but the two best are "
            f"{pairs[0]} for plain and {pairs[1]} for the arm): suspect a bug"
        )
    return f"a tie within rounding (both gaps at most {limit:g})"


def _limit(dtype: str) -> float:
    return TIE_GAP.get(dtype.removeprefix("torch."), TIE_GAP["float32"])


def differing(plain: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Ids of the requests whose output digests differ, in plain's order."""
    return [name for name, value in plain.items() if other.get(name) != value]


def explain(
    request_id: str,
    plain: Sequence[tuple[int, Mapping[int, float]]],
    other: Sequence[tuple[int, Mapping[int, float]]],
    dtype: str,
    batch: int,
    timed_position: int | None = None,
) -> dict[str, Any]:
    """Compare two re-runs with log-probabilities, each request alone in its batch.

    Args:
        request_id: the request.
        plain: plain's tokens, each with the log-probabilities of the best few.
        other: the same of the other arm.
        dtype: what the target runs in.
        batch: requests in flight in the timed pass whose outputs differed.
        timed_position: where they first differed in the timed pass, if that is known.
    """
    position = first_difference([token for token, _ in plain], [token for token, _ in other])
    shorter = min(len(plain), len(other))
    if position is not None and position >= shorter:
        return {
            "request": request_id,
            "position": position,
            "verdict": f"the re-runs agree for {shorter} tokens, then one ends: suspect a bug",
        }
    alike = position is None
    shown = timed_position if alike else position
    ours = theirs = None
    if shown is not None and shown < shorter:
        ours, theirs = choice(*plain[shown]), choice(*other[shown])
    return {
        "request": request_id,
        "position": position,
        "plain": vars(ours) if ours else None,
        "arm": vars(theirs) if theirs else None,
        "verdict": _alike(ours, theirs, dtype, batch) if alike else verdict(ours, theirs, dtype),
    }


def _alike(plain: Choice | None, other: Choice | None, dtype: str, batch: int) -> str:
    """The verdict where the re-runs do not differ although the timed outputs did."""
    found = "the re-run, alone in its batch, gives the same tokens in both arms: "
    if batch == 1:
        return found + (
            "as the timed pass had a batch of 1 too, an arm is not deterministic or carries "
            "state from one request to the next; suspect a bug"
        )
    if plain is not None and other is not None:
        largest, limit = max(plain.gap, other.gap), _limit(dtype)
        if largest > limit:
            return found + (
                f"the difference came with the batch, but a gap of {largest:.2e} is larger than "
                f"{limit:g}; suspect a bug"
            )
        return found + f"the difference came with the batch's composition (gaps at most {limit:g})"
    return found + "the difference came with the batch's composition, or with non-determinism"
