"""Greedy stairs write, token for token, what greedy `generate` writes."""

import itertools
from typing import Any

import pytest
import torch

from tests.hf.tiny_pairs import early_ends, pair, prompts
from vllm_stairs.hf import stairs, stairs_generate

KINDS = ("llama", "t5")
BATCHES = (1, 2, 5)
HEIGHTS = tuple(range(1, 9))
LAYOUTS = ("packed", "expanded")
ENDINGS = (False, True)


def check(
    kind: str, batch: int, height: int, layout: Any, ends_early: bool, **options: Any
) -> None:
    model, assistant = pair(kind)
    inputs = prompts(kind, batch, seed=batch)
    more: dict[str, Any] = {"max_new_tokens": 36, "do_sample": False}
    if ends_early:
        more["eos_token_id"] = early_ends(model, inputs)
    expected = model.generate(**inputs, **more)
    climber = stairs(assistant, num_speculative_tokens=height, layout=layout, **options)
    assert torch.equal(model.generate(**inputs, **more, custom_generate=climber), expected)
    if not options.get("adaptive", True):
        assert climber.stats.drafted > 0


def pairwise() -> list[tuple[Any, ...]]:
    """Every height with every kind; other dimensions vary along."""
    cells = []
    for number, (kind, height) in enumerate(itertools.product(KINDS, HEIGHTS)):
        cells.append(
            (
                kind,
                BATCHES[number % 3],
                height,
                LAYOUTS[(number // 2) % 2],
                ENDINGS[number % 2],
            )
        )
    cells += [(kind, 5, 3, layout, True) for kind in KINDS for layout in LAYOUTS]
    return cells


@pytest.mark.parametrize(("kind", "batch", "height", "layout", "ends_early"), pairwise())
def test_fixed_height(kind: str, batch: int, height: int, layout: str, ends_early: bool) -> None:
    check(kind, batch, height, layout, ends_early, adaptive=False)


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "batch", "height", "layout", "ends_early"),
    list(itertools.product((*KINDS, "gpt2", "bart"), (1, 2, 3, 5, 8), HEIGHTS, LAYOUTS, ENDINGS)),
)
def test_fixed_height_whole_matrix(
    kind: str, batch: int, height: int, layout: str, ends_early: bool
) -> None:
    check(kind, batch, height, layout, ends_early, adaptive=False)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_architectures(kind: str, layout: str) -> None:
    """Learned positions too; BART counts columns, so its rows advance in step."""
    check(kind, 4, 4, layout, True, adaptive=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 4])
def test_adaptive(kind: str, batch: int) -> None:
    check(kind, batch, 8, "packed", True, adaptive=True)


class Wandering:
    """A policy that takes every height in turn, 0 included."""

    max_height = 5
    uses_confidence = False

    def __init__(self) -> None:
        self.step = 0

    def choose(self, batch: int = 1) -> int:
        self.step += 1
        return (3, 0, 5, 1, 0, 0, 4)[self.step % 7]

    def limit(self, chosen: int) -> int:
        return chosen

    def observe(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_changing_heights(kind: str, layout: Any) -> None:
    """After steps without a draft the assistant catches up; copies change their shape."""
    check(kind, 3, 5, layout, False, policy=Wandering())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_caches(kind: str, layout: Any) -> None:
    model, assistant = pair(kind)
    inputs = prompts(kind, 3)
    more = {"max_new_tokens": 14, "do_sample": False, "use_cache": False}
    expected = model.generate(**inputs, **more)
    assert torch.equal(
        stairs_generate(
            model, assistant, **inputs, **more, num_speculative_tokens=3, layout=layout
        ),
        expected,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_as_its_own_assistant(kind: str) -> None:
    """Every draft is kept, and the caches are right after each of them."""
    model, _ = pair(kind)
    inputs = prompts(kind, 3)
    more: dict[str, Any] = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": None}
    climber = stairs(model, num_speculative_tokens=4, adaptive=False)
    result = model.generate(**inputs, **more, custom_generate=climber)
    assert torch.equal(result, model.generate(**inputs, **more))
    assert climber.stats.acceptance == 1.0
    assert climber.stats.steps == 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_useless_assistant(kind: str) -> None:
    model, _ = pair(kind)
    _, stranger = pair(kind, noise=3.0)
    inputs = prompts(kind, 2)
    more = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(
        stairs_generate(model, stranger, **inputs, **more, num_speculative_tokens=3),
        model.generate(**inputs, **more),
    )


def test_the_encoder_runs_once() -> None:
    model, assistant = pair("t5")
    runs = []
    hooks = [
        member.get_encoder().register_forward_hook(lambda *_: runs.append(1))
        for member in (model, assistant)
    ]
    stairs_generate(model, assistant, **prompts("t5", 2), max_new_tokens=20)
    for hook in hooks:
        hook.remove()
    assert len(runs) == 2


def test_one_new_token_and_no_mask() -> None:
    model, assistant = pair("llama")
    ids = prompts("llama", 1)["input_ids"]
    for tokens in (1, 2):
        assert torch.equal(
            stairs_generate(model, assistant, ids, max_new_tokens=tokens),
            model.generate(ids, max_new_tokens=tokens),
        )


def test_beyond_the_assistants_positions() -> None:
    """GPT-2 cannot read past its positions: near the limit there are no drafts."""
    model, _ = pair("llama")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    short = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=20, n_embd=16, n_layer=1, n_head=2)
    ).eval()
    inputs = prompts("llama", 2)
    assert torch.equal(
        stairs_generate(model, short, **inputs, max_new_tokens=30, adaptive=False),
        model.generate(**inputs, max_new_tokens=30),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_up_to_the_targets_last_position(layout: Any) -> None:
    """Rows of different lengths near the end of GPT-2's position table."""
    model, assistant = pair("gpt2")
    inputs = prompts("gpt2", 4)
    more: dict[str, Any] = {"max_length": 128, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        stairs_generate(model, assistant, **inputs, **more, adaptive=False, layout=layout),
        model.generate(**inputs, **more),
    )
