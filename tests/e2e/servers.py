"""Real servers: ``vllm serve`` on a free port of this machine."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


def launch(log_path: Path, *arguments: str | Path) -> tuple["subprocess.Popen[bytes]", str]:
    """Begin to serve; the caller ends the process.

    Args:
        log_path: what the server prints.
        arguments: of ``vllm serve``, model first, without host and port.

    Returns:
        The process, and the base URL that it will answer at (:func:`wait_until_healthy`).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    not_the_users = ("OMP_NUM_THREADS", "LD_PRELOAD", "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS")
    env = {k: v for k, v in os.environ.items() if k not in not_the_users}
    env |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_LOG_STATS_INTERVAL": "1",
    }
    command = [Path(sys.executable).parent / "vllm", "serve", *arguments]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=log,
            env=env,
        )
    return process, f"http://127.0.0.1:{port}"


def wait_until_healthy(process: "subprocess.Popen[bytes]", url: str, log_path: Path) -> None:
    """Wait for a server; fails with the end of its log if it does not come up."""
    deadline = time.monotonic() + 400
    while True:
        assert process.poll() is None, log_path.read_text()[-4000:]
        assert time.monotonic() < deadline, log_path.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
            return
        except OSError:
            time.sleep(0.5)
