"""The end of an arm's processes."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

psutil = pytest.importorskip("psutil")

PARENT = """
import os, signal, subprocess, sys, time
from vllm_stairs.bench.environment import guard

# Like an arm: it ends when its input does, if it runs at all.
arm = subprocess.Popen(
    [sys.executable, "-c", "import sys; sys.stdin.read()"],
    stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
)
guard(arm)
os.killpg(arm.pid, signal.SIGSTOP)
print(arm.pid, flush=True)
time.sleep(600)
"""


def test_a_stopped_arm_does_not_outlive_a_benchmark_that_was_killed():
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert parent.stdout is not None
    arm = psutil.Process(int(parent.stdout.readline()))
    deadline = time.monotonic() + 30
    while arm.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
        time.sleep(0.05)
    assert arm.status() == psutil.STATUS_STOPPED
    parent.kill()
    parent.communicate(timeout=30)
    psutil.wait_procs([arm], timeout=30)
    assert not arm.is_running() or arm.status() == psutil.STATUS_ZOMBIE
