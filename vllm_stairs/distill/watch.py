"""Ends what a process leaves behind: vLLM's own processes outlive a parent that is killed.

They would keep the memory that the same command, given again, needs. Run beside the process that
starts vLLM, as ``python -m vllm_stairs.distill.watch PID``.
"""

import contextlib
import os
import subprocess
import sys
import time

SECONDS = 1.0
"""Between two looks."""


def watched() -> "subprocess.Popen[bytes]":
    """Start a process that looks after this one; ending it ends that."""
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the others.
    )


def watch(parent: int) -> None:
    """Wait for the end of the parent, then kill the descendants that it had.

    Args:
        parent: id of the process that has started this one.
    """
    import psutil  # One of vLLM's requirements.

    found: set[psutil.Process] = set()
    while os.getppid() == parent:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= set(psutil.Process(parent).children(recursive=True))
        time.sleep(SECONDS)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):  # Nor is another one of its id killed.
            if process.pid != os.getpid():
                process.kill()


if __name__ == "__main__":
    watch(int(sys.argv[1]))
