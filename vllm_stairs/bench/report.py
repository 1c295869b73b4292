"""What people see: progress while it runs, tables when it is done. Needs rich."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from vllm_stairs.bench.compare import Change
from vllm_stairs.bench.errors import BenchError
from vllm_stairs.bench.replay import Score
from vllm_stairs.bench.results import Result, with_defaults
from vllm_stairs.bench.summary import PARTS, TIMED


def _rich() -> Any:
    try:
        import rich
        import rich.box
        import rich.console
        import rich.progress
        import rich.table
    except ImportError:
        raise BenchError("the benchmark needs rich: pip install 'vllm-stairs[bench]'") from None
    return rich


def console() -> Any:
    """Standard output; wide where it is no terminal, so that tables stay whole in files."""
    rich = _rich()
    found = rich.console.Console(highlight=False)
    return found if found.is_terminal else rich.console.Console(highlight=False, width=200)


class Progress(AbstractContextManager["Progress"]):
    """A progress bar on standard error."""

    def __init__(self) -> None:
        rich = _rich()
        errors = rich.console.Console(stderr=True, highlight=False)
        columns = rich.progress
        self._progress = columns.Progress(
            columns.BarColumn(bar_width=24),
            columns.MofNCompleteColumn(),
            columns.TimeElapsedColumn(),
            columns.TimeRemainingColumn(),
            columns.TextColumn("{task.description}", markup=False),
            console=errors,
            transient=True,
        )
        self._terminal = errors.is_terminal
        self._task = self._progress.add_task("checking", total=None)

    def __enter__(self) -> "Progress":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def total(self, measurements: int) -> None:
        """How many passes there will be."""
        self._progress.update(self._task, total=measurements)

    def note(self, text: str) -> None:
        """A line for the user."""
        self._progress.console.print(text, markup=False)

    def doing(self, text: str) -> None:
        """What is being done now."""
        self._progress.update(self._task, description=text)
        if not self._terminal:
            self._progress.console.print(text, markup=False)

    def done(self) -> None:
        """One pass is finished."""
        self._progress.advance(self._task)


def show(result: Result, out: Any | None = None) -> None:
    """Print everything a run found out.

    Args:
        result: with its summary, as a run or :func:`vllm_stairs.bench.results.load` made it.
        out: a rich console; None: standard output.
    """
    out = out or console()
    summary, settings = result.summary, result.settings
    prompts = result.prompts
    turns = with_defaults(settings)["turns"]
    groups = ", ".join(f"{count} {name}" for name, count in sorted(prompts["groups"].items()))
    out.print(
        f"Target {settings['target']}, draft {settings.get('draft') or 'none'}; "
        f"{prompts['count']} prompts ({groups}) x {settings['output_tokens']} tokens, "
        f"{settings['repeats']} repeats, interleaved"
        f"{f' in {turns} turns each' if turns > 1 else ''}.",
        markup=False,
    )
    if settings.get("eager"):
        out.print("Eager: not for headline figures, plain vLLM gains from compilation.")
    for temperature in dict.fromkeys(row["temperature"] for row in summary):
        rows = [row for row in summary if row["temperature"] == temperature]
        title = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        out.print(_speed(rows, title))
        if any(row["limit"] for row in rows):
            out.print(_limits(rows, result, title))
        if any(row["acceptance_per_position"] for row in rows):
            out.print(_acceptance(rows, title))
        if any(row["method"] != "plain" and row["ratio_to_plain_by_group"] for row in rows):
            out.print(_groups(rows, title))
    if result.online:
        out.print(_online(result))
    out.print(_arms(result))
    _identity(result, out)


def show_changes(changes: Sequence[Change], tolerance: float, out: Any | None = None) -> None:
    """Print a comparison."""
    out = out or console()
    table = _table("", "arm", "batch", "temp.", "figure", "before", "after", "change", "verdict")
    for change in changes:
        if change.problem:
            verdict = change.problem
        elif change.fell:
            verdict = f"fell by more than {tolerance:.0%}"
        else:
            verdict = "within noise" if change.within_noise else "ok"
        table.add_row(
            change.arm,
            str(change.batch),
            f"{change.temperature:g}",
            change.quantity,
            f"{change.before:.3g}",
            "" if change.problem else f"{change.after:.3g}",
            "" if change.problem else f"{change.change:+.1%}",
            verdict,
        )
    out.print(table)


def show_scores(
    scored: Iterable[tuple[Score, Sequence[Score]]], source: str, out: Any | None = None
) -> None:
    """Print the simulator's scores, one table a batch size."""
    out = out or console()
    out.print(f"Costs: {source}", markup=False)
    fastest = 0.0
    for plain, scores in scored:
        table = _table(
            f"replay, batch {plain.batch}",
            "policy",
            "tokens/s",
            "vs plain",
            "mean height",
            "accept. length",
            "ms/step",
            "draft",
            "target",
            "rest",
            "guessed",
        )
        best = max(scores, key=lambda score: score.tokens_per_s, default=plain)
        for score in (plain, *scores):
            total = score.draft_ms + score.target_ms + score.overhead_ms
            mark = " *" if score is best and score.tokens_per_s > plain.tokens_per_s else ""
            name = "plain" if score is plain else score.policy
            table.add_row(
                name + mark,
                f"{score.tokens_per_s:.1f}",
                f"{score.tokens_per_s / plain.tokens_per_s:.3f}",
                f"{score.mean_height:.2f}",
                f"{score.acceptance_length:.2f}",
                f"{total / score.steps:.2f}",
                f"{score.draft_ms / total:.0%}",
                f"{score.target_ms / total:.0%}",
                f"{score.overhead_ms / total:.0%}",
                f"{score.guessed:.1%}",
            )
            fastest = max(fastest, score.simulated_per_s)
        out.print(table)
    out.print(
        "* best. guessed: staircases that met a position which the record does not know. "
        f"Simulated at up to {fastest:,.0f} staircases/s.",
        markup=False,
    )


