"""What `GenerationConfig` and `generate` offer is honoured, or refused in one line."""

import copy
from typing import Any

import pytest
import torch
from scipy import stats
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
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
from vllm_stairs.hf.cache import with_roll_back

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


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_limit_far_beyond_what_is_written(kind: str) -> None:
    """Nothing is reserved for what `max_length` would allow."""
    model, assistant = pair(kind)
    inputs = prompts(kind, 3)
    more = {
        "max_length": 10**12,
        "do_sample": False,
        "eos_token_id": early_ends(model, inputs, 3),
    }
    result = stairs_generate(model, assistant, **inputs, **more, adaptive=False)
    assert torch.equal(result, model.generate(**inputs, **more))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_text_longer_than_what_is_reserved_at_first(kind: str) -> None:
    model, assistant = pair(kind)
    inputs = prompts(kind, 3)
    more: dict[str, Any] = {"max_new_tokens": 200, "do_sample": False, "eos_token_id": None}
    climber = stairs(assistant, adaptive=False)
    result = model.generate(**inputs, **more, custom_generate=climber)
    assert torch.equal(result, model.generate(**inputs, **more))


def broken_pair(kind: str) -> tuple[Any, Any]:
    """An assistant that gives NaN as long as one of some tokens is in its text."""
    model, assistant = pair(kind, noise=0.05)
    assistant = copy.deepcopy(assistant)
    embeddings = assistant.get_input_embeddings()
    with torch.no_grad():
        if kind == "t5":  # the head is tied; keep the logits of all tokens as they are
            assistant.lm_head.weight = torch.nn.Parameter(embeddings.weight.clone())
        embeddings.weight[list(range(3, 64, 3))] = torch.nan
    return model, assistant


def test_an_assistant_without_a_distribution() -> None:
    """All NaN: nothing is drafted, and nothing is lost."""
    model, assistant = pair("llama")
    assistant = copy.deepcopy(assistant)
    torch.nn.init.constant_(assistant.lm_head.weight, torch.nan)
    inputs = prompts("llama", 3)
    for adaptive in (False, True):
        climber = stairs(assistant, num_speculative_tokens=3, adaptive=adaptive)
        more: dict[str, Any] = {"max_new_tokens": 20, "custom_generate": climber}
        expected = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        assert torch.equal(model.generate(**inputs, **more, do_sample=False), expected)
        assert model.generate(**inputs, **more, do_sample=True).shape[0] == 3
        assert climber.stats.accepted == 0
        # The policy learns that this assistant is of no use.
        assert not adaptive or climber.stats.drafted < 0.8 * climber.stats.staircases


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_sampling_with_a_draft_that_breaks(kind: str) -> None:
    """Rows in which the assistant overflows go on without it; the distribution is the target's."""
    model, assistant = broken_pair(kind)
    ids = torch.tensor([[5, 10, 11, 7]])
    options = {
        "do_sample": True,
        "top_k": 6,
        "temperature": 1.3,
        "max_new_tokens": 4,
        "eos_token_id": None,
        "num_return_sequences": 3000,
    }
    climber = stairs(assistant, num_speculative_tokens=3, adaptive=False)
    torch.manual_seed(1)
    ours = model.generate(ids, custom_generate=climber, **options)
    torch.manual_seed(2)
    plain = model.generate(ids, **options)
    for column in (-4, -3, -2, -1):
        seen = torch.stack(
            [torch.bincount(text[:, column], minlength=64) for text in (ours, plain)]
        )
        seen = seen[:, seen.sum(0) >= 10]
        assert stats.chi2_contingency(seen.numpy()).pvalue > 1e-3
    assert climber.stats.accepted > 0
    assert climber.stats.drafted < 3 * climber.stats.staircases


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


