"""``bench compare``: two result files side by side, with a verdict."""

from dataclasses import dataclass
from typing import Any

from vllm_stairs.bench.errors import BenchError
from vllm_stairs.bench.results import Result
from vllm_stairs.bench.summary import summarise


@dataclass(frozen=True)
class Change:
    """How one arm at one batch size fared in two results."""

    arm: str
    batch: int
    temperature: float
    quantity: str
    """``ratio to plain`` where both results have plain, else ``tokens/s``."""
    before: float
    after: float
    noise: float | None
    """Relative noise that the two results state together; None if either has one repeat."""
    fell: bool
    """Whether the figure fell by more than the tolerance."""

    @property
    def change(self) -> float:
        """Relative change; negative is worse."""
        return self.after / self.before - 1

    @property
    def within_noise(self) -> bool:
        """Whether the stated noise explains the change."""
        return self.noise is not None and abs(self.change) <= self.noise


def compare(before: Result, after: Result, tolerance: float, *, force: bool) -> list[Change]:
    """Match rows by arm, batch and temperature.

    Args:
        before: the older result.
        after: the newer one.
        tolerance: share by which a figure may fall, e.g. 0.05.
        force: compare although the two measured different prompts or lengths.
    """
    if not 0 <= tolerance < 1:
        raise BenchError("--tolerance must be a share from 0 to below 1, for example 0.05")
    if not force:
        _check_comparable(before, after)
    old = {(r["arm"], r["batch"], r["temperature"]): r for r in summarise(before)}
    new = {(r["arm"], r["batch"], r["temperature"]): r for r in summarise(after)}
    changes = []
    for key in (key for key in old if key in new):
        pair = (old[key], new[key])
        ratios = [row["ratio_to_plain"] for row in pair]
        if old[key]["method"] == "plain" or None in ratios:
            quantity = "tokens/s"
            first, second = (row["tokens_per_s"] for row in pair)
            noises = [row["noise"] for row in pair]
        else:
            quantity = "ratio to plain"
            first, second = (ratio["median"] for ratio in ratios)
            noises = [ratio["noise"] for ratio in ratios]
        noise = None if None in noises else max(noises)
        # Plain's own tokens/s tell of the machine; only the arms can fail.
        judged = quantity == "ratio to plain" or all(
            r["ratio_to_plain"] is None for r in (*old.values(), *new.values())
        )
        fell = judged and second < first * (1 - tolerance)
        changes.append(Change(*key, quantity, first, second, noise, fell))
    if not changes:
        raise BenchError("the two results have no arm, batch size and temperature in common")
    return changes


def _check_comparable(before: Result, after: Result) -> None:
    pairs: list[tuple[str, Any, Any]] = [
        ("prompts", before.prompts.get("hash"), after.prompts.get("hash")),
        *(
            (name, before.settings.get(name), after.settings.get(name))
            for name in ("output_tokens", "eager", "dtype", "all_turns", "stop_at_eos")
        ),
    ]
    for name, old, new in pairs:
        if old != new:
            raise BenchError(
                f"the two results differ in {name} ({old!r}, {new!r}): pass --force to compare "
                "them all the same"
            )