def _speed(rows: Sequence[Mapping[str, Any]], title: str) -> Any:
    table = _table(
        f"speed, {title} (medians; +- what a second run may differ by; ms)",
        "batch",
        "arm",
        "tokens/s",
        "spread",
        "vs plain",
        "vs best draft_model",
        "TTFT p50/p90/p99",
        "ITL p50/p90/p99",
        "accept. length",
        "= plain",
    )
    for row in _by_batch(rows, table):
        table.add_row(
            str(row["batch"]),
            row["arm"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['spread']:.1%}" if row["repeats"] > 1 else "",
            _ratio(row["ratio_to_plain"]),
            _ratio(row["ratio_to_best_draft_model"]),
            _percentiles(row["ttft_ms"]),
            _percentiles(row["itl_ms"]),
            _number(row["acceptance_length"], "{:.2f}"),
            row["identity"] or "",
        )
    return table


def _limits(rows: Sequence[Mapping[str, Any]], result: Result, title: str) -> Any:
    bandwidth = (result.bandwidth or {}).get("bytes_per_s", 0) / 1e9
    workers = result.settings.get("tensor_parallel_size") or 1
    each = f" in each of {workers} workers" if workers > 1 else ""
    sources = sorted({row["time"]["source"] for row in rows if row["time"]})
    times = f"; measured ms/step from the {' or (t) '.join(sources)}, prefill steps included"
    table = _table(
        f"limit, {title}: reading memory at the measured {bandwidth:.1f} GB/s{each} and nothing "
        f"else{times if sources else ''}",
        "batch",
        "arm",
        "tokens/s",
        "ideal plain",
        "ideal here",
        "ideal, free draft",
        "reached",
        "ideal ms/step draft+target",
        "measured ms/step " + "+".join(PARTS),
        "time share",
    )
    for row in _by_batch((row for row in rows if row["limit"]), table):
        limit, time = row["limit"], row["time"]
        table.add_row(
            str(row["batch"]),
            row["arm"],
            f"{row['tokens_per_s']:.1f}",
            f"{limit['plain_tokens_per_s']:.1f}",
            f"{limit['tokens_per_s']:.1f}",
            f"{limit['free_draft_tokens_per_s']:.1f}",
            f"{limit['share']:.0%}",
            f"{limit['draft_ms']:.1f}+{limit['target_ms']:.1f}",
            _milliseconds(time, mark=len(sources) > 1),
            " ".join(f"{time['share'][part]:.0%}" for part in PARTS) if time else "",
        )
    return table


def _milliseconds(time: Mapping[str, Any] | None, *, mark: bool) -> str:
    if not time:
        return ""
    parts = "+".join(f"{time['ms_per_step'][part]:.1f}" for part in PARTS)
    return parts + (" (t)" if mark and time["source"] == TIMED else "")


