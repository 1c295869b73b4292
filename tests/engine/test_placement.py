"""A draft that runs whole on every rank of a tensor-parallel target."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs

from tests.engine.engines import COMMON, greedy, plain, tensor_parallel_2, token_ids
from tests.engine.test_arguments import build, error, parse
from tests.engine.test_identity import prompts
from tests.tiny import VOCAB_SIZE, WORDS, TinyModels, copy_model
from vllm_stairs.engine.dedicated import AbsentDrafter
from vllm_stairs.engine.placement import in_draft_group, solo_group


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Arguments of a tensor-parallel engine; the thread binding stays out of this process."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    return {"tensor_parallel_size": 2}


def sizes(config: Any) -> tuple[str, int | None, int]:
    return (
        config.stairs.placement,
        config.draft_tensor_parallel_size,
        config.draft_parallel_config.tensor_parallel_size,
    )


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, ("colocated", 2, 2)),
        ({"stairs_placement": "colocated"}, ("colocated", 2, 2)),
        ({"draft_tensor_parallel_size": 2}, ("colocated", 2, 2)),
        ({"stairs_placement": "replicated"}, ("replicated", 1, 1)),
        ({"draft_tensor_parallel_size": 1}, ("replicated", 1, 1)),
        (
            {"stairs_placement": "replicated", "draft_tensor_parallel_size": 1},
            ("replicated", 1, 1),
        ),
    ],
)
def test_sizes(
    tiny: TinyModels, two_ranks: dict[str, int], keys: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    config = {"method": "stairs", "model": str(tiny.noisy), **keys}
    assert sizes(build(tiny.target, config, **two_ranks)) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"draft_tensor_parallel_size": 3}, "set it to 1 (the whole draft on every rank) or 2."),
        (
            {"stairs_placement": "colocated", "draft_tensor_parallel_size": 1},
            "draft_tensor_parallel_size=1 does not go with stairs_placement=colocated, which is 2",
        ),
        (
            {"stairs_placement": "replicated", "draft_tensor_parallel_size": 2},
            "draft_tensor_parallel_size=2 does not go with stairs_placement=replicated",
        ),
        ({"stairs_placement": "elsewhere"}, "'colocated', 'replicated' or 'dedicated'"),
    ],
)
def test_sizes_that_do_not_go(
    tiny: TinyModels, two_ranks: dict[str, int], keys: dict[str, Any], message: str
) -> None:
    assert message in error(tiny.target, {"model": str(tiny.noisy), **keys}, **two_ranks)


def test_one_rank_has_one_placement(tiny: TinyModels) -> None:
    config = parse(
        "--model", str(tiny.target), "--spec-method", "stairs", "--spec-model", str(tiny.noisy),
        "--stairs-placement", "replicated",
    )  # fmt: skip
    assert sizes(config) == ("colocated", 1, 1)
    message = error(tiny.target, {"model": str(tiny.noisy), "draft_tensor_parallel_size": 2})
    assert message.endswith("leave it out or set it to 1.")


def test_a_draft_that_cannot_be_sharded(
    tiny: TinyModels, two_ranks: dict[str, int], tmp_path: Path
) -> None:
    draft = copy_model(
        tiny.noisy, tmp_path / "odd", num_attention_heads=1, num_key_value_heads=1, head_dim=64
    )
    config = {"model": str(draft)}
    assert "must be divisible by tensor parallel size" in error(tiny.target, config, **two_ranks)
    config = {"method": "stairs", **config, "stairs_placement": "replicated"}
    assert sizes(build(tiny.target, config, **two_ranks)) == ("replicated", 1, 1)


def test_compiled_graphs_are_kept_apart(tiny: TinyModels, two_ranks: dict[str, int]) -> None:
    """vLLM would load the graphs of a sharded draft for a whole one."""
    hashes = {
        build(
            tiny.target,
            {"method": "stairs", "model": str(tiny.noisy), "stairs_placement": placement},
            **two_ranks,
        ).compute_hash()
        for placement in ("colocated", "replicated")
    }
    assert len(hashes) == 2


def test_the_group_comes_back(tiny: TinyModels) -> None:
    plain(tiny.target)  # Makes vLLM's groups in this process.
    shared, solo = parallel_state.get_tp_group(), parallel_state.get_pp_group()
    assert shared is not solo

    class Proposer:
        def __init__(self, replicated: bool) -> None:
            self.replicated = replicated

        @in_draft_group
        def group(self, fail: bool = False) -> Any:
            if fail:
                raise RuntimeError("a pass that fails")
            return parallel_state.get_tp_group()

    assert Proposer(replicated=True).group() is solo
    assert Proposer(replicated=False).group() is shared
    with pytest.raises(RuntimeError, match="a pass that fails"):
        Proposer(replicated=True).group(fail=True)
    assert parallel_state.get_tp_group() is shared
    with solo_group(), solo_group():
        pass
    assert parallel_state.get_tp_group() is shared


def test_a_dedicated_draft_is_found_from_any_folder(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of a running cluster work where the cluster was started."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tiny.root)
    config = {"method": "stairs", "model": tiny.noisy.name, "stairs_placement": "dedicated"}
    args = EngineArgs(
        model=f"./{tiny.target.name}", speculative_config=config, dtype="float32", max_model_len=256
    )
    drafter = AbsentDrafter(args.create_engine_config(), torch.device("cpu"), None)
    draft = drafter.draft_config()
    assert draft.model_config.model == str(tiny.noisy)
    assert draft.model_config.tokenizer == str(tiny.target)
    assert drafter.speculative_config.draft_model_config.model == tiny.noisy.name


def expected_texts(tiny: TinyModels, texts: list[str]) -> list[list[int]]:
    return [samples[0] for samples in token_ids(plain(tiny.target), texts, greedy(30))]


def test_lossless(tiny: TinyModels) -> None:
    """A draft that is right now and then; heights that differ; prompts from the prefix cache."""
    texts = prompts(5, seed=70)
    outputs, statistics = tensor_parallel_2(
        tiny.target,
        tiny.noisy,
        texts,
        [[4] * 5, [0, 1, 2, 3, 4]],
        max_tokens=30,
        stairs_placement="replicated",
    )
    assert outputs == [expected_texts(tiny, texts)] * 2
    assert 0 < statistics["accepted_per_position"][0] < statistics["drafted_per_position"][0]


@pytest.mark.parametrize(
    "layout", [pytest.param("packed"), pytest.param("expanded", marks=pytest.mark.full)]
)
def test_draft_kv_is_right(tiny: TinyModels, layout: str) -> None:
    """The target as its own draft, whole beside its shards: stale or misplaced KV would show."""
    texts = prompts(5, seed=71)
    outputs, statistics = tensor_parallel_2(
        tiny.target,
        tiny.target,
        texts,
        # Holes where nobody drafted, then drafts over what the prefix cache has of them.
        [[0, 1, 2, 3, 4], [4] * 5],
        max_tokens=30,
        stairs_placement="replicated",
        stairs_layout=layout,
    )
    assert outputs == [expected_texts(tiny, texts)] * 2
    assert statistics["accepted_per_position"] == statistics["drafted_per_position"]
    assert statistics["drafted_per_position"][3] > 0


@pytest.mark.full
def test_trimmed_vocabulary(tiny: TinyModels, tmp_path: Path) -> None:
    """The head is not sharded; what it lacks ends a staircase, nothing else does."""
    texts = prompts(4, seed=72)
    expected = expected_texts(tiny, texts)
    lacking = set(random.Random(8).sample(range(3, len(WORDS)), 10))
    kept = tmp_path / "ids.json"
    kept.write_text(json.dumps(sorted(set(range(VOCAB_SIZE)) - lacking)))
    outputs, statistics = tensor_parallel_2(
        tiny.target,
        tiny.target,
        texts,
        [[4] * 4],
        max_tokens=30,
        draft_tensor_parallel_size=1,
        stairs_draft_vocab=str(kept),
    )
    assert outputs == [expected]
    said = sum(i in lacking for text in expected for i in text)
    assert statistics["accepted"][4] > 0
    # At the end of a request staircases are less tall.
    assert statistics["staircases"] - statistics["accepted"][4] <= said + 2 * len(texts)


SAMPLED = """
import json, sys
import torch
from vllm import LLM, SamplingParams
from vllm_stairs.engine.proposer import weights_share

