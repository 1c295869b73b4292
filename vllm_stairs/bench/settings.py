"""What a run is asked to do. Everything that a resumed run must share is in here."""

import dataclasses
import json
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_stairs.bench.errors import BenchError

DEFAULT_BATCHES = (1, 2, 4, 8, 16, 32)

DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
"""What vLLM's ``--dtype`` takes."""

MAX_SEED = 2**32 - 1
"""vLLM seeds NumPy, which takes no larger one."""

OWN_ARGUMENTS = {
    "model": "--target",
    "dtype": "--dtype",
    "seed": "--seed",
    "enforce_eager": "--eager",
    "max_model_len": "--max-model-len",
    "tensor_parallel_size": "--tensor-parallel-size",
    "kv_cache_memory_bytes": "--kv-cache-gib",
    "speculative_config": "--arm",
    "worker_extension_cls": None,
    "disable_log_stats": None,
}
"""Arguments of ``LLM`` that the benchmark sets itself, and the option that sets them."""


@dataclass(frozen=True)
class Settings:
    """The settings of ``bench run``, checked."""

    target: str
    draft: str | None = None
    arms: tuple[str, ...] = ()
    prompts: str = "spec-bench"
    groups: tuple[str, ...] = ()
    by_group: bool = False
    """One group after the other instead of a mixture; each is served to its end."""
    limit: int | None = 36
    all_turns: bool = False
    skip_long: bool = False
    seed: int = 0
    batches: tuple[int, ...] = DEFAULT_BATCHES
    temperatures: tuple[float, ...] = (0.0,)
    repeats: int = 3
    turns: int = 1
    """Into how many parts of equally many tokens a pass is cut, between which all arms take
    turns; 1: arms take turns in whole passes."""
    output_tokens: int = 96
    stop_at_eos: bool = False
    dtype: str = "auto"
    eager: bool = False
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    kv_cache_gib: float | None = None
    engine: tuple[tuple[str, Any], ...] = ()
    """Further arguments of ``LLM``, for every arm alike."""
    profile: bool = True
    online: bool = False
    request_rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (
            ("repeats", 1),
            ("turns", 1),
            ("output_tokens", 2),
            ("tensor_parallel_size", 1),
        ):
            if getattr(self, name) < least:
                raise BenchError(f"--{name.replace('_', '-')} must be at least {least}")
        if not self.batches or min(self.batches) < 1:
            raise BenchError("--batch-sizes must be whole numbers of at least 1")
        # Said so that NaN, for which no comparison holds, is refused too.
        if not self.temperatures or not all(0 <= t <= 2 for t in self.temperatures):
            raise BenchError("--temperatures must lie between 0 and 2")
        if not 0 <= self.seed <= MAX_SEED:
            raise BenchError(f"--seed must lie between 0 and {MAX_SEED}")
        if self.dtype not in DTYPES:
            raise BenchError(f"--dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise BenchError("--max-model-len must be at least 1")
        if self.kv_cache_gib is not None and not 0 < self.kv_cache_gib < math.inf:
            raise BenchError("--kv-cache-gib must be a number above 0")
        if self.online and not (self.request_rates and all(r > 0 for r in self.request_rates)):
            raise BenchError("--online needs --request-rates above 0, for example 1 2 inf")
        if self.online and self.by_group:
            raise BenchError("--by-group does not go with --online: requests come by a rate")
        if self.online and self.turns > 1:
            raise BenchError("--turns does not go with --online: a server cannot be held")
        if self.stop_at_eos and self.turns > 1:
            raise BenchError(
                "--turns does not go with --stop-at-eos: how long a pass is must be known"
            )
        if self.request_rates and not self.online:
            raise BenchError("--request-rates belong to --online")
        keys = [key for key, _ in self.engine]
        for key in keys:
            if key in OWN_ARGUMENTS:
                option = OWN_ARGUMENTS[key]
                advice = f"use {option}" if option else "it cannot be changed"
                raise BenchError(f"--engine {key}=...: the benchmark sets {key} itself, {advice}")
            if keys.count(key) > 1:
                raise BenchError(f"--engine {key}=... is given twice")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as the result file keeps them."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def engine_arguments(self, *, cpu: bool) -> dict[str, Any]:
        """Arguments of ``LLM``, the same for every arm.

        Args:
            cpu: on a CPU the KV cache is 1 GiB unless said otherwise; vLLM's default there is
                most of the memory, which several engines cannot share.
        """
        arguments: dict[str, Any] = {"model": self.target, "dtype": self.dtype, "seed": self.seed}
        if self.eager:
            arguments["enforce_eager"] = True
        if self.max_model_len:
            arguments["max_model_len"] = self.max_model_len
        if self.tensor_parallel_size > 1:
            arguments["tensor_parallel_size"] = self.tensor_parallel_size
        gib = self.kv_cache_gib or (1.0 if cpu else None)
        if gib:
            arguments["kv_cache_memory_bytes"] = int(gib * 2**30)
        return {**arguments, **dict(self.engine)}


def server_flags(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments of ``LLM`` as flags of ``vllm serve`` (the model left out)."""
    flags: list[str] = []
    for key, value in arguments.items():
        flag = "--" + key.replace("_", "-")
        if key == "model" or value is None:
            continue
        if value is True:
            flags.append(flag)
        elif value is False:
            flags.append("--no-" + key.replace("_", "-"))
        else:
            flags += [flag, value if isinstance(value, str) else json.dumps(value)]
    return flags


def free_port() -> int:
    """A TCP port on this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
