"""Installed but not asked for, the plugin changes nothing."""

import concurrent.futures
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.tiny import TinyModels

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
model = sys.argv[1]
args = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--model", model])
defaults = {k: repr(v) for k, v in vars(args).items() if not k.startswith("stairs_")}
llm = LLM(model=model, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8,
          kv_cache_memory_bytes=32 * 2**20, disable_log_stats=True)
greedy = SamplingParams(temperature=0, max_tokens=30, logprobs=2)
sampled = SamplingParams(temperature=0.9, min_p=0.1, logit_bias={5: 2.0}, seed=1, max_tokens=30)
texts = ["the cat sat", "a b c d", "red sun on the mat"]
outputs = llm.generate(texts * 2, [greedy] * 3 + [sampled] * 3, use_tqdm=False)
import os
print("RESULT " + json.dumps([
    [o.outputs[0].token_ids for o in outputs],
    [[{k: v.logprob for k, v in row.items()} for row in o.outputs[0].logprobs or ()]
     for o in outputs],
    defaults,
    llm.llm_engine.vllm_config.parallel_config.worker_cls,
    sorted(m for m in sys.modules if m.startswith("vllm_stairs.engine.")),
    os.environ.get("LD_PRELOAD"),
]))
"""


def run(target: Path, plugins: str | None) -> list:
    env = {k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"}
    if plugins is not None:
        env["VLLM_PLUGINS"] = plugins
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(target)],
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, result.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def test_nothing_changes(tiny: TinyModels) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        without, with_plugin = pool.map(functools.partial(run, tiny.target), ("", None))
    assert without[4] == []
    # Two light modules are loaded: the entry point and the wrapped arguments.
    assert with_plugin.pop(4) == ["vllm_stairs.engine.arguments", "vllm_stairs.engine.plugin"]
    without.pop(4)
    assert with_plugin == without
