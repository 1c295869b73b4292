"""The command line of the benchmark. Heavy imports happen inside the commands."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_stairs.bench.errors import BenchError

DESCRIPTION = "Measure ways of serving a target against each other; see docs/benchmarks.md."

QUICK_TARGET = "models/smollm2-135m-instruct"
QUICK_OUTPUT = Path("results/quick.json")

RUN_EPILOG = """\
arms: plain | draft_model:k=4[,table=1-4:4/5-16:2] | ngram:k=4[,max=4,min=2] |
      stairs:k=4[,layout=expanded,...]; [name@]method[:key=value,...],
      draft=PATH overrides --draft, spec.KEY=VALUE is passed to vLLM as it stands.

example: vllm-stairs bench run --target models/smollm2-135m-instruct \\
           --draft models/smollm2-135m-instruct-draft --dtype float32 \\
           --arm plain --arm draft_model:k=2 --arm stairs:k=2 \\
           --limit 24 --output-tokens 96 --batch-sizes 1 4 16 --output results/run.json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vllm_stairs.bench``."""
    parser = argparse.ArgumentParser(prog="python -m vllm_stairs.bench", description=DESCRIPTION)
    _add_commands(parser)
    args = parser.parse_args(argv)
    return int(args.func(args))


def add_parser(subparsers: Any) -> None:
    """Register ``bench`` as a sub-command of ``vllm-stairs``."""
    _add_commands(
        subparsers.add_parser(
            "bench", help="measure, compare, plot, replay", description=DESCRIPTION
        )
    )


def _add_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    raw = argparse.RawDescriptionHelpFormatter

    run = commands.add_parser(
        "run", help="measure arms on the same prompts", epilog=RUN_EPILOG, formatter_class=raw
    )
    run.add_argument("--arm", action="append", metavar="ARM", help="repeatable; see below")
    _add_run_arguments(run)
    run.set_defaults(func=_guarded(_run))

    sweep = commands.add_parser(
        "sweep", help="the paper's sweep over the assistant's batch: plain and stairs K = 1..8"
    )
    sweep.add_argument("--heights", type=int, nargs="+", default=list(range(1, 9)), metavar="K")
    sweep.add_argument("--stock", action="store_true", help="sweep draft_model beside it")
    _add_run_arguments(sweep)
    sweep.set_defaults(func=_guarded(_sweep))

    quick = commands.add_parser("quick", help="a first impression on the demo pair")
    quick.add_argument("--target", default=QUICK_TARGET)
    quick.add_argument("--draft", help="default: TARGET-draft if it is there, else the target")
    quick.add_argument("--compiled", action="store_true", help="fairer to plain, starts slower")
    quick.add_argument("--output", type=Path, default=QUICK_OUTPUT)
    quick.set_defaults(func=_guarded(_quick))

    show = commands.add_parser("show", help="print the tables of a result again")
    show.add_argument("result", type=Path)
    show.set_defaults(func=_guarded(_show))

    compare = commands.add_parser(
        "compare", help="two results side by side; exit status 1 if a ratio fell or is missing"
    )
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.add_argument("--tolerance", type=float, default=0.05, metavar="SHARE")
    compare.add_argument(
        "--force", action="store_true", help="although prompts, models or arguments differ"
    )
    compare.set_defaults(func=_guarded(_compare))

    plot = commands.add_parser("plot", help="figures of a result, PNG and SVG")
    plot.add_argument("result", type=Path)
    plot.add_argument("--folder", type=Path, help="default: beside the result")
    plot.set_defaults(func=_guarded(_plot))

    replay = commands.add_parser("replay", help="score heights and policies on a record")
    replay.add_argument("record", type=Path, help="of bench run --record")
    replay.add_argument(
        "--policy",
        action="append",
        metavar="POLICY",
        help="fixed:K, threshold:P[:K], product:P[:K], heuristic[:START[:K]], gain[:K], auto[:K]; "
        "repeatable; default: the paper's sweep, fixed:1 to fixed:8 (or the record's height)",
    )
    replay.add_argument(
        "--cost",
        default="record",
        metavar="record|FILE",
        help="times in the record, a cost model (JSON) or a result of bench run",
    )
    replay.add_argument("--batch-sizes", type=int, nargs="+", default=[1], metavar="N")
    replay.add_argument(
        "--dedicated",
        type=float,
        metavar="MS",
        help="the draft has a device of its own, with a hand-over of MS milliseconds a step",
    )
    replay.add_argument(
        "--overlap",
        choices=("auto", "off"),
        default="auto",
        help="with --dedicated: whether the draft writes ahead while the target verifies",
    )
    replay.add_argument("--output", type=Path, help="also write the scores as JSON")
    replay.set_defaults(func=_guarded(_replay))


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--target", required=True, metavar="MODEL", help="path or id of the target")
    add("--draft", metavar="MODEL", help="path or id of the draft")
    add("--prompts", default="spec-bench", metavar="SOURCE",
        help="spec-bench (240 prompts, in the package), human-eval, FILE.jsonl, FILE")  # fmt: skip
    add("--groups", nargs="+", default=[], metavar="GROUP", help="default: all groups")
    add("--limit", type=int, default=36, help="prompts, an equal share of each group")
    add(
        "--by-group",
        action="store_true",
        help="one group after the other, each to its end, instead of a mixture",
    )
    add("--all-turns", action="store_true", help="whole conversations, not first turns")
    add("--skip-long", action="store_true", help="leave prompts out that do not fit")
    add("--seed", type=int, default=0)
    add("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], metavar="N")
    add("--temperatures", type=float, nargs="+", default=[0.0], metavar="T", help="0: greedy")
    add("--repeats", type=int, default=3)
    add("--turns", type=int, default=1, metavar="N",
        help="cut each pass into N parts, between which the arms take turns")  # fmt: skip
    add("--output-tokens", type=int, default=96, help="per request, the same for all")
    add("--stop-at-eos", action="store_true", help="let the end-of-text token end an answer")
    add("--dtype", default="auto")
    add("--eager", action="store_true", help="no compilation; not for headline figures")
    add("--max-model-len", type=int)
    add("--tensor-parallel-size", type=int, default=1)
    add("--kv-cache-gib", type=float, metavar="GIB", help="per arm; default on a CPU: 1")
    add("--engine", action="append", default=[], metavar="KEY=VALUE",
        help="further argument of vLLM's LLM, for every arm alike; repeatable")  # fmt: skip
    add("--no-profile", action="store_true", help="leave the profiled passes out")
    add("--sequential", action="store_true", help="one engine at a time (less memory)")
    add("--record", type=Path, metavar="FILE", help="also write a record for bench replay")
    add("--record-height", type=int, default=8, metavar="K")
    add("--online", action="store_true", help="vllm serve driven by vllm bench serve")
    add("--request-rates", type=float, nargs="+", default=[], metavar="R", help="per second; inf")
    add("--output", type=Path, default=Path("results/bench.json"), help="result file")
    add("--resume", action="store_true", help="go on with an interrupted run")
    add("--overwrite", action="store_true")


def _guarded(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Turn errors that the user can act on into one line and exit status 2."""

    def guarded(args: argparse.Namespace) -> int:
        try:
            return command(args)
        except BenchError as error:
            line = str(error)
        except OSError as error:
            line = f"{error.strerror or error}"
            if error.filename is not None:
                line = f"{str(error.filename)!r}: {line}"
        print(f"vllm-stairs bench: error: {line}", file=sys.stderr)
        return 2

    return guarded


