"""Ray clusters: a running one that is joined, or an instance started for one server.

Three processes take part:

* the front end, where the options are checked (:func:`connect`): Ray is not initialised in it;
* a helper process (:mod:`vllm_stairs.placement.keeper`), which checks a running cluster and ends,
  or starts an instance and holds it for as long as the front end lives;
* the worker that drives the draft (:func:`join`, :func:`reserve`): a Ray driver. Its job owns the
  placement group and the actor, so Ray removes both when this process is gone, however it went.

An instance of our own listens on the loopback device only and asks for a token that nobody but the
server's own processes has. Both are in the environment that these inherit.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_stairs.versions import RAY_OLDEST

NAMESPACE = "vllm-stairs"
"""Of the jobs in Ray."""

LOCAL = "local"
"""The address that stands for an instance of the server's own."""

DRAFT_BUNDLE = 0
"""Index of the draft's bundle in the placement group; the target's follow."""

ADDRESS_VARIABLE = "RAY_ADDRESS"
_LOOPBACK = "127.0.0.1"
# Ray's switch for systems where it keeps to the loopback device ("cluster" here means: machines).
_CLUSTER_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# Ray ends a driver, which is a worker of the target here, when the cluster has not answered for
# a minute.
_GIVE_UP_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"
_NEVER = 1_000_000
# In what Ray says if its own processes do not come up in 30 seconds.
_TOO_SLOW = "timed out during startup"
# So that its node can be found again: Ray wants resources of a bundle to be above nothing.
_A_LITTLE = 0.001


class ClusterError(ValueError):
    """What is wrong with Ray or the cluster, in one sentence."""


@dataclass(frozen=True)
class DraftBundle:
    """What the draft takes of a cluster.

    Attributes:
        cpus: CPUs as Ray counts them, logical.
        gpus: GPUs; a fraction shares one.
        node: address, host name, Ray's node name or node id; None: any, the target's preferred.
        resources: custom resources and their amounts.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    node: str | None = None
    resources: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, resources: Mapping[str, float], node: str | None = None) -> "DraftBundle":
        """From amounts by name, ``CPU`` and ``GPU`` among them."""
        custom = {k: v for k, v in resources.items() if k not in ("CPU", "GPU")}
        return cls(resources.get("CPU", 0.0), resources.get("GPU", 0.0), node, custom)

    def amounts(self) -> dict[str, float]:
        """All that is above nothing, by Ray's names."""
        everything = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return {name: float(amount) for name, amount in everything.items() if amount > 0}

    def actor_options(self, group: Any) -> dict[str, Any]:
        """Arguments of ``ActorClass.options`` that put an actor into the draft's bundle.

        Nothing else runs in the bundle, which holds the custom resources: of the actor Ray refuses
        some of them (``memory``).

        Args:
            group: of :func:`reserve`.
        """
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=DRAFT_BUNDLE
            ),
        }


# --------------------------------------------------------------------------- the front end