def _acceptance(rows: Sequence[Mapping[str, Any]], title: str) -> Any:
    table = _table(
        f"acceptance, {title}",
        "batch",
        "arm",
        "drafts held up to position 1, 2, ...",
        "heights 0, 1, 2, ...",
        "not drafted, why",
        "length by group",
    )
    for row in rows:
        if row["acceptance_per_position"]:
            by_group = sorted(row["acceptance_length_by_group"].items())
            table.add_row(
                str(row["batch"]),
                row["arm"],
                " ".join(f"{share:.2f}" for share in row["acceptance_per_position"]),
                " ".join(str(count) for count in row["heights"] or []),
                " ".join(f"{reason} {count}" for reason, count in row["off"].items()),
                " ".join(f"{name} {length:.2f}" for name, length in by_group),
            )
    return table


def _groups(rows: Sequence[Mapping[str, Any]], title: str) -> Any:
    names = sorted({name for row in rows for name in row["ratio_to_plain_by_group"] or {}})
    table = _table(
        f"requests of a group against plain, {title} (tokens over the time from sending a request "
        "to its last token)",
        "batch",
        "arm",
        *names,
    )
    compared = (r for r in rows if r["method"] != "plain" and r["ratio_to_plain_by_group"])
    for row in _by_batch(compared, table):
        ratios = row["ratio_to_plain_by_group"]
        table.add_row(
            str(row["batch"]), row["arm"], *(_number(ratios.get(n), "{:.3f}") for n in names)
        )
    return table


def _arms(result: Result) -> Any:
    table = _table("arms", "arm", "start-up s", "peak memory GiB", "engine")
    for label, arm in result.arms.items():
        peak = arm.get("peak_memory_bytes") or {}
        engine = arm.get("engine") or {}
        facts = [
            f"{key}={engine[key]}"
            for key in ("dtype", "device", "threads", "compilation_mode", "async_scheduling")
            if key in engine
        ]
        table.add_row(
            label,
            _number(arm.get("startup_seconds"), "{:.1f}"),
            ", ".join(f"{size / 2**30:.2f} {kind}" for kind, size in peak.items()),
            " ".join(facts),
        )
    return table


def _identity(result: Result, out: Any) -> None:
    if not result.identity:
        return
    different = [entry for entry in result.identity if entry["differing"]]
    if not different:
        out.print("Greedy output: token-identical to plain in every arm and batch size.")
    for entry in different:
        out.print(
            f"{entry['arm']}, batch {entry['batch']}: {len(entry['differing'])} of "
            f"{entry['requests']} outputs differ from plain.",
            markup=False,
        )
        for found in entry["explained"]:
            where = found.get("position_in_timed_pass", found.get("position"))
            out.print(f"  {found['request']}: first at token {where}; {found['verdict']}",
                      markup=False)  # fmt: skip
            for name in ("plain", "arm"):
                if found.get(name):
                    side = found[name]
                    out.print(
                        f"    {name}: wrote {side['token']}; best {side['best']}, second "
                        f"{side['second']}, gap {side['gap']:.2e}",
                        markup=False,
                    )


def _online(result: Result) -> Any:
    from vllm_stairs.bench.online import summary_rows

    table = _table(
        "online: vllm serve driven by vllm bench serve (medians, ms)",
        "requests/s",
        "arm",
        "tokens/s",
        "spread",
        "vs plain",
        "TTFT p50/p90/p99",
        "ITL p50/p90/p99",
        "TPOT p50/p90/p99",
        "accept. length",
    )
    for row in summary_rows(result):
        ratio = row["ratio_to_plain"]
        table.add_row(
            row["request_rate"],
            row["arm"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['spread']:.1%}" if row["repeats"] > 1 else "",
            _ratio(vars(ratio)) if ratio else "",
            *(
                "/".join(_number(row.get(f"p{p}_{name}_ms"), "{:.0f}") for p in (50, 90, 99))
                for name in ("ttft", "itl", "tpot")
            ),
            _number(row["acceptance_length"], "{:.2f}"),
        )
    return table


def _ratio(ratio: Mapping[str, Any] | None) -> str:
    if not ratio:
        return ""
    noise = ratio["noise"]
    if noise is None or not noise:
        return f"{ratio['median']:.3f}"
    return f"{ratio['median']:.3f} +-" + (f"{noise:.1%}" if noise < 1 else "100% or more")


def _percentiles(table: Mapping[str, float] | None) -> str:
    return "/".join(f"{table[key]:.0f}" for key in ("p50", "p90", "p99")) if table else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _table(title: str, *columns: str) -> Any:
    rich = _rich()
    table = rich.table.Table(title=title or None, title_justify="left", box=rich.box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _by_batch(rows: Iterable[Mapping[str, Any]], table: Any) -> Iterator[Mapping[str, Any]]:
    """The rows, the table getting a section for each batch size."""
    last = None
    for row in rows:
        if last not in (None, row["batch"]):
            table.add_section()
        last = row["batch"]
        yield row
