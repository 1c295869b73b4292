"""``bench compare``: two result files side by side, with a verdict."""

import math
from collections.abc import Mapping, Sequence
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
    """``ratio to plain`` where the older result has plain, else ``tokens/s``."""
    before: float
    after: float
    """NaN where the newer result does not have it."""
    noise: float | None
    """Relative noise that the two results state together; None if either has one repeat."""
    fell: bool
    """Whether the figure fell by more than the tolerance."""
    problem: str | None = None
    """Why the two figures cannot be compared; None if they can."""

    @property
    def failed(self) -> bool:
        """Whether this line alone is reason for exit status 1."""
        return self.fell or self.problem is not None

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

    What the older result has and the newer one lacks (an arm, a batch size, plain) is a
    failure, and so is a figure that is no finite number: neither may pass for "no regression".

    Args:
        before: the older result.
        after: the newer one.
        tolerance: share by which a figure may fall, e.g. 0.05.
        force: compare although the two measured different things.
    """
    if not 0 <= tolerance < 1:
        raise BenchError("--tolerance must be a share from 0 to below 1, for example 0.05")
    if not force:
        _check_comparable(before, after)
    old = {(r["arm"], r["batch"], r["temperature"]): r for r in summarise(before)}
    new = {(r["arm"], r["batch"], r["temperature"]): r for r in summarise(after)}
    if not old.keys() & new.keys():
        raise BenchError("the two results have no arm, batch size and temperature in common")
    return [_change(key, row, new.get(key), tolerance) for key, row in old.items()]


def _change(
    key: tuple[str, int, float],
    old: Mapping[str, Any],
    new: Mapping[str, Any] | None,
    tolerance: float,
) -> Change:
    # Plain's own tokens/s tell of the machine; only the other arms can fall.
    own = old["method"] == "plain"
    by_ratio = not own and old["ratio_to_plain"] is not None
    quantity = "ratio to plain" if by_ratio else "tokens/s"
    first, noise = _figure(old, by_ratio)
    second, second_noise = _figure(new, by_ratio) if new else (math.nan, None)
    problem = None
    if new is None:
        problem = "not in the newer result"
    elif by_ratio and new["ratio_to_plain"] is None:
        problem = "no plain in the newer result"
    elif not all(math.isfinite(figure) and figure > 0 for figure in (first, second)):
        problem = "not a finite figure above 0"
    together = None if noise is None or second_noise is None else max(noise, second_noise)
    fell = not own and second < first * (1 - tolerance)
    return Change(*key, quantity, first, second, together, fell, problem)


def _figure(row: Mapping[str, Any], by_ratio: bool) -> tuple[float, float | None]:
    """A row's figure and its noise; NaN where a ratio is asked for and there is none."""
    if not by_ratio:
        return row["tokens_per_s"], row["noise"]
    ratio = row["ratio_to_plain"]
    return (ratio["median"], ratio["noise"]) if ratio else (math.nan, None)


def _check_comparable(before: Result, after: Result) -> None:
    targets = [result.settings.get("target") for result in (before, after)]
    pairs: list[tuple[str, Any, Any]] = [
        ("prompts", before.prompts.get("hash"), after.prompts.get("hash")),
        *(
            (name, before.settings.get(name), after.settings.get(name))
            for name in (
                "output_tokens", "eager", "dtype", "all_turns", "stop_at_eos", "seed",
                "by_group", "max_model_len", "tensor_parallel_size", "kv_cache_gib", "engine",
            )
        ),
        ("target", *_models(before, after, "target", targets)),
    ]  # fmt: skip
    for label in (label for label in before.arms if label in after.arms):
        configs = [
            dict(result.arms[label].get("speculative_config") or {}) for result in (before, after)
        ]
        names = [config.pop("model", None) for config in configs]
        methods = [result.arms[label].get("method") for result in (before, after)]
        drafts = _models(before, after, f"draft of {label}", names)
        pairs += [
            (f"the method of {label}", methods[0], methods[1]),
            (f"the draft of {label}", drafts[0], drafts[1]),
            (f"the speculative_config of {label}", configs[0], configs[1]),
        ]
    for name, old, new in pairs:
        if old != new:
            raise BenchError(
                f"the two results differ in {name} ({old!r}, {new!r}): pass --force to compare "
                "them all the same"
            )


def _models(before: Result, after: Result, role: str, names: Sequence[Any]) -> Sequence[Any]:
    """Hashes of the weights where both results have them, else the names."""
    hashes = [
        ((result.provenance.get("models") or {}).get(role) or {}).get("weights_hash")
        for result in (before, after)
    ]
    return hashes if all(hashes) else names