@dataclass
class _Instance:
    """An instance of our own, held by its keeper."""

    process: "subprocess.Popen[bytes]"
    address: str
    folder: Path
    ours: dict[str, str]
    """Variables that the server's processes inherit from here."""
    before: dict[str, str | None]
    """What they were."""
    owner: int
    """Process id of the front end."""

    def stop(self, patience: float = 10.0) -> None:
        """End the instance and wait for it, ``patience`` seconds at most."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()  # What Ray started dies with it.
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        for name, value in self.before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_instance: _Instance | None = None


def connect(
    address: str | None = None,
    bundle: DraftBundle | None = None,
    *,
    target_gpus: Sequence[str] = (),
    own_gpus: Sequence[str] = (),
    by_ray: bool = False,
    gpu_variable: str = "CUDA_VISIBLE_DEVICES",
    timeout: float = 30.0,
) -> str:
    """See to it that there is a cluster with room for the draft, before anything else is started.

    Args:
        address: ``HOST:PORT`` of a cluster's GCS; ``auto``: the one of ``ray start`` here;
            ``local``: an instance of our own, which lives as long as this process. None: what the
            environment variable ``RAY_ADDRESS`` says, else ``local``.
        bundle: what the draft takes; the default is one CPU.
        target_gpus: ids of the GPUs that the target holds on this machine.
        own_gpus: ids of the GPUs that an instance of our own has: those that the target leaves.
        by_ray: see :func:`reserve`.
        gpu_variable: names them to processes.
        timeout: seconds to wait for free resources.

    Returns:
        ``HOST:PORT``, for :func:`join`.

    Raises:
        ClusterError: Ray is missing, cluster unreachable, wrong token, unknown node, no room.
    """
    bundle = bundle or DraftBundle()
    if importlib.util.find_spec("ray") is None:
        raise ClusterError(
            "stairs_placement=dedicated places the draft by Ray, which is not installed: "
            "pip install ray."
        )
    version = importlib.metadata.version("ray")
    if is_too_old(version):
        raise ClusterError(
            f"stairs_placement=dedicated needs Ray {RAY_OLDEST} or newer, the first that asks for "
            f"a token, and {version} is installed: pip install 'ray>={RAY_OLDEST}'."
        )
    if not bundle.amounts():
        raise ClusterError("stairs_draft_resources asks for nothing: name a GPU or a CPU at least.")
    wanted = address or os.environ.get(ADDRESS_VARIABLE) or LOCAL
    if wanted == LOCAL:
        _check_own(bundle, own_gpus)
        return _own_instance(bundle, own_gpus, gpu_variable)
    if wanted == "auto":
        wanted = _found_here()
    _check_reachable(wanted)
    request = {
        "address": wanted,
        "bundle": bundle.amounts(),
        "node": bundle.node,
        "target_gpus": list(target_gpus),
        "by_ray": by_ray,
        "timeout": timeout,
    }
    with tempfile.TemporaryFile() as log:
        process = _start_keeper(request, _impatient(os.environ), log)
        with process:
            return _answer(process, log, wanted, timeout + 60)


def stop() -> None:
    """End the instance of our own, if there is one. Runs at exit by itself."""
    global _instance
    instance, _instance = _instance, None
    if instance is not None and instance.owner == os.getpid():  # No child that was forked.
        instance.stop()


def is_own(address: str) -> bool:
    """Whether an address is that of an instance of our own, on the loopback device."""
    return address.rpartition(":")[0] == _LOOPBACK and _keeps_to_loopback()


def is_too_old(version: str) -> bool:
    """Whether this version of Ray lacks something that is needed."""
    found, oldest = (
        tuple(map(int, re.findall(r"\d+", text)[:2])) for text in (version, RAY_OLDEST)
    )
    return found < oldest


def may_be_here(node: str | None) -> bool:
    """Whether a node that is called so may be this machine.

    Args:
        node: address or host name; None: any. By Ray's names no machine is recognised.
    """
    if node is None or node == socket.gethostname():
        return True
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.bind((node, 0))  # Names are looked up; only this machine's addresses can be bound.
        return True
    return False


def _keeps_to_loopback() -> bool:
    return os.environ.get(_CLUSTER_VARIABLE) == "0"


def _check_own(bundle: DraftBundle, gpus: Sequence[str]) -> None:
    """What an instance on this machine alone cannot have."""
    if bundle.resources:
        raise ClusterError(
            f"stairs_draft_resources asks for {_listed(bundle.resources)}, which only a running "
            "Ray cluster can have: start one with these resources and name it "
            "(--stairs-ray-address or RAY_ADDRESS)."
        )
    if not may_be_here(bundle.node):
        raise ClusterError(
            f"stairs_draft_node={bundle.node}: without a running Ray cluster there is this machine "
            "only: name the cluster (--stairs-ray-address or RAY_ADDRESS), or leave the node out."
        )
    if bundle.gpus > len(gpus):
        raise ClusterError(
            f"The draft wants {bundle.gpus:g} GPU of its own, and the target leaves "
            f"{len(gpus)} of this machine's: use fewer GPUs for the target, "
            "--stairs-placement colocated, or a Ray cluster with more (--stairs-ray-address)."
        )


def _own_instance(bundle: DraftBundle, gpus: Sequence[str], gpu_variable: str) -> str:
    """Start an instance of our own, or take the one that this process has."""
    global _instance
    if _instance is not None and _instance.process.poll() is None:
        os.environ.update(_instance.ours)
        return _instance.address
    stop()
    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        _CLUSTER_VARIABLE: "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    environment = {
        **os.environ,
        **ours,
        # No workers in advance: the one actor brings an environment of its own.
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
        # Ray gives way to everything else; a target waits for its draft.
        "RAY_worker_niceness": "0",
        # Plain vLLM has nobody who kills processes when memory is short.
        "RAY_memory_monitor_refresh_ms": "0",
    }
    environment.pop(ADDRESS_VARIABLE, None)
    if gpus:
        environment[gpu_variable] = ",".join(gpus)
    try:
        process, address, folder = _start_instance(bundle, len(gpus), environment)
    except ClusterError as error:
        if _TOO_SLOW not in str(error):
            raise
        # The machine was busy (with other servers that start, say).
        process, address, folder = _start_instance(bundle, len(gpus), environment)
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    _instance = _Instance(process, address, folder, ours, before, os.getpid())
    # Finalizers run in reverse order, so after those of an engine that is made later.
    weakref.finalize(sys.modules[__name__], stop)
    return address


def _start_instance(
    bundle: DraftBundle, gpus: int, environment: Mapping[str, str]
) -> tuple["subprocess.Popen[bytes]", str, Path]:
    """Start a helper that starts an instance: the process, the instance's address, its folder."""
    folder = Path(tempfile.mkdtemp(prefix="stairs-", dir=_short_folder()))
    request = {"address": LOCAL, "cpus": bundle.cpus, "gpus": gpus, "folder": str(folder)}
    try:
        with open(folder / "keeper.log", "w+b") as log:
            process = _start_keeper(request, environment, log)
            try:
                return process, _answer(process, log, LOCAL, 120), folder
            except BaseException:
                process.kill()
                process.wait()
                raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _let_go() -> None:
    """In a forked child: the instance ends with its owner, not with the last who has the pipe."""
    if _instance is not None and _instance.process.stdin is not None:
        _instance.process.stdin.close()


