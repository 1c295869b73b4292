"""Ray clusters: an instance of our own, running ones, and every way in which there is none."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from vllm_stairs.placement import cluster
from vllm_stairs.placement.cluster import ClusterError, DraftBundle

NODES = [
    {
        "Alive": True,
        "NodeID": "ab12",
        "NodeName": "first",
        "NodeManagerAddress": "10.0.0.1",
        "NodeManagerHostname": "host-1",
        "Resources": {"CPU": 8.0, "GPU": 4.0},
    },
    {
        "Alive": True,
        "NodeID": "cd34",
        "NodeManagerAddress": "10.0.0.2",
        "NodeManagerHostname": "10.0.0.2",
        "Resources": {"CPU": 2.0},
    },
    {"Alive": False, "NodeID": "ef56", "NodeManagerAddress": "10.0.0.3", "Resources": {}},
]


def error(*args: Any, **kwargs: Any) -> str:
    """What :func:`cluster.connect` says, in one line."""
    with pytest.raises(ClusterError) as raised:
        cluster.connect(*args, **kwargs)
    message = str(raised.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# --------------------------------------------------------------------------- plain functions


def test_amounts() -> None:
    bundle = DraftBundle.of({"CPU": 2, "GPU": 0, "fast": 1}, "there")
    assert bundle == DraftBundle(2, 0, "there", {"fast": 1})
    assert bundle.amounts() == {"CPU": 2.0, "fast": 1.0}


def test_bundles() -> None:
    draft = DraftBundle(cpus=1, gpus=1)
    here = "node:10.0.0.1"
    assert cluster.bundles(draft, None, "10.0.0.1", 0) == [
        {"CPU": 1.0, "GPU": 1.0},
        {here: 0.001},
    ]
    apart, target = cluster.bundles(draft, "10.0.0.2", "10.0.0.1", 4)
    assert apart == {"CPU": 1.0, "GPU": 1.0, "node:10.0.0.2": 0.001}
    assert target == {here: 0.001, "GPU": 4.0}
    groups = cluster.bundles(draft, None, "10.0.0.1", 3, by_ray=True)
    assert groups[cluster.DRAFT_BUNDLE] == {"CPU": 1.0, "GPU": 1.0}
    # vLLM's Ray executor takes one GPU from a bundle, the first on its driver's node.
    assert groups[1:] == [{here: 0.001, "GPU": 1.0}, {"GPU": 1.0}, {"GPU": 1.0}]


@pytest.mark.parametrize("name", ["10.0.0.1", "host-1", "first", "ab12"])
def test_a_node_by_any_name(name: str) -> None:
    assert cluster.find_node(name, NODES) == "10.0.0.1"
    assert cluster.find_node(None, NODES) is None


@pytest.mark.parametrize("name", ["10.0.0.3", "ef56", "host-2", "None"])
def test_no_such_node(name: str) -> None:
    with pytest.raises(ClusterError) as raised:
        cluster.find_node(name, NODES)
    assert f"={name}: no node" in str(raised.value)
    assert "there are 10.0.0.1 (host-1), 10.0.0.2." in str(raised.value)


def test_no_room_says_what_there_is() -> None:
    text = cluster.no_room(DraftBundle(1, 1, "host-1"), 4, NODES, {"CPU": 7.0, "GPU": 0.5})
    assert "wants 1 CPU, 1 GPU on host-1, the target 4 GPU beside it" in text
    assert "free 7 CPU, 0.5 GPU of 10.0.0.1 (host-1): 8 CPU, 4 GPU; 10.0.0.2: 2 CPU, 0 GPU" in text
    assert "10.0.0.3" not in text


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("rpc error: Unauthenticated: InvalidAuthToken", "refuses the token of this process (RAY"),
        ("Token authentication is enabled but no authentication token was found", "refuses the"),
        ("RAY_AUTH_TOKEN_PATH is set but file cannot be opened", "RAY_AUTH_TOKEN_PATH=None: there"),
        ("No node info found matching attributes: ''", "no node on this machine"),
        (
            "Oh.\nVersion mismatch: started with:\n Ray: 2.48",
            "6379: Version mismatch: started with",
        ),
        ("Traceback:\n  somewhere\nOSError: full", "could not be joined: OSError: full"),
    ],
)
def test_sentences(monkeypatch: pytest.MonkeyPatch, said: str, expected: str) -> None:
    for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)
    outer = ConnectionError("Failed to connect")
    outer.__cause__ = RuntimeError(said)
    for error in (RuntimeError(said), outer, said):
        text = cluster.sentence(error, "10.0.0.1:6379")
        assert expected in text
        assert "\n" not in text


def test_gpus_must_differ() -> None:
    cluster.check_gpus_differ(["0", "1"], ["2"])
    cluster.check_gpus_differ([], ["0"])
    with pytest.raises(ClusterError, match="the draft GPU 1, which the target uses"):
        cluster.check_gpus_differ(["0", "1"], ["1"])


# --------------------------------------------------------------------------- refused at once


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert error(cluster.LOCAL).endswith("pip install ray.")


def test_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.52 Ray asks nobody for a token."""
    found = {v: cluster.is_too_old(v) for v in ("2.9.3", "2.51.1", "2.52.0", "2.60.0rc1", "3.0")}
    assert list(found.values()) == [True, True, False, False, False]
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.48.0")
    assert "needs Ray 2.52 or newer" in error(cluster.LOCAL)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("ray://10.0.0.1:10001", "client protocol"),
        ("10.0.0.1", "must be HOST:PORT"),
        ("10.0.0.1:", "must be HOST:PORT"),
        ("10.0.0.1:70000", "must be HOST:PORT"),
        (":6379", "must be HOST:PORT"),
        ("no-such-host.invalid:6379", "cannot be reached"),
    ],
)
def test_addresses(address: str, expected: str) -> None:
    message = error(address)
    assert address in message
    assert expected in message


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # Bound, but it does not listen.
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        assert f"{address} cannot be reached (Connection refused)" in error(address)
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert f"{address} cannot be reached" in error()
        assert time.monotonic() - started < 5


