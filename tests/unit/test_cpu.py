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


@pytest.mark.parametrize(
    ("cpus", "workers", "draft", "expected"),
    [
        (machine(2), 1, 1, ("0", [1])),
        (machine(4), 1, 1, ("0,1,2", [3])),
        (machine(5), 2, 1, ("0,1|2,3", [4])),
        (machine(4, threads=2), 1, 2, ("4,5", [6, 7])),
        # vLLM's choice would take the draft's cores too.
        (machine(32, nodes=2), 2, 4, (None, [28, 29, 30, 31])),
        # Too few for all: the draft shares.
        (machine(2), 2, 1, ("0|1", [1])),
        (machine(1), 1, 1, ("0", [0])),
    ],
)
def test_cores_of_a_dedicated_draft(
    cpus: list[Cpu], workers: int, draft: int, expected: tuple[str | None, list[int]]
) -> None:
    own = cpu.draft_cores(cpus, draft)
    binding = cpu.thread_binding(cpus, workers, own)
    assert own == expected[1]
    if expected[0] is None:
        assert binding is not None
        assert not cpu.cpu_ids(binding) & set(own)
    else:
        assert binding == expected[0]


def test_cpu_ids() -> None:
    assert cpu.cpu_ids("0-3|5, 7-8") == {0, 1, 2, 3, 5, 7, 8}
    assert cpu.cpu_ids("auto") == cpu.cpu_ids("nobind") == set()


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for variable in (cpu.BINDING, cpu.RESERVED, cpu.DRAFT_BINDING, "LD_PRELOAD"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setattr("vllm.utils.cpu_resource_utils.get_allowed_cpu_list", lambda: machine(4))
    return monkeypatch


def test_environment_of_a_dedicated_draft(four_cores: pytest.MonkeyPatch) -> None:
    assert cpu.default_draft_cores() == 1
    cpu.bind_threads(1)
    assert cpu.draft_environment() == {}
    assert cpu.bind_threads(1, draft=2) == "0,1"
    four_cores.setenv("LD_PRELOAD", f"/lib/{cpu.LIBRARY}.so:other.so")
    assert cpu.draft_environment() == {
        "LD_PRELOAD": f"/lib/{cpu.LIBRARY}.so:other.so",
        "OMP_NUM_THREADS": "2",
        "KMP_AFFINITY": "granularity=fine,explicit,proclist=[2,3]",
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
    }
    four_cores.setattr(cpu, "find_openmp", lambda: None)
    four_cores.delenv("LD_PRELOAD")
    assert cpu.draft_environment() == {
        "OMP_NUM_THREADS": "2",
        "OMP_PLACES": "{2,3}",
        "OMP_PROC_BIND": "true",
    }
    cpu.bind_threads(1)
    assert cpu.draft_environment() == {}


def test_a_draft_beside_an_engine_in_this_process(four_cores: pytest.MonkeyPatch) -> None:
    assert cpu.bind_threads(1, draft=1, processes=False) is None
    assert cpu.BINDING not in os.environ
    assert os.environ[cpu.DRAFT_BINDING] == "3"


@pytest.mark.parametrize(("given", "left"), [("0-1", "3"), ("0-2", "3"), ("0-3", ""), ("auto", "")])
def test_a_draft_takes_what_the_user_leaves(
    four_cores: pytest.MonkeyPatch, given: str, left: str
) -> None:
    four_cores.setenv(cpu.BINDING, given)
    assert cpu.bind_threads(1, draft=1) is None
    assert os.environ[cpu.BINDING] == given
    assert os.environ[cpu.DRAFT_BINDING] == left
    assert "KMP_AFFINITY" not in cpu.draft_environment() or left


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


def test_a_target_leaves_memory_to_a_draft_beside_it() -> None:
    assert cpu.memory_share(0.92, available=20, total=24) == pytest.approx(0.65 * 20 / 24)
    assert cpu.memory_share(0.92, 20, 24, workers=2) == pytest.approx(0.65 * 20 / 24 / 2)
    assert cpu.memory_share(0.3, available=20, total=24) == 0.3
