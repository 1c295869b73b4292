import pytest

from vllm_stairs.bench import measure
from vllm_stairs.bench.errors import BenchError
from vllm_stairs.bench.measure import Output, Work


class FakeEngine:
    """Gives every running request ``per_step`` tokens a step; a step takes one second."""

    def __init__(self, per_step=1, length=4):
        self.per_step, self.length = per_step, length
        self.running, self.now, self.order, self.most = {}, 0.0, [], 0

    def submit(self, request_id, tokens, seed):
        self.running[request_id] = 0
        self.order.append((request_id, tuple(tokens), seed))
        self.most = max(self.most, len(self.running))

    def step(self):
        self.now += 1.0
        outputs = []
        for request_id, written in list(self.running.items()):
            # The prefill gives one token, as in vLLM.
            count = min(self.per_step if written else 1, self.length - written)
            self.running[request_id] = written + count
            finished = written + count == self.length
            outputs.append(Output(request_id, list(range(written, written + count)), finished))
            if finished:
                del self.running[request_id]
        return outputs

    def clock(self):
        return self.now


def work(count, turns=1):
    return [Work(str(i), f"g{i % 2}", (1, 2, 3), ("hello",) * turns, True) for i in range(count)]


def run(engine, items, batch, **kwargs):
    loop = measure.Loop(engine, items, batch, clock=engine.clock, **kwargs)
    loop.run()
    return loop.result()


def test_keeps_exactly_the_batch_in_flight_in_order():
    engine = FakeEngine()
    result = run(engine, work(5), 2, seed=10)
    assert engine.most == 2
    assert [request_id for request_id, _, _ in engine.order] == ["0/0", "1/0", "2/0", "3/0", "4/0"]
    assert [seed for _, _, seed in engine.order] == [10, 11, 12, 13, 14]
    assert result.output_tokens == 20
    assert result.seconds == 12  # Three rounds of four steps.


def test_by_group_a_group_ends_before_the_next_begins():
    items = sorted(work(5), key=lambda item: item.group)
    engine = FakeEngine()
    result = run(engine, items, 2, by_group=True)
    assert [request_id for request_id, _, _ in engine.order] == ["0/0", "2/0", "4/0", "1/0", "3/0"]
    sent = {request.work.id: request.submitted for request in result.requests}
    # Mixed, the first of the second group would be sent with the last of the first one.
    assert sent == {"0": 0, "2": 0, "4": 4, "1": 8, "3": 8}


def test_figures_of_plain_decoding():
    engine = FakeEngine()
    figures = measure.summarise(run(engine, work(2), 1))
    assert figures["tokens_per_s"] == 1
    assert figures["acceptance_length"] == 1
    assert figures["ttft_ms"]["p50"] == 1000
    assert figures["itl_ms"]["p99"] == 1000
    assert figures["tpot_ms"]["mean"] == 1000
    assert figures["mean_context_tokens"] == 5
    assert figures["groups"]["g1"] == {
        "requests": 1, "tokens": 3, "steps": 3, "output_tokens": 4, "seconds": 4.0,
    }  # fmt: skip


def test_acceptance_length_counts_tokens_per_step_without_the_prefill():
    figures = measure.summarise(run(FakeEngine(per_step=3, length=7), work(2), 2))
    assert figures["acceptance_length"] == 3
    assert figures["tpot_ms"]["p50"] == pytest.approx(1000 / 3)


def test_same_output_same_digest():
    one = measure.summarise(run(FakeEngine(1), work(2), 1))["digests"]
    other = measure.summarise(run(FakeEngine(2), work(2), 2))["digests"]
    assert one == other
    assert measure.digest([1, 2]) != measure.digest([12])


def test_later_turns_follow_the_answers():
    asked = []

    def follow_up(item, answers):
        asked.append((item.id, [len(answer) for answer in answers]))
        return [9] * (len(answers) + 1) if len(answers) < 3 else None

    engine = FakeEngine()
    result = run(engine, work(1, turns=4), 1, follow_up=follow_up)
    # The fourth turn was refused: the conversation no longer fits.
    assert [r.id for r in result.requests] == ["0/0", "0/1", "0/2"]
    assert asked == [("0", [4]), ("0", [4, 4]), ("0", [4, 4, 4])]
    assert list(result.requests[2].prompt) == [9, 9, 9]


def test_a_request_without_a_token_is_an_error():
    class Silent(FakeEngine):
        def step(self):
            return [Output(name, [], True) for name in list(self.running)]

    with pytest.raises(BenchError, match="ended without a token"):
        measure.summarise(run(Silent(), work(1), 1))


class World:
    """A clock that time passes on while other arms have their turns."""

    def __init__(self, engine):
        self.engine, self.elsewhere, self.calls = engine, 0.0, []

    def clock(self):
        return self.engine.now + self.elsewhere

    def pause(self):
        self.calls.append("pause")

    def resume(self):
        self.calls.append("resume")


def test_a_pass_in_turns_has_the_figures_of_one_without():
    whole = measure.summarise(run(FakeEngine(), work(5), 2))
    world = World(FakeEngine())
    loop = measure.Loop(world.engine, work(5), 2, clock=world.clock)
    for turn in range(1, 5):
        world.elsewhere += 1000.0
        resume = world.resume if turn > 1 else None
        loop.run(20 * turn / 4, resume=resume, pause=world.pause)
    assert loop.done
    figures = measure.summarise(loop.result())
    turns = figures.pop("turns")
    assert whole.pop("turns") == [(20, 12.0)]
    assert figures == whole
    assert [tokens for tokens, _ in turns] == [6, 4, 6, 4]  # A step of two is not cut.
    assert sum(seconds for _, seconds in turns) == figures["seconds"]
    # The last turn ends with the pass: nothing is left to be held.
    assert world.calls == ["pause", "resume", "pause", "resume", "pause", "resume"]


def test_what_an_engine_does_until_it_stands_still_is_part_of_the_turn():
    world = World(FakeEngine())

    def pause():
        world.engine.now += 0.5

    loop = measure.Loop(world.engine, work(1), 1, clock=world.clock)
    loop.run(2, pause=pause)
    world.elsewhere += 100.0
    loop.run()
    assert loop.result().turns == [(2, 2.5), (2, 2.0)]


def test_groups_know_how_long_their_requests_took():
    groups = measure.summarise(run(FakeEngine(), work(4), 2))["groups"]
    assert groups["g0"] == {
        "requests": 2, "tokens": 6, "steps": 6, "output_tokens": 8, "seconds": 8.0,
    }  # fmt: skip
