"""Greedy output of stairs is plain vLLM's, token for token, in float32."""

import itertools
import json
import random
from pathlib import Path

import pytest
from safetensors.torch import load_file
from vllm import SamplingParams

from tests.engine.engines import (
    counting_preemptions,
    greedy,
    kv_usage,
    plain,
    stairs,
    statistics,
    token_ids,
)
from tests.tiny import WORDS, TinyModels, copy_model

DRAFTS = ["target", "random", "cut", "noisy"]
LAYOUTS = ["packed", "expanded"]
# A pairwise sample of draft x layout; the whole matrix runs in `make test-full`.
PAIRS = [("target", "packed"), ("random", "expanded"), ("cut", "packed"), ("noisy", "expanded"),
         ("noisy", "packed")]  # fmt: skip


def prompts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Prompts of mixed lengths."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS[3:], k=rng.randint(1, longest))) for _ in range(count)]


def matrix() -> list:
    """Draft x layout; those outside the sample are marked full."""
    return [
        pytest.param(*pair, marks=() if pair in PAIRS else pytest.mark.full)
        for pair in itertools.product(DRAFTS, LAYOUTS)
    ]


@pytest.mark.parametrize(("draft", "layout"), matrix())
def test_batches_and_heights(tiny: TinyModels, draft: str, layout: str) -> None:
    engine = stairs(tiny.target, getattr(tiny, draft), stairs_layout=layout)
    reference = plain(tiny.target)
    before = statistics(engine)
    for batch in (1, 2, 5, 16):
        texts = prompts(batch, seed=batch)
        expected = token_ids(reference, texts, greedy())
        assert token_ids(engine, texts, greedy()) == expected
        # Every height from 0 to 8 at once, one request each.
        ragged = [greedy(extra_args={"stairs_max_height": i % 9}) for i in range(batch)]
        assert token_ids(engine, texts, ragged) == expected
    after = statistics(engine)
    heights = [b - a for a, b in zip(before["heights"], after["heights"], strict=True)]
    assert all(heights), f"every height must have been used: {heights}"
    accepted = after["accepted_per_position"][0] - before["accepted_per_position"][0]
    drafted = after["drafted_per_position"][0] - before["drafted_per_position"][0]
    if draft == "target":
        assert accepted == drafted > 0
    elif draft == "random":
        assert accepted < 0.2 * drafted
    elif draft == "noisy":
        assert 0.2 * drafted < accepted < drafted
    assert kv_usage(engine) == 0


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("height", range(1, 8))
def test_every_k(tiny: TinyModels, height: int, layout: str) -> None:
    engine = stairs(tiny.target, tiny.noisy, height=height, stairs_layout=layout)
    texts = prompts(7)
    assert token_ids(engine, texts, greedy()) == token_ids(plain(tiny.target), texts, greedy())


