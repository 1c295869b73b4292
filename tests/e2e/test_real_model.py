"""SmolLM2-135M-Instruct, in this process: losslessness on real weights."""

from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams

from tests.engine.engines import spare_the_others
from tests.memory import free_engines
from vllm_stairs.bench import prompts as bench

FLOOR = 0.36
"""First-position acceptance that the shipped draft must not lose; 24 prompts, held text: 0.42."""

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
    "1, 1, 2, 3, 5, 8,",
    "The three states of matter are",
    "Dear Sir or Madam,",
]
ENGINE: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 256 * 2**20,
    "disable_log_stats": True,
}
TOKENS = 32


def generate(model: Path, dtype: str, draft: Path | None, **kwargs: Any) -> list[Any]:
    config = None
    if draft is not None:
        config = {"method": "stairs", "model": str(draft), "num_speculative_tokens": 4, **kwargs}
    llm = LLM(model=str(model), dtype=dtype, speculative_config=config, **ENGINE)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=2)
    outputs = [output.outputs[0] for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    spare_the_others(llm)
    del llm
    free_engines()
    return outputs


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> dict[str, list[Any]]:
    return {dtype: generate(smollm2, dtype, None) for dtype in ("float32", "bfloat16")}


@pytest.mark.parametrize(
    ("draft", "layout"),
    [
        ("random-draft", "packed"),
        ("cut-draft", "expanded"),
        pytest.param("random-draft", "expanded", marks=pytest.mark.full),
        pytest.param("cut-draft", "packed", marks=pytest.mark.full),
        pytest.param("", "packed", marks=pytest.mark.full),
        pytest.param("", "expanded", marks=pytest.mark.full),
    ],
)
def test_float32_is_identical(
    smollm2: Path, plain: dict[str, list[Any]], draft: str, layout: str
) -> None:
    folder = smollm2.with_name(f"{smollm2.name}-{draft}") if draft else smollm2
    ours = generate(smollm2, "float32", folder, stairs_layout=layout)
    for our, their in zip(ours, plain["float32"], strict=True):
        assert our.token_ids == their.token_ids


def test_bfloat16_differs_only_at_ties(smollm2: Path, plain: dict[str, list[Any]]) -> None:
    """A batch of another shape rounds differently; where it matters the two best are neighbours.

    Logits near 20 have steps of 0.125 in bfloat16; two of them are allowed.
    """
    ours = generate(smollm2, "bfloat16", smollm2)
    compared = 0
    for our, their in zip(ours, plain["bfloat16"], strict=True):
        for i, (mine, yours) in enumerate(zip(our.token_ids, their.token_ids, strict=True)):
            compared += 1
            if mine == yours:
                continue
            best, second = sorted((x.logprob for x in their.logprobs[i].values()), reverse=True)[:2]
            assert best - second <= 0.25, f"position {i}: {mine} instead of {yours}"
            break
    assert compared > 60


def test_the_shipped_draft_is_kept_often_enough(smollm2: Path) -> None:
    """On development prompts, one of each group; and the text is the target's."""
    chosen = bench.select(bench.load("spec-bench"), limit=6)
    chats = [[{"role": "user", "content": prompt.turns[0]}] for prompt in chosen]
    params = SamplingParams(temperature=0, max_tokens=40)
    engine = {**ENGINE, "dtype": "float32", "max_model_len": 2048}

    def answers(llm: LLM) -> list[list[int]]:
        outputs = llm.chat(chats, params, use_tqdm=False)
        spare_the_others(llm)
        return [list(output.outputs[0].token_ids) for output in outputs]

    draft = smollm2.with_name(f"{smollm2.name}-draft")
    config = {"method": "stairs", "model": str(draft), "stairs_height": "fixed"}
    stairs = LLM(model=str(smollm2), speculative_config=config, **engine)
    ours = answers(stairs)
    counts = stairs.collective_rpc("stairs_statistics")[0]
    del stairs
    free_engines()
    assert ours == answers(LLM(model=str(smollm2), **engine))
    assert counts["accepted_per_position"][0] > FLOOR * counts["drafted_per_position"][0]