os.register_at_fork(after_in_child=_let_go)


def _short_folder() -> str | None:
    """Where Ray's sockets go: their paths may have 107 characters, 80 of which Ray takes."""
    folder = tempfile.gettempdir()
    return "/tmp" if len(folder) > 12 and os.access("/tmp", os.W_OK) else folder


def _impatient(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which Ray gives up on a cluster in seconds, not minutes."""
    return {
        "RAY_gcs_server_request_timeout_seconds": "15",
        "RAY_NUM_REDIS_GET_RETRIES": "3",
        **environment,
    }


def _start_keeper(
    request: Mapping[str, Any], environment: Mapping[str, str], log: Any
) -> "subprocess.Popen[bytes]":
    """Start the helper process.

    It is in a session of its own: what a terminal or a supervisor signals to the server's group
    must not take the cluster from under workers that are still shutting down.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "vllm_stairs.placement.keeper", json.dumps(request)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=dict(environment),
        start_new_session=True,
    )


def _answer(process: "subprocess.Popen[bytes]", log: Any, address: str, timeout: float) -> str:
    """Wait for the helper's line: the address, or what is wrong."""
    assert process.stdout is not None
    overdue = threading.Timer(timeout, process.kill)
    overdue.start()
    try:
        line = process.stdout.readline()
    finally:
        overdue.cancel()
    try:
        answer = json.loads(line)
    except ValueError:
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()
        raise ClusterError(sentence(said[-1] if said else "no answer", address)) from None
    if "error" in answer:
        raise ClusterError(answer["error"])
    found: str = answer["address"]
    return found


def _found_here() -> str:
    """The address of the cluster that ``ray start`` started on this machine.

    From the file that it leaves; Ray itself would also take an instance of another server.
    """
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        address = (Path(folder) / "ray" / "ray_current_cluster").read_text().strip()
    except OSError:
        address = ""
    if not address:
        raise ClusterError(
            "No Ray cluster runs on this machine: start one (ray start --head), name one "
            "(--stairs-ray-address HOST:PORT), or leave the address out."
        )
    return address


