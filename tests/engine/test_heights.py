"""Heights that change every step, per request, decided while drafting: still plain's output.

What `auto` decides depends on measured times. Here a policy that decides by dice takes its place
in the engine: off and on, ragged, stopping in the middle of a draft, leaving drafts out. Whatever
it does must not show. The engine around it is the real one.
"""

import random
from collections import Counter

import pytest
from vllm import LLM, SamplingParams

from tests.engine.engines import (
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


class Dice(RaggedPolicy):
    """Decides at random, within what requests allow."""

    def __init__(self, max_height: int, seed: int) -> None:
        super().__init__(max_height)
        self.dice = random.Random(seed)
        self.planned: Counter = Counter()
        self.trimmed = 0

    def plan(self, keys, rooms, *args, **kwargs):  # type: ignore[no-untyped-def]
        plan = super().plan(keys, rooms, *args, **kwargs)
        off = self.dice.random() < 0.3
        plan.active = [
            i for i, room in enumerate(rooms) if room > 0 and not off and self.dice.random() < 0.7
        ]
        for i in range(len(keys)):
            drafts = i in plan.active
            plan.heights[i] = self.dice.randint(1, rooms[i]) if drafts else 0
            plan.reasons[i] = None if drafts else "load"
            self.planned[plan.heights[i]] += 1
        plan.survival = {i: [] for i in plan.active}
        plan.confidences = {i: [] for i in plan.active}
        return plan

    def proceed(self, plan, confidences=None, elapsed_ms=None):  # type: ignore[no-untyped-def]
        assert all(0.0 <= value <= 1.0001 for value in confidences)
        assert len(confidences) == len(plan.active)
        active = plan.active
        plan.passes.append(len(active))
        depth = len(plan.passes)
        places = [
            place
            for place, index in enumerate(active)
            if plan.heights[index] > depth and self.dice.random() < 0.8
        ]
        for index in active:
            plan.heights[index] = min(plan.heights[index], depth)
        plan.active = [active[place] for place in places]
        for index in plan.active:
            plan.heights[index] = max(plan.heights[index], depth + 1)
        return places

    def settle(self, plan, may_trim=False):  # type: ignore[no-untyped-def]
        heights = super().settle(plan, False)
        if not may_trim:
            return heights
        trimmed = [self.dice.randint(0, h) if self.dice.random() < 0.2 else h for h in heights]
        self.trimmed += sum(heights) - sum(trimmed)
        return trimmed

    def drafted(self, *_):  # type: ignore[no-untyped-def]
        """Dice learn nothing from prices."""


def runner_of(llm: LLM):  # type: ignore[no-untyped-def]
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def wild(llm: LLM, seed: int) -> Dice:
    runner = runner_of(llm)
    runner.stairs_decider.policy = dice = Dice(runner.num_spec_tokens, seed)
    return dice


@pytest.mark.parametrize("draft", ["target", "noisy", "random"])
@pytest.mark.parametrize("layout", ["packed", "expanded"])
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
    if draft == "target":
        # After every step without drafts the draft reads what it missed: nothing is refused.
        assert after["accepted_per_position"] != before["accepted_per_position"]
        for name in range(6):
            drafted = after["drafted_per_position"][name] - before["drafted_per_position"][name]
            kept = after["accepted_per_position"][name] - before["accepted_per_position"][name]
            assert kept == drafted
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
        assert token_ids(engine, texts, greedy(40)) == expected
        after = statistics(engine)
        for name in range(4):
            drafted = after["drafted_per_position"][name] - before["drafted_per_position"][name]
            kept = after["accepted_per_position"][name] - before["accepted_per_position"][name]
            assert kept == drafted
    assert kv_usage(engine) == 0


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
    assert after["estimated_gain"] > 0