def test_none_runs_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert "No Ray cluster runs on this machine" in error("auto")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1\n")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert "Ray cluster 127.0.0.1:1 cannot be reached" in error()


def test_what_this_machine_alone_cannot_have() -> None:
    assert "fast" in error(cluster.LOCAL, DraftBundle(resources={"fast": 1}))
    assert "=elsewhere" in error(cluster.LOCAL, DraftBundle(node="elsewhere"))
    message = error(cluster.LOCAL, DraftBundle(gpus=2), own_gpus=["3"])
    assert "wants 2 GPU of its own, and the target leaves 1" in message
    assert "asks for nothing" in error(cluster.LOCAL, DraftBundle(cpus=0))


def test_this_machine() -> None:
    assert all(map(cluster.may_be_here, (None, "127.0.0.1", socket.gethostname())))
    interfaces = [address for found in psutil.net_if_addrs().values() for address in found]
    own = [address.address for address in interfaces if address.family == socket.AF_INET]
    assert all(map(cluster.may_be_here, own))
    # The second is for documentation only, no machine's.
    assert not any(map(cluster.may_be_here, ("elsewhere", "192.0.2.1")))


# --------------------------------------------------------------------------- an instance of our own


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    before = dict(os.environ)
    # Engines of other tests in this process may have an instance.
    others, cluster._instance = cluster._instance, None
    os.environ.pop("RAY_AUTH_TOKEN", None)
    # A user's own setting must not open the instance.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    try:
        yield cluster.connect(cluster.LOCAL)
    finally:
        processes = family()
        cluster.stop()
        assert os.environ["RAY_AUTH_MODE"] == "disabled"
        assert "RAY_AUTH_TOKEN" not in os.environ
        os.environ.clear()
        os.environ.update(before)
        cluster._instance = others
        assert not running(processes)


def called(process: psutil.Process) -> str:
    """Its command line in small letters; that of an agent where it has just ended."""
    try:
        return " ".join(process.cmdline()).lower() or "agent"
    except psutil.NoSuchProcess:
        return "agent"


def family(root: int | None = None) -> list[psutil.Process]:
    """The keeper and all that it started."""
    if root is None:
        assert cluster._instance is not None
        root = cluster._instance.process.pid
    keeper = psutil.Process(root)
    return [keeper, *keeper.children(recursive=True)]


def running(processes: list[psutil.Process], patience: float = 20.0) -> list[psutil.Process]:
    """Those that still run after a while."""
    _, alive = psutil.wait_procs(processes, timeout=patience)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def script(code: str, **environment: str) -> Any:
    """What a Python process that starts from here prints as its last line, as JSON."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_it_is_reused(address: str) -> None:
    assert cluster.is_own(address)
    started = time.monotonic()
    assert cluster.connect(cluster.LOCAL, DraftBundle(cpus=2)) == address
    assert time.monotonic() - started < 0.5


BUSY = """
import json
import psutil
from vllm_stairs.placement import cluster
answer, processes = cluster._answer, []
def too_slow_at_first(process, *rest):
    processes.append(process)
    found = answer(process, *rest)
    if len(processes) <= FAILURES:
        raise cluster.ClusterError("Ray could not start: it timed out during startup.")
    return found
