"""Cost models: how long a draft token and a pass of the target take. Measured or given.

As JSON (times in milliseconds)::

    {"draft_ms": {"1": 2.1, "16": 3.0},    one draft token for so many requests
     "target_ms": {"1": 30.0, "64": 41.0}, one pass of the target over so many rows
     "overhead_ms": 1.5,                   everything else in a step
     "source": "what the figures are"}

Between two sizes a model interpolates linearly, beyond the last it goes on with the last
slope (never downhill), below the first it takes the first.

A measured curve never falls: more rows do not make a pass faster, so sizes whose medians say
otherwise share one value (pool adjacent violators, weighted by the numbers of steps).
"""

import bisect
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_stairs.bench.errors import BenchError
from vllm_stairs.bench.statistics import median
from vllm_stairs.height.isotonic import isotonic


class Curve:
    """Milliseconds by size, piecewise linear."""

    def __init__(self, points: Mapping[int, float]) -> None:
        if not points:
            raise ValueError("a cost curve needs at least one point")
        self.sizes = sorted(points)
        self.values = [float(points[size]) for size in self.sizes]
        self._known: dict[int, float] = {}

    def __call__(self, size: int) -> float:
        """Milliseconds at this size."""
        if size not in self._known:
            self._known[size] = self._at(size)
        return self._known[size]

    def as_dict(self) -> dict[str, float]:
        """The points, as JSON wants them."""
        return {str(s): v for s, v in zip(self.sizes, self.values, strict=True)}

    def beyond(self) -> int | None:
        """The largest size asked for so far, if it is larger than the last point's."""
        largest = max(self._known, default=0)
        return largest if largest > self.sizes[-1] else None

    def _at(self, size: int) -> float:
        sizes, values = self.sizes, self.values
        if size <= sizes[0] or len(sizes) == 1:
            return values[0]
        right = min(bisect.bisect_left(sizes, size), len(sizes) - 1)
        left = right - 1
        slope = (values[right] - values[left]) / (sizes[right] - sizes[left])
        if size > sizes[-1]:
            return values[-1] + max(slope, 0.0) * (size - sizes[-1])
        return values[left] + slope * (size - sizes[left])


def monotone(points: Mapping[int, tuple[float, float]]) -> dict[int, float]:
    """The never falling curve nearest to measured points (weighted least squares).

    Args:
        points: size -> (milliseconds, weight above 0).
    """
    sizes = sorted(points)
    values = isotonic([points[size][0] for size in sizes], [points[size][1] for size in sizes])
    return dict(zip(sizes, values, strict=True))


@dataclass(frozen=True)
class CostModel:
    """Times of the parts of a step, in milliseconds."""

    draft_ms: Curve
    """One draft token, by number of requests drafting."""
    target_ms: Curve
    """One pass of the target, by number of rows."""
    overhead_ms: float = 0.0
    """Validation, scheduling and the rest, per step."""
    origin: str = ""
    """What the figures are and where they are from."""

    @property
    def source(self) -> str:
        """The origin, and what was asked for beyond the last sizes that it knows."""
        notes = [self.origin] if self.origin else []
        for curve, part, unit in (
            (self.target_ms, "target", "rows"),
            (self.draft_ms, "draft", "requests"),
        ):
            asked = curve.beyond()
            if asked is not None:
                last = curve.sizes[-1]
                notes.append(f"{part} extrapolated beyond {last} {unit} (up to {asked})")
        return "; ".join(notes)

    def step_ms(self, drafting: int, passes: int, rows: int) -> float:
        """One step: ``passes`` draft tokens for ``drafting`` requests, then ``rows`` rows."""
        draft = passes * self.draft_ms(drafting) if passes else 0.0
        return draft + self.target_ms(rows) + self.overhead_ms

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "draft_ms": self.draft_ms.as_dict(),
            "target_ms": self.target_ms.as_dict(),
            "overhead_ms": self.overhead_ms,
            "source": self.origin,
        }


