"""The simulator against the engine, and what `auto` is worth, in time that a cost model keeps.

How fast a machine happens to be would decide what `auto` does, and no test could say what it
should have done. So the engine here is the real one, with real drafts and real decisions, but its
clock is not: each pass of a model lasts as long as a cost model says, and the simulator's do too.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from tests.engine.engines import plain, stairs, statistics
from tests.tiny import WORDS, TinyModels
from vllm_stairs.bench.costs import CostModel, Curve
from vllm_stairs.bench.measure import Loop, Output, Work
from vllm_stairs.bench.policies import Auto, Fixed
from vllm_stairs.bench.record import Record, load
from vllm_stairs.bench.replay import Score, replay
from vllm_stairs.engine import runner as runner_module
from vllm_stairs.height.ragged import RaggedPolicy

HEIGHT, TALL = 4, 16
TOKENS = 100
PROMPTS = 32


def prompts(count: int) -> list[tuple[int, ...]]:
    """Token ids of prompts of mixed lengths; fewer are the first of more."""
    rng = random.Random(7)
    ids = range(3, len(WORDS))
    return [tuple(rng.choices(ids, k=rng.randint(4, 60))) for _ in range(count)]


def machine(*, draft_ms: float = 1.5, row_ms: float = 0.2) -> CostModel:
    """A step of the target takes 10 ms and something for each row; up to sizes of prompts."""
    return CostModel(
        Curve({1: draft_ms, 1001: draft_ms + 20.0}),
        Curve({1: 10.0, 2001: 10.0 + 2000 * row_ms}),
        0.5,
    )


def guess(costs: CostModel) -> float:
    """The draft's price in steps of the target, as the engine guesses it from the weights."""
    return costs.draft_ms(1) / costs.target_ms(1)


def runner_of(llm: LLM) -> Any:
    core = llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    return core.model_executor.driver_worker.worker.model_runner


class Clock:
    """Takes the place of the module ``time``."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0

    def perf_counter(self) -> float:
        return self.seconds

    def spend(self, ms: float) -> None:
        self.seconds += ms / 1e3


@contextmanager
def virtual_time(llm: LLM, costs: CostModel) -> Iterator[Clock]:
    """Let each pass last as long as the cost model says, and everything else no time."""
    clock, runner = Clock(), runner_of(llm)
    execute, forward = runner.execute_model, runner._model_forward
    rows = 0

    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal rows
        rows = scheduler_output.total_num_scheduled_tokens
        return execute(scheduler_output, *args, **kwargs)

    def target_pass(*args: Any, **kwargs: Any) -> Any:
        clock.spend(costs.target_ms(rows) + costs.overhead_ms)
        clock.steps += 1
        return forward(*args, **kwargs)

    def timed_draft_pass(draft_pass: Callable[..., Any]) -> Callable[..., Any]:
        def run(metadata: Any, *args: Any, **kwargs: Any) -> Any:
            clock.spend(costs.draft_ms(metadata.num_actual_tokens))
            return draft_pass(metadata, *args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner_module, "time", clock)
        patch.setattr(runner, "execute_model", execute_model)
        patch.setattr(runner, "_model_forward", target_pass)
        if hasattr(runner, "drafter"):
            patch.setattr(runner.drafter, "_run", timed_draft_pass(runner.drafter._run))
        yield clock


class Watched(RaggedPolicy):
    """The policy itself, with a look at what it was told."""

    def __init__(self, costs: CostModel) -> None:
        super().__init__(HEIGHT, draft_share=guess(costs))
        self.seen: dict[Any, list[tuple[int, int]]] = defaultdict(list)

    def observe(self, keys, heights, accepted, *args, **kwargs):  # type: ignore[no-untyped-def]
        for key, height, kept in zip(keys, heights, accepted, strict=True):
            self.seen[key].append((height, kept))
        super().observe(keys, heights, accepted, *args, **kwargs)

    def mean_height_of(self, chosen: Callable[[int], bool]) -> float:
        """Mean height of the staircases of some requests, by their numbers."""
        heights = [
            height
            for key, staircases in self.seen.items()
            if chosen(int(str(key).split("/")[0]))
            for height, _ in staircases
        ]
        return sum(heights) / len(heights)


@dataclass(frozen=True)
class Course:
    """What became of some requests in the engine."""

    outputs: list[list[int]]
    tokens: int
    steps: int
    seconds: float
    heights: list[int]
    """Staircases by height."""
    accepted: int

    @property
    def staircases(self) -> int:
        return sum(self.heights)

    @property
    def mean_height(self) -> float:
        return sum(h * count for h, count in enumerate(self.heights)) / self.staircases

    @property
    def acceptance_length(self) -> float:
        return 1 + self.accepted / self.staircases

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class Server:
    """An engine as the benchmark's loop wants it."""

    def __init__(self, llm: LLM, temperatures: Sequence[float], max_height: int | None) -> None:
        self.engine: Any = llm.llm_engine
        self.temperatures = temperatures
        self.extra = None if max_height is None else {"stairs_max_height": max_height}

    def submit(self, request_id: str, tokens: Sequence[int], seed: int) -> None:
        params = SamplingParams(
            temperature=self.temperatures[seed % len(self.temperatures)],
            seed=seed,
            max_tokens=TOKENS,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
            extra_args=self.extra,
        )
        self.engine.add_request(request_id, {"prompt_token_ids": list(tokens)}, params)

    def step(self) -> list[Output]:
        return [
            Output(output.request_id, output.outputs[0].token_ids, output.finished)
            for output in self.engine.step()
        ]


