"""What the benchmark asks inside a worker, as vLLM's supported worker extension.

Every arm is started with ``worker_extension_cls`` set to :class:`Probe`, plain included. It
does nothing until it is asked; the timers are put in only for the profiled pass.
"""

import resource
import sys
import time
from collections.abc import Callable
from typing import Any


class Probe:
    """Methods that ``collective_rpc`` finds on the worker."""

    model_runner: Any

    def bench_memory(self) -> dict[str, int]:
        """Peak memory of this worker in bytes: resident set, and the device's where it has one."""
        unit = 1 if sys.platform == "darwin" else 1024
        peak = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
        import torch

        if torch.cuda.is_available() and torch.cuda.is_initialized():
            peak["device"] = torch.cuda.max_memory_reserved()
        return peak

    def bench_facts(self) -> dict[str, Any]:
        """Threads and device of this worker."""
        import torch

        device = getattr(self.model_runner, "device", torch.device("cpu"))
        return {
            "device": str(device),
            "threads": torch.get_num_threads(),
            "runner": type(self.model_runner).__name__,
        }

    def bench_bandwidth(self, megabytes: int, repeats: int) -> dict[str, Any]:
        """Read bandwidth of this worker's memory, with this worker's threads.

        Args:
            megabytes: size of the buffer; far larger than any cache.
            repeats: the best of so many passes is taken.
        """
        import torch

        device = getattr(self.model_runner, "device", torch.device("cpu"))
        buffer = torch.ones(megabytes * 2**20 // 4, dtype=torch.float32, device=device)
        best = float("inf")
        for _ in range(repeats + 1):
            start = time.perf_counter()
            buffer.sum()
            _synchronise(torch, device)
            best = min(best, time.perf_counter() - start)
        return {
            "bytes_per_s": buffer.numel() * 4 / best,
            "buffer_bytes": buffer.numel() * 4,
            "repeats": repeats,
            "device": str(device),
        }

    def bench_profile_start(self) -> bool:
        """Put timers round the target, the sampler and the drafter of this worker's runner."""
        runner = self.model_runner
        profile = Profile(runner)
        runner.bench_profile = profile
        return profile.install()

    def bench_profile_stop(self) -> dict[str, Any]:
        """Take the timers out and return what they saw."""
        profile: Profile = self.model_runner.bench_profile
        profile.remove()
        del self.model_runner.bench_profile
        return profile.report()


class Profile:
    """Timers on one model runner: ``target`` is preparing and running the forward pass with
    its logits, ``validation`` sampling and accepting, ``draft`` the drafter. A part that another
    one calls does not count in the caller.
    """

    PARTS = (
        ("target", "execute_model"),
        ("validation", "_sample"),
        ("draft", "propose_draft_token_ids"),
        # Where stairs drafts; vLLM's own methods hand over here what they have drafted already.
        ("draft", "take_draft_token_ids"),
    )

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.seconds = {part: 0.0 for part, _ in self.PARTS}
        self.steps: list[dict[str, float]] = []
        # Seconds of parts that the running one has called.
        self._inner = 0.0

    def install(self) -> bool:
        """Wrap the runner's methods; False if it has not got them all."""
        found = [hasattr(self.runner, name) for _, name in self.PARTS]
        for (part, name), there in zip(self.PARTS, found, strict=True):
            if there:
                setattr(self.runner, name, self._timed(part, getattr(self.runner, name)))
        return all(found)

    def remove(self) -> None:
        """Give the runner its own methods back."""
        for _, name in self.PARTS:
            self.runner.__dict__.pop(name, None)

    def report(self) -> dict[str, Any]:
        """Seconds by part, number of steps, and the cost of a step by its size."""
        decode = [step for step in self.steps if step["decode"]]
        return {
            "seconds": self.seconds,
            "steps": len(self.steps),
            "target_ms_by_rows": _medians(decode, "rows", "target"),
            "draft_ms_by_batch": _medians(
                [step for step in decode if step["passes"]], "requests", "draft", per="passes"
            ),
        }

    def _timed(self, part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        device = getattr(self.runner, "device", torch.device("cpu"))

        def timed(*arguments: Any, **options: Any) -> Any:
            if part == "target":
                self._open_step(arguments[0] if arguments else None)
            _synchronise(torch, device)
            outer, self._inner = self._inner, 0.0
            start = time.perf_counter()
            outcome = method(*arguments, **options)
            _synchronise(torch, device)
            elapsed = time.perf_counter() - start
            own, self._inner = elapsed - self._inner, outer + elapsed
            self.seconds[part] += own
            if self.steps:
                step = self.steps[-1]
                step[part] = step.get(part, 0.0) + own
                if part == "draft":
                    step["passes"] = max(step["passes"], _height(outcome))
            return outcome

        return timed

    def _open_step(self, scheduled: Any) -> None:
        per_request = getattr(scheduled, "num_scheduled_tokens", None) or {}
        drafts = getattr(scheduled, "scheduled_spec_decode_tokens", None) or {}
        rows = sum(per_request.values())
        expected = len(per_request) + sum(len(tokens) for tokens in drafts.values())
        new = getattr(scheduled, "scheduled_new_reqs", None) or []
        self.steps.append(
            {
                "rows": rows,
                "requests": len(per_request),
                "decode": bool(per_request) and not new and rows == expected,
                "passes": 0,
            }
        )


def _height(drafts: Any) -> int:
    """Draft tokens of the tallest draft: a tensor's second extent or the longest list.

    Args:
        drafts: a tensor, lists, vLLM's ``DraftTokenIds`` or nothing.
    """
    drafts = getattr(drafts, "draft_token_ids", drafts)
    shape = getattr(drafts, "shape", None)
    if shape is not None:
        return int(shape[1]) if len(shape) > 1 else 0
    return max((len(draft) for draft in drafts or []), default=0)


def _medians(
    steps: list[dict[str, float]], size: str, part: str, per: str | None = None
) -> dict[str, list[float]]:
    from vllm_stairs.bench.statistics import median

    by_size: dict[int, list[float]] = {}
    for step in steps:
        if part in step:
            by_size.setdefault(int(step[size]), []).append(
                step[part] * 1e3 / (step[per] if per else 1)
            )
    return {str(key): [median(values), len(values)] for key, values in sorted(by_size.items())}


def _synchronise(torch: Any, device: Any) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