def from_mapping(data: Any, where: str) -> CostModel:
    """Read the JSON form; one line if it is not that."""
    try:
        draft, target = (
            Curve({_size(size): float(ms) for size, ms in data[key].items()})
            for key in ("draft_ms", "target_ms")
        )
        model = CostModel(
            draft, target, float(data.get("overhead_ms", 0)), str(data.get("source", ""))
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise BenchError(
            f'{where} is not a cost model: expected {{"draft_ms": {{"1": ms, ...}}, '
            '"target_ms": {"1": ms, ...}, "overhead_ms": ms}'
        ) from None
    return _checked(model, where)


def _checked(model: CostModel, where: str) -> CostModel:
    times = (*model.draft_ms.values, *model.target_ms.values, model.overhead_ms)
    if not all(map(math.isfinite, times)):
        raise BenchError(f"{where}: times must be finite numbers")
    if min(times) < 0 or min(*model.draft_ms.values, *model.target_ms.values) <= 0:
        raise BenchError(f"{where}: times must be positive")
    return model


def _size(text: str) -> int:
    size = int(text)
    if size < 1:
        raise ValueError(text)
    return size


def load(path: Path) -> CostModel:
    """A cost model from its JSON form or from a result of ``bench run``."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise BenchError(f"no cost model {str(path)!r}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BenchError(f"{str(path)!r} is not a cost model: {error}") from None
    if isinstance(data, dict) and "profiles" in data:
        from vllm_stairs.bench.results import load as load_result

        result = load_result(path)
        return from_profiles(result.profiles, str(path), result.arms)
    return from_mapping(data, repr(str(path)))


def from_profiles(
    profiles: Iterable[Mapping[str, Any]],
    where: str,
    arms: Mapping[str, Mapping[str, Any]] | None = None,
) -> CostModel:
    """A measured cost model from the profiled passes of a run.

    The target's curve takes all arms (a row costs the same whoever drafted it). The draft's and
    the overhead take the stairs arms of fixed height; those of ``height=auto`` where there are no
    others (their passes shrink while they go, and choosing is part of their time); or
    ``draft_model`` where there are none at all.

    Args:
        profiles: of a result.
        where: the result's name.
        arms: of the result: label -> ``speculative_config`` and more.
    """
    profiles = list(profiles)
    target = _merge(profile.get("target_ms_by_rows", {}) for profile in profiles)
    stairs = [p for p in profiles if p.get("method") == "stairs"]
    fixed = [p for p in stairs if not _adaptive((arms or {}).get(str(p.get("arm"))))]
    drafting = fixed or stairs or [p for p in profiles if p.get("method") == "draft_model"]
    draft = _merge(profile.get("draft_ms_by_batch", {}) for profile in drafting)
    if not target or not draft:
        raise BenchError(
            f"{where} has no profiled pass of plain and a drafting arm to take a cost model from"
        )
    overhead = [
        (p["seconds"]["validation"] + p["seconds"]["rest"]) * 1e3 / p["steps"]
        for p in drafting
        if p.get("steps")
    ]
    model = CostModel(
        Curve(draft),
        Curve(target),
        max(0.0, median(overhead)) if overhead else 0.0,
        f"measured: profiled passes of {where}",
    )
    return _checked(model, repr(where))


def from_data_sheet(
    *,
    name: str,
    bandwidth: float,
    flops: float,
    efficiency: float,
    target_parameters: float,
    target_devices: int,
    draft_parameters: float,
    draft_devices: int,
    weight_bytes: int,
    overhead_ms: float,
    target_fixed_ms: float = 0.0,
    draft_fixed_ms: float = 0.0,
    largest_batch: int = 512,
    tallest: int = 8,
) -> CostModel:
    """A cost model computed from data-sheet figures, for machines that are not at hand.

    A pass takes the longer of reading the weights and of multiplying them with every row (two
    operations a weight and row), each at ``efficiency`` of the peak, over all devices of the
    model. KV cache and attention are left out; communication belongs in the fixed times.

    Args:
        name: of the machine.
        bandwidth: peak bytes per second of one device's memory.
        flops: peak dense operations per second of one device at this precision.
        efficiency: share of both peaks that is reached, 0 to 1.
        target_parameters: weights of the target.
        target_devices: devices the target is split over.
        draft_parameters: weights of the draft.
        draft_devices: devices the draft is split over.
        weight_bytes: bytes per weight.
        overhead_ms: everything else in a step, milliseconds.
        target_fixed_ms: added to each pass of the target, milliseconds.
        draft_fixed_ms: added to each pass of the draft, milliseconds.
        largest_batch: requests the curves reach to.
        tallest: largest height the target's curve reaches to.
    """

    def curve(parameters: float, devices: int, fixed: float, largest: int) -> Curve:
        read = parameters * weight_bytes / (bandwidth * efficiency * devices)
        row = 2 * parameters / (flops * efficiency * devices)
        knee = max(1, int(read / row))
        sizes = sorted({1, min(knee, largest), largest})
        return Curve({size: max(read, row * size) * 1e3 + fixed for size in sizes})

    rows = largest_batch * (tallest + 1)
    return CostModel(
        curve(draft_parameters, draft_devices, draft_fixed_ms, largest_batch),
        curve(target_parameters, target_devices, target_fixed_ms, rows),
        overhead_ms,
        f"computed, not measured: {name}, {bandwidth / 1e12:g} TB/s and {flops / 1e12:g} TFLOP/s "
        f"a device at {efficiency:.0%}, target {target_parameters / 1e9:g}e9 weights on "
        f"{target_devices} devices, draft {draft_parameters / 1e9:g}e9 on {draft_devices}, "
        f"{weight_bytes} bytes a weight, {overhead_ms:g} ms overhead assumed",
    )


def h100_example() -> CostModel:
    """The example of ``data/h100_example.json``: a 70e9 target on a node of 8 H100 SXM."""
    return from_data_sheet(
        name="8 x H100 SXM",
        bandwidth=3.35e12,
        flops=989e12,
        efficiency=0.7,
        target_parameters=70e9,
        target_devices=8,
        draft_parameters=1e9,
        draft_devices=1,
        weight_bytes=2,
        overhead_ms=1.0,
    )


def _adaptive(arm: Mapping[str, Any] | None) -> bool:
    config = (arm or {}).get("speculative_config") or {}
    return config.get("stairs_height", "fixed") != "fixed"


def _merge(tables: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """What several profiles measured, as one curve: per size the median, weighted by counts."""
    values: dict[int, list[float]] = {}
    for table in tables:
        for size, (ms, count) in table.items():
            values.setdefault(int(size), []).extend([ms] * min(int(count), 1000))
    return monotone({size: (median(found), len(found)) for size, found in values.items() if found})
