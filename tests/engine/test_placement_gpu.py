"""Placements on GPUs, among them vLLM's Ray executor, which refuses the CPU platform.

Not yet run: no machine with several GPUs was at hand (``docs/placement.md``). Engines are processes
of their own, because each wants the GPUs for itself.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.engine.engines import COMMON, in_a_process
from tests.engine.test_identity import prompts
from tests.tiny import TinyModels

pytestmark = pytest.mark.gpu

_SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    llm = LLM(**job["engine"])
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    outputs = llm.generate(job["prompts"], params, use_tqdm=False)
    ids = [list(output.outputs[0].token_ids) for output in outputs]
    stairs = "speculative_config" in job["engine"]
    counters = llm.collective_rpc("stairs_statistics")[0] if stairs else None
    print("RESULT " + json.dumps([ids, counters]))
"""


def write(folder: Path, model: Path, **engine: Any) -> tuple[list[list[int]], dict[str, Any]]:
    job = {
        "engine": {**COMMON, "model": str(model), "max_num_seqs": 8, **engine},
        "prompts": prompts(6, seed=110),
    }
    ids, counters = in_a_process(_SCRIPT, job, folder, timeout=900)
    return ids, counters


@pytest.mark.parametrize("executor", ["mp", "ray"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("placement", ["colocated", "replicated", "dedicated"])
def test_placements(
    tiny: TinyModels, tmp_path: Path, executor: str, ranks: int, placement: str
) -> None:
    """The target as its own draft: its own output, and every draft kept."""
    parallel = {"tensor_parallel_size": ranks, "distributed_executor_backend": executor}
    expected, _ = write(tmp_path, tiny.target, **parallel)
    config = {
        "method": "stairs",
        "model": str(tiny.target),
        "num_speculative_tokens": 4,
        "stairs_height": "fixed",
        "stairs_placement": placement,
    }
    found, counters = write(tmp_path, tiny.target, speculative_config=config, **parallel)
    assert found == expected
    assert counters["drafted_per_position"][0] > 0
    assert counters["accepted_per_position"] == counters["drafted_per_position"]
