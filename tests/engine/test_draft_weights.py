"""A draft whose matrices are bfloat16 where all else is float32: the output does not change."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm import LLM
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.linear import ReplicatedLinear

from tests.engine.engines import (
    greedy,
    long_patience_ms,
    plain,
    stairs,
    statistics,
    tensor_parallel_2,
    token_ids,
)
from tests.engine.test_arguments import error
from tests.engine.test_dedicated import dedicated
from tests.engine.test_distribution import exact_distribution, p_value, sample
from tests.engine.test_draft_vocabulary import EVERY_OTHER, ids_file, variant
from tests.engine.test_identity import prompts
from tests.tiny import TinyModels
from vllm_stairs.engine import draft_weights
from vllm_stairs.engine import runner as runner_module
from vllm_stairs.engine.draft_weights import BFloat16Weights, settle_weights
from vllm_stairs.engine.proposer import _checkpoint_bytes, weights_share
from vllm_stairs.processor import fast_bfloat16

HIDDEN = torch.randn(5, 64, generator=torch.Generator().manual_seed(8))


def logits(engine: LLM) -> torch.Tensor:
    """What the draft of an engine makes of some hidden states."""
    found = engine.collective_rpc(
        lambda worker: worker.model_runner.drafter.model.compute_logits(HIDDEN)
    )
    assert isinstance(found[0], torch.Tensor)
    return found[0]


def saved_bytes(engine: LLM) -> int | None:
    """How much smaller the linear layers of the draft are; None: they are as ever."""
    matrices = engine.collective_rpc(lambda worker: worker.model_runner.drafter.matrices)[0]
    return None if matrices is None else matrices.saved_bytes


@pytest.mark.parametrize("trimmed", [False, True])
def test_a_draft_in_bfloat16(tiny: TinyModels, tmp_path: Path, trimmed: bool) -> None:
    """Batches, all heights at once; the draft is nearly what it was, and smaller."""
    options: dict[str, Any] = {}
    if trimmed:
        options["stairs_draft_vocab"] = ids_file(tmp_path, EVERY_OTHER)
    full = stairs(tiny.target, tiny.target, **options)
    engine = stairs(tiny.target, tiny.target, stairs_draft_weights="bfloat16", **options)
    exact, rounded = logits(full), logits(engine)
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))
    assert saved_bytes(full) is None
    assert saved_bytes(engine)

    before = statistics(engine)
    for batch in (1, 12):
        texts = prompts(batch, seed=70 + batch)
        expected = token_ids(plain(tiny.target), texts, greedy())
        assert token_ids(engine, texts, greedy()) == expected
        ragged = [greedy(extra_args={"stairs_max_height": i % 9}) for i in range(batch)]
        assert token_ids(engine, texts, ragged) == expected
    after = statistics(engine)
    accepted, drafted = (
        after[name][0] - before[name][0]
        for name in ("accepted_per_position", "drafted_per_position")
    )
    # The target is its own draft: rounding alone makes them differ, or the ids that are missing.
    assert drafted > 100
    assert accepted > (0.2 if trimmed else 0.9) * drafted


def test_sampled_requests(tiny: TinyModels) -> None:
    """The probabilities that are weighed are those that the draft has drawn from."""
    expected = exact_distribution(plain(tiny.target, max_logprobs=96), "temperature")
    engine = stairs(
        tiny.target,
        tiny.noisy,
        height=2,
        draft_sample_method="probabilistic",
        max_num_seqs=128,
        stairs_draft_weights="bfloat16",
    )
    assert saved_bytes(engine)
    counts = sample(engine, seed=18, constraint="temperature")
    assert statistics(engine)["accepted_per_position"][0] > 100
    assert p_value(counts, expected) > 1e-4


@pytest.mark.parametrize("kind", ["scaled", "capped"])
def test_other_models(tiny: TinyModels, tmp_path: Path, kind: str) -> None:
    """Tied: the head is the embedding too, which stays exact."""
    draft = variant(tiny, tmp_path / kind, kind)
    full = stairs(tiny.target, draft, height=3)
    engine = stairs(tiny.target, draft, height=3, stairs_draft_weights="bfloat16")
    exact, rounded = logits(full), logits(engine)
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))
    texts = prompts(3, seed=73)
    assert token_ids(engine, texts, greedy()) == token_ids(plain(tiny.target), texts, greedy())
    assert statistics(engine)["drafted_per_position"][2] > 0


def test_a_layer_with_a_bias(tiny: TinyModels) -> None:
    """The bias is added in float32."""
    engine = stairs(tiny.target, tiny.target, stairs_draft_weights="bfloat16")
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(32, 64, generator=generator)
    bias = torch.randn(32, generator=generator)

    def run(worker: Any) -> tuple[torch.dtype, torch.Tensor]:
        with set_current_vllm_config(worker.vllm_config):
            layer = ReplicatedLinear(
                64, 32, params_dtype=torch.float32, quant_config=BFloat16Weights()
            )
            dtype = layer.weight.dtype
            layer.weight.weight_loader(layer.weight, weight)
            layer.bias.data.copy_(bias)
            layer.quant_method.process_weights_after_loading(layer)
            out, _ = layer(HIDDEN)
        return dtype, out

    dtype, out = engine.collective_rpc(run)[0]
    assert (dtype, out.dtype) == (torch.bfloat16, torch.float32)
    expected = (HIDDEN.bfloat16().float() @ weight.bfloat16().float().T).bfloat16().float() + bias
    torch.testing.assert_close(out, expected, rtol=0.01, atol=0.1)


def config(dtype: torch.dtype = torch.float32, quantized: bool = False) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(dtype=dtype),
        quant_config=object() if quantized else None,
        additional_config={"theirs": 1},
    )


def asked_for(choice: str) -> Any:
    return SimpleNamespace(stairs=SimpleNamespace(draft_weights=choice))


@pytest.mark.parametrize("fast", [False, True])
def test_auto_asks_the_processor(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(draft_weights, "fast_bfloat16", lambda: fast)
    draft = config()
    assert (settle_weights(draft, asked_for("auto")) is not None) == fast
    assert (draft.quant_config is not None) == fast
    # Compiled drafts of either kind are different ones, and what others put there stays.
    assert draft.additional_config["theirs"] == 1
    assert ("stairs_draft_weights" in draft.additional_config) == fast


@pytest.mark.parametrize("kwargs", [{"dtype": torch.bfloat16}, {"quantized": True}])
def test_what_is_not_float32_stays_as_it_is(kwargs: dict[str, Any]) -> None:
    draft = config(**kwargs)
    before = draft.quant_config
    assert settle_weights(draft, asked_for("bfloat16")) is None
    assert draft.quant_config is before


def test_the_default_is_this_processors(tiny: TinyModels) -> None:
    engine = stairs(tiny.target, tiny.noisy, stairs_draft_weights="auto")
    assert (saved_bytes(engine) is not None) == fast_bfloat16()
    assert statistics(engine)["draft_weights"] == ("bfloat16" if fast_bfloat16() else "full")
    texts = prompts(3, seed=74)
    assert token_ids(engine, texts, greedy()) == token_ids(plain(tiny.target), texts, greedy())


@pytest.mark.parametrize(("choice", "share"), [("bfloat16", 0.5), ("full", 1.0)])
def test_what_a_pass_is_taken_to_cost(tiny: TinyModels, choice: str, share: float) -> None:
    """The policy's first guess knows in which type the draft is read."""
    # A height that no other test has: an engine that has not drafted yet.
    engine = stairs(tiny.target, tiny.target, 3, stairs_height="auto", stairs_draft_weights=choice)

    def guess(worker: Any) -> float:
        runner = worker.model_runner
        policy = runner.stairs_decider.policy
        assert policy.draft.scale(1.0) == weights_share(runner.speculative_config)
        return policy.draft.scale(1.0)

    assert engine.collective_rpc(guess) == [share]


