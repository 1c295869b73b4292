"""What a dedicated draft needs around it, settled before anything is started.

Cluster, GPUs and the placement group where vLLM's Ray executor shares it. The cluster itself:
:mod:`vllm_stairs.placement.cluster`.
"""

import os
from typing import Any

from vllm_stairs.config import StairsOptions
from vllm_stairs.placement import cluster
from vllm_stairs.placement.cluster import ClusterError, DraftBundle


def draft_bundle(options: StairsOptions) -> DraftBundle:
    """What the draft takes of the cluster: as given, else a GPU, or a share of the cores."""
    from vllm.platforms import current_platform

    from vllm_stairs.engine import cpu

    resources = options.draft_resources
    if resources is None:
        if current_platform.is_cpu():
            resources = {"CPU": cpu.default_draft_cores()}
        else:
            resources = {"GPU": 1.0, "CPU": 1.0}
    elif not current_platform.is_cpu() and not resources.get("GPU"):
        raise ClusterError(
            f"stairs_draft_resources={resources}: the draft runs on {current_platform.device_name} "
            "as the target does: name a GPU."
        )
    return DraftBundle.of(resources, options.draft_node)


def cores_beside_the_target(bundle: DraftBundle) -> int:
    """Cores of this machine that the target leaves to the draft; none if it runs elsewhere."""
    return max(1, int(bundle.cpus)) if cluster.may_be_here(bundle.node) else 0


def place(config: Any, bundle: DraftBundle, parallel: Any) -> None:
    """Join or start the cluster; it has room for the draft when this returns.

    Args:
        config: :class:`StairsSpeculativeConfig`; gets address, resources and the target's share.
        bundle: what the draft takes.
        parallel: the target's ``ParallelConfig``; gets the placement group under vLLM's Ray
            executor.

    Raises:
        ClusterError: in one sentence.
    """
    from vllm.platforms import current_platform

    by_ray = parallel.distributed_executor_backend == "ray"
    size = 0 if current_platform.is_cpu() else parallel.tensor_parallel_size
    variable = getattr(current_platform, "device_control_env_var", "CUDA_VISIBLE_DEVICES")
    visible = _visible_gpus(variable) if size else []
    chosen = getattr(parallel, "assigned_physical_gpu_ids", None)
    if size and chosen:  # --device-ids
        taken = [str(gpu) for gpu in chosen]
        visible = [*taken, *(gpu for gpu in visible if gpu not in taken)]
    # Workers that vLLM starts take the first ones; those that Ray starts may be anywhere.
    target_gpus = [str(rank) for rank in range(size)] if by_ray else visible[:size]
    address = cluster.connect(
        config.stairs.ray_address,
        bundle,
        target_gpus=target_gpus,
        own_gpus=visible if by_ray else visible[size:],
        by_ray=by_ray,
        gpu_variable=variable,
    )
    config.stairs = config.stairs.model_copy(
        update={"draft_resources": bundle.amounts(), "draft_node": bundle.node}
    )
    config.stairs_ray_address = address
    own = cluster.is_own(address) and not by_ray
    config.stairs_ray_gpus = [] if own or by_ray else target_gpus
    if by_ray and size:
        # One group for all. vLLM's driver joins the cluster that the variable names.
        os.environ[cluster.ADDRESS_VARIABLE] = address
        cluster.join(address)
        parallel.placement_group = cluster.reserve(bundle, target_gpus=target_gpus, by_ray=True)
        first = cluster.DRAFT_BUNDLE + 1
        os.environ["VLLM_RAY_BUNDLE_INDICES"] = ",".join(map(str, range(first, first + size)))


def _visible_gpus(variable: str) -> list[str]:
    from vllm.platforms import current_platform

    named = os.environ.get(variable)
    if named:
        return [gpu.strip() for gpu in named.split(",")]
    return [str(gpu) for gpu in range(current_platform.device_count())]
