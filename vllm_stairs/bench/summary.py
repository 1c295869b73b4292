"""From measurements to the rows of the tables: medians, ratios, shares, limits."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vllm_stairs.bench.results import Result
from vllm_stairs.bench.roofline import ModelBytes, limit
from vllm_stairs.bench.statistics import Ratio, median, paired_ratio, repeat_noise, spread

PARTS = ("draft", "target", "validation", "rest")
"""Where time goes; ``rest`` is scheduling, detokenising, and whatever else remains."""

PROFILED, TIMED = "profiled pass", "timed passes"
"""Where the times of the parts come from."""


def summarise(result: Result) -> list[dict[str, Any]]:
    """One row per arm, batch and temperature, in the order in which they were asked for."""
    cells: dict[tuple[int, float], dict[str, list[dict[str, Any]]]] = {}
    for measurement in result.measurements:
        cell = cells.setdefault((measurement["batch"], measurement["temperature"]), {})
        cell.setdefault(measurement["arm"], []).append(measurement)
    rows = []
    for (batch, temperature), by_arm in sorted(cells.items(), key=lambda item: item[0][::-1]):
        plain = _first_of(result, by_arm, "plain")
        stock = _best_stock(result, by_arm)
        for label in result.arms:
            if label in by_arm:
                rows.append(
                    {
                        "arm": label,
                        "method": result.arms[label]["method"],
                        "batch": batch,
                        "temperature": temperature,
                        **_figures(by_arm[label]),
                        "ratio_to_plain": _ratio(by_arm, label, plain),
                        "ratio_to_plain_by_group": _group_ratios(by_arm, label, plain),
                        "best_draft_model": stock,
                        "ratio_to_best_draft_model": _ratio(by_arm, label, stock),
                        "identity": _identity(result, label, batch, temperature),
                        "time": _time(result, label, batch, by_arm[label]),
                        "limit": _limit(result, label, by_arm[label]),
                    }
                )
    return rows


def per_position(measurements: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Share of all drafts whose tokens held up to each position; None without drafts."""
    drafts = sum(m["speculation"].get("drafts", 0) for m in measurements)
    if not drafts:
        return None
    tables = [m["speculation"].get("accepted_per_position") or [] for m in measurements]
    width = max(map(len, tables))
    return [sum(t[i] for t in tables if i < len(t)) / drafts for i in range(width)]