def _check_reachable(address: str) -> None:
    """That somebody listens there: Ray itself takes minutes to say so."""
    if "://" in address:
        raise ClusterError(
            f"Ray address {address}: Ray's client protocol cannot place a draft: give HOST:PORT of "
            "the cluster's GCS (the port is usually 6379), from a machine of the cluster."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ClusterError(
            f"Ray address {address!r}: must be HOST:PORT of a cluster's GCS (the port is usually "
            "6379), 'auto' or 'local'."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise ClusterError(
            f"Ray cluster {address} cannot be reached ({error.strerror or error}): check the "
            "address (--stairs-ray-address or RAY_ADDRESS) and that the cluster runs."
        ) from None


# --------------------------------------------------------------------------- the driver


def join(address: str) -> None:
    """Become a driver of the cluster in this process; nothing where Ray is initialised already.

    Args:
        address: of :func:`connect`.

    Raises:
        ClusterError: in one sentence.
    """
    import ray

    if ray.is_initialized():
        joined = ray.get_runtime_context().gcs_address
        if joined != address:
            raise ClusterError(
                f"This process is connected to the Ray cluster {joined} already and cannot join "
                f"{address}: name that one (--stairs-ray-address), or disconnect first."
            )
        return
    os.environ.setdefault(_GIVE_UP_VARIABLE, str(_NEVER))
    _take_environment(own=is_own(address))
    with _signals_kept():
        try:
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=True,
                logging_level=logging.WARNING,
            )
        except Exception as error:
            raise ClusterError(sentence(error, address)) from error


def _take_environment(own: bool) -> None:
    """Let Ray read its variables where it was imported before they were set.

    That is so with an engine in the front end's own process.
    Set: ``ray_constants.ENABLE_RAY_CLUSTER``, without which Ray takes 127.0.0.1 for this machine's
    address on the network. Retired by: Ray leaving loopback addresses as they are.

    Args:
        own: the cluster is an instance of our own.
    """
    from ray._private import ray_constants

    if own:
        ray_constants.ENABLE_RAY_CLUSTER = False
    core: Any = importlib.import_module("ray._raylet")
    core.Config.initialize("")
    core.AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM, which is vLLM's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def reserve(
    bundle: DraftBundle,
    *,
    target_gpus: Sequence[str] = (),
    by_ray: bool = False,
    timeout: float = 30.0,
) -> Any:
    """Reserve one placement group for the deployment. It ends with this process's job.

    Args:
        bundle: the draft's, at index :data:`DRAFT_BUNDLE`.
        target_gpus: ids of the GPUs that the target holds on this node.
        by_ray: the target's workers are Ray's too, one bundle each; else one bundle stands for
            them all, where Ray counts this node's GPUs.
        timeout: seconds to wait for free resources.

    Returns:
        A Ray ``PlacementGroup`` that is ready.

    Raises:
        ClusterError: unknown node, no room, or the draft's GPU is one of the target's.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    nodes = ray.nodes()
    here = ray.get_runtime_context().get_node_id()
    this = next(node for node in nodes if node["NodeID"] == here)
    count = len(target_gpus) if by_ray or this["Resources"].get("GPU") else 0
    group = placement_group(
        bundles(
            bundle,
            find_node(bundle.node, nodes),
            this["NodeManagerAddress"],
            count,
            by_ray=by_ray,
        ),
        strategy="PACK",
    )
    try:
        if not group.wait(timeout):
            raise ClusterError(no_room(bundle, count, nodes, ray.available_resources()))
        if target_gpus and bundle.gpus and not by_ray and draft_is_here(group):
            task = ray.remote(_gpus_of_this_task).options(**bundle.actor_options(group))
            check_gpus_differ(target_gpus, ray.get(task.remote()))
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def _gpus_of_this_task() -> list[str]:
    """Runs in the draft's bundle, whose GPUs are settled with the group."""
    import ray

    return [str(gpu) for gpu in ray.get_runtime_context().get_accelerator_ids().get("GPU", [])]


def release(group: Any, patience: float = 2.0) -> None:
    """Give a placement group back, and with it the actor in it. Never raises.

    Args:
        group: of :func:`reserve`.
        patience: seconds to wait for it. Ray itself waits for a cluster that is gone.
    """
    import ray
    from ray.util.placement_group import remove_placement_group

    def remove() -> None:
        with contextlib.suppress(Exception):
            remove_placement_group(group)

    if ray.is_initialized():
        thread = threading.Thread(target=remove, daemon=True)
        thread.start()
        thread.join(patience)


def draft_is_here(group: Any) -> bool:
    """Whether the draft's bundle is on the node of this process."""
    import ray
    from ray.util import placement_group_table

    nodes = placement_group_table(group)["bundles_to_node_id"]
    return bool(nodes[DRAFT_BUNDLE] == ray.get_runtime_context().get_node_id())


# --------------------------------------------------------------------------- plain functions


def bundles(
    draft: DraftBundle, node: str | None, here: str, target_gpus: int, *, by_ray: bool = False
) -> list[dict[str, float]]:
    """The bundles of the deployment's placement group.

    Args:
        draft: what the draft takes.
        node: address of the node that the draft is to be on; None: any.
        here: address of this process's node; a bundle on it makes it the preferred one.
        target_gpus: GPUs that the target holds.
        by_ray: one bundle for each of them, as vLLM's Ray executor wants it.

    Returns:
        Amounts by resource, for each bundle; the draft's is the first.
    """
    own = draft.amounts()
    if node is not None:
        own[f"node:{node}"] = _A_LITTLE
    first = {f"node:{here}": _A_LITTLE}
    if not target_gpus:
        return [own, first]
    if by_ray:
        return [own, {**first, "GPU": 1.0}, *({"GPU": 1.0} for _ in range(target_gpus - 1))]
    return [own, {**first, "GPU": float(target_gpus)}]


