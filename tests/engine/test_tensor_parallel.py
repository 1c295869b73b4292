"""Tensor parallel 2: two worker processes, one answer."""

import json
import os
import subprocess
import sys

from tests.engine.engines import greedy, plain, token_ids
from tests.engine.test_identity import prompts
from tests.tiny import TinyModels

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    llm = LLM(**job["engine"])
    result = []
    for heights in job["heights"]:
        params = [SamplingParams(temperature=0, max_tokens=30, ignore_eos=True,
                  extra_args={"stairs_max_height": h}) for h in heights]
        outputs = llm.generate(job["prompts"], params, use_tqdm=False)
        result.append([list(o.outputs[0].token_ids) for o in outputs])
    statistics = llm.collective_rpc("stairs_statistics")[0]
    print("RESULT " + json.dumps([result, statistics]))
"""


def test_tensor_parallel_2(tiny: TinyModels, tmp_path) -> None:
    texts = prompts(5, seed=50)
    job = {
        "engine": {
            "model": str(tiny.target),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "max_num_seqs": 8,
            "block_size": 32,
            "kv_cache_memory_bytes": 64 * 2**20,
            "tensor_parallel_size": 2,
            "disable_log_stats": True,
            "speculative_config": {
                "method": "stairs",
                "model": str(tiny.noisy),
                "num_speculative_tokens": 4,
            },
        },
        "prompts": texts,
        "heights": [[4] * 5, [0, 1, 2, 3, 4]],
    }
    script = tmp_path / "tp2.py"
    script.write_text(SCRIPT)
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    }
    run = subprocess.run(
        [sys.executable, str(script), json.dumps(job)],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, run.stderr[-3000:]
    outputs, statistics = json.loads(lines[0].removeprefix("RESULT "))
    expected = [samples[0] for samples in token_ids(plain(tiny.target), texts, greedy(30))]
    assert outputs == [expected, expected]
    assert 0 < statistics["accepted_per_position"][0] < statistics["drafted_per_position"][0]
