"""The helper process of :mod:`vllm_stairs.placement.cluster`: checks a cluster, or holds one.

Run with one argument, a JSON object; writes one JSON line, ``{"address": ...}`` or
``{"error": ...}``, to standard output. It ends with standard input, that is, when the front end is
gone, however it went, and so does an instance that it starts. If this process is killed, the kernel
kills what Ray started with it.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

from vllm_stairs.placement.cluster import (
    LOCAL,
    NAMESPACE,
    ClusterError,
    DraftBundle,
    release,
    reserve,
    sentence,
)

_SLOTS = 16
"""CPUs that an instance counts: a number for Ray's books only. Threads are bound elsewhere."""
_OBJECT_STORE = 80 << 20
"""Bytes, near Ray's least: drafts are small enough to travel in the messages."""


def main() -> int:
    """Serve the one request."""
    request: Mapping[str, Any] = json.loads(sys.argv[1])
    answer = os.dup(1)
    os.dup2(2, 1)  # Whatever else is printed is for the log.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    own = request["address"] == LOCAL
    answered = threading.Event()
    if not own:
        threading.Thread(target=_end_with_the_front_end, args=(answered,), daemon=True).start()
    try:
        reply = {"address": _start(request) if own else _check(request)}
    except ClusterError as error:
        reply = {"error": str(error)}
    except Exception as error:
        reply = {"error": sentence(error, request["address"])}
    answered.set()
    with contextlib.suppress(OSError):
        os.write(answer, json.dumps(reply).encode() + b"\n")
    os.close(answer)
    if own and "address" in reply:
        sys.stdin.buffer.read()
    if "ray" in sys.modules:
        import ray

        ray.shutdown()
    if own:
        shutil.rmtree(request["folder"], ignore_errors=True)
    return 0


def _end_with_the_front_end(answered: threading.Event) -> None:
    """Wait no longer for room in a cluster that nobody wants any more.

    Args:
        answered: set when the answer is about to be written.
    """
    os.read(0, 1)
    if not answered.is_set():
        os._exit(1)  # Ray takes back what this process has reserved.


def _start(request: Mapping[str, Any]) -> str:
    """Start an instance on this machine; returns its address."""
    import ray

    ray.init(
        address=LOCAL,
        namespace=NAMESPACE,
        num_cpus=max(_SLOTS, int(request["cpus"]) + 1),
        num_gpus=int(request["gpus"]),
        object_store_memory=_OBJECT_STORE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        _temp_dir=request["folder"],
    )
    return str(ray.get_runtime_context().gcs_address)


def _check(request: Mapping[str, Any]) -> str:
    """Join a running cluster and reserve for a moment what the server will need."""
    import ray

    ray.init(
        address=request["address"],
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    bundle = DraftBundle.of(request["bundle"], request["node"])
    group = reserve(
        bundle,
        target_gpus=request["target_gpus"],
        by_ray=request["by_ray"],
        timeout=request["timeout"],
    )
    release(group)
    return str(ray.get_runtime_context().gcs_address)


if __name__ == "__main__":
    sys.exit(main())