def serve(
    llm: LLM,
    texts: Sequence[tuple[int, ...]],
    batch: int,
    costs: CostModel,
    temperatures: Sequence[float] = (0.0,),
    max_height: int | None = None,
) -> Course:
    """Serve prompts with ``batch`` of them in flight, from an empty prefix cache."""
    llm.reset_prefix_cache()
    speculates = hasattr(runner_of(llm), "drafter")
    work = [Work(str(i), "", tokens, (), False) for i, tokens in enumerate(texts)]
    before = statistics(llm) if speculates else None
    server = Server(llm, temperatures, max_height)
    with virtual_time(llm, costs) as clock:
        loop = Loop(server, work, batch, clock=clock.perf_counter)
        loop.run()
        result = loop.result()
    done = sorted(result.requests, key=lambda request: int(request.work.id))
    heights, accepted = [len(texts) * (TOKENS - 1)], 0
    if before is not None:
        after = statistics(llm)
        heights = [b - a for a, b in zip(before["heights"], after["heights"], strict=True)]
        accepted = sum(after["accepted_per_position"]) - sum(before["accepted_per_position"])
    return Course(
        [request.tokens for request in done],
        result.output_tokens,
        clock.steps,
        result.seconds,
        heights,
        accepted,
    )


def serve_auto(
    llm: LLM,
    texts: Sequence[tuple[int, ...]],
    batch: int,
    costs: CostModel,
    temperatures: Sequence[float] = (0.0,),
) -> tuple[Course, Watched]:
    """The same with a policy that knows nothing yet."""
    policy = Watched(costs)
    with pytest.MonkeyPatch.context() as patch:
        # Other tests share the engine.
        patch.setattr(runner_of(llm).stairs_decider, "policy", policy)
        return serve(llm, texts, batch, costs, temperatures), policy


def auto(tiny: TinyModels, draft: Path) -> LLM:
    return stairs(tiny.target, draft, height=HEIGHT, stairs_height="auto")


@dataclass(frozen=True)
class Recorded:
    """A run of fixed height with the noisy draft, and the record of it."""

    llm: LLM
    record: Record
    course: Course
    costs: CostModel

    def simulate(
        self, policy: Auto | Fixed, costs: CostModel, batch: int, count: int = PROMPTS
    ) -> Score:
        """Replay the first requests."""
        some = Record(self.record.traces[:count], self.record.height, None)
        return replay(some, policy, costs, batch)


def make_record(llm: LLM, path: Path, max_height: int | None = None) -> Recorded:
    """Record all prompts at once."""
    costs, texts = machine(), prompts(PROMPTS)
    path.write_text("")  # The engine goes on appending.
    course = serve(llm, texts, PROMPTS, costs, max_height=max_height)
    found = load(path)
    assert [trace.prompt for trace in found.traces] == [len(text) for text in texts]
    assert {trace.tokens for trace in found.traces} == {TOKENS - 1}
    return Recorded(llm, found, course, costs)


@pytest.fixture(scope="module")
def recorder(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, Path]:
    path = tmp_path_factory.mktemp("agreement") / "record.jsonl"
    options = {"stairs_record": str(path), "max_num_seqs": PROMPTS}
    return stairs(tiny.target, tiny.noisy, height=TALL, **options), path


@pytest.fixture(scope="module")
def recorded(recorder: tuple[LLM, Path]) -> Recorded:
    """So tall that no draft is kept whole: the record knows every position."""
    return make_record(*recorder)