cluster._answer = too_slow_at_first
try:
    said = cluster.connect("local")
except cluster.ClusterError as error:
    said = str(error)
print(json.dumps([said, len(processes), len(psutil.Process().children())]))
"""


@pytest.mark.parametrize(
    ("failures", "starts", "says"), [(1, 2, "127.0.0.1:"), (2, 2, "timed out")]
)
def test_a_start_on_a_busy_machine_is_tried_twice(failures: int, starts: int, says: str) -> None:
    said, tried, children = script(BUSY.replace("FAILURES", str(failures)))
    assert says in said
    assert tried == starts
    assert children == (failures < starts), "what was given up was ended"


def test_it_listens_to_this_machine_only(address: str) -> None:
    listening = [
        (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
        for process in family()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert ("127.0.0.1", int(address.rpartition(":")[2])) in listening
    assert {ip for ip, _ in listening} == {"127.0.0.1"}


ACTOR = """
import json, os, signal, time
from vllm_stairs.placement import cluster
before = signal.getsignal(signal.SIGTERM)
cluster.join({address!r})
cluster.join({address!r})
assert signal.getsignal(signal.SIGTERM) is before
import ray
# Memory is one of the custom resources that Ray refuses of an actor.
bundle = cluster.DraftBundle(cpus=2, resources={{"memory": 1e6}})
group = cluster.reserve(bundle)

@ray.remote
class Draft:
    def environment(self):
        return os.environ.get("MARK"), os.environ.get("OMP_NUM_THREADS")

options = bundle.actor_options(group)
draft = Draft.options(**options, runtime_env={{"env_vars": {{"MARK": "here"}}}}).remote()
found = ray.get(draft.environment.remote())
here = cluster.draft_is_here(group)
free = ray.available_resources()["CPU"]
cluster.release(group)
cluster.release(group)
until = time.monotonic() + 30
while (freed := ray.available_resources()["CPU"]) == free and time.monotonic() < until:
    time.sleep(0.1)
