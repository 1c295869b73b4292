"""Whatever plain vLLM accepts in a request gives plain vLLM's answer."""

import json
import math

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.engines import greedy, kv_usage, plain, stairs, token_ids
from tests.engine.test_identity import prompts
from tests.tiny import WORDS, TinyModels

LAYOUTS = ["packed", "expanded"]

PARAMETERS = {
    "stop string": greedy(60, stop=["cat", "7"]),
    "stop string kept": greedy(60, stop=["b", "dog"], include_stop_str_in_output=True),
    "stop token": greedy(60, stop_token_ids=list(range(10, 20))),
    "eos": greedy(60, ignore_eos=False),
    "min_tokens": greedy(60, ignore_eos=False, min_tokens=30, stop_token_ids=list(range(3, 40))),
    "one token": greedy(1),
    "two tokens": greedy(2),
    "repetition penalty": greedy(40, repetition_penalty=1.7),
    "presence and frequency penalty": greedy(40, presence_penalty=1.5, frequency_penalty=0.7),
    "bad words": greedy(40, bad_words=["a b", "cat", "7", "the"]),
    "allowed ids": greedy(40, allowed_token_ids=list(range(3, 30))),
    "logit bias": greedy(40, logit_bias={5: 8.0, 9: -100.0, 12: 4.0}),
    "logit bias and penalty": greedy(
        40, repetition_penalty=1.7, logit_bias={5: 8.0, 9: -100.0, 12: 4.0, 20: 6.0, 30: 6.0}
    ),
    "min_p, greedy": greedy(40, min_p=0.2),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_same_answer(tiny: TinyModels, name: str) -> None:
    params = PARAMETERS[name]
    texts = prompts(4, seed=40, longest=30)
    expected = token_ids(plain(tiny.target), texts, params)
    for layout, draft in zip(LAYOUTS, (tiny.noisy, tiny.target), strict=True):
        engine = stairs(tiny.target, draft, stairs_layout=layout)
        assert token_ids(engine, texts, params) == expected
        assert kv_usage(engine) == 0


def test_min_tokens_at_every_length(tiny: TinyModels) -> None:
    """The end is allowed from one token on, also where that token lies inside a staircase."""
    texts = prompts(8, seed=46, longest=20)
    for min_tokens in range(2, 14):
        params = greedy(
            40, ignore_eos=False, min_tokens=min_tokens, stop_token_ids=list(range(3, 40))
        )
        expected = token_ids(plain(tiny.target), texts, params)
        assert token_ids(stairs(tiny.target, tiny.target), texts, params) == expected


@pytest.mark.parametrize("budget", [0, 5])
def test_thinking_budget(tiny: TinyModels, budget: int) -> None:
    """Decoded plainly, beside requests that are not."""
    reasoning = {"reasoning_start_str": "{", "reasoning_end_str": "}"}
    texts = [f"{text} {{" for text in prompts(5, seed=47, longest=20)]
    params = [greedy(30, thinking_token_budget=budget)] * 4 + [greedy(30)]
    reference = plain(tiny.target, reasoning_config=reasoning)
    engine = stairs(tiny.target, tiny.target, reasoning_config=reasoning)
    expected = token_ids(reference, texts, params)
    assert token_ids(engine, texts, params) == expected
    assert token_ids(engine, texts, [greedy(30)] * 5) == token_ids(
        reference, texts, [greedy(30)] * 5
    )


def test_all_kinds_in_one_batch(tiny: TinyModels) -> None:
    params = list(PARAMETERS.values())
    texts = prompts(len(params), seed=41, longest=30)
    engine = stairs(tiny.target, tiny.noisy)
    assert token_ids(engine, texts, params) == token_ids(plain(tiny.target), texts, params)


STRUCTURES = {
    "json": StructuredOutputsParams(
        json={
            "type": "object",
            "properties": {"a": {"type": "boolean"}, "b": {"enum": ["red", "blue"]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        }
    ),
    "regex": StructuredOutputsParams(regex=r"(cat|dog)[0-9]{3,8}(red|green)+yes"),
    "choice": StructuredOutputsParams(choice=["thecatsat", "thedogran", "no"]),
}


@pytest.mark.parametrize("kind", STRUCTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_structured_output(tiny: TinyModels, kind: str, layout: str) -> None:
    params = greedy(60, ignore_eos=False, structured_outputs=STRUCTURES[kind])
    texts = prompts(3, seed=42, longest=10)
    mixed = [params, greedy(30), params]
    engine = stairs(tiny.target, tiny.noisy, stairs_layout=layout)
    expected = token_ids(plain(tiny.target), texts, mixed)
    assert token_ids(engine, texts, mixed) == expected
    written = "".join(WORDS[i] for i in expected[0][0] if i != 2)
    if kind == "json":
        assert json.loads(written)["b"] in ("red", "blue")
    elif kind == "choice":
        assert written in ("thecatsat", "thedogran", "no")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs(tiny: TinyModels, layout: str) -> None:
    params = greedy(30, logprobs=5, prompt_logprobs=2)
    texts = prompts(4, seed=43, longest=20)
    engine = stairs(tiny.target, tiny.noisy, stairs_layout=layout)
    ours = engine.generate(texts, params, use_tqdm=False)
    theirs = plain(tiny.target).generate(texts, params, use_tqdm=False)
    for our, their in zip(ours, theirs, strict=True):
        assert our.outputs[0].token_ids == their.outputs[0].token_ids
        rows = [
            *zip(our.outputs[0].logprobs, their.outputs[0].logprobs, strict=True),
            *zip(our.prompt_logprobs[1:], their.prompt_logprobs[1:], strict=True),
        ]
        for our_row, their_row in rows:
            assert our_row.keys() == their_row.keys()
            for token, value in our_row.items():
                assert value.rank == their_row[token].rank
                assert math.isclose(value.logprob, their_row[token].logprob, abs_tol=1e-4)


def test_abort_in_mid_stream(tiny: TinyModels) -> None:
    engine = stairs(tiny.target, tiny.noisy)
    core = engine.llm_engine
    texts = prompts(6, seed=45, longest=40)
    expected = token_ids(plain(tiny.target), texts, greedy(50))
    ids = []
    for i, text in enumerate(texts):
        ids.append(core.add_request(f"abort-{i}", text, greedy(50)))
    finished = {}
    for step in range(200):
        if step == 4:
            core.abort_request([ids[1], ids[4]], internal=True)
        for output in core.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        if not core.has_unfinished_requests():
            break
    for i in (0, 2, 3, 5):
        assert finished[f"abort-{i}"] == expected[i][0]
    assert kv_usage(engine) == 0


def test_invalid_height_of_a_request(tiny: TinyModels) -> None:
    engine = stairs(tiny.target, tiny.noisy)
    for value in (-1, 1.5, "many", [1]):
        with pytest.raises(VLLMValidationError, match="stairs_max_height.*whole number"):
            engine.generate(["a"], greedy(4, extra_args={"stairs_max_height": value}))
