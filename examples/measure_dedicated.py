"""What a dedicated draft costs and gains beside its own work: hand-over and overlap.

The target drafts for itself, so every draft is right, and both are slowed down by sleeping: the
target's step takes STEP milliseconds, a pass of the draft a quarter of that. With K = 4 a step that
waits for its drafts takes twice STEP, one whose drafts are written ahead 1.25 times: a gain of 1.6
at best.

    python examples/measure_dedicated.py [MODEL [STEP]]
"""

import os
import sys
import time
from typing import Any

MODEL = "models/smollm2-135m-instruct"
STEP_MS = 400.0
TOKENS = 100
PROMPT = "The history of the bicycle begins with"


def main() -> None:
    # The engine in this process: its steps are slowed down here.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    model = sys.argv[1] if len(sys.argv) > 1 else MODEL
    step_ms = float(sys.argv[2]) if len(sys.argv) > 2 else STEP_MS

    from vllm_stairs.engine.draft_actor import DELAY_VARIABLE

    os.environ[DELAY_VARIABLE] = str(step_ms / 4 - own_pass_ms(model))
    llm = engine(model)
    runner = runner_of(llm)
    forward = runner._model_forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        hidden_states = forward(*args, **kwargs)
        time.sleep(max(start + step_ms / 1e3 - time.perf_counter(), 0.0))
        return hidden_states

    runner._model_forward = slow
    seconds = {}
    for name, ahead in (("with overlap", runner.stairs_dedicated.ahead), ("without", 0)):
        runner.stairs_dedicated.ahead = ahead
        write(llm, 10)
        before = counters(llm)
        start = time.perf_counter()
        write(llm, TOKENS)
        seconds[name] = time.perf_counter() - start
        since = {key: value - before[key] for key, value in counters(llm).items()}
        print(
            f"{name}: {1e3 * seconds[name] / TOKENS:.1f} ms per token, "
            f"{since['answers']:.0f} answers, {since['ready']:.0f} of them ready, hand-over "
            f"{1e3 * since['hand_over_seconds'] / since['answers']:.2f} ms per step"
        )
    print(f"overlap gains {seconds['without'] / seconds['with overlap']:.2f} (ideal 1.6)")


def own_pass_ms(model: str) -> float:
    """Milliseconds of a pass of the draft without sleeping, on the cores that it has."""
    llm = engine(model)
    runner_of(llm).stairs_dedicated.ahead = 0
    write(llm, TOKENS)
    before = counters(llm)
    write(llm, TOKENS)
    since = {key: value - before[key] for key, value in counters(llm).items()}
    runner_of(llm).stairs_close()
    drafting = since["wait_seconds"] - since["hand_over_seconds"]
    print(f"no sleeping: hand-over {1e3 * since['hand_over_seconds'] / since['answers']:.2f} ms")
    return 1e3 * drafting / since["answers"] / 4


def engine(model: str) -> Any:
    from vllm import LLM

    return LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=2,
        kv_cache_memory_bytes=128 * 2**20,
        speculative_config={
            "method": "stairs",
            "model": model,
            "num_speculative_tokens": 4,
            "stairs_height": "fixed",
            "stairs_placement": "dedicated",
        },
    )


def runner_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def write(llm: Any, tokens: int) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    llm.generate(PROMPT, params, use_tqdm=False)


def counters(llm: Any) -> dict[str, float]:
    found: dict[str, float] = llm.collective_rpc("stairs_statistics")[0]["dedicated"]
    return found


if __name__ == "__main__":
    main()
