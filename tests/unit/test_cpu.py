"""Cores for workers."""

import os
from dataclasses import dataclass

import pytest

from vllm_stairs.engine import cpu


@dataclass
class Cpu:
    id: int
    physical_core: int
    numa_node: int = 0


def machine(cores: int, *, nodes: int = 1, threads: int = 1) -> list[Cpu]:
    """Numbered as Linux does: the second threads of all cores after the first ones."""
    return [
        Cpu(thread * cores + core, core, core * nodes // cores)
        for thread in range(threads)
        for core in range(cores)
    ]


@pytest.mark.parametrize(
    ("cpus", "workers", "expected"),
    [
        (machine(2), 1, "0,1"),
        (machine(2), 2, "0|1"),
        (machine(7), 2, "0,1,2|3,4,5"),
        # One thread of each core.
        (machine(4, threads=2), 2, "4,5|6,7"),
        # vLLM's choice: it leaves one core of many, and finds a node for each worker.
        (machine(8), 1, None),
        (machine(32, nodes=2), 2, None),
        # It would refuse: one node for two workers.
        (machine(16), 2, ",".join(map(str, range(8))) + "|" + ",".join(map(str, range(8, 16)))),
        # Too few: vLLM has its own message.
        (machine(1), 2, None),
    ],
)
def test_threads_are_bound_where_vllm_would_serve_badly(
    cpus: list[Cpu], workers: int, expected: str | None
) -> None:
    assert cpu.thread_binding(cpus, workers) == expected


@pytest.mark.parametrize("variable", [cpu.BINDING, cpu.RESERVED])
def test_the_users_choice_stands(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv(cpu.BINDING, raising=False)
    monkeypatch.setenv(variable, "1")
    assert cpu.bind_threads(1) is None


def test_our_own_choice_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (cpu.BINDING, cpu.RESERVED):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setattr(
        "vllm.utils.cpu_resource_utils.get_allowed_cpu_list", lambda: machine(4), raising=True
    )
    assert cpu.bind_threads(1) == "0,1,2,3"
    assert cpu.bind_threads(2) == "0,1|2,3" == os.environ[cpu.BINDING]
    assert cpu.bind_threads(8) is None
    assert cpu.BINDING not in os.environ