def test_quantized_weights_take_what_they_take_in_the_file(tmp_path: Path) -> None:
    tensors = {
        "packed": torch.zeros(6, 4, dtype=torch.int32),
        "codes": torch.zeros(10, dtype=torch.int8),
        "eighth": torch.zeros(3, dtype=torch.float8_e4m3fn),
        "scales": torch.zeros(5, dtype=torch.bfloat16),
        "norm": torch.zeros(2, dtype=torch.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert _checkpoint_bytes(str(tmp_path), 4) == 6 * 4 * 4 + 10 + 3 + (5 + 2) * 4
    assert _checkpoint_bytes(str(tmp_path), 2) == 6 * 4 * 4 + 10 + 3 + (5 + 2) * 2
    assert _checkpoint_bytes(str(tmp_path / "none"), 4) is None


def test_errors(tiny: TinyModels) -> None:
    message = error(tiny.target, {"model": str(tiny.noisy), "stairs_draft_weights": "int4"})
    assert "stairs_draft_weights" in message
    assert "'bfloat16'" in message


@pytest.mark.full
def test_a_dedicated_draft_in_bfloat16(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "fixed_patience_ms", long_patience_ms)
    engine = dedicated(tiny.target, tiny.noisy, stairs_draft_weights="bfloat16")
    colocated = stairs(tiny.target, tiny.noisy, stairs_draft_weights="bfloat16")
    texts = prompts(4, seed=75)
    expected = token_ids(plain(tiny.target), texts, greedy())
    kept = []
    for llm in (engine, colocated):
        assert token_ids(llm, texts, greedy()) == expected
        counted = statistics(llm)
        assert counted["draft_weights"] == "bfloat16"
        kept.append(counted["accepted_per_position"])
    assert kept[0] == kept[1]


@pytest.mark.full
@pytest.mark.parametrize("placement", ["colocated", "replicated"])
def test_tensor_parallel_2(tiny: TinyModels, placement: str) -> None:
    texts = prompts(4, seed=76)
    expected = [samples[0] for samples in token_ids(plain(tiny.target), texts, greedy(30))]
    outputs, counted = tensor_parallel_2(
        tiny.target,
        tiny.target,
        texts,
        [[4] * 4],
        max_tokens=30,
        stairs_placement=placement,
        stairs_draft_weights="bfloat16",
    )
    assert outputs == [expected]
    assert counted["draft_weights"] == "bfloat16"
    assert counted["accepted_per_position"][0] > 0.9 * counted["drafted_per_position"][0] > 0
