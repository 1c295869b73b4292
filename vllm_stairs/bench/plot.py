"""``bench plot``: figures of a result, as PNG and SVG."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_stairs.bench.errors import BenchError
from vllm_stairs.bench.results import Result
from vllm_stairs.bench.summary import PARTS, summarise


def plot(result: Result, folder: Path) -> list[Path]:
    """Draw what the result holds: throughput, acceptance, heights, time.

    Returns:
        The files written, a PNG and an SVG a figure.
    """
    rows = summarise(result)
    if not rows:
        raise BenchError("the result holds no measurement to plot")
    try:
        import matplotlib
    except ImportError:
        raise BenchError("plots need matplotlib: pip install 'vllm-stairs[bench]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "vllm-stairs"  # The same input, the same file.
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for temperature in sorted({row["temperature"] for row in rows}):
        chosen = [row for row in rows if row["temperature"] == temperature]
        suffix = "" if temperature == 0 else f"-temperature-{temperature:g}"
        written += _throughput(chosen, result, folder / f"throughput{suffix}")
        written += _acceptance(chosen, folder / f"acceptance{suffix}")
        written += _heights(chosen, folder / f"heights{suffix}")
        written += _time(chosen, folder / f"time{suffix}")
        written += _sweep(chosen, folder / f"sweep{suffix}")
    return written


def _throughput(rows: Sequence[dict[str, Any]], result: Result, stem: Path) -> list[Path]:
    figure, axes = _figure()
    for arm in _arms(rows):
        own = [row for row in rows if row["arm"] == arm]
        axes.errorbar(
            [row["batch"] for row in own],
            [row["tokens_per_s"] for row in own],
            yerr=[row["tokens_per_s"] * row["spread"] / 2 for row in own],
            marker="o",
            capsize=2,
            label=arm,
        )
    limits = [
        (row["batch"], row["limit"]["plain_tokens_per_s"])
        for row in rows
        if row["method"] == "plain" and row["limit"]
    ]
    if limits:
        axes.plot(*zip(*limits, strict=True), "k--", linewidth=1, label="limit of plain (roofline)")
    axes.set_xscale("log", base=2)
    batches = sorted({row["batch"] for row in rows})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("requests in flight")
    axes.set_ylabel("tokens/s, median (bars: spread)")
    axes.set_ylim(bottom=0)
    axes.set_title(Path(str(result.settings.get("target", ""))).name)
    return _write(figure, axes, stem)


def _acceptance(rows: Sequence[dict[str, Any]], stem: Path) -> list[Path]:
    smallest = min(row["batch"] for row in rows)
    own = [row for row in rows if row["batch"] == smallest and row["acceptance_per_position"]]
    if not own:
        return []
    figure, axes = _figure()
    for row in own:
        shares = row["acceptance_per_position"]
        axes.plot(range(1, len(shares) + 1), shares, marker="o", label=row["arm"])
    axes.set_xticks(range(1, 1 + max(len(row["acceptance_per_position"]) for row in own)))
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("position in the draft")
    axes.set_ylabel(f"share of drafts accepted up to here, batch {smallest}")
    return _write(figure, axes, stem)


def _heights(rows: Sequence[dict[str, Any]], stem: Path) -> list[Path]:
    own = [row for row in rows if row["heights"] and sum(row["heights"])]
    if not own:
        return []
    figure, axes = _figure()
    width = 0.8 / len(own)
    for index, row in enumerate(own):
        total = sum(row["heights"])
        axes.bar(
            [height + (index + 0.5) * width - 0.4 for height in range(len(row["heights"]))],
            [count / total for count in row["heights"]],
            width,
            label=f"{row['arm']}, batch {row['batch']}",
        )
    axes.set_xticks(range(max(len(row["heights"]) for row in own)))
    axes.set_xlabel("height of the staircase")
    axes.set_ylabel("share of staircases")
    return _write(figure, axes, stem)


def _time(rows: Sequence[dict[str, Any]], stem: Path) -> list[Path]:
    own = [row for row in rows if row["time"]]
    if not own:
        return []
    figure, axes = _figure()
    names = [f"{row['arm']}, batch {row['batch']}" for row in own]
    left = [0.0] * len(own)
    for part in PARTS:
        widths = [row["time"]["ms_per_step"][part] for row in own]
        axes.barh(names, widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    sources = sorted({str(row["time"]["source"]) for row in own})
    axes.set_xlabel(f"ms per engine step, prefills included ({', '.join(sources)})")
    return _write(figure, axes, stem)


def _sweep(rows: Sequence[dict[str, Any]], stem: Path) -> list[Path]:
    """Tokens/s by height, where arms named ``method:k=N`` make a sweep."""
    series: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for row in rows:
        found = re.fullmatch(r"(stairs|draft_model):k=(\d+)", row["arm"])
        if found:
            points = series.setdefault((found[1], row["batch"]), [])
            points.append((int(found[2]), row["tokens_per_s"]))
    series = {key: sorted(points) for key, points in series.items() if len(points) > 2}
    if not series:
        return []
    figure, axes = _figure()
    for (method, batch), points in series.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{method}, batch {batch}")
    for row in rows:
        if row["method"] == "plain" and row["batch"] in {batch for _, batch in series}:
            axes.axhline(row["tokens_per_s"], linestyle=":", color="grey", linewidth=1)
    axes.set_xlabel("draft tokens a step (K); dotted: plain")
    axes.set_ylabel("tokens/s, median")
    axes.set_ylim(bottom=0)
    return _write(figure, axes, stem)


def _figure() -> tuple[Any, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(7, 4.5), layout="constrained")


def _write(figure: Any, axes: Any, stem: Path) -> list[Path]:
    from matplotlib import pyplot

    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return paths


def _arms(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))