cluster.reserve(bundle)
print(json.dumps([found[0], here, free, freed]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""

FREE = """
import json, time, ray
from vllm_stairs.placement import cluster
cluster.join({address!r})
until = time.monotonic() + 30
while True:
    groups = [g["state"] for g in ray.util.placement_group_table().values()]
    free = ray.available_resources()["CPU"]
    if (set(groups) <= {{"REMOVED"}} and free == ray.cluster_resources()["CPU"]):
        break
    if time.monotonic() > until:
        break
    time.sleep(0.1)
print(json.dumps([groups, free, ray.cluster_resources()["CPU"]]))
"""


def test_a_process_that_inherits_joins_and_places(address: str) -> None:
    """What it releases is free again, and what it holds when it is killed."""
    run = subprocess.run(
        [sys.executable, "-c", ACTOR.format(address=address)],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr[-3000:]
    mark, here, free, freed = json.loads(run.stdout.splitlines()[-1])
    assert mark == "here"
    assert here
    groups, freed_again, everything = script(FREE.format(address=address))
    assert set(groups) == {"REMOVED"}
    assert freed == freed_again == everything == free + 2


def test_it_counts_as_a_running_cluster(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same checks as on any: of an address that was given, or of the environment."""
    assert cluster.connect(address) == address
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster.connect(None, DraftBundle(node="127.0.0.1")) == address
    message = error(None, DraftBundle(cpus=1000, resources={"fast": 1}), timeout=1)
    assert "no room for the draft: it wants 1000 CPU, 1 fast; free " in message
    assert "16 CPU, 0 GPU, 0 fast" in message
    message = error(address, DraftBundle(node="elsewhere"))
    assert "stairs_draft_node=elsewhere: no node of the Ray cluster; there are 127.0.0.1" in message


@pytest.mark.parametrize("token", ["0" * 64, None])
def test_wrong_token(address: str, monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    if token is None:
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    else:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    message = error(address)
    assert f"Ray cluster {address} refuses the token of this process" in message
    assert ("RAY_AUTH_MODE is not token" in message) == (token is None)


WAITS = """
import signal
from vllm_stairs.placement import cluster
signal.signal(signal.SIGINT, signal.default_int_handler)  # A background job's is ignored.
cluster.connect({address!r}, cluster.DraftBundle(cpus=1000), timeout=120)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_front_end_that_waits_for_room_is_ended(address: str, how: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS.format(address=address)], stderr=subprocess.DEVNULL
    )
    helper: list[psutil.Process] = []
    while not helper:
        assert process.poll() is None
        time.sleep(0.1)
        helper = psutil.Process(process.pid).children()
    time.sleep(3)  # It joins the cluster, and then it waits.
    process.send_signal(how)
    assert process.wait(30) == -how
    assert not running(helper, patience=10)
    groups, freed, everything = script(FREE.format(address=address))
    assert set(groups) == {"REMOVED"}
    assert freed == everything


GPUS = """
import json, os
from vllm_stairs.placement import cluster
bundle = cluster.DraftBundle(gpus=1)
address = cluster.connect("local", bundle, target_gpus=["0"], own_gpus=["4", "6"])
assert cluster.connect(address, bundle, target_gpus=["0"]) == address
cluster.join(address)
import ray

def drafts_gpus(target):
    group = cluster.reserve(bundle, target_gpus=target)
    task = ray.remote(cluster._gpus_of_this_task).options(**bundle.actor_options(group))
    ids = ray.get(task.remote())
    cluster.release(group)
    return ids

ids, beside = drafts_gpus([]), drafts_gpus(["0"])
said = []
for gpus, timeout in ((beside, 30), (["0", "1"], 1)):
    try:
        cluster.reserve(bundle, target_gpus=gpus, timeout=timeout)
    except cluster.ClusterError as error:
        said.append(str(error))
groups = cluster.reserve(cluster.DraftBundle(cpus=1), target_gpus=["4", "6"], by_ray=True)
print(json.dumps([ids, beside, said, groups.bundle_specs]))
"""


def test_gpus_as_ray_counts_them() -> None:
    """Ray's books only: there is no such device on this machine."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, "-c", GPUS], env=environment, capture_output=True, text=True, timeout=180
    )
    assert run.returncode == 0, run.stderr[-3000:]
    ids, beside, said, groups = json.loads(run.stdout.splitlines()[-1])
    assert ids[0] in ("4", "6")
    assert f"the draft GPU {beside[0]}, which the target uses" in said[0]
    assert "the target 2 GPU beside it; free" in said[1]
    assert [bundle.get("GPU", 0) for bundle in groups] == [0, 1, 1]


SERVER = """
import json, os, sys, time
from vllm_stairs.placement import cluster
address = cluster.connect("local")
print(json.dumps([address, cluster._instance.process.pid, str(cluster._instance.folder)]))
sys.stdout.flush()
if len(sys.argv) > 1:
    cluster.join(address)
    import ray
    cluster.reserve(cluster.DraftBundle())
    ray.get(ray.remote(lambda: os.getpid()).remote())
    print("joined", flush=True)
time.sleep(600 if "wait" in sys.argv else 0)
"""


def server(*argv: str) -> tuple["subprocess.Popen[str]", list[psutil.Process], str]:
    """A process with an instance, all processes of the instance, and its folder."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, *argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    _, keeper, folder = json.loads(process.stdout.readline())
    found = family(keeper)
    if argv:
        assert process.stdout.readline() == "joined\n"
        found = family(keeper)
        assert any("ray::" in " ".join(p.cmdline()) for p in found)
    return process, found, folder


def test_kill_9_leaves_nothing() -> None:
    process, found, folder = server("join", "wait")
    process.kill()
    process.wait()
    assert not running(found)
    assert not os.path.exists(folder)


FORK = """
import json, os, time
from vllm_stairs.placement import cluster
cluster.connect("local")
child = os.fork()
if child:
    print(json.dumps([cluster._instance.process.pid, child]), flush=True)
time.sleep(600)
"""


def test_a_forked_child_does_not_hold_the_instance() -> None:
    """Engines of offline use are forked from their front end, where there are GPUs."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", FORK], env=environment, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    keeper, child = json.loads(process.stdout.readline())
    found = family(keeper)
    process.kill()
    process.wait()
    try:
        assert psutil.pid_exists(child)
        assert not running(found)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_killed_keeper_leaves_no_draft() -> None:
    process, found, folder = server("join", "wait")
    found[0].kill()
    try:
        # Ray's two agents notice it after a minute, the others at once, if they get to run.
        deadline = time.monotonic() + 45
        while left := [line for line in map(called, running(found, 0)) if "agent" not in line]:
            assert time.monotonic() < deadline, left
            time.sleep(0.5)
    finally:
        process.kill()
        process.wait()
        for agent in running(found, patience=0):
            agent.kill()
        shutil.rmtree(folder)


@pytest.mark.full
def test_a_driver_outlives_its_cluster() -> None:
    """It is a worker of the target. Ray would end it after a minute without an answer."""
    process, found, folder = server("join", "wait")
    try:
        found[0].kill()
        time.sleep(80)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


def test_an_ordinary_end_leaves_nothing() -> None:
    process, found, folder = server()
    assert process.wait(60) == 0
    assert not running(found, patience=1)
    assert not os.path.exists(folder)
