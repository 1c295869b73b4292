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
    limit = TIE_GAP.get(dtype.removeprefix("torch."), TIE_GAP["float32"])
    if max(plain.gap, other.gap) <= limit and {plain.best, plain.second} == {
        other.best,
        other.second,
    }:
        return f"a tie within rounding (both gaps at most {limit:g})"
    return f"not a tie (a gap is larger than {limit:g}): suspect a bug"


def differing(plain: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Ids of the requests whose output digests differ, in plain's order."""
    return [name for name, value in plain.items() if other.get(name) != value]


def explain(
    request_id: str,
    plain: Sequence[tuple[int, Mapping[int, float]]],
    other: Sequence[tuple[int, Mapping[int, float]]],
    dtype: str,
) -> dict[str, Any]:
    """Compare two re-runs with log-probabilities.

    Args:
        request_id: the request.
        plain: plain's tokens, each with the log-probabilities of the best few.
        other: the same of the other arm.
        dtype: what the target runs in.
    """
    position = first_difference([token for token, _ in plain], [token for token, _ in other])
    if position is None or position >= min(len(plain), len(other)):
        return {
            "request": request_id,
            "position": position,
            "verdict": "the re-run, alone in its batch, gives the same tokens in both arms: "
            "the difference came with the batch's composition",
        }
    ours, theirs = choice(*plain[position]), choice(*other[position])
    return {
        "request": request_id,
        "position": position,
        "plain": vars(ours) if ours else None,
        "arm": vars(theirs) if theirs else None,
        "verdict": verdict(ours, theirs, dtype),
    }
