"""What `GenerationConfig` and `generate` offer is honoured, or refused in one line."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from tests.hf.tiny_pairs import early_ends, pair, prompts
from vllm_stairs.hf import stairs, stairs_generate

PROCESSORS: dict[str, dict[str, Any]] = {
    "min_new_tokens": {"min_new_tokens": 12},
    "min_length": {"min_length": 15},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[5], [9, 11], [20]]},
    "suppress_tokens": {"suppress_tokens": [7, 8, 30, 41, 49, 63]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 40))},
    "forced_eos": {"forced_eos_token_id": 1},
    "exponential_decay": {"exponential_decay_length_penalty": (5, 1.4)},
    "sequence_bias": {"sequence_bias": [[[12], 3.0], [[4, 6], -4.0]]},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 2.0},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.2},
    "prefix_allowed_tokens_fn": {
        "prefix_allowed_tokens_fn": lambda row, ids: [
            1,
            *range(3 + (row + len(ids)) % 3, 64, 1 + row % 2),
        ]
    },
}


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("name", list(PROCESSORS))
def test_processors(kind: str, name: str) -> None:
    model, assistant = pair(kind)
    inputs = prompts(kind, 3)
    ends = early_ends(model, inputs) if kind == "llama" else 1
    usual = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": ends}
    more = usual | PROCESSORS[name]
    expected = model.generate(**inputs, **more)
    plain = model.generate(**inputs, **usual)
    for layout in ("packed", "expanded"):
        climber = stairs(assistant, num_speculative_tokens=4, adaptive=False, layout=layout)
        assert torch.equal(model.generate(**inputs, **more, custom_generate=climber), expected)
    if name in ("repetition_penalty", "suppress_tokens", "prefix_allowed_tokens_fn"):
        assert expected.shape != plain.shape or not torch.equal(expected, plain)


class Every(StoppingCriteria):
    """Ends a row at a token; counts its calls, and looks at the whole batch."""

    def __init__(self, token: int) -> None:
        self.token, self.calls = token, []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.calls.append(input_ids.tolist())
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("eos", [True, False])
def test_own_criteria_see_what_generate_shows_them(kind: str, eos: bool) -> None:
    model, assistant = pair(kind)
    inputs = prompts(kind, 3)
    ends = early_ends(model, inputs)
    more: dict[str, Any] = {"max_new_tokens": 25, "do_sample": False}
    more["eos_token_id"] = ends[:2] if eos else None
    seen = []
    for options in ({}, {"custom_generate": stairs(assistant, adaptive=False)}):
        criterion = Every(ends[-1])
        text = model.generate(
            **inputs, **more, **options, stopping_criteria=StoppingCriteriaList([criterion])
        )
        seen.append((text.tolist(), criterion.calls))
    assert seen[0] == seen[1]


def test_max_time() -> None:
    model, assistant = pair("llama")
    text = stairs_generate(
        model, assistant, **prompts("llama", 2), max_new_tokens=100, max_time=0.0
    )
    assert text.shape[1] < 9 + 12


def tokenizer_of_letters() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [chr(ord("0") + i) for i in range(64)]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=letters[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=letters[0])


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("eos", [True, False])
def test_stop_strings(kind: str, eos: bool) -> None:
    """With an end token rows are padded after their stop string; without, they go on."""
    model, assistant = pair(kind)
    inputs = prompts(kind, 4)
    tokenizer = tokenizer_of_letters()
    more: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    plain = model.generate(**inputs, **more, eos_token_id=None)[:, -30:]
    stops = ["".join(tokenizer.convert_ids_to_tokens(plain[row, 8:10])) for row in range(3)]
    more["eos_token_id"] = 1 if eos else None
    expected = model.generate(**inputs, **more, stop_strings=stops, tokenizer=tokenizer)
    result = stairs_generate(
        model,
        assistant,
        **inputs,
        **more,
        stop_strings=stops,
        tokenizer=tokenizer,
        adaptive=False,
    )
    assert torch.equal(result, expected)


class Recorder(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.log: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.log.append(value.tolist())

    def end(self) -> None:
        self.log.append("end")


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("batch", [1, 3])
def test_streamers_get_what_generate_gives_them(kind: str, batch: int) -> None:
    model, assistant = pair(kind)
    inputs = prompts(kind, batch)
    more = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": early_ends(model, inputs)}
    ours, theirs = Recorder(), Recorder()
    model.generate(**inputs, **more, streamer=theirs)
    stairs_generate(model, assistant, **inputs, **more, streamer=ours, adaptive=False)
    assert ours.log == theirs.log


def test_text_streamer(capsys: pytest.CaptureFixture[str]) -> None:
    model, assistant = pair("llama")
    inputs, tokenizer = prompts("llama", 1), tokenizer_of_letters()
    model.generate(**inputs, max_new_tokens=12, streamer=TextStreamer(tokenizer))
    expected = capsys.readouterr().out
    stairs_generate(model, assistant, **inputs, max_new_tokens=12, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("layout", ["packed", "expanded"])
def test_scores_and_logits(kind: str, layout: Any) -> None:
    model, assistant = pair(kind)
    inputs = prompts(kind, 3)
    more = {
        "max_new_tokens": 20,
        "do_sample": False,
        "eos_token_id": early_ends(model, inputs),
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.2,
    }
    theirs = model.generate(**inputs, **more)
    ours = stairs_generate(model, assistant, **inputs, **more, layout=layout, adaptive=False)
    assert type(ours) is type(theirs)
    assert torch.equal(ours.sequences, theirs.sequences)
    new = theirs.sequences[:, -len(theirs.scores) :]
    going = torch.ones(3, dtype=torch.bool)
    for column, token in enumerate(new.T):
        for mine, other in ((ours.scores, theirs.scores), (ours.logits, theirs.logits)):
            assert len(mine) == len(other)
            torch.testing.assert_close(
                mine[column][going], other[column][going], rtol=1e-4, atol=1e-4
            )
            assert (mine[column][~going].argmax(-1) == 0).all()
        going &= ~torch.isin(token, torch.tensor(more["eos_token_id"]))


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("layout", ["packed", "expanded"])
def test_the_cache_that_is_returned(kind: str, layout: Any) -> None:
    """Rolled back exactly: as long as `generate`'s, with the same contents."""
    model, assistant = pair(kind)
    inputs = prompts(kind, 1)
    more = {"max_new_tokens": 17, "do_sample": False, "return_dict_in_generate": True}
    theirs = model.generate(**inputs, **more)
    ours = stairs_generate(model, assistant, **inputs, **more, layout=layout, adaptive=False)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert type(ours.past_key_values) is type(theirs.past_key_values)
    for mine, other in zip(ours.past_key_values, theirs.past_key_values, strict=True):
        for a, b in zip(mine, other, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_several_sequences_per_prompt() -> None:
    for kind in ("llama", "t5"):
        model, assistant = pair(kind)
        text = stairs_generate(
            model,
            assistant,
            **prompts(kind, 2),
            do_sample=True,
            num_return_sequences=3,
            max_new_tokens=6,
        )
        assert text.shape[0] == 6


def test_statistics() -> None:
    model, assistant = pair("llama")
    climber = stairs(assistant, num_speculative_tokens=3, adaptive=False)
    model.generate(**prompts("llama", 2), max_new_tokens=20, custom_generate=climber)
    stats = climber.stats
    assert stats.accepted + stats.refused <= stats.drafted
    assert 1.0 <= stats.acceptance_length <= 4.0
    assert sum(stats.heights.values()) == stats.staircases
    assert stats.as_dict()["acceptance_per_position"].keys() <= {"1", "2", "3"}
    stats.reset()
    assert stats.steps == 0
    assert not stats.heights


# -- refusals ----------------------------------------------------------------------------


def one_line(message: str) -> bool:
    return "\n" not in message and len(message) < 260


def refused(match: str, model: Any, assistant: Any, **options: Any) -> None:
    kind = "t5" if model.config.is_encoder_decoder else "llama"
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        stairs_generate(model, assistant, **{**prompts(kind, 2), "max_new_tokens": 5, **options})
    assert one_line(str(caught.value))


def test_missing_assistant() -> None:
    model, _ = pair("llama")
    refused("needs an assistant", model, None)
    refused("needs an assistant", model, "some/model")


def test_mismatched_vocabularies() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model, _ = pair("llama")
    config = LlamaConfig.from_dict({**model.config.to_dict(), "vocab_size": 72})
    torch.manual_seed(0)
    other = LlamaForCausalLM(config).eval()
    refused("vocabularies have 64 and 72", model, other)
    tokenizer = tokenizer_of_letters()
    inputs = prompts("llama", 2)
    result = stairs_generate(
        model,
        other,
        **inputs,
        max_new_tokens=12,
        tokenizer=tokenizer,
        assistant_tokenizer=tokenizer,
        adaptive=False,
    )
    assert torch.equal(result, model.generate(**inputs, max_new_tokens=12))
    longer = tokenizer_of_letters()
    longer.add_tokens(["zz"])
    refused(
        "tokenizers given differ", model, other, tokenizer=tokenizer, assistant_tokenizer=longer
    )


def test_pairs_of_two_kinds() -> None:
    refused("one kind", pair("llama")[0], pair("t5")[0])
    refused("one kind", pair("t5")[0], pair("llama")[0])


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("not beam search", {"num_beams": 2}),
        ("prompt_lookup_num_tokens|not assisted generation", {"prompt_lookup_num_tokens": 3}),
        ("DynamicCache only", {"cache_implementation": "static"}),
        ("prefill_chunk_size", {"prefill_chunk_size": 4}),
        (
            "does not return attentions",
            {"output_attentions": True, "return_dict_in_generate": True},
        ),
        (
            "does not return hidden_states",
            {"output_hidden_states": True, "return_dict_in_generate": True},
        ),
        ("UnbatchedClassifierFreeGuidance", {"guidance_scale": 2.0}),
        ("num_speculative_tokens must be at least 1", {"num_speculative_tokens": 0}),
        ("num_speculative_tokens must be a whole number", {"num_speculative_tokens": 2.5}),
        ("layout must be one of packed, expanded", {"layout": "folded"}),
        ("stop_strings need", {"stop_strings": ["a"]}),
    ],
)
def test_unsupported_options(match: str, options: dict[str, Any]) -> None:
    refused(match, *pair("llama"), **options)