def part(worker):
    # What the ranks draft from now on differs; requests that have a seed are judged alike.
    torch.manual_seed(worker.rank)

def costs(worker):
    drafter = worker.model_runner.drafter
    return drafter.weights_bytes(), weights_share(drafter.speculative_config)

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    llm = LLM(**job["engine"])
    llm.collective_rpc(part)
    params = [SamplingParams(temperature=1, seed=i, max_tokens=40, ignore_eos=True)
              for i in range(len(job["prompts"]))]
    outputs = llm.generate(job["prompts"], params, use_tqdm=False)
    lengths = [len(o.outputs[0].token_ids) for o in outputs]
    result = [lengths, llm.collective_rpc("stairs_statistics"), llm.collective_rpc(costs)]
    print("RESULT " + json.dumps(result))
"""


@pytest.mark.full
def test_ranks_keep_the_same_sampled_tokens(tiny: TinyModels, tmp_path: Path) -> None:
    """Even where their drafts, and so their q, are not the same."""
    texts = prompts(6, seed=73)
    config = {
        "method": "stairs",
        "model": str(tiny.noisy),
        "stairs_draft_weights": "full",
        "stairs_height": "fixed",
        "stairs_placement": "replicated",
        "draft_sample_method": "probabilistic",
    }
    engine = {
        **COMMON,
        "model": str(tiny.target),
        "tensor_parallel_size": 2,
        "speculative_config": config,
    }
    script = tmp_path / "sampled.py"
    script.write_text(SAMPLED)
    run = subprocess.run(
        [sys.executable, str(script), json.dumps({"engine": engine, "prompts": texts})],
        env={
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # For the functions that workers run.
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, run.stderr[-3000:]
    lengths, (first, second), costs = json.loads(lines[0].removeprefix("RESULT "))
    assert lengths == [40] * len(texts)
    for key in ("staircases", "heights", "accepted"):
        assert first[key] == second[key]
    assert 0 < first["accepted_per_position"][0] < first["drafted_per_position"][0]
    # A whole draft of the target's shape beside half a target.
    weights = load_file(tiny.noisy / "model.safetensors").values()
    assert costs == [[sum(4 * tensor.numel() for tensor in weights), 2.0]] * 2