@pytest.mark.parametrize("place", ["generation_config", "model"])
def test_stop_strings_of_a_config(place: str) -> None:
    """Those of the model's own configuration too, which `generate` would look up itself."""
    model, assistant = pair("llama")
    model = copy.deepcopy(model)
    inputs, tokenizer = prompts("llama", 3), tokenizer_of_letters()
    plain = model.generate(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=None)
    stop = "".join(tokenizer.convert_ids_to_tokens(plain[0, -20:-18]))
    config = GenerationConfig(max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=1)
    (config if place == "generation_config" else model.generation_config).stop_strings = [stop]
    expected = model.generate(**inputs, generation_config=config, tokenizer=tokenizer)
    ours = stairs_generate(
        model, assistant, **inputs, generation_config=config, tokenizer=tokenizer, adaptive=False
    )
    assert torch.equal(ours, expected)
    with pytest.raises(ValueError, match="stop_strings need the model's tokenizer") as caught:
        stairs_generate(model, assistant, **inputs, generation_config=config)
    assert one_line(str(caught.value))
    # As with `generate`: None switches them off.
    ours = stairs_generate(
        model, assistant, **inputs, generation_config=config, stop_strings=None, adaptive=False
    )
    other = GenerationConfig(max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=1)
    assert torch.equal(ours, model.generate(**inputs, generation_config=other, stop_strings=None))


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
    refused("LlamaModel has no language model head", model, model.model)


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


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("unk", [None, 4])
def test_ids_that_the_assistant_lacks(kind: str, unk: int | None) -> None:
    """It reads unknown, or else padding, instead: in the encoder's input too."""
    model, _ = pair(kind)
    small = copy.deepcopy(pair(kind)[1])
    small.resize_token_embeddings(48)
    tokenizer = tokenizer_of_letters()
    if unk is not None:
        tokenizer.unk_token = tokenizer.convert_ids_to_tokens(unk)
    read = []
    hook = small.get_input_embeddings().register_forward_hook(
        lambda module, arguments, output: read.append(arguments[0].flatten())
    )
    inputs = prompts(kind, 3)
    inputs["input_ids"][:, -4] = 60
    inputs["attention_mask"][:, -4:] = 1
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    result = stairs_generate(
        model,
        small,
        **inputs,
        **options,
        tokenizer=tokenizer,
        assistant_tokenizer=tokenizer,
        adaptive=False,
    )
    hook.remove()
    assert torch.equal(result, expected)
    assert (expected >= 48).any(), "the target should write ids that the assistant lacks"
    seen = torch.cat(read)
    assert seen.max() < 48
    assert (seen == (4 if unk else 0)).any()


def test_ids_that_the_target_lacks() -> None:
    """An error of the caller's, as with `generate`."""
    model, assistant = pair("llama")
    for options in ({}, {"custom_generate": stairs(assistant)}):
        with pytest.raises(IndexError):
            model.generate(torch.tensor([[5, 64]]), max_new_tokens=4, **options)


def test_a_compiled_assistant() -> None:
    model, assistant = pair("llama")
    inputs = prompts("llama", 2)
    more = {"max_new_tokens": 8, "do_sample": False}
    result = stairs_generate(model, torch.compile(assistant), **inputs, **more, adaptive=False)
    assert torch.equal(result, model.generate(**inputs, **more))


def test_an_offloaded_cache() -> None:
    cache = DynamicCache()
    cache.offloading = True
    with pytest.raises(ValueError, match="not an offloaded one") as caught:
        with_roll_back(cache, "target")
    assert one_line(str(caught.value))


def test_pairs_of_two_kinds() -> None:
    refused("one kind", pair("llama")[0], pair("t5")[0])
    refused("one kind", pair("t5")[0], pair("llama")[0])


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("not beam search", {"num_beams": 2}),
        ("prompt_lookup_num_tokens|not assisted generation", {"prompt_lookup_num_tokens": 3}),
        (
            "DynamicCache on the model's device only, not StaticCache",
            {"cache_implementation": "static"},
        ),
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
        ("stop_strings must be a text or a list of texts, not 3", {"stop_strings": 3}),
        ("stop_strings must be a text or a list of texts", {"stop_strings": ["a", 3]}),
        ("policy must have the methods of .*int lacks choose", {"policy": 3}),
        ("leave custom_generate out", {"custom_generate": "some/repository"}),
        ("does not support synced_gpus", {"synced_gpus": True}),
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


def test_synced_gpus_that_generate_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a sharded model on several processes it is on unless it is switched off."""
    model, assistant = pair("llama")
    model = copy.deepcopy(model)
    model._is_fsdp_managed_module = True
    inputs = prompts("llama", 1)
    expected = model.generate(**inputs, max_new_tokens=5)
    assert torch.equal(stairs_generate(model, assistant, **inputs, max_new_tokens=5), expected)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    refused("does not support synced_gpus", model, assistant)
    text = stairs_generate(model, assistant, **inputs, max_new_tokens=5, synced_gpus=False)
    assert torch.equal(text, expected)


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