@pytest.mark.parametrize("draft", ["padded", "narrow"])
def test_other_padded_vocabulary(tiny: TinyModels, draft: str) -> None:
    engine = stairs(tiny.target, getattr(tiny, draft))
    texts = prompts(6)
    assert token_ids(engine, texts, greedy()) == token_ids(plain(tiny.target), texts, greedy())
    stats = statistics(engine)
    assert stats["accepted_per_position"][0] > 0.2 * stats["drafted_per_position"][0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunked_prefill_mixes_with_decode(tiny: TinyModels, layout: str) -> None:
    """A budget of 48 tokens: prompts of up to 150 tokens come in chunks beside decode rows."""
    options = {"max_num_batched_tokens": 48, "max_num_seqs": 8, "enable_prefix_caching": False}
    texts = prompts(12, seed=3, longest=150)
    params = [greedy(10 + 5 * (i % 6)) for i in range(12)]
    engine = stairs(tiny.target, tiny.noisy, height=4, stairs_layout=layout, **options)
    assert token_ids(engine, texts, params) == token_ids(
        plain(tiny.target, **options), texts, params
    )


def test_a_seed_holds_while_a_prompt_is_read_in_parts(tiny: TinyModels) -> None:
    """On vLLM 0.32's CPU build plain vLLM dies of such a request; and a part draws nothing."""
    options = {"max_num_seqs": 8, "enable_prefix_caching": False}
    texts = prompts(6, seed=12, longest=150)
    params = [
        SamplingParams(temperature=0.9, seed=i, max_tokens=12, ignore_eos=True) for i in range(6)
    ]
    whole = stairs(tiny.target, tiny.noisy, height=4, **options)
    parts = stairs(tiny.target, tiny.noisy, height=4, max_num_batched_tokens=48, **options)
    # One by one: what else is in a batch decides how far a request drafts, and so what it draws.
    for text, own in zip(texts, params, strict=True):
        expected = token_ids(whole, [text], own)
        assert token_ids(whole, [text], own) == expected
        assert token_ids(parts, [text], own) == expected
    assert len(token_ids(parts, texts, params)) == len(texts)


def test_prefix_caching_with_repeated_prompts(tiny: TinyModels) -> None:
    """Shared prefixes, whole repeats, and continuations of earlier output."""
    engine, reference = stairs(tiny.target, tiny.target, height=4), plain(tiny.target)
    shared = " ".join(random.Random(5).choices(WORDS[3:], k=100))
    texts = [f"{shared} {tail}" for tail in prompts(6, seed=6, longest=20)]
    expected = token_ids(reference, texts, greedy())
    assert token_ids(engine, texts, greedy()) == expected
    before = statistics(engine)
    assert token_ids(engine, texts, greedy()) == expected
    after = statistics(engine)
    # The target as its own draft accepts everything, over inherited blocks too.
    assert (
        after["accepted_per_position"][0] - before["accepted_per_position"][0]
        == after["drafted_per_position"][0] - before["drafted_per_position"][0]
        > 0
    )


@pytest.mark.parametrize("opted_out_first", [True, False])
def test_draft_kv_has_no_holes(tiny: TinyModels, opted_out_first: bool) -> None:
    """A prefix that was computed without drafting leaves holes; whoever inherits them fills them.

    The target as its own draft must then accept everything: stale KV would show at once.
    """
    engine = stairs(tiny.target, tiny.target, height=4)
    seed = 11 if opted_out_first else 12
    text = " ".join(random.Random(seed).choices(WORDS[3:], k=90))
    if opted_out_first:
        off = greedy(60, extra_args={"stairs_max_height": 0})
        written = token_ids(engine, [text], off)[0][0]
    else:
        written = token_ids(engine, [text], greedy(60))[0][0]
    before = statistics(engine)
    continued = f"{text} {' '.join(WORDS[i] for i in written)}"
    texts = [continued, text, continued]
    assert token_ids(engine, texts, greedy(30)) == token_ids(plain(tiny.target), texts, greedy(30))
    after = statistics(engine)
    assert (
        after["accepted_per_position"][0] - before["accepted_per_position"][0]
        == after["drafted_per_position"][0] - before["drafted_per_position"][0]
        > 0
    )


@pytest.mark.parametrize(("draft", "layout"), [("target", "packed"), ("noisy", "expanded")])
def test_preemption(tiny: TinyModels, draft: str, layout: str) -> None:
    """A KV cache of 17 blocks of 32 tokens cannot hold 8 requests of 150 tokens."""
    options = {"num_gpu_blocks_override": 18, "max_num_seqs": 8}
    texts = prompts(8, seed=8, longest=60)
    engine = stairs(tiny.target, getattr(tiny, draft), height=4, stairs_layout=layout, **options)
    with counting_preemptions(engine) as preempted:
        outputs = token_ids(engine, texts, greedy(110))
    assert preempted, "this load must preempt"
    assert outputs == token_ids(plain(tiny.target), texts, greedy(110))
    assert kv_usage(engine) == 0
    if draft == "target":
        stats = statistics(engine)
        assert stats["accepted_per_position"] == stats["drafted_per_position"]
        assert all(stats["drafted_per_position"])


def test_height_by_batch_size_table(tiny: TinyModels) -> None:
    """vLLM's own table is a ceiling."""
    engine = stairs(
        tiny.target,
        tiny.noisy,
        height=4,
        num_speculative_tokens_per_batch_size=[[1, 2, 4], [3, 8, 2], [9, 16, 0]],
    )
    for batch in (1, 6, 12):
        texts = prompts(batch, seed=20 + batch)
        assert token_ids(engine, texts, greedy()) == token_ids(plain(tiny.target), texts, greedy())
    heights = statistics(engine)["heights"]
    assert heights[0]
    assert heights[2]
    assert heights[4]


def test_length_limits(tiny: TinyModels) -> None:
    """Up to the target's max_model_len, and past that of a draft with a shorter one."""
    texts = prompts(4, seed=30, longest=40)
    params = greedy(max_tokens=None)
    expected = token_ids(plain(tiny.target), texts, params)
    assert token_ids(stairs(tiny.target, tiny.noisy, height=8), texts, params) == expected
    short = stairs(tiny.target, tiny.target, height=8, max_model_len_draft=100)
    assert token_ids(short, texts, params) == expected
    long_prompt = [" ".join(random.Random(1).choices(WORDS[3:], k=150)), "the cat"]
    assert token_ids(short, long_prompt, greedy()) == token_ids(
        plain(tiny.target), long_prompt, greedy()
    )


def test_draft_of_another_tokenizer(tiny: TinyModels) -> None:
    """vLLM's own mapping between vocabularies, on request."""
    engine = stairs(tiny.target, tiny.foreign, use_heterogeneous_vocab=True)
    texts = prompts(5, seed=60)
    assert token_ids(engine, texts, greedy()) == token_ids(plain(tiny.target), texts, greedy())
    assert statistics(engine)["drafted_per_position"][0] > 0


def test_prompts_as_embeddings(tiny: TinyModels) -> None:
    """Of whole prompts and of parts; they are served without drafts, others beside them with."""
    engine = stairs(tiny.target, tiny.target, enable_prompt_embeds=True)
    table = load_file(tiny.target / "model.safetensors")["model.embed_tokens.weight"]
    texts = prompts(4, seed=63)
    expected = token_ids(plain(tiny.target), texts, greedy())
    ids = [engine.get_tokenizer()(text)["input_ids"] for text in texts]
    whole = [{"prompt_embeds": table[row]} for row in ids]
    in_part = []
    for row in ids:
        is_id = [place % 3 > 0 for place in range(len(row))]
        in_part.append(
            {
                "prompt_embeds": table[row],
                "prompt_token_ids": [i if kept else 0 for i, kept in zip(row, is_id, strict=True)],
                "prompt_is_token_ids": is_id,
            }
        )
    for embedded in (whole, in_part):
        before = statistics(engine)["drafted_per_position"]
        assert token_ids(engine, embedded, greedy()) == expected
        assert statistics(engine)["drafted_per_position"] == before
    mixture = [whole[0], texts[1], in_part[2], texts[3]]
    assert token_ids(engine, mixture, greedy()) == expected
    assert statistics(engine)["drafted_per_position"][0] > before[0]
    counted = statistics(engine)
    # The target's own drafts, of texts that it has read: none is refused.
    assert counted["accepted_per_position"] == counted["drafted_per_position"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("target_window", "draft_window"), [(None, 32), (32, None), (32, 32)])
def test_sliding_windows(
    tiny: TinyModels,
    tmp_path: Path,
    target_window: int | None,
    draft_window: int | None,
    layout: str,
) -> None:
    """Texts are several windows long: vLLM gives blocks that left the window to others."""
    target, draft = (
        copy_model(
            tiny.target,
            tmp_path / name,
            architectures=["MistralForCausalLM"],
            model_type="mistral",
            sliding_window=window,
        )
        for name, window in (("target", target_window), ("draft", draft_window))
    )
    texts = prompts(5, seed=64, longest=120)
    engine = stairs(target, draft, height=3, stairs_layout=layout)
    expected = token_ids(plain(target), texts, greedy(80))
    without = token_ids(plain(tiny.target), texts, greedy(80))
    assert (expected == without) == (target_window is None), "the window matters"
    assert token_ids(engine, texts, greedy(80)) == expected
    assert statistics(engine)["accepted_per_position"][0] > 0
    assert token_ids(engine, texts, greedy(80)) == expected  # With what the first time has left.


def test_record(tiny: TinyModels, tmp_path: Path) -> None:
    """One line per staircase, enough to tell the output and the counters from."""
    file = tmp_path / "record.jsonl"
    engine = stairs(tiny.target, tiny.noisy, height=3, stairs_record=str(file))
    texts = prompts(3, seed=61, longest=10)
    written = token_ids(engine, texts, greedy(20))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    by_request: dict[str, list[int]] = {}
    for line in lines:
        assert len(line["draft"]) == len(line["probability"]) <= 3
        assert all(0 < p <= 1 for p in line["probability"])
        kept = line["emitted"]
        assert kept[:-1] == line["draft"][: len(kept) - 1]
        if len(kept) <= len(line["draft"]):
            assert kept[-1] != line["draft"][len(kept) - 1]
        by_request.setdefault(line["request"], []).extend(kept)
    # The first token of each request comes from prefill, not from a staircase.
    assert sorted(by_request.values()) == sorted(text[0][1:] for text in written)
    stats = statistics(engine)
    assert stats["staircases"] == len(lines)
    assert sum(stats["drafted_per_position"]) == sum(len(line["draft"]) for line in lines)


def test_logprobs_of_chosen_ids_beside_drafts(tiny: TinyModels) -> None:
    """Such a request may arrive between a draft and its validation."""
    engine, reference = stairs(tiny.target, tiny.noisy), plain(tiny.target)
    texts = prompts(3, seed=62, longest=10)
    chosen = greedy(20, logprobs=3, logprob_token_ids=[5, 9, 14])
    expected = [
        token_ids(reference, [text], params)[0][0]
        for text, params in zip(texts, [greedy(40), greedy(40), chosen], strict=True)
    ]
    core = engine.llm_engine
    for i in (0, 1):
        core.add_request(f"beside-{i}", texts[i], greedy(40))
    finished = {}
    for step in range(100):
        if step == 3:
            core.add_request("beside-2", texts[2], chosen)
        for output in core.step():
            if output.finished:
                finished[int(output.request_id[-1])] = output.outputs[0]
        if not core.has_unfinished_requests():
            break
    assert [list(finished[i].token_ids) for i in range(3)] == expected
    assert all({5, 9, 14} <= row.keys() for row in finished[2].logprobs)
