"""Heights that change every step, per request, decided while drafting: still plain's output.

What `auto` decides depends on measured times. Here a policy that decides by dice takes its place
in the engine: off and on, ragged, stopping in the middle of a draft, leaving drafts out. Whatever
it does must not show. The engine around it is the real one.
"""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.dice import Dice, roll_in
from tests.engine.engines import (
    COMMON,
    counting_preemptions,
    greedy,
    kv_usage,
    plain,
    stairs,
    statistics,
    token_ids,
)
from tests.engine.test_distribution import PROMPT, exact_distribution, p_value
from tests.engine.test_identity import prompts
from tests.tiny import WORDS, TinyModels
from vllm_stairs.height.ragged import RaggedPolicy


def assert_all_kept(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Between two readings of the counters nothing that was verified was refused."""
    drafted, kept = (
        np.subtract(after[name], before[name]).tolist()
        for name in ("drafted_per_position", "accepted_per_position")
    )
    assert kept == drafted
    assert any(drafted)


def runner_of(llm: LLM):  # type: ignore[no-untyped-def]
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def wild(llm: LLM, seed: int) -> Dice:
    dice = roll_in(runner_of(llm), seed)
    assert dice is not None
    return dice


@pytest.mark.parametrize(
    ("draft", "layout"),
    [
        ("target", "packed"),
        ("noisy", "packed"),
        ("noisy", "expanded"),
        ("random", "expanded"),
        pytest.param("target", "expanded", marks=pytest.mark.full),
        pytest.param("random", "packed", marks=pytest.mark.full),
    ],
)
def test_any_heights_are_lossless(tiny: TinyModels, draft: str, layout: str) -> None:
    engine = stairs(
        tiny.target, getattr(tiny, draft), height=6, stairs_height="auto", stairs_layout=layout
    )
    policy = wild(engine, seed=1)
    before = statistics(engine)
    for batch in (1, 5, 16):
        texts = prompts(batch, seed=90 + batch)
        expected = token_ids(plain(tiny.target), texts, greedy(50))
        assert token_ids(engine, texts, greedy(50)) == expected
    assert all(policy.planned[height] for height in range(7))
    assert policy.trimmed
    after = statistics(engine)
    assert all(np.subtract(after["heights"], before["heights"])), "every height was verified"
    if draft == "target":
        # After every step without drafts the draft reads what it missed: nothing is refused.
        assert after["accepted_per_position"] != before["accepted_per_position"]
        assert_all_kept(before, after)
    assert after["off"]["load"] > before["off"]["load"]
    assert kv_usage(engine) == 0


def test_any_heights_under_preemption(tiny: TinyModels) -> None:
    options = {"num_gpu_blocks_override": 18, "max_num_seqs": 8}
    engine = stairs(tiny.target, tiny.target, height=4, stairs_height="auto", **options)
    wild(engine, seed=2)
    texts = prompts(8, seed=8, longest=60)
    with counting_preemptions(engine) as preempted:
        outputs = token_ids(engine, texts, greedy(110))
    assert preempted, "this load must preempt"
    assert outputs == token_ids(plain(tiny.target), texts, greedy(110))
    stats = statistics(engine)
    assert stats["accepted_per_position"] == stats["drafted_per_position"]
    assert all(stats["drafted_per_position"])
    assert kv_usage(engine) == 0


def test_any_heights_over_inherited_prefixes_and_aborts(tiny: TinyModels) -> None:
    """Blocks written while off, or by a request that was aborted, are inherited."""
    engine = stairs(tiny.target, tiny.target, height=4, stairs_height="auto")
    wild(engine, seed=3)
    core = engine.llm_engine
    shared = " ".join(random.Random(6).choices(WORDS[3:], k=80))
    for round_ in range(4):
        texts = [f"{shared} {tail}" for tail in prompts(4, seed=60 + round_, longest=20)]
        core.add_request("victim", texts[0], greedy(60))
        for _ in range(5):
            core.step()
        core.abort_request(["victim"])
        expected = token_ids(plain(tiny.target), texts, greedy(40))
        before = statistics(engine)
        outputs = engine.generate(texts, greedy(40), use_tqdm=False)
        assert [[list(output.outputs[0].token_ids)] for output in outputs] == expected
        assert all(output.num_cached_tokens for output in outputs[1:]), "blocks are inherited"
        after = statistics(engine)
        assert_all_kept(before, after)
    assert kv_usage(engine) == 0


class Ends(Dice):
    """Reads the ends of texts only."""

    def reads_the_end(self) -> bool:
        return True


def test_a_draft_that_reads_the_end_of_a_text(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes what the draft model writes on the rest alone, as if nothing had been before."""
    record = tmp_path / "record.jsonl"
    engine = stairs(
        tiny.target, tiny.noisy, height=4, stairs_height="auto", stairs_record=str(record)
    )
    runner = runner_of(engine)
    runner.stairs_decider.policy = Ends(4, seed=7)
    ledger, first = runner.stairs_ledger, {}
    begin_at = ledger.begin_at

    def noting(request_id: str, token: int) -> None:
        first[request_id] = token
        begin_at(request_id, token)

    monkeypatch.setattr(ledger, "begin_at", noting)
    draws = random.Random(9)
    lengths = (150, 199, 200, 215)
    texts = [" ".join(draws.choices(WORDS[3:], k=length)) for length in lengths]
    outputs = engine.generate(texts, greedy(36), use_tqdm=False)
    expected = token_ids(plain(tiny.target), texts, greedy(36))
    assert [list(output.outputs[0].token_ids) for output in outputs] == [own for (own,) in expected]

    whole = {
        output.request_id: [*output.prompt_token_ids, *output.outputs[0].token_ids]
        for output in outputs
    }
    model = AutoModelForCausalLM.from_pretrained(tiny.noisy, dtype=torch.float32)
    compared = others = 0
    runner.stairs_record.flush()
    for line in map(json.loads, record.read_text().splitlines()):
        position, draft = line["position"], line["draft"]
        if not draft:
            continue
        start = first.get(line["request"], 0)
        # The name within the engine has a random ending.
        text = whole[line["request"].rpartition("-")[0]][:position] + draft
        alone, with_all = (
            model(torch.tensor([text[begin:-1]])).logits[0, -len(draft) :].argmax(-1).tolist()
            for begin in (start, 0)
        )
        assert draft == alone
        compared += len(draft)
        others += alone != with_all
    assert len(first) == 3, "the shortest is read whole"
    assert all(value and value % COMMON["block_size"] == 0 for value in first.values())
    assert statistics(engine)["cut_contexts"] == 3
    assert compared > 50
    assert others, "the beginning matters to this draft"
    assert kv_usage(engine) == 0


class Listening(Dice):
    """Keeps what it is told."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kept: Counter = Counter()
        self.asked: Counter = Counter()
        self.refused = 0

    def plan(self, keys, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.asked.update(keys)
        return super().plan(keys, *args, **kwargs)

    def observe(  # type: ignore[no-untyped-def]
        self, keys, heights, accepted, target_ms, rows, refused
    ):
        for key, own in zip(keys, accepted, strict=True):
            self.kept[key] += own + 1
        self.refused += sum(refused or ())
        super().observe(keys, heights, accepted, target_ms, rows, refused)


def test_what_a_grammar_refuses_is_refused(tiny: TinyModels) -> None:
    """The policy hears of drafts that the scheduler left out before the target saw them."""
    texts = prompts(6, seed=44, longest=10)
    regex = StructuredOutputsParams(regex="(cat|dog)[0-9]{3,8}(red|green)+yes")
    params = [greedy(40, ignore_eos=False, structured_outputs=regex), greedy(30)] * 3
    engine = stairs(tiny.target, tiny.noisy, height=6, stairs_height="auto")
    runner = runner_of(engine)
    runner.stairs_decider.policy = policy = Listening(runner.num_spec_tokens, 6)
    before = statistics(engine)["off"]["grammar"]
    assert token_ids(engine, texts, params) == token_ids(plain(tiny.target), texts, params)
    assert policy.refused > 3
    without = statistics(engine)["off"]["grammar"]
    assert without > before
    policy.refused = 0
    assert token_ids(engine, texts, greedy(30)) == token_ids(plain(tiny.target), texts, greedy(30))
    assert policy.refused == 0
    assert statistics(engine)["off"]["grammar"] == without
    assert not runner._stairs_under_grammar


def test_what_is_kept_behind_the_end_of_a_text_is_no_gain(tiny: TinyModels) -> None:
    """The target as its own draft goes on behind a stop token, and all that would be kept."""
    texts = prompts(12, seed=31, longest=20)
    free = token_ids(plain(tiny.target), texts, greedy(40))
    # Tokens that come up late, and differ from text to text.
    stops = sorted({own[0][20] for own in free})
    params = greedy(40, ignore_eos=False, stop_token_ids=stops)
    expected = token_ids(plain(tiny.target), texts, params)
    assert sum(len(own[0]) < 40 for own in expected) > 6
    engine = stairs(tiny.target, tiny.target, height=6, stairs_height="auto")
    runner = runner_of(engine)
    runner.stairs_decider.policy = policy = Listening(runner.num_spec_tokens, 5)
    before = statistics(engine)
    assert token_ids(engine, texts, params) == expected
    after = statistics(engine)
    # The first token comes with the prompt.
    later = [len(own[0]) - 1 for own in expected if len(own[0]) > 1]
    assert sorted(policy.kept.values()) == sorted(later)
    emitted = sum(after["accepted"][n] * (n + 1) for n in range(7))
    emitted -= sum(before["accepted"][n] * (n + 1) for n in range(7))
    assert emitted == sum(later)
    assert set(policy.kept) == set(policy.asked), "nothing is planned for texts that have ended"


def test_sampled_output_keeps_its_distribution_under_any_heights(tiny: TinyModels) -> None:
    engine = stairs(
        tiny.target, tiny.noisy, height=4, stairs_height="auto",
        draft_sample_method="probabilistic",
    )  # fmt: skip
    wild(engine, seed=4)
    expected = exact_distribution(plain(tiny.target, max_logprobs=96))
    params = SamplingParams(temperature=0.8, max_tokens=3, ignore_eos=True, n=1)
    counts: Counter = Counter()
    for _ in range(8):
        outputs = token_ids(engine, [PROMPT] * 500, params)
        counts.update(tuple(sample) for samples in outputs for sample in samples)
    assert p_value(counts, expected) > 1e-4


@pytest.mark.parametrize("draft", ["target", "random"])
def test_auto_gives_up_on_a_bad_draft_and_says_why(tiny: TinyModels, draft: str) -> None:
    engine = stairs(tiny.target, getattr(tiny, draft), height=4, stairs_height="auto")
    runner_of(engine).stairs_decider.policy = RaggedPolicy(4)
    before = statistics(engine)
    for seed in range(3):
        texts = prompts(6, seed=70 + seed)
        expected = token_ids(plain(tiny.target), texts, greedy(60))
        assert token_ids(engine, texts, greedy(60)) == expected
    after = statistics(engine)
    off = after["heights"][0] - before["heights"][0]
    staircases = after["staircases"] - before["staircases"]
    if draft == "random":
        assert off > 0.6 * staircases
        assert after["off"]["weak_draft"] + after["off"]["load"] > 0
        reasons = ("weak_draft", "load", "paused")
        assert sum(after["off"][why] - before["off"][why] for why in reasons) > 0.5 * off
        # The last token of a text needs no draft.
        assert after["off"]["limit"] - before["off"]["limit"] > 12
    assert after["estimated_gain"] > 0
    assert after["estimated_gain"] != 1.0, "that is what it starts at"


def test_requests_get_their_own_figures(tiny: TinyModels) -> None:
    """vLLM's own ``--per-request-spec-decode-metrics``; steps without drafts do not count."""
    engine = stairs(
        tiny.target, tiny.target, height=4, stairs_height="auto",
        per_request_spec_decode_metrics="summary",
    )  # fmt: skip
    wild(engine, seed=5)
    params = [greedy(40), greedy(40, extra_args={"stairs_max_height": 0})]
    drafted, opted_out = (
        output.outputs[0].spec_decode_metrics.to_dict()
        for output in engine.generate(prompts(2, seed=15), params, use_tqdm=False)
    )
    stats = statistics(engine)
    assert drafted["num_accepted_draft_tokens"] == sum(stats["accepted_per_position"]) > 0
    assert drafted["num_draft_tokens"] == sum(stats["drafted_per_position"])
    assert opted_out["num_spec_steps"] == 0
