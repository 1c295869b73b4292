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
from typing import Any, Protocol

LIBRARY = "libiomp5"
BINDING = "VLLM_CPU_OMP_THREADS_BIND"
RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"
_OURS = "VLLM_STAIRS_THREADS_BIND"
"""What we set the binding to: an engine started from here later may need another."""
DRAFT_BINDING = "VLLM_STAIRS_DRAFT_THREADS"
"""The cores that were set aside for a dedicated draft, for the worker that starts it."""
DRAFT_SHARE = 8
"""A dedicated draft has one core of so many: about what it weighs beside its target."""
TARGET_SHARE = 0.65
"""What a target takes at most of a CPU machine's free memory beside a dedicated draft."""
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
    os.environ["LD_PRELOAD"] = _preloading(library)
    return True


def _preloading(library: Path) -> str:
    """``LD_PRELOAD`` with the library before what is there already."""
    others = os.environ.get("LD_PRELOAD")
    return f"{library}:{others}" if others else str(library)


def bind_threads(workers: int, draft: int = 0, *, processes: bool = True) -> str | None:
    """Bind the threads of vLLM's workers where its own choice serves badly.

    Args:
        workers: on this machine.
        draft: cores for a draft in a process of its own (:func:`draft_environment`).
        processes: the workers are processes still to be started; else they are left as they are.

    Returns:
        The cores, in vLLM's notation; None where the choice is vLLM's or the user's.
    """
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

    cpus = get_allowed_cpu_list()
    given = os.environ.get(BINDING)
    if given == os.environ.get(_OURS):
        given = None
    if RESERVED in os.environ or given is not None:
        taken = cpu_ids(given or "")
        cpus = [cpu for cpu in cpus if cpu.id not in taken]
        own = draft_cores(cpus, draft) if taken else []
        _set(DRAFT_BINDING, ",".join(map(str, own)) if draft else None)
        return None
    own = draft_cores(cpus, draft)
    _set(DRAFT_BINDING, ",".join(map(str, own)) if draft else None)
    if not processes:
        return None
    binding = thread_binding(cpus, workers, own)
    for variable in (BINDING, _OURS):
        _set(variable, binding)
    return binding


def _set(variable: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value


def default_draft_cores() -> int:
    """Cores of a dedicated draft where the user names no number."""
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

    return max(1, len(_one_of_each_core(get_allowed_cpu_list())) // DRAFT_SHARE)


def draft_environment() -> dict[str, str]:
    """What the process of a dedicated draft on this machine needs in its environment.

    The OpenMP library, and threads on cores that :func:`bind_threads` set aside: the settings that
    vLLM gives its own worker processes. Empty where nothing was set aside: on GPUs, and where the
    draft is on another machine nothing of it is true.
    """
    binding = os.environ.get(DRAFT_BINDING)
    if binding is None:
        return {}
    environment = {}
    library = find_openmp()
    if is_preloaded():
        environment["LD_PRELOAD"] = os.environ["LD_PRELOAD"]
    elif library is not None:
        environment["LD_PRELOAD"] = _preloading(library)
    if binding:
        environment["OMP_NUM_THREADS"] = str(len(binding.split(",")))
        if LIBRARY in environment.get("LD_PRELOAD", ""):
            environment["KMP_AFFINITY"] = f"granularity=fine,explicit,proclist=[{binding}]"
            environment["KMP_BLOCKTIME"] = "5"
            environment["KMP_TPAUSE"] = "0"
        else:
            environment["OMP_PLACES"] = f"{{{binding}}}"
            environment["OMP_PROC_BIND"] = "true"
    return environment


def cpu_ids(binding: str) -> set[int]:
    """The logical CPUs that vLLM's notation names: ``0-3|4,6`` -> 0, 1, 2, 3, 4, 6."""
    ids: set[int] = set()
    for part in binding.replace("|", ",").split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit():
            ids.update(range(int(first), int(last if last.isdigit() else first) + 1))
    return ids


def _one_of_each_core(cpus: Iterable[LogicalCPU]) -> list[LogicalCPU]:
    """One logical CPU of each core, by node: two threads of a core share its arithmetic."""
    core_of = {(cpu.numa_node, cpu.physical_core): cpu for cpu in cpus}
    return [core_of[place] for place in sorted(core_of)]


def draft_cores(cpus: Iterable[LogicalCPU], draft: int) -> list[int]:
    """One logical CPU of each of the last ``draft`` cores; fewer where there are fewer."""
    return sorted(cpu.id for cpu in _one_of_each_core(cpus)[-draft:]) if draft else []


def thread_binding(
    cpus: Iterable[LogicalCPU], workers: int, draft: Iterable[int] = ()
) -> str | None:
    """Cores for each worker, where vLLM's own choice serves badly.

    Args:
        cpus: the logical CPUs that this process may use.
        workers: on this machine; each gets cores that lie together.
        draft: logical CPUs of the draft's own cores, which are left to it, unless there would be
            fewer cores than workers.

    Returns:
        vLLM's notation: cores by comma, workers by bar; None where vLLM's own choice is fine, or
        there are fewer cores than workers.
    """
    everything = _one_of_each_core(cpus)
    theirs = set(draft)
    left = [cpu for cpu in everything if cpu.id not in theirs]
    if len(left) < workers:
        left = everything
    cores = [cpu.id for cpu in left]
    nodes = len({cpu.numa_node for cpu in left})
    each = len(cores) // workers
    if not each or (not theirs and nodes >= workers and each >= FEW_CORES):
        return None
    own = [cores[worker * each : (worker + 1) * each] for worker in range(workers)]
    return "|".join(",".join(map(str, sorted(part))) for part in own)


def free_memory() -> Any:
    """vLLM's ``MemoryNodeInfo`` of the memory that this process's workers check."""
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

    return get_memory_node_info(get_allowed_cpu_list()[0].numa_node)


def memory_share(asked: float, available: int, total: int, workers: int = 1) -> float:
    """The share of a machine's memory for a worker of a target with a dedicated draft beside it.

    Args:
        asked: vLLM's ``gpu_memory_utilization``, which on CPU is a share of all memory.
        available: bytes that are free now, while the draft is being loaded.
        total: bytes of the machine.
        workers: of the target, on this machine.
    """
    return min(asked, TARGET_SHARE * available / total / workers)
