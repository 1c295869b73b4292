"""What stairs needs on the CPU platform.

Speculative decoding is many short forward passes, and GNU OpenMP pays for each parallel region.
Intel's ``libiomp5``, which vLLM's CPU build installs and asks for in its documentation, must be
in ``LD_PRELOAD`` before a worker process starts; workers are spawned, so their parent can set it.
"""

import os
import sys
from pathlib import Path

LIBRARY = "libiomp5"


def find_openmp() -> Path | None:
    """The ``libiomp5.so`` that the wheel ``intel-openmp`` put into this environment."""
    for folder in (Path(sys.prefix) / "lib", Path(sys.base_prefix) / "lib"):
        candidate = folder / f"{LIBRARY}.so"
        if candidate.is_file():
            return candidate
    return None


def is_preloaded() -> bool:
    """Whether processes started from here get the library."""
    return LIBRARY in os.environ.get("LD_PRELOAD", "")


def preload_openmp() -> bool:
    """See to it that the worker processes get ``libiomp5``.

    Returns:
        Whether they do. An engine in this very process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``)
        is out of reach: there the variable must be set before Python starts.
    """
    if is_preloaded():
        return True
    library = find_openmp()
    if library is None or os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "0":
        return False
    others = os.environ.get("LD_PRELOAD")
    os.environ["LD_PRELOAD"] = f"{library}:{others}" if others else str(library)
    return True