def find_node(wanted: str | None, nodes: Iterable[Mapping[str, Any]]) -> str | None:
    """The address of the node that is meant.

    Args:
        wanted: address, host name, Ray's node name or node id; None: none in particular.
        nodes: of ``ray.nodes()``.

    Raises:
        ClusterError: no living node is called so; names those there are.
    """
    if wanted is None:
        return None
    alive = [node for node in nodes if node.get("Alive", True)]
    for node in alive:
        names = ("NodeManagerAddress", "NodeManagerHostname", "NodeName", "NodeID")
        if wanted in [node.get(name) for name in names]:
            return str(node["NodeManagerAddress"])
    there = ", ".join(sorted(_called(node) for node in alive)) or "none"
    raise ClusterError(
        f"stairs_draft_node={wanted}: no node of the Ray cluster; there are {there}."
    )


def no_room(
    bundle: DraftBundle,
    target_gpus: int,
    nodes: Iterable[Mapping[str, Any]],
    free: Mapping[str, float],
) -> str:
    """The sentence about a cluster without room.

    Args:
        bundle: what the draft takes.
        target_gpus: GPUs that the target holds of it.
        nodes: of ``ray.nodes()``.
        free: of ``ray.available_resources()``.
    """
    names = sorted({*bundle.amounts(), "CPU", "GPU"})
    there = "; ".join(
        f"{_called(node)}: {_listed({k: node['Resources'].get(k, 0) for k in names})}"
        for node in nodes
        if node.get("Alive", True)
    )
    target = f", the target {target_gpus} GPU beside it" if target_gpus else ""
    on = f" on {bundle.node}" if bundle.node else ""
    return (
        f"The Ray cluster has no room for the draft: it wants {_listed(bundle.amounts())}{on}"
        f"{target}; free {_listed({k: free.get(k, 0) for k in names})} of {there}: free some, or "
        "ask for less (stairs_draft_resources, stairs_draft_node)."
    )


def check_gpus_differ(target: Iterable[str], draft: Iterable[str]) -> None:
    """Stop where Ray gave the draft a GPU that the target, which Ray did not start, uses.

    Args:
        target: ids of the target's GPUs, on the same node.
        draft: ids of the draft's.

    Raises:
        ClusterError: in one sentence.
    """
    both = sorted(set(target) & set(draft))
    if both:
        raise ClusterError(
            f"Ray gave the draft GPU {', '.join(both)}, which the target uses without Ray's "
            "knowing: start Ray on this machine with CUDA_VISIBLE_DEVICES naming only GPUs that "
            "the target leaves, or leave the cluster out (--stairs-ray-address local)."
        )


def sentence(error: BaseException | str, address: str) -> str:
    """What Ray said, as one sentence for the user.

    Args:
        error: with what caused it, or the last line of a log.
        address: as the user gave it.
    """
    said: list[str] = []
    is_token = False
    cause: BaseException | str | None = error
    while cause is not None:
        said.append(str(cause).strip() or type(cause).__name__)
        if isinstance(cause, str):
            break
        is_token |= type(cause).__name__ == "AuthenticationError"
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    everything = " ".join(" ".join(said).split())
    low = everything.lower()
    if "ray_auth_token_path is set" in low:
        return (
            f"RAY_AUTH_TOKEN_PATH={os.environ.get('RAY_AUTH_TOKEN_PATH')}: there is no token in "
            "that file, or it cannot be read."
        )
    if is_token or "invalidauthtoken" in low or "authentication token" in low:
        mode = os.environ.get("RAY_AUTH_MODE")
        return (
            f"Ray cluster {address} refuses the token of this process"
            f"{'' if mode == 'token' else ' (RAY_AUTH_MODE is not token, so it shows none)'}: set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's."
        )
    if "no node info found" in low or "no raylet" in low:
        return (
            f"Ray cluster {address} has no node on this machine: start one here (ray start "
            f"--address={address}), or run the server on a machine of the cluster."
        )
    if "version mismatch" in low:
        return f"Ray cluster {address}: {everything[low.index('version mismatch') :][:300]}"
    doing = "could not start" if address == LOCAL else f"at {address} could not be joined"
    # Ray puts tracebacks into messages; what counts is at their end.
    return f"Ray {doing}: {said[-1].splitlines()[-1].strip()[:300]}"


def _called(node: Mapping[str, Any]) -> str:
    address, host = node.get("NodeManagerAddress"), node.get("NodeManagerHostname")
    return f"{address} ({host})" if host and host != address else f"{address}"


def _listed(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())
