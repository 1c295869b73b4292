"""Losses, acceptance, labels, against what they are defined by."""

import itertools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import TinyModels
from vllm_stairs.distill import acceptance, card, training
from vllm_stairs.distill.acceptance import Acceptance, Text, stretches, walk
from vllm_stairs.distill.batching import batches, padded
from vllm_stairs.distill.conversations import GIVEN, GREEDY, SAMPLED, Talk
from vllm_stairs.distill.errors import DistillError
from vllm_stairs.distill.labels import label
from vllm_stairs.distill.losses import distance
from vllm_stairs.distill.prompts import Seed
from vllm_stairs.distill.shards import Folder, Shard
from vllm_stairs.distill.training import (
    DraftTrainer,
    Examples,
    Recipe,
    columns_of_step,
    evaluations_without_gain,
    frequencies,
    held_out_texts,
    last_checkpoint,
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


@pytest.mark.parametrize(
    ("kind", "own"),
    [("granite", {"logits_scaling": 8.0}), ("gemma2", {"final_logit_softcapping": 3.0})],
)
def test_types_that_change_their_logits_are_followed(kind: str, own: dict[str, float]) -> None:
    """In labels and in the loss: with the target as draft, both see one distribution."""
    config = AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        initializer_range=0.5, pad_token_id=None, **own,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tokens = torch.arange(3, 15)
    shard = Shard(
        tokens.numpy().astype(np.int32), np.array([0] + [2] * 11, np.uint8), np.array([0, 12]),
        np.zeros(1, np.int16), np.zeros(1, bool), ("g",),
    )  # fmt: skip
    found = label(shard, model, 5)
    with torch.inference_mode():
        logits = model(tokens[None]).logits[0, :-1]
    values, ids = logits.log_softmax(-1).topk(5)
    assert found.ids.tolist() == ids.tolist()
    np.testing.assert_allclose(found.log_probabilities, values, atol=1e-2)
    trainer = SimpleNamespace(
        head_ids=torch.arange(64), common=torch.arange(64), loss_kind="kl",
        accelerator=SimpleNamespace(autocast=nullcontext),
    )  # fmt: skip
    inputs = {
        "input_ids": tokens[None], "positions": torch.arange(11), "ids": ids,
        "log_probabilities": values,
    }  # fmt: skip
    loss = DraftTrainer.compute_loss(trainer, model, inputs)
    assert loss.item() == pytest.approx(distance("kl", logits, ids, values).item(), rel=1e-4)


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


def random_data(
    tiny: TinyModels, folder: Path, talks: int = 400, origin: int = GREEDY, **settings: str
) -> Folder:
    """Conversations of ids that were drawn, labelled by the target."""
    data = Folder(folder, settings)
    draw = np.random.default_rng(0)
    written = []
    for number in range(talks):
        seed = Seed(str(number), "g", ())
        talk = Talk(seed, greedy=origin == GREEDY, past_the_end=False, temperature=0.0)
        talk.add(draw.integers(3, 60, 4).tolist(), GIVEN)
        talk.add(draw.integers(3, 60, 12).tolist(), origin)
        written.append(talk)
    target = AutoModelForCausalLM.from_pretrained(tiny.target).eval()
    label(data.save(0, written, set()), target, 4).save(data.labels_file(0))
    return data


class Learner:
    """Trains the cut draft on data, and keeps what came of it."""

    def __init__(self, tiny: TinyModels, data: Folder, work: Path, **recipe: Any) -> None:
        self.tiny, self.data, self.work = tiny, data, work
        self.recipe = {"epochs": 1, "batch": 16, "evaluations": 1, "mixed_precision": False}
        self.recipe |= recipe

    def __call__(self, **changes: Any) -> "Learner":
        self.draft = AutoModelForCausalLM.from_pretrained(self.tiny.cut)
        said: list[str] = []
        self.found, curve = train(
            self.draft, [self.data], Recipe(**{**self.recipe, **changes}), self.work,
            counts=frequencies([self.data], self.draft.config.vocab_size), device="cpu",
            say=said.append,
        )  # fmt: skip
        self.steps, self.said = [point["step"] for point in curve], "\n".join(said)
        return self

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.draft.state_dict().items()}


