"""vLLM's workers with our model runner. Reached through ``ParallelConfig.worker_cls``."""

from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from vllm_stairs.engine.cpu import free_memory, in_process, memory_share
from vllm_stairs.engine.frames import with_room
from vllm_stairs.engine.runner import StairsCPUModelRunner, StairsGPUModelRunner
from vllm_stairs.heap import keep_freed_memory
from vllm_stairs.placement.cluster import may_be_here

logger = init_logger("vllm.stairs.worker")


class _Mixin:
    """What all our workers have; put before vLLM's in the bases."""

    model_runner: Any

    @with_room
    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """As in vLLM."""
        return super().execute_model(*args, **kwargs)  # type: ignore[misc]

    @with_room
    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """As in vLLM."""
        return super().sample_tokens(*args, **kwargs)  # type: ignore[misc]

    @with_room
    def take_draft_token_ids(self, *args: Any, **kwargs: Any) -> Any:
        """As in vLLM; here drafts are written."""
        return super().take_draft_token_ids(*args, **kwargs)  # type: ignore[misc]

    def stairs_statistics(self) -> dict[str, Any]:
        """Counters of the method; ``llm.collective_rpc("stairs_statistics")[0]``."""
        return self.model_runner.stairs_statistics()

    def shutdown(self) -> None:
        """Also end a dedicated draft."""
        runner = getattr(self, "model_runner", None)
        if runner is not None:
            runner.stairs_close()
        super().shutdown()  # type: ignore[misc]


class StairsGPUWorker(_Mixin, Worker):
    """vLLM's worker on CUDA and ROCm."""

    def _make_model_runner(self) -> Any:
        return StairsGPUModelRunner(self.vllm_config, self.device)


if current_platform.is_cpu():
    # On other platforms this import registers CPU-only shared memory.
    from vllm.v1.worker import cpu_worker

    class StairsCPUWorker(_Mixin, cpu_worker.CPUWorker):
        """vLLM's worker on CPU."""

        def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            stairs, cache = vllm_config.speculative_config.stairs, vllm_config.cache_config
            if (
                stairs.placement == "dedicated"
                and may_be_here(stairs.draft_node)
                and cache.kv_cache_memory_bytes is None
            ):
                # vLLM takes nearly all memory of the machine, or refuses to start.
                memory = free_memory()
                share = memory_share(
                    cache.gpu_memory_utilization,
                    memory.available_memory,
                    memory.total_memory,
                    vllm_config.parallel_config.tensor_parallel_size,
                )
                if share < cache.gpu_memory_utilization:
                    logger.info(
                        "Stairs: the target takes %.0f %% of this machine's memory instead of "
                        "%.0f %%: its draft is here too.",
                        100 * share,
                        100 * cache.gpu_memory_utilization,
                    )
                    cache.gpu_memory_utilization = share
            super().__init__(vllm_config, *args, **kwargs)

        def compile_or_warm_up_model(self) -> Any:
            """As in vLLM; from then on a worker process keeps the memory that steps free."""
            found = super().compile_or_warm_up_model()
            if not in_process():
                keep_freed_memory()
            return found

        def init_device(self) -> None:
            """As in vLLM, which names the runner's class inside this method.

            Patched: the module global ``cpu_worker.CPUModelRunner``, for the time of the call.
            Retired by: ``CPUWorker`` using ``_make_model_runner`` as the GPU worker does.
            """
            stock = cpu_worker.CPUModelRunner
            cpu_worker.CPUModelRunner = StairsCPUModelRunner
            try:
                super().init_device()
            finally:
                cpu_worker.CPUModelRunner = stock