def test_encoder_outputs_without_input() -> None:
    model, assistant = pair("t5")
    inputs = prompts("t5", 2)
    encoded = model.encoder(**inputs)
    with pytest.raises(ValueError, match="not encoder_outputs"):
        stairs_generate(model, assistant, encoder_outputs=encoded, max_new_tokens=4)


def test_sliding_windows_are_refused() -> None:
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
        pad_token_id=0,
    )
    sliding = MistralForCausalLM(config).eval()
    assert isinstance(sliding, torch.nn.Module)
    refused("sliding window", sliding, pair("llama")[1])
    refused("the assistant has", pair("llama")[0], sliding)


def test_a_cache_of_the_callers() -> None:
    from transformers import DynamicCache

    refused("past_key_values of the caller", *pair("llama"), past_key_values=DynamicCache())


@pytest.mark.parametrize("name", ["streamer", "assistant_model", "tokenizer"])
def test_arguments_that_generate_would_drop(name: str) -> None:
    model, assistant = pair("llama")
    values = {
        "streamer": Recorder(),
        "assistant_model": assistant,
        "tokenizer": tokenizer_of_letters(),
    }
    with pytest.raises(ValueError, match=f"generate\\(\\) drops {name}") as caught:
        model.generate(
            **prompts("llama", 1), custom_generate=stairs(assistant), **{name: values[name]}
        )
    assert one_line(str(caught.value))


@pytest.mark.full
def test_a_real_target(smollm2: Any) -> None:
    """SmolLM2-135M-Instruct with its first layers as assistant: real weights, real text."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    config = type(model.config).from_dict({**model.config.to_dict(), "num_hidden_layers": 29})
    draft = LlamaForCausalLM(config).eval()
    draft.load_state_dict(model.state_dict(), strict=False)
    inputs = tokenizer(
        ["The capital of France is", "Water boils at", "In the beginning there was a very"],
        return_tensors="pt",
        padding=True,
    )
    more = {"max_new_tokens": 24, "do_sample": False}
    expected = model.generate(**inputs, **more)
    for layout in ("packed", "expanded"):
        climber = stairs(draft, num_speculative_tokens=3, adaptive=False, layout=layout)
        assert torch.equal(model.generate(**inputs, **more, custom_generate=climber), expected)
