"""Engines that tests share, and how their outputs are compared.

Every test of losslessness asks two engines in this process, plain vLLM and vLLM with stairs, and
compares token ids.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

COMMON: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "block_size": 32,
    "kv_cache_memory_bytes": 64 * 2**20,
    "disable_log_stats": True,
    "seed": 0,
}


def plain(model: Path, **kwargs: Any) -> LLM:
    """vLLM without speculation."""
    return _engine(str(model), None, json.dumps(kwargs, sort_keys=True))


def stairs(model: Path, draft: Path, height: int = 8, **kwargs: Any) -> LLM:
    """vLLM with stairs; ``stairs_*`` and other keys of speculative_config may be among kwargs."""
    keys = {
        "num_speculative_tokens_per_batch_size",
        "draft_sample_method",
        "use_heterogeneous_vocab",
        "max_model_len_draft",
    }
    config = {
        key: kwargs.pop(key) for key in list(kwargs) if key.startswith("stairs_") or key in keys
    }
    if "max_model_len_draft" in config:
        config["max_model_len"] = config.pop("max_model_len_draft")
    config |= {"method": "stairs", "model": str(draft), "num_speculative_tokens": height}
    return _engine(str(model), json.dumps(config, sort_keys=True), json.dumps(kwargs))


@functools.cache
def _engine(model: str, speculative_config: str | None, kwargs: str) -> LLM:
    config = json.loads(speculative_config) if speculative_config else None
    return LLM(model=model, speculative_config=config, **{**COMMON, **json.loads(kwargs)})


def token_ids(llm: LLM, prompts: Sequence[Any], params: Any) -> list[list[list[int]]]:
    """Token ids per prompt and per sample."""
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]


def statistics(llm: LLM) -> dict[str, Any]:
    """The counters of the method since the engine started."""
    return llm.collective_rpc("stairs_statistics")[0]


def kv_usage(llm: LLM) -> float:
    """Share of the KV cache in use."""
    core = llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    return core.scheduler.kv_cache_manager.usage


@contextlib.contextmanager
def counting_preemptions(llm: LLM) -> Iterator[list[str]]:
    """The requests that the scheduler preempts meanwhile."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
    preempted: list[str] = []
    original = scheduler._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return original(request, *args, **kwargs)

    scheduler._preempt_request = preempt
    try:
        yield preempted
    finally:
        scheduler._preempt_request = original


def greedy(max_tokens: int = 40, **kwargs: Any) -> SamplingParams:
    """Greedy parameters that do not stop early unless asked to."""
    kwargs.setdefault("ignore_eos", True)
    return SamplingParams(temperature=0, max_tokens=max_tokens, **kwargs)
