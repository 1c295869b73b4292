"""Losses, acceptance, labels, against what they are defined by."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import TinyModels
from vllm_stairs.distill import acceptance
from vllm_stairs.distill.acceptance import Acceptance, Text, stretches, walk
from vllm_stairs.distill.batching import batches, padded
from vllm_stairs.distill.conversations import GIVEN, GREEDY, Talk
from vllm_stairs.distill.labels import label
from vllm_stairs.distill.losses import distance
from vllm_stairs.distill.prompts import Seed
from vllm_stairs.distill.shards import Folder, Shard
from vllm_stairs.distill.training import (
    Examples,
    Recipe,
    columns_of_step,
    frequencies,
    train,
    trained_ids,
)


def coarsen(p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    kept = p.gather(-1, ids)
    return torch.cat([kept, (1 - kept.sum(-1, keepdim=True)).clamp(min=0)], -1)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    target = torch.randn(12, 30).mul(2).softmax(-1).double()
    draft = torch.randn(12, 30).double()
    return target, draft, target.topk(5).indices


def test_kl_is_the_cross_entropy_of_the_coarse_distributions(pair) -> None:
    target, draft, ids = pair
    p, q = coarsen(target, ids), coarsen(draft.softmax(-1), ids)
    expected = -(p * q.log()).sum(-1).mean()
    found = distance("kl", draft, ids, target.gather(-1, ids).log())
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_total_variation_is_the_probability_of_a_refusal(pair) -> None:
    target, draft, ids = pair
    p, q = coarsen(target, ids), coarsen(draft.softmax(-1), ids)
    expected = (p - q).abs().sum(-1).mean() / 2
    found = distance("tv", draft, ids, target.gather(-1, ids).log())
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    both = distance("kl+tv", draft, ids, target.gather(-1, ids).log())
    alone = distance("kl", draft, ids, target.gather(-1, ids).log())
    assert both.item() == pytest.approx(alone.item() + found.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["kl", "tv", "kl+tv"])
def test_the_target_itself_is_the_best_draft(pair, kind) -> None:
    target, draft, ids = pair
    logs = target.gather(-1, ids).log()
    best = distance(kind, target.log(), ids, logs)
    assert best < distance(kind, draft, ids, logs)
    logits = target.log().clone().requires_grad_()
    distance(kind, logits, ids, logs).backward()
    if kind == "kl":
        assert logits.grad.abs().max() < 1e-5


def test_ids_that_the_draft_is_not_trained_on_count_with_the_rest(pair) -> None:
    target, draft, ids = pair
    ids = ids.clone()
    ids[:, 2] = -1
    logs = target.topk(5).values.log()
    found = distance("kl", draft, ids, logs)
    kept = ids[:, [0, 1, 3, 4]]
    p, q = coarsen(target, kept), coarsen(draft.softmax(-1), kept)
    assert found.item() == pytest.approx(-(p * q.log()).sum(-1).mean().item(), rel=1e-4)
    assert torch.isfinite(found)


def test_a_walk_is_what_staircases_would_bring() -> None:
    assert walk(np.array([1, 1, 0, 1], bool), 4) == [2, 1]
    assert walk(np.array([1] * 10, bool), 4) == [4, 4]
    assert walk(np.array([0, 0, 0], bool), 4) == [0, 0, 0]
    assert walk(np.array([], bool), 4) == []
    for bits in itertools.product([False, True], repeat=7):
        for height in (1, 2, 4):
            kept = walk(np.array(bits), height)
            assert sum(k + 1 for k in kept) in (7, 8)  # The last token of all may be a bonus.
            assert max(kept) <= height


def test_stretches() -> None:
    mask = np.array([0, 1, 1, 0, 1], bool)
    assert list(stretches(mask)) == [slice(1, 3), slice(4, 5)]
    assert list(stretches(np.zeros(3, bool))) == []


def test_acceptance_of_a_model_on_its_own_greedy_text_is_full(tiny: TinyModels) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.target).eval()
    other = AutoModelForCausalLM.from_pretrained(tiny.random).eval()
    prompts = torch.randint(3, 60, (3, 5), generator=torch.Generator().manual_seed(0))
    out = model.generate(prompts, max_new_tokens=24, do_sample=False, eos_token_id=-1).numpy()
    greedy = np.r_[np.zeros(5, bool), np.ones(24, bool)]
    texts = [Text(row.astype(np.int32), greedy, "g") for row in out]
    found = acceptance.measure(model, texts)["g"]
    assert found.first_position == 1.0
    assert found.positions == 72
    # 23 tokens after the prefill's own: 4 whole staircases and one of 3, in each text.
    assert found.kept == (15, 15, 15, 12)
    assert found.length == pytest.approx(1 + 57 / 15)
    assert acceptance.measure(other, texts)["g"].first_position < 0.3
    assert acceptance.mean({"a": found, "b": Acceptance()}) == (0.5, (found.length + 1) / 2)


def test_labels_are_the_targets_distribution(tiny: TinyModels) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.target).eval()
    generator = torch.Generator().manual_seed(0)
    lengths = [7, 12, 3]
    tokens = torch.randint(3, 60, (sum(lengths),), generator=generator)
    origin = torch.randint(0, 3, (sum(lengths),), generator=generator)
    offsets = np.cumsum([0, *lengths])
    origin[offsets[:-1]] = 0
    shard = Shard(
        tokens.numpy().astype(np.int32), origin.numpy().astype(np.uint8), offsets,
        np.zeros(3, np.int16), np.zeros(3, bool), ("g",),
    )  # fmt: skip
    done = []
    found = label(shard, model, 4, done.append)
    assert sum(done) == shard.written
    row = 0
    for n in range(3):
        place = shard.conversation(n)
        with torch.inference_mode():
            logs = model(tokens[place][None]).logits[0].log_softmax(-1)
        for position in range(1, lengths[n]):
            if origin[place][position] > 0:
                values, ids = logs[position - 1].topk(4)
                assert found.ids[row].tolist() == ids.tolist()
                np.testing.assert_allclose(found.log_probabilities[row], values, atol=2e-2)
                row += 1
    assert row == len(found.ids)


def test_the_trained_ids_are_the_frequent_ones() -> None:
    counts = np.array([0, 10_000_000, 5, 3, 0, 20_000_000, 30_000])
    assert trained_ids(counts, Recipe().head_coverage).tolist() == [1, 5, 6]
    assert trained_ids(counts, 0.5).tolist() == [5]
    assert trained_ids(counts, 1.0).tolist() == [1, 2, 3, 5, 6]


def test_batches_hold_every_text_once_and_not_too_much() -> None:
    lengths = [3, 50, 4, 3, 1, 20, 4]
    found = list(batches(lengths, 12))
    assert found == [[4, 0, 3], [2, 6], [5], [1]]  # Of 1, 3 and 3 tokens; a fourth would be 16.
    assert list(batches([], 12)) == []
    texts = [np.array([5, 6], np.int32), np.array([7], np.int32)]
    assert padded(texts).tolist() == [[5, 6], [7, 0]]


def test_what_a_training_that_goes_on_must_have_in_common() -> None:
    # The names of trainings that were begun before the others could be chosen.
    assert set(Recipe().identity()) == {
        "loss", "learning_rate", "epochs", "batch", "evaluations", "patience", "mixed_precision",
        "seed",
    }  # fmt: skip
    assert Recipe(max_minutes=1.0).identity() == Recipe().identity()
    assert Recipe(head_coverage=0.9).identity() != Recipe().identity()


def test_a_training_stops_at_its_limit_and_goes_on(tiny: TinyModels, tmp_path: Path) -> None:
    data = Folder(tmp_path / "data", {})
    draw = np.random.default_rng(0)
    talks = []
    for number in range(400):
        seed = Seed(str(number), "g", ())
        talk = Talk(seed, greedy=True, past_the_end=False, temperature=0.0)
        talk.add(draw.integers(3, 60, 4).tolist(), GIVEN)
        talk.add(draw.integers(3, 60, 12).tolist(), GREEDY)
        talks.append(talk)
    target = AutoModelForCausalLM.from_pretrained(tiny.target).eval()
    label(data.save(0, talks, set()), target, 4).save(data.labels_file(0))

    def learn(max_minutes: float | None) -> tuple[list[float], str]:
        recipe = Recipe(
            epochs=1, batch=16, evaluations=1, mixed_precision=False, max_minutes=max_minutes
        )
        draft = AutoModelForCausalLM.from_pretrained(tiny.cut)
        counts = frequencies([data], draft.config.vocab_size)
        said: list[str] = []
        found, curve = train(
            draft, [data], recipe, tmp_path / "training", counts=counts, device="cpu",
            say=said.append,
        )  # fmt: skip
        assert found["g"].positions > 0
        return [point["step"] for point in curve], "\n".join(said)

    steps, said = learn(1e-9)
    assert steps == [0, 1]
    assert "stopping after 1e-09 minutes, at step 1" in said
    steps, said = learn(1e-9)
    assert steps == [0, 1, 2]
    assert "going on from step 1" in said
    steps, said = learn(None)
    assert steps == [0, 1, 2, len(Examples([data])) // 16]
    assert "stopping" not in said


def test_a_step_uses_the_frequent_ids_and_those_that_are_likely_in_it():
    ids = torch.tensor([[5, 1, 7], [2, -1, 5]])
    probabilities = torch.tensor([[0.9, 0.05, 1e-5], [0.5, 0.4, 0.1]])
    columns, found = columns_of_step(ids, probabilities.log(), torch.tensor([0, 2]), 9)
    assert columns.tolist() == [0, 1, 2, 5]
    # 7 is neither frequent nor likely: it counts with the rest, as an id that is not trained.
    assert found.tolist() == [[3, 1, -1], [2, -1, 3]]
    everything, same = columns_of_step(ids, probabilities.log(), torch.arange(9), 9)
    assert everything.tolist() == list(range(9))
    assert same.tolist() == ids.tolist()
