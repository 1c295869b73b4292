"""A draft in a process of its own, placed by Ray: same drafts, same output, whatever happens."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM

from tests.engine.dice import Dice
from tests.engine.engines import (
    counting_preemptions,
    greedy,
    kv_usage,
    long_patience_ms,
    plain,
    stairs,
    statistics,
    tensor_parallel_2,
    token_ids,
)
from tests.engine.test_identity import prompts
from tests.tiny import TinyModels
from vllm_stairs.engine import runner as runner_module
from vllm_stairs.engine.draft_actor import DELAY_VARIABLE
from vllm_stairs.height.ragged import RaggedPolicy


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here drafts are counted."""
    monkeypatch.setattr(runner_module, "fixed_patience_ms", long_patience_ms)


def until(happened: Callable[[], Any], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def dedicated(model: Path, draft: Path, **kwargs: Any) -> LLM:
    engine = stairs(model, draft, stairs_placement="dedicated", **kwargs)
    # Another test may have killed its draft.
    until(runner_of(engine).stairs_dedicated.is_free)
    return engine


def runner_of(llm: LLM) -> Any:
    core = llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    return core.model_executor.driver_worker.worker.model_runner


def slow_down(runner: Any, milliseconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the target's steps take longer."""
    forward = runner._model_forward

    def slower(*args: Any, **kwargs: Any) -> Any:
        time.sleep(milliseconds / 1e3)
        return forward(*args, **kwargs)

    monkeypatch.setattr(runner, "_model_forward", slower)


class Since:
    """What the counters have counted since this was made."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.before = statistics(llm)

    def __getitem__(self, name: str) -> Any:
        before, after = self.before[name], statistics(self.llm)[name]
        if isinstance(after, dict):
            return {key: after[key] - before[key] for key in after}
        return [b - a for a, b in zip(before, after, strict=True)]


def test_batches_and_heights(tiny: TinyModels) -> None:
    """A draft that is right now and then; one request, a full batch; all heights at once."""
    engine, reference = dedicated(tiny.target, tiny.noisy), plain(tiny.target)
    since = Since(engine)
    for batch in (1, 5, 16):
        texts = prompts(batch, seed=80 + batch)
        expected = token_ids(reference, texts, greedy())
        assert token_ids(engine, texts, greedy()) == expected
        ragged = [greedy(extra_args={"stairs_max_height": i % 9}) for i in range(batch)]
        assert token_ids(engine, texts, ragged) == expected
    assert all(since["heights"])
    accepted, drafted = since["accepted_per_position"][0], since["drafted_per_position"][0]
    assert 0.2 * drafted < accepted < drafted
    assert since["dedicated"]["late"] == 0
    assert kv_usage(engine) == 0


@pytest.mark.parametrize("overlap", [True, False])
def test_drafts_are_those_of_a_colocated_draft(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """Token for token, step for step."""
    texts = prompts(6, seed=90)
    written = []
    for engine in (stairs(tiny.target, tiny.noisy), dedicated(tiny.target, tiny.noisy)):
        runner = runner_of(engine)
        if runner.stairs_dedicated is not None and not overlap:
            monkeypatch.setattr(runner.stairs_dedicated, "ahead", 0)
        file = tmp_path / f"{len(written)}.jsonl"
        with file.open("w") as record:
            monkeypatch.setattr(runner, "stairs_record", record)
            token_ids(engine, texts, [greedy(20 + 5 * i) for i in range(6)])
            monkeypatch.setattr(runner, "stairs_record", None)
        by_request: dict[str, list[Any]] = {}
        for line in map(json.loads, file.read_text().splitlines()):
            step = [line["position"], line["draft"], line["emitted"]]
            by_request.setdefault(line["request"], []).append(step)
        written.append(list(by_request.values()))
    assert written[0] == written[1]
    assert sum(len(step[1]) for steps in written[0] for step in steps) > 100


def small(tiny: TinyModels) -> LLM:
    """The target as its own draft, in a small KV cache, with a small budget of tokens."""
    return dedicated(
        tiny.target,
        tiny.target,
        height=4,
        num_gpu_blocks_override=18,
        max_num_seqs=8,
        max_num_batched_tokens=48,
    )


def test_the_target_as_its_draft(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is accepted: over preemption, prompts that return, holes where nobody drafted.

    The target leaves the draft time to write ahead, as a real one does: two tiny models on two
    busy cores end a step whenever the system lets them.
    """
    engine, reference = small(tiny), plain(tiny.target)
    slow_down(runner_of(engine), 50.0, monkeypatch)
    texts = prompts(8, seed=91, longest=60)
    since = Since(engine)
    with counting_preemptions(engine) as preempted:
        outputs = token_ids(engine, texts, greedy(110))
    assert preempted, "this load must preempt"
    assert outputs == token_ids(reference, texts, greedy(110))
    some = [greedy(30, extra_args={"stairs_max_height": 4 * (i % 2)}) for i in range(8)]
    assert token_ids(engine, texts, some) == token_ids(reference, texts, greedy(30))
    assert since["accepted_per_position"] == since["drafted_per_position"]
    assert since["drafted_per_position"][3] > 0
    counted = since["dedicated"]
    assert counted["late"] == 0
    assert counted["ready"] > 0.2 * counted["answers"], "nothing was written ahead"


def test_long_prompts_in_chunks(tiny: TinyModels) -> None:
    """What the draft has not read comes in passes of the token budget."""
    engine = small(tiny)
    texts = prompts(10, seed=92, longest=150)
    params = [greedy(10 + 5 * (i % 6)) for i in range(10)]
    since = Since(engine)
    assert token_ids(engine, texts, params) == token_ids(plain(tiny.target), texts, params)
    assert since["accepted_per_position"] == since["drafted_per_position"]
    assert since["drafted_per_position"][0] > 0


def test_a_draft_that_is_late(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without patience there are no drafts, and the text that was not drafted is caught up."""
    engine, reference = small(tiny), plain(tiny.target)
    texts = prompts(4, seed=93)
    since = Since(engine)
    monkeypatch.setattr(runner_module, "fixed_patience_ms", lambda *_: 0.0)
    assert token_ids(engine, texts, greedy()) == token_ids(reference, texts, greedy())
    assert since["dedicated"]["late"] > 0
    until(runner_of(engine).stairs_dedicated.is_free)
    since = Since(engine)
    monkeypatch.setattr(runner_module, "fixed_patience_ms", long_patience_ms)
    assert token_ids(engine, texts, greedy()) == token_ids(reference, texts, greedy())
    assert since["dedicated"]["late"] == 0
    assert since["accepted_per_position"] == since["drafted_per_position"]


def test_aborts(tiny: TinyModels) -> None:
    """Requests that go away at any moment take nothing with them, and leave nothing."""
    engine = dedicated(tiny.target, tiny.noisy)
    core = engine.llm_engine
    rng = random.Random(94)
    texts = prompts(60, seed=94)
    stay = set(range(0, 60, 6))
    finished: dict[int, list[int]] = {}
    running: dict[int, str] = {}
    waiting = list(range(60))
    while waiting or running:
        while waiting and len(running) < 12:
            number = waiting.pop(0)
            running[number] = f"request-{number}"
            core.add_request(running[number], texts[number], greedy(30))
        for output in core.step():
            if output.finished:
                number = int(output.request_id.split("-")[1])
                finished[number] = list(output.outputs[0].token_ids)
                running.pop(number, None)
        gone = [n for n in running if n not in stay and rng.random() < 0.2]
        core.abort_request([running.pop(number) for number in gone])
    kept = sorted(stay)
    expected = token_ids(plain(tiny.target), [texts[n] for n in kept], greedy(30))
    assert [[finished[n]] for n in kept] == expected
    assert kv_usage(engine) == 0
    since = Since(engine)
    assert token_ids(engine, texts[:16], greedy()) == token_ids(
        plain(tiny.target), texts[:16], greedy()
    )
    assert since["accepted_per_position"][0] > 0


def auto(tiny: TinyModels) -> LLM:
    """Shared with the tests of faults."""
    return dedicated(tiny.target, tiny.target, height=4, stairs_height="auto")


def test_heights_from_dice(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a policy plans and leaves out, the output is the same and the draft's KV right."""
    engine = auto(tiny)
    decider = runner_of(engine).stairs_decider
    dice = Dice(4, seed=5)
    monkeypatch.setattr(decider, "policy", dice)
    monkeypatch.setattr(decider, "patience_ms", long_patience_ms)
    texts = prompts(6, seed=95)
    since = Since(engine)
    assert token_ids(engine, texts, greedy(100)) == token_ids(
        plain(tiny.target), texts, greedy(100)
    )
    assert all(since["heights"])
    assert dice.trimmed > 0
    assert since["accepted_per_position"] == since["drafted_per_position"]


def test_heights_of_the_policy(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` speculates where drafts are cheap to wait for."""
    engine = auto(tiny)
    runner = runner_of(engine)
    slow_down(runner, 40.0, monkeypatch)
    # By its weights the target's own draft would not be worth trying.
    monkeypatch.setattr(runner.stairs_decider, "policy", RaggedPolicy(4, use_confidence=False))
    texts = prompts(2, seed=95)
    since = Since(engine)
    assert token_ids(engine, texts, greedy(150)) == token_ids(
        plain(tiny.target), texts, greedy(150)
    )
    heights = since["heights"]
    assert sum(heights[1:]) > heights[0]
    assert since["accepted_per_position"] == since["drafted_per_position"]


def test_sampled_requests_beside_greedy_ones(tiny: TinyModels) -> None:
    engine = dedicated(tiny.target, tiny.noisy)
    texts = prompts(8, seed=96)
    params = [greedy(30) for _ in texts]
    for i in range(1, 8, 2):
        params[i].temperature, params[i].seed = 0.8, i
    outputs = token_ids(engine, texts, params)
    expected = token_ids(plain(tiny.target), texts[::2], greedy(30))
    assert outputs[::2] == expected
    assert all(len(output[0]) == 30 for output in outputs)


TARGET_MS = 60.0


@pytest.fixture
def slow(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """A target whose steps take 60 ms and more, and a draft whose passes take 15 and more."""
    monkeypatch.setenv(DELAY_VARIABLE, str(TARGET_MS / 4))
    engine = dedicated(tiny.target, tiny.target, height=4, max_num_seqs=2)
    slow_down(runner_of(engine), TARGET_MS, monkeypatch)
    return engine


def test_overlap_gains(slow: LLM, tiny: TinyModels) -> None:
    """A draft that is always right, K = 4, a quarter of a step per token: 1.6 at best."""
    draft = runner_of(slow).stairs_dedicated
    waited = {}
    (text,) = prompts(1, seed=97, longest=10)
    for ahead in (5, 0):
        draft.ahead = ahead
        token_ids(slow, [text], greedy(10))
        since = Since(slow)
        assert token_ids(slow, [text], greedy(100)) == token_ids(
            plain(tiny.target), [text], greedy(100)
        )
        waited[ahead] = since["dedicated"]["wait_seconds"]
    # One pass of five is waited for where the target's step takes four.
    assert waited[5] < 0.6 * waited[0], waited


@pytest.mark.parametrize("height", ["fixed", pytest.param("auto", marks=pytest.mark.full)])
def test_tensor_parallel_2(tiny: TinyModels, height: str) -> None:
    """The first rank asks; the scheduler hands both the same drafts.

    Under ``auto`` ranks agree and the text is the target's; whether the draft is worth a question
    where three processes share two cores is the policy's affair.
    """
    texts = prompts(5, seed=98)
    batches = [[4] * 5, [0, 1, 2, 3, 4]] + [[4] * 5] * (3 if height == "auto" else 0)
    outputs, counted = tensor_parallel_2(
        tiny.target,
        tiny.noisy,
        texts,
        batches,
        max_tokens=30,
        stairs_placement="dedicated",
        stairs_height=height,
    )
    expected = [samples[0] for samples in token_ids(plain(tiny.target), texts, greedy(30))]
    assert outputs == [expected] * len(batches)
    if height == "fixed":
        assert 0 < counted["accepted_per_position"][0] < counted["drafted_per_position"][0]
        assert counted["dedicated"]["answers"] > 0
