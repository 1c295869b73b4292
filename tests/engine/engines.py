"""Engines that tests share, and how their outputs are compared.

Every test of losslessness asks two engines in this process, plain vLLM and vLLM with stairs, and
compares token ids.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams, envs

from tests.engine.dice import roll
from vllm_stairs.engine import runner as runner_module
from vllm_stairs.engine.cpu import BINDING

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
    # What `auto` drafts depends on measured times: only its own tests ask for it.
    config.setdefault("stairs_height", "fixed")
    # A target that is its own draft agrees with itself only where both are float32.
    config.setdefault("stairs_draft_weights", "full")
    config |= {"method": "stairs", "model": str(draft), "num_speculative_tokens": height}
    return _engine(str(model), json.dumps(config, sort_keys=True), json.dumps(kwargs))


@functools.cache
def _engine(model: str, speculative_config: str | None, kwargs: str) -> LLM:
    config = json.loads(speculative_config) if speculative_config else None
    return LLM(model=model, speculative_config=config, **{**COMMON, **json.loads(kwargs)})


def in_a_process(
    script: str, job: dict[str, Any], folder: Path, *, timeout: float, **environment: str
) -> Any:
    """Run a script whose engine is a process of its own, and so are its workers.

    Args:
        script: its text; prints ``RESULT`` and a JSON value.
        job: its argument, as JSON.
        folder: for the script.
        timeout: seconds.
        environment: further variables.

    Returns:
        What it printed.
    """
    file = folder / "script.py"  # A file: vLLM spawns its workers.
    file.write_text(script)
    run = subprocess.run(
        [sys.executable, str(file), json.dumps(job)],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, run.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


_PARALLEL_SCRIPT = """
import json, sys
from tests.engine.engines import write_in_parallel
from vllm import LLM
if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print("RESULT " + json.dumps(write_in_parallel(LLM(**job["engine"]), job)))
"""


def long_patience_ms(*_: Any) -> float:
    """For a dedicated draft: late on a busy machine it only costs drafts, but tests count them."""
    return 20_000.0


def be_patient(_worker: Any) -> None:
    """Let a worker that is a process of its own wait long for a dedicated draft."""
    runner_module.fixed_patience_ms = long_patience_ms


def write_in_parallel(llm: LLM, job: dict[str, Any]) -> list[Any]:
    """The work of :func:`tensor_parallel_2`: token ids per batch and prompt, counters per rank."""
    llm.collective_rpc(be_patient)
    if job["dice"] is not None:
        llm.collective_rpc(roll, args=(job["dice"],))
    length = job["max_tokens"]
    batches = [[sampled(length, seed) for seed in seeds] for seeds in job["seeds"]]
    for heights in job["heights"]:
        batches.append([greedy(length, extra_args={"stairs_max_height": h}) for h in heights])
    written = [
        [samples[0] for samples in token_ids(llm, job["prompts"], params)] for params in batches
    ]
    return [written, llm.collective_rpc("stairs_statistics")]


def spare_the_others(llm: LLM) -> None:
    """An engine's end would take the groups of this process from engines of other tests."""
    llm.llm_engine.engine_core._finalizer.detach()  # type: ignore[attr-defined]


def _with_workers(job: dict[str, Any]) -> list[Any]:
    """The same with workers in processes of their own and all else in this one."""
    with pytest.MonkeyPatch.context() as patch:
        # vLLM wants a memory node for each worker, or to be told.
        patch.setenv(BINDING, "nobind")
        envs.disable_envs_cache()  # Engines of other tests have filled it.
        try:
            llm = LLM(**job["engine"])
            core = llm.llm_engine.engine_core
            spare_the_others(llm)
            try:
                return write_in_parallel(llm, job)
            finally:
                core.engine_core.model_executor.shutdown()  # type: ignore[attr-defined]
        finally:
            envs.disable_envs_cache()


def tensor_parallel_2(
    model: Path,
    draft: Path,
    prompts: Sequence[str],
    heights: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    seeds: Sequence[Sequence[int | None]] = (),
    folder: Path | None = None,
    dice: int | None = None,
    **options: Any,
) -> tuple[list[list[list[int]]], dict[str, Any]]:
    """Write with stairs (K = 4) in an engine of its own with two worker processes.

    Args:
        model: the target.
        draft: the draft.
        prompts: texts.
        heights: of each greedy batch, the greatest height of each prompt.
        max_tokens: of each answer.
        seeds: of each sampled batch, the seed of each prompt, or None for the engine's generator;
            these batches come before the greedy ones, at any height up to K.
        folder: for the script of an engine that is a process of its own, as users have it; None:
            only the workers are, which has two processes fewer to start.
        dice: the seed of a policy that decides at random, on the rank that decides.
        options: ``stairs_*`` and other keys of the method.

    Returns:
        Token ids per batch and prompt, and the counters of the method, which are the same on
        both ranks but for the times and what only the deciding rank knows.
    """
    job = {
        "engine": {
            **COMMON,
            "model": str(model),
            "max_num_seqs": 8,
            "tensor_parallel_size": 2,
            "speculative_config": {
                "method": "stairs",
                "model": str(draft),
                "num_speculative_tokens": 4,
                "stairs_height": "fixed",
                "stairs_draft_weights": "full",
                **options,
            },
        },
        "prompts": prompts,
        "heights": heights,
        "max_tokens": max_tokens,
        "seeds": seeds,
        "dice": dice,
    }
    if folder is None:
        outputs, (counters, others) = _with_workers(job)
    else:
        outputs, (counters, others) = in_a_process(
            _PARALLEL_SCRIPT,
            job,
            folder,
            timeout=600,
            VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # For the function that brings the dice.
            PYTHONPATH=str(Path(__file__).resolve().parents[2]),
        )
    for name in ("heights", "accepted"):
        assert counters[name] == others[name], "the ranks have verified different staircases"
    return outputs, counters


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


def sampled(max_tokens: int, seed: int | None) -> SamplingParams:
    """Parameters of one sampled text; a seed of None: drawn by the engine's own generator."""
    return SamplingParams(temperature=0.8, max_tokens=max_tokens, ignore_eos=True, seed=seed)