def _run(args: argparse.Namespace) -> int:
    from vllm_stairs.bench.arms import default_arms

    return _measure(args, args.arm or default_arms(args.draft))


def _sweep(args: argparse.Namespace) -> int:
    from vllm_stairs.bench.arms import sweep_arms

    if not args.draft:
        raise BenchError("a sweep needs --draft")
    return _measure(args, sweep_arms(args.heights, stock=args.stock))


def _measure(args: argparse.Namespace, arms: Sequence[str]) -> int:
    from vllm_stairs.bench.settings import Settings

    settings = Settings(
        target=args.target,
        draft=args.draft,
        arms=tuple(arms),
        prompts=args.prompts,
        groups=tuple(args.groups),
        by_group=args.by_group,
        limit=args.limit,
        all_turns=args.all_turns,
        skip_long=args.skip_long,
        seed=args.seed,
        batches=tuple(args.batch_sizes),
        temperatures=tuple(args.temperatures),
        repeats=args.repeats,
        turns=args.turns,
        output_tokens=args.output_tokens,
        stop_at_eos=args.stop_at_eos,
        dtype=args.dtype,
        eager=args.eager,
        max_model_len=args.max_model_len,
        tensor_parallel_size=args.tensor_parallel_size,
        kv_cache_gib=args.kv_cache_gib,
        engine=tuple(_engine_option(text) for text in args.engine),
        profile=not args.no_profile,
        online=args.online,
        request_rates=tuple(args.request_rates),
    )
    return _execute(
        settings,
        args.output,
        resume=args.resume,
        overwrite=args.overwrite,
        sequential=args.sequential,
        record=args.record,
        record_height=args.record_height,
    )