@pytest.fixture(scope="module")
def low(recorder: tuple[LLM, Path]) -> Recorded:
    """As tall as `auto` may be: what follows a draft that was kept whole is guessed."""
    return make_record(*recorder, max_height=HEIGHT)


def assert_same(simulated: Score, real: Course) -> None:
    """The same course: every staircase, every step, every millisecond."""
    assert simulated.guessed == 0
    none = [0] * (len(real.heights) - len(simulated.heights))
    assert [*simulated.heights, *none] == real.heights
    assert simulated.tokens == real.tokens
    assert simulated.steps == real.steps
    assert simulated.mean_height == pytest.approx(real.mean_height)
    assert simulated.acceptance_length == pytest.approx(real.acceptance_length)
    assert simulated.tokens_per_s == pytest.approx(real.tokens_per_s)


def test_the_simulator_reproduces_the_recorded_run(recorded: Recorded) -> None:
    assert_same(recorded.simulate(Fixed(TALL), recorded.costs, PROMPTS), recorded.course)


@pytest.mark.parametrize("height", [1, 3])
def test_the_simulator_takes_the_engines_course_at_lower_heights(
    recorded: Recorded, height: int
) -> None:
    texts = prompts(12)
    real = serve(recorded.llm, texts, 4, recorded.costs, max_height=height)
    assert_same(recorded.simulate(Fixed(height), recorded.costs, 4, len(texts)), real)


@pytest.mark.parametrize(("batch", "count"), [(1, 8), (4, 20)])
@pytest.mark.parametrize("draft_ms", [0.5, 1.5, 4.0])
def test_the_simulator_takes_the_engines_course_with_auto(
    tiny: TinyModels, recorded: Recorded, low: Recorded, batch: int, count: int, draft_ms: float
) -> None:
    costs = machine(draft_ms=draft_ms)
    real, _ = serve_auto(auto(tiny, tiny.noisy), prompts(count), batch, costs)
    assert real.tokens == count * TOKENS
    assert_same(recorded.simulate(Auto(HEIGHT, costs), costs, batch, count), real)
    # Where some is guessed the policy sees another world, and may go another way of like speed.
    guessing = low.simulate(Auto(HEIGHT, costs), costs, batch, count)
    assert 0 < guessing.guessed < 0.05
    assert guessing.tokens_per_s == pytest.approx(real.tokens_per_s, rel=0.03)


@pytest.mark.parametrize(("batch", "count"), [(1, 8), (8, 32)])
def test_a_bad_draft_costs_little(
    tiny: TinyModels, recorded: Recorded, batch: int, count: int
) -> None:
    costs, texts = machine(), prompts(count)
    without = serve(plain(tiny.target, async_scheduling=False), texts, batch, costs)
    real, _ = serve_auto(auto(tiny, tiny.random), texts, batch, costs)
    assert real.outputs == without.outputs
    assert 0 < sum(real.heights[1:]) < 0.1 * real.staircases
    assert real.tokens_per_s > 0.97 * without.tokens_per_s
    # Plain decoding in the simulator is the engine's, step for step.
    simulated = recorded.simulate(Fixed(0), costs, batch, count)
    assert simulated.steps == without.steps
    assert simulated.tokens_per_s == pytest.approx(without.tokens_per_s, rel=1e-6)


def test_a_good_draft_is_used_to_the_full(tiny: TinyModels, recorded: Recorded) -> None:
    costs, count = machine(draft_ms=0.5), 6
    real, _ = serve_auto(auto(tiny, tiny.target), prompts(count), 1, costs)
    assert real.heights[HEIGHT] > 0.85 * real.staircases
    without = recorded.simulate(Fixed(0), costs, 1, count)
    # 5 tokens for a step and four draft passes; prompts and the first steps are no faster.
    assert real.tokens_per_s > 3.3 * without.tokens_per_s


def test_requests_of_a_batch_are_told_apart(tiny: TinyModels, recorded: Recorded) -> None:
    """The draft is the target: right for those that write greedily, seldom for every fourth."""
    costs, count = machine(draft_ms=0.5, row_ms=0.5), 16
    temperatures = (0.0, 0.0, 0.0, 2.0)
    real, policy = serve_auto(auto(tiny, tiny.target), prompts(count), 4, costs, temperatures)
    assert policy.mean_height_of(lambda number: number % 4 != 3) > 3.0
    assert policy.mean_height_of(lambda number: number % 4 == 3) < 1.0
    without = recorded.simulate(Fixed(0), costs, 4, count)
    assert real.tokens_per_s > 1.3 * without.tokens_per_s
