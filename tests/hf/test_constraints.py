"""Processors that know some texts only are shown what `generate` shows them, nothing else."""

from typing import Any

import pytest
import torch
from scipy import stats
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from tests.hf.tiny_pairs import EOS, PAD, early_ends, pair, prompts
from vllm_stairs.hf import stairs

LAYOUTS = ("packed", "expanded")
NEW = 24


class Trie:
    """A `prefix_allowed_tokens_fn` over a fixed set of texts; KeyError on any other text.

    In a batch a row that has ended is shown with padding, as `generate` does; alone it is
    not shown any more, and its text is unknown then.
    """

    def __init__(self, texts: list[list[int]], prompt: int, padded: bool) -> None:
        self.children: dict[tuple[int, ...], set[int]] = {}
        self.prompt, self.padded = prompt, padded
        self.shown: list[tuple[int, tuple[int, ...]]] = []
        for text in texts:
            for cut in range(len(text)):
                self.children.setdefault(tuple(text[:cut]), set()).add(text[cut])

    def __call__(self, row: int, ids: torch.Tensor) -> list[int]:
        written = tuple(ids[self.prompt :].tolist())
        self.shown.append((row, written))
        if self.padded and EOS in written:
            end = written.index(EOS)
            if set(written[end + 1 :]) <= {PAD}:
                return [PAD]
        return sorted(self.children[written])


def known_texts(model: Any, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """What the target writes alone, cut at different lengths, and other texts that begin so."""
    rows = len(inputs["input_ids"])
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    generator = torch.Generator().manual_seed(0)
    texts = []
    for row, text in enumerate(plain[:, -NEW:].tolist()):
        text = [token if token > EOS else 5 for token in text]
        length = 6 + 5 * (rows - row)
        texts.append([*text[:length], EOS])
        for cut in range(0, length, 2):
            other = torch.randint(3, 64, (4,), generator=generator).tolist()
            texts.append([*text[:cut], *other, EOS])
    return texts


@pytest.mark.parametrize("kind", ["llama", "t5", "bart"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trie(kind: str, batch: int, layout: Any) -> None:
    """Same text, and the very same calls: no draft is shown that the target refuses."""
    model, assistant = pair(kind)
    inputs = prompts(kind, batch)
    texts = known_texts(model, inputs)
    prompt = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    climber = stairs(assistant, num_speculative_tokens=4, adaptive=False, layout=layout)
    seen = []
    for options in ({}, {"custom_generate": climber}):
        trie = Trie(texts, prompt, padded=batch > 1)
        text = model.generate(
            **inputs,
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=EOS,
            prefix_allowed_tokens_fn=trie,
            **options,
        )
        seen.append((text.tolist(), trie.shown))
    assert seen[0] == seen[1]
    new = torch.tensor(seen[0][0])[:, prompt:]
    lengths = (new == EOS).int().argmax(1)
    assert len(set(lengths.tolist())) >= min(batch, 2), "rows should end at different times"
    assert climber.stats.accepted > 0
    assert climber.stats.refused > 0


class Counting(LogitsProcessor):
    """A processor of a user's: forbids another token at every call, whatever it is shown."""

    def __init__(self) -> None:
        self.shown: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.shown.append(input_ids.tolist())
        scores = scores.clone()
        scores[:, 3 + len(self.shown) % 61 :: 7] = -torch.inf
        return scores


class Stricter(RepetitionPenaltyLogitsProcessor):
    """A subclass of one of Transformers' is a user's too."""

    def __init__(self) -> None:
        super().__init__(1.3)
        self.shown: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.shown.append(input_ids.tolist())
        return super().__call__(input_ids, scores)


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("make", [Counting, Stricter])
def test_processors_of_ones_own(kind: str, batch: int, make: Any) -> None:
    """One that counts its calls does what it does under `generate`."""
    model, assistant = pair(kind, noise=0.05)
    inputs = prompts(kind, batch)
    more = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": early_ends(model, inputs)}
    climber = stairs(assistant, num_speculative_tokens=3, adaptive=False)
    seen = []
    for options in ({}, {"custom_generate": climber}):
        own = make()
        text = model.generate(
            **inputs, **more, **options, logits_processor=LogitsProcessorList([own])
        )
        seen.append((text.tolist(), own.shown))
    assert seen[0] == seen[1]
    assert climber.stats.drafted > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_own_are_not_shown_more_than_there_can_be(
    layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No text as long as the limit, and nothing but padding after an end, drafted or not.

    Rows differ in length here, so what is beyond a row's own end is not looked at.
    """
    model, assistant = pair("llama")
    inputs = prompts("llama", 4)
    ends = early_ends(model, inputs)
    lengths, tails = [], []
    original = RepetitionPenaltyLogitsProcessor.__call__

    def spy(self: Any, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        lengths.append(input_ids.shape[1])
        for row in input_ids[scores.ne(0).any(1), 9:].tolist():
            end = min((row.index(token) for token in ends if token in row), default=len(row))
            tails.extend(row[end + 1 :])
        return original(self, input_ids, scores)

    more = {"max_length": 30, "do_sample": False, "eos_token_id": ends, "repetition_penalty": 1.05}
    expected = model.generate(**inputs, **more)
    monkeypatch.setattr(RepetitionPenaltyLogitsProcessor, "__call__", spy)
    climber = stairs(assistant, num_speculative_tokens=6, adaptive=False, layout=layout)
    assert torch.equal(model.generate(**inputs, **more, custom_generate=climber), expected)
    assert max(lengths) == 29
    assert set(tails) <= {PAD}


def test_no_draft_beyond_the_limit_counts() -> None:
    """Rows of different lengths: the longer ones draft no further than the limit."""
    model, _ = pair("llama")
    inputs = prompts("llama", 4)
    assistant = pair("llama", noise=0.3)[1]
    for tokens in range(6, 14):
        climber = stairs(assistant, num_speculative_tokens=6, adaptive=False)
        more = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
        text = model.generate(**inputs, **more, custom_generate=climber)
        assert torch.equal(text, model.generate(**inputs, **more))
        written = climber.stats.accepted + climber.stats.staircases
        assert written == 4 * tokens


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_sampling_in_step(kind: str) -> None:
    """Judged stair by stair, samples still have the target's distribution."""
    model, assistant = pair(kind, noise=0.05)
    calls, rows = 90, 30
    ids = torch.tensor([[5, 9, 11, 7]])
    options: dict[str, Any] = {
        "do_sample": True,
        "top_k": 4,
        "temperature": 1.3,
        "max_new_tokens": 3,
        "eos_token_id": None,
        "prefix_allowed_tokens_fn": lambda row, text: [*range(3, 64, 2), int(text[-1]) // 2 * 2],
    }
    climber = stairs(assistant, num_speculative_tokens=2, adaptive=False)
    torch.manual_seed(1)
    ours = torch.cat(
        [
            model.generate(ids, num_return_sequences=rows, custom_generate=climber, **options)
            for _ in range(calls)
        ]
    )
    torch.manual_seed(2)
    plain = model.generate(ids, num_return_sequences=rows * calls, **options)
    for column in (-3, -2, -1):
        seen = torch.stack(
            [torch.bincount(text[:, column], minlength=64) for text in (ours, plain)]
        )
        seen = seen[:, seen.sum(0) >= 10]
        assert stats.chi2_contingency(seen.numpy()).pvalue > 1e-3
    assert climber.stats.accepted > 0
