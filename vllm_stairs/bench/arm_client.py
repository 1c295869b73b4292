"""The parent's side of an arm: starts its process and speaks with it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_stairs.bench.arms import Arm
from vllm_stairs.bench.environment import end_process_group, guard
from vllm_stairs.bench.errors import BenchError

PROBE = "vllm_stairs.bench.probe.Probe"


class ArmClient:
    """One arm, alive in a process of its own."""

    def __init__(
        self, arm: Arm, engine: Mapping[str, Any], environment: Mapping[str, str], log: Path
    ) -> None:
        """Start the process; :meth:`wait_until_ready` waits for the engine.

        Args:
            arm: what to serve.
            engine: arguments of ``LLM``, the same for every arm.
            environment: of the process, the same for every arm.
            log: file for what the process prints.
        """
        self.arm = arm
        self.log = log
        self.facts: dict[str, Any] = {}
        log.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        self._log_file = log.open("ab")
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm_stairs.bench.arm_process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        theirs.close()
        self._guard = guard(self._process)
        self._frozen = False
        self._socket = ours
        self._stream = ours.makefile("rw", encoding="utf-8")
        arguments = {**engine, "worker_extension_cls": PROBE, "disable_log_stats": False}
        if arm.speculative_config:
            arguments["speculative_config"] = arm.speculative_config
        self._send({"do": "start", "engine": arguments})

    def wait_until_ready(self) -> dict[str, Any]:
        """Wait for the engine; its facts, with the start-up time since the process began."""
        self.facts = self._receive("start")
        self.facts["startup_seconds_with_process"] = time.perf_counter() - self._started
        return self.facts

    def call(self, name: str, **arguments: Any) -> Any:
        """Run one command of :class:`vllm_stairs.bench.arm_process.ArmEngine`."""
        self._thaw()
        self._send({"do": name, **arguments})
        return self._receive(name)

    def freeze(self) -> None:
        """Stop the arm's processes until its next command: idle ones look for work for a while,
        at the cost of whoever is measured."""
        self._frozen = True
        os.killpg(self._process.pid, signal.SIGSTOP)

    def _thaw(self) -> None:
        if self._frozen:
            os.killpg(self._process.pid, signal.SIGCONT)
            self._frozen = False

    def close(self) -> None:
        """End the process and everything it started."""
        with contextlib.suppress(OSError, ValueError, BenchError):  # Not if it has died.
            self._thaw()
            self._send({"do": "stop"})
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        end_process_group(self._process)
        self._guard.kill()
        self._guard.communicate()
        self._log_file.close()

    def _send(self, command: dict[str, Any]) -> None:
        try:
            self._stream.write(json.dumps(command) + "\n")
            self._stream.flush()
        except BrokenPipeError:
            raise self._died("its process") from None

    def _receive(self, doing: str) -> Any:
        try:
            line = self._stream.readline()
        except ConnectionResetError:
            line = ""
        if not line:
            raise self._died(doing)
        answer = json.loads(line)
        if "error" in answer:
            raise BenchError(
                f"arm {self.arm.label!r} failed in {doing}: {self._cause(answer['error'])} "
                f"(log: {self.log})"
            )
        return answer["ok"]

    def _cause(self, message: str) -> str:
        """vLLM reports "see root cause above" for what its engine's process printed."""
        if "root cause above" not in message:
            return message
        with contextlib.suppress(OSError):
            for line in reversed(self.log.read_text(errors="replace").splitlines()):
                text = line.rpartition("] ")[2].strip()
                name, colon, _ = text.partition(": ")
                if colon and name.endswith(("Error", "Exception")) and "root cause" not in text:
                    return text
        return message

    def _died(self, doing: str) -> BenchError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        return BenchError(
            f"arm {self.arm.label!r} died in {doing} (exit status {self._process.returncode}, "
            f"log: {self.log})"
        )