def _figures(measurements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    speeds = [m["tokens_per_s"] for m in measurements]
    lengths = [m["acceptance_length"] for m in measurements if m["acceptance_length"]]
    heights = [m["speculation"]["heights"] for m in measurements if "heights" in m["speculation"]]
    off: Counter[str] = Counter()
    groups: dict[str, list[int]] = {}
    for measurement in measurements:
        off.update(measurement["speculation"].get("off", {}))
        for name, group in measurement["groups"].items():
            sums = groups.setdefault(name, [0, 0])
            sums[0] += group["tokens"]
            sums[1] += group["steps"]
    drafts = sum(m["speculation"].get("drafts", 0) for m in measurements)
    accepted = sum(m["speculation"].get("accepted_tokens", 0) for m in measurements)
    drafted = sum(m["speculation"].get("draft_tokens", 0) for m in measurements)
    return {
        "repeats": len(speeds),
        "tokens_per_s": median(speeds),
        "spread": spread(speeds),
        "noise": repeat_noise(speeds),
        "ttft_ms": _median_table([m["ttft_ms"] for m in measurements]),
        "itl_ms": _median_table([m["itl_ms"] for m in measurements]),
        "tpot_ms": _median_table([m["tpot_ms"] for m in measurements]),
        "acceptance_length": median(lengths) if lengths else None,
        "acceptance_length_of_drafts": 1 + accepted / drafts if drafts else None,
        "acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_per_position": per_position(measurements),
        "acceptance_length_by_group": {
            name: tokens / steps for name, (tokens, steps) in groups.items() if steps
        },
        "heights": [sum(column) for column in zip(*heights, strict=True)] if heights else None,
        "off": {reason: count for reason, count in off.most_common() if count},
    }


def _median_table(tables: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    present = [table for table in tables if table]
    if not present:
        return None
    return {key: median([table[key] for table in present]) for key in present[0]}


def _first_of(result: Result, by_arm: Mapping[str, Any], method: str) -> str | None:
    return next(
        (a for a in result.arms if a in by_arm and result.arms[a]["method"] == method), None
    )


def _best_stock(result: Result, by_arm: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    stock = [a for a in by_arm if result.arms[a]["method"] == "draft_model"]
    if not stock:
        return None
    return max(stock, key=lambda arm: median([m["tokens_per_s"] for m in by_arm[arm]]))


def _ratio(
    by_arm: Mapping[str, Sequence[Mapping[str, Any]]], label: str, base: str | None
) -> dict[str, Any] | None:
    if base is None:
        return None
    ours = {m["repeat"]: m for m in by_arm[label]}
    theirs = {m["repeat"]: m for m in by_arm[base]}
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return None
    if label == base:
        return asdict(Ratio(1.0, 1.0, 1.0, 0.0))
    return asdict(
        paired_ratio(
            [ours[r]["tokens_per_s"] for r in common],
            [theirs[r]["tokens_per_s"] for r in common],
            _turn_ratios([ours[r] for r in common], [theirs[r] for r in common]),
        )
    )


def _turn_ratios(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> list[list[float]]:
    """For each repeat the ratios of its turns; none where the arms did not take any.

    Turns in which some arm wrote nothing (a step may write more than a turn) are left out.
    """
    speeds = [
        [tokens / seconds for tokens, seconds in m.get("turns", ())] for m in (*ours, *theirs)
    ]
    wrote = [turn for turn in range(min(map(len, speeds))) if all(own[turn] for own in speeds)]
    if len(wrote) < 2:
        return []
    pairs = zip(speeds[: len(ours)], speeds[len(ours) :], strict=True)
    return [[own[turn] / base[turn] for turn in wrote] for own, base in pairs]


def _group_ratios(
    by_arm: Mapping[str, Sequence[Mapping[str, Any]]], label: str, base: str | None
) -> dict[str, float] | None:
    """By group of prompts: how much sooner its requests were done, medians over the repeats."""
    if base is None:
        return None
    theirs = {m["repeat"]: m["groups"] for m in by_arm[base]}
    found: dict[str, list[float]] = {}
    for measurement in by_arm[label]:
        for name, group in measurement["groups"].items():
            other = theirs.get(measurement["repeat"], {}).get(name)
            if other and group.get("seconds") and other.get("seconds"):
                speeds = [g["output_tokens"] / g["seconds"] for g in (group, other)]
                found.setdefault(name, []).append(speeds[0] / speeds[1])
    return {name: median(ratios) for name, ratios in found.items()} or None


def _identity(result: Result, label: str, batch: int, temperature: float) -> str | None:
    for entry in result.identity:
        if (entry["arm"], entry["batch"], entry["temperature"]) == (label, batch, temperature):
            return f"{entry['same']}/{entry['requests']}"
    return None


def _time(
    result: Result, label: str, batch: int, measurements: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Seconds and milliseconds per step by part, prefill steps included.

    From the profiled pass where the arm has one, in which every method is timed by the same
    clocks on the same prompts; else from stairs' own clocks in the timed passes, whose share of
    prefill is another.
    """
    profile = next((p for p in result.profiles if (p["arm"], p["batch"]) == (label, batch)), None)
    own = [m for m in measurements if "seconds" in m["speculation"]]
    if profile is not None:
        steps, seconds, source = profile["steps"], profile["seconds"], PROFILED
    elif own:
        steps = sum(m["speculation"]["steps"] for m in own)
        seconds = {
            part: sum(m["speculation"]["seconds"].get(part, 0.0) for m in own)
            for part in PARTS[:-1]
        }
        seconds["rest"] = sum(m["seconds"] for m in own) - sum(seconds.values())
        source = TIMED
    else:
        return None
    total = sum(seconds.values())
    return {
        "source": source,
        "share": {part: seconds[part] / total for part in PARTS},
        "ms_per_step": {part: seconds[part] * 1e3 / max(steps, 1) for part in PARTS},
    }


def _limit(
    result: Result, label: str, measurements: Sequence[Mapping[str, Any]]
) -> dict[str, float] | None:
    target = result.models.get(str(result.settings.get("target")))
    if not target or not result.bandwidth:
        return None
    arm = result.arms[label]
    config = arm.get("speculative_config") or {}
    draft = result.models.get(str(config.get("model")))
    lengths = [m["acceptance_length"] for m in measurements if m["acceptance_length"]]
    # Measured by one worker; each of a tensor-parallel group reads its part of the weights.
    workers = result.settings.get("tensor_parallel_size") or 1
    computed = limit(
        bandwidth=result.bandwidth["bytes_per_s"] * workers,
        target=ModelBytes(**target),
        batch=measurements[0]["batch"],
        context=median([m["mean_context_tokens"] for m in measurements]),
        measured=median([m["tokens_per_s"] for m in measurements]),
        draft=ModelBytes(**draft) if draft else None,
        acceptance_length=median(lengths) if lengths else 1.0,
        draft_passes=_draft_passes(config, measurements),
    )
    return computed.as_dict()


def _draft_passes(config: Mapping[str, Any], measurements: Sequence[Mapping[str, Any]]) -> float:
    """Passes of the draft per step: as many as the step's tallest draft has tokens.

    Arms of one height draft that high whenever they draft. Where heights differ between the
    requests of a step the tallest was not counted, and the mean is a lower bound (exact at
    batch size 1): the ideal stays one that cannot be beaten.
    """
    staircases = sum(sum(m["groups"][g]["steps"] for g in m["groups"]) for m in measurements)
    if not staircases:
        return 0.0
    mean: float = sum(m["speculation"].get("draft_tokens", 0) for m in measurements) / staircases
    one_height = (
        config.get("stairs_height", "fixed") == "fixed"
        and "num_speculative_tokens_per_batch_size" not in config
    )
    if measurements[0]["batch"] == 1 or not one_height:
        return mean
    drafts = sum(m["speculation"].get("drafts", 0) for m in measurements)
    tallest: float = (config.get("num_speculative_tokens") or 0) * drafts / staircases
    return max(mean, tallest)
