"""Large blocks that are freed and taken again cost no page faults."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, sys
from vllm_stairs.heap import keep_freed_memory

libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size = 40 << 20  # Above what glibc ever keeps by itself.

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
step()
before = faults()
for _ in range(10):
    step()
print(kept, faults() - before)
"""


def run(how: str, **variables: str) -> tuple[str, int]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    printed = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout.split()
    return printed[0], int(printed[1])


def test_what_was_freed_is_taken_again() -> None:
    kept, faults = run("keep")
    if kept != "True":
        pytest.skip("another C library")
    assert faults < 100
    _, bare = run("leave")
    assert bare > 10 * faults


def test_what_the_user_has_set_stands() -> None:
    kept, _ = run("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False"
