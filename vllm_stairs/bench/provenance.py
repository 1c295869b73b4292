"""Where a result came from: versions, commit, machine, threads, weights, command."""

import datetime
import hashlib
import json
import os
import platform
import shlex
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_stairs.bench.errors import BenchError
from vllm_stairs.engine.contract import distribution_version

_FULL_HASH_LIMIT = 8 * 2**30
_EDGE = 2**20

_RECORDED_ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_PLUGINS",
    "CUDA_VISIBLE_DEVICES",
    "KMP_BLOCKTIME",
    "LD_PRELOAD",
)


def collect(models: dict[str, str]) -> dict[str, Any]:
    """Everything that is needed to judge and to repeat a run.

    Args:
        models: role ("target", "draft", ...) to path or hub id.
    """
    described = {name: describe_model(name) for name in set(models.values())}
    program = Path(sys.argv[0])
    module = program.name == "__main__.py"
    command = ["python", "-m", "vllm_stairs.bench"] if module else [program.name]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([*command, *sys.argv[1:]]),
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
        "environment": {k: os.environ[k] for k in _RECORDED_ENVIRONMENT if k in os.environ},
        "models": {role: described[name] for role, name in models.items()},
    }


def versions() -> dict[str, str]:
    """Versions of what has a say in the figures."""
    found = {"python": platform.python_version()}
    for name in ("vllm", "torch", "transformers", "vllm-stairs", "intel-openmp", "numpy"):
        version = distribution_version(name)
        if version is not None:
            found[name] = version
    if "vllm-stairs" not in found:
        from vllm_stairs.versions import __version__

        found["vllm-stairs"] = __version__
    return found


def commit() -> str | None:
    """The git commit of this package's checkout, marked if it has changes; None outside one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # Not another repository's.
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """Processor, cores, memory, load and accelerators of this machine."""
    described: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_bytes": _memory_bytes(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
    }
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        described["accelerators"] = [line.strip() for line in listing.splitlines() if line.strip()]
    except (OSError, subprocess.CalledProcessError):
        described["accelerators"] = []
    return described


def model_folder(name: str) -> Path | None:
    """The folder of a model: the path itself, or the hub cache's copy of an id; else None."""
    path = Path(name)
    if path.is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    except Exception:
        return None


def check_model(name: str, role: str) -> None:
    """One line if a model that is meant to be a folder is not there or is no model."""
    path = Path(name)
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") != 1 or path.exists()
    parent_exists = name.count("/") == 1 and Path(name.split("/")[0]).is_dir()
    if (looks_like_a_path or parent_exists) and not (path / "config.json").is_file():
        raise BenchError(f"{role} model {name!r}: no such folder with a config.json in it")


def describe_model(name: str) -> dict[str, Any]:
    """Name, architecture and a hash of the weights (None where they are not at hand)."""
    folder = model_folder(name)
    described: dict[str, Any] = {"name": name, "weights_hash": None, "files": {}}
    if folder is None:
        return described
    config = read_config(folder)
    described["architecture"] = (config.get("architectures") or [None])[0]
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digest = hashlib.sha256()
    for file in files:
        hashed = file_hash(file)
        described["files"][file.name] = hashed
        digest.update(hashed.encode())
    if files:
        described["weights_hash"] = digest.hexdigest()
    return described


def file_hash(path: Path) -> str:
    """SHA-256 of a file; of its size, first and last MiB where it is larger than 8 GiB."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _FULL_HASH_LIMIT:
            while block := file.read(8 * _EDGE):
                digest.update(block)
            return digest.hexdigest()
        digest.update(str(size).encode() + file.read(_EDGE))
        file.seek(-_EDGE, os.SEEK_END)
        digest.update(file.read(_EDGE))
        return "edges-" + digest.hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """The model's ``config.json``; its text part where the model has several."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise BenchError(f"cannot read {folder / 'config.json'}: {error}") from None
    return {**config, **config.get("text_config", {})}


def parameter_counts(folder: Path) -> dict[str, int] | None:
    """Elements per tensor of a model, from the headers of its safetensors files."""
    counts: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                elements = 1
                for extent in tensor["shape"]:
                    elements *= extent
                counts[name] = elements
    return counts or None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