def _execute(settings: Any, output: Path, **options: Any) -> int:
    from vllm_stairs.bench import report
    from vllm_stairs.bench.run import Run

    with report.Progress() as progress:
        run = Run(settings, output, progress, **options)
        try:
            result = run.execute()
        except KeyboardInterrupt:
            kept = len(run.result.measurements) + len(run.result.online)
            progress.note(f"interrupted; {kept} measurements kept in {output} (--resume goes on)")
            return 130
    report.show(result)
    report.console().print(f"Result: {output}", markup=False)
    return 0


def _quick(args: argparse.Namespace) -> int:
    from vllm_stairs.bench.settings import Settings

    if not Path(args.target).is_dir():
        raise BenchError(f"no model {args.target!r}: `make demo` prepares the demo pair")
    beside = args.target.rstrip("/") + "-draft"
    draft = args.draft or (beside if Path(beside).is_dir() else args.target)
    settings = Settings(
        target=args.target,
        draft=draft,
        arms=("plain", "stairs:k=2"),
        groups=("chat", "qa", "math_reasoning"),
        limit=3,
        batches=(1,),
        repeats=2,
        output_tokens=32,
        dtype="float32",
        eager=not args.compiled,
        max_model_len=2048,
        kv_cache_gib=1.0,
        profile=False,
    )
    if args.output != QUICK_OUTPUT and args.output.exists():
        _check_quick(args.output, settings.as_dict())
    return _execute(settings, args.output, overwrite=True, together=True)


def _check_quick(path: Path, settings: dict[str, Any]) -> None:
    """Raise unless the file is another quick run's: only such a file may be overwritten."""
    from vllm_stairs.bench import results

    def kind(of: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in of.items() if k not in ("target", "draft", "eager")}

    try:
        found = results.with_defaults(results.load(path).settings)
        quick = kind(found) == kind(settings)
    except BenchError:
        quick = False
    if not quick:
        raise BenchError(f"{str(path)!r} exists and is no result of bench quick: name another")


def _show(args: argparse.Namespace) -> int:
    from vllm_stairs.bench import report, results

    report.show(results.load(args.result))
    return 0


def _compare(args: argparse.Namespace) -> int:
    from vllm_stairs.bench import compare, report, results

    changes = compare.compare(
        results.load(args.before), results.load(args.after), args.tolerance, force=args.force
    )
    report.show_changes(changes, args.tolerance)
    return int(any(change.failed for change in changes))


def _plot(args: argparse.Namespace) -> int:
    from vllm_stairs.bench import plot, results

    found = results.load(args.result)
    folder = args.folder or args.result.with_suffix("")
    if folder == args.result:
        raise BenchError(f"{str(folder)!r} has no suffix to take off: give --folder")
    for path in plot.plot(found, folder):
        print(path)
    return 0


def _replay(args: argparse.Namespace) -> int:
    from vllm_stairs.bench import costs, policies, record, replay, report, results

    if args.output:
        inputs = [args.record] if args.cost == "record" else [args.record, Path(args.cost)]
        for path in inputs:
            if results.same_file(args.output, path):
                raise BenchError(f"--output would overwrite an input: {str(path)!r}")
        results.check_writable(args.output, "--output")
    found = record.load(args.record)
    if args.cost == "record":
        if found.measured is None:
            raise BenchError(f"{str(args.record)!r} has no times of decode steps: give --cost FILE")
        model = found.measured
    else:
        model = costs.load(Path(args.cost))
    if min(args.batch_sizes) < 1:
        raise BenchError("--batch-sizes must be whole numbers of at least 1")
    dedicated = None
    if args.dedicated is not None:
        from vllm_stairs.bench.dedicated import Dedicated

        dedicated = Dedicated(args.dedicated, args.overlap == "auto")
    texts = args.policy or [f"fixed:{k}" for k in range(1, min(8, found.height) + 1)]
    scored = []
    for batch in args.batch_sizes:
        # A policy learns: every batch size gets fresh ones.
        chosen = [policies.parse(text, height=found.height, costs=model) for text in texts]
        scored.append(replay.compare(found, chosen, model, batch, dedicated))
    report.show_scores(scored, model.source)
    if args.output:
        document = {
            "record": str(args.record),
            "cost_model": model.as_dict(),
            "scores": [score.as_dict() for plain, scores in scored for score in (plain, *scores)],
        }
        args.output.write_text(results.dumps(document))
    return 0


def _engine_option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise BenchError(f"--engine {text!r}: expected KEY=VALUE, KEY an argument of vLLM's LLM")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