def test_a_training_stops_at_its_limit_and_goes_on(tiny: TinyModels, tmp_path: Path) -> None:
    data = random_data(tiny, tmp_path / "data")
    learner = Learner(tiny, data, tmp_path / "training")

    def learn(max_minutes: float | None) -> tuple[list[float], str]:
        learner(max_minutes=max_minutes)
        assert learner.found["g"].positions > 0
        return learner.steps, learner.said

    steps, said = learn(1e-9)
    assert steps == [0, 1]
    assert "stopping after 1e-09 minutes, at step 1" in said
    steps, said = learn(1e-9)
    assert steps == [0, 1, 2]
    assert "going on from step 1" in said
    steps, said = learn(None)
    assert steps == [0, 1, 2, len(Examples([data])) // 16]
    assert "stopping" not in said
    before = learner.weights
    steps, said = learn(None)  # It has ended: nothing changes.
    assert steps == [0, 1, 2, len(Examples([data])) // 16]
    assert "the training has ended, at step 24" in said
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.weights.items())


def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    tiny: TinyModels, tmp_path: Path
) -> None:
    """In the second pass over the data too: the conversations come in the same order."""
    data = random_data(tiny, tmp_path / "data", talks=60)
    options = {"epochs": 2.5, "evaluations": 9, "patience": 100}
    steps = int(len(Examples([data])) * 2.5 / 16)
    Learner(tiny, data, tmp_path / "whole", **options)()
    learner = Learner(tiny, data, tmp_path / "parts", **options)
    for number in range(1, steps):
        assert learner(max_minutes=1e-9).steps[-1] == number
    learner()
    whole, parts = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / f"checkpoint-{steps}").state_dict()
        for name in ("whole", "parts")
    )
    for name, tensor in parts.items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mixed_precision", [True, False])
def test_mixed_precision_multiplies_in_bfloat16(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixed_precision: bool
) -> None:
    """While it trains and while it judges; the weights stay float32."""
    monkeypatch.setattr(training, "fast_bfloat16", lambda: True)
    dtypes = set()

    def note(module: torch.nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, torch.nn.Linear):
            dtypes.add((torch.is_grad_enabled(), output.dtype))

    learner = Learner(tiny, random_data(tiny, tmp_path / "data"), tmp_path / "training")
    with torch.nn.modules.module.register_module_forward_hook(note):
        learner(mixed_precision=mixed_precision)
    expected = torch.bfloat16 if mixed_precision else torch.float32
    assert dtypes >= {(True, expected), (False, expected)}
    assert not mixed_precision or (True, torch.float32) not in dtypes
    assert {tensor.dtype for tensor in learner.weights.values()} == {torch.float32}


def test_evaluations_without_a_gain_are_counted_on_the_schedule() -> None:
    def count(*points: tuple[int, float]) -> int:
        curve = [{"step": step, "eval_acceptance_length": length} for step, length in points]
        return evaluations_without_gain(curve, 10)

    assert count() == count((0, 1.9)) == count((0, 1.9), (10, 1.0)) == 0
    assert count((0, 1.0), (10, 1.2), (20, 1.2), (30, 1.1)) == 2
    assert count((0, 1.0), (10, 1.2), (13, 1.1), (20, 1.1), (27, 1.2)) == 1
    assert count((0, 1.0), (10, 1.2), (20, 1.1), (25, 1.3)) == 0


def test_a_training_that_has_stopped_early_does_not_go_on(tiny: TinyModels, tmp_path: Path) -> None:
    data = random_data(tiny, tmp_path / "data")
    # Steps so small that nothing changes: the first evaluation stays the best.
    learner = Learner(
        tiny, data, tmp_path / "training", evaluations=8, patience=2, learning_rate=1e-12
    )
    stopped = learner().steps
    assert stopped == [0, 3, 6, 9]
    before = learner.weights
    assert learner().steps == stopped
    assert "the training has ended, at step 9" in learner.said
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.weights.items())


def test_without_a_held_out_conversation_nothing_is_judged(
    tiny: TinyModels, tmp_path: Path
) -> None:
    """Given text, for one: it is not the target's, so it says nothing about what is kept."""
    data = random_data(tiny, tmp_path / "data", talks=64, origin=SAMPLED)
    learner = Learner(tiny, data, tmp_path / "training", evaluations=4, patience=1, epochs=2)
    assert learner().steps == []
    assert "nothing is measured" in learner.said
    assert learner.found == {}
    assert "Not measured" in card.table(learner.found)
    assert (tmp_path / "training" / "checkpoint-8").is_dir()  # It has not stopped early.
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "training" / "checkpoint-8").state_dict()
    assert all(torch.equal(tensor, last[name]) for name, tensor in learner.weights.items())
    assert "has ended" in learner().said
    assert all(torch.equal(tensor, last[name]) for name, tensor in learner.weights.items())


def test_nothing_to_learn_from_is_one_line(tiny: TinyModels, tmp_path: Path) -> None:
    data = Folder(tmp_path / "data", {})
    target = AutoModelForCausalLM.from_pretrained(tiny.target).eval()
    label(data.save(0, [], set()), target, 4).save(data.labels_file(0))
    with pytest.raises(DistillError, match="nothing to learn from"):
        Learner(tiny, data, tmp_path / "training")()


def test_what_a_draft_wrote_is_no_measure_of_it(tiny: TinyModels, tmp_path: Path) -> None:
    data = random_data(tiny, tmp_path / "data")
    assert len(held_out_texts([data])) > 3
    of_draft = random_data(tiny, tmp_path / "other", writer="a draft")
    assert held_out_texts([of_draft]) == []
    assert len(held_out_texts([data, of_draft])) == len(held_out_texts([data]))


def test_a_checkpoint_that_was_not_written_whole_is_passed_over(tmp_path: Path) -> None:
    for step, state in ((5, "{}"), (10, "{}"), (15, '{"best_'), (20, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_checkpoint(tmp_path / "nowhere") is None


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
