"""What stairs needs on the CPU platform, set before vLLM starts its worker processes.

Speculative decoding is many short forward passes, and GNU OpenMP pays for each parallel region.
Intel's ``libiomp5``, which vLLM's CPU build installs and asks for in its documentation, must be
in ``LD_PRELOAD`` before a worker process starts; workers are spawned, so their parent can set it.

vLLM binds a worker's threads to the cores of one NUMA node and leaves one core per worker to its
other processes. On a machine of few cores that is much of it, and a node with several workers it
refuses. There we bind the threads ourselves.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

LIBRARY = "libiomp5"
BINDING = "VLLM_CPU_OMP_THREADS_BIND"
RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"
_OURS = "VLLM_STAIRS_THREADS_BIND"
"""What we set the binding to: an engine started from here later may need another."""
FEW_CORES = 8
"""Cores of a worker below which the one that vLLM reserves is missed: an eighth of the speed."""


class LogicalCPU(Protocol):
    """As in vLLM's ``LogicalCPUInfo``."""

    id: int
    physical_core: int
    numa_node: int


def find_openmp() -> Path | None:
    """The ``libiomp5.so`` that the wheel ``intel-openmp`` put into this environment."""
    for folder in (Path(sys.prefix) / "lib", Path(sys.base_prefix) / "lib"):
        candidate = folder / f"{LIBRARY}.so"
        if candidate.is_file():
            return candidate
    return None


def in_process() -> bool:
    """Whether the engine core runs in this very process, whose libraries and threads are set."""
    return os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "0"


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
    if library is None or in_process():
        return False
    others = os.environ.get("LD_PRELOAD")
    os.environ["LD_PRELOAD"] = f"{library}:{others}" if others else str(library)
    return True


def bind_threads(workers: int) -> str | None:
    """Bind the threads of vLLM's workers where its own choice serves badly.

    Args:
        workers: on this machine.

    Returns:
        The cores, in vLLM's notation; None where the choice is vLLM's or the user's.
    """
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

    given = os.environ.get(BINDING)
    if RESERVED in os.environ or (given is not None and given != os.environ.get(_OURS)):
        return None
    binding = thread_binding(get_allowed_cpu_list(), workers)
    for variable in (BINDING, _OURS):
        if binding is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = binding
    return binding


def thread_binding(cpus: Iterable[LogicalCPU], workers: int) -> str | None:
    """Cores for each worker, where vLLM's own choice serves badly.

    Args:
        cpus: the logical CPUs that this process may use.
        workers: on this machine; each gets cores that lie together.

    Returns:
        vLLM's notation: cores by comma, workers by bar; None where vLLM's own choice is fine, or
        there are fewer cores than workers.
    """
    # One logical CPU of each core: two threads of a core share its arithmetic.
    core_of = {(cpu.numa_node, cpu.physical_core): cpu.id for cpu in cpus}
    cores = [core_of[place] for place in sorted(core_of)]
    nodes = len({node for node, _ in core_of})
    each = len(cores) // workers
    if not each or (nodes >= workers and each >= FEW_CORES):
        return None
    own = [cores[worker * each : (worker + 1) * each] for worker in range(workers)]
    return "|".join(",".join(map(str, sorted(part))) for part in own)
