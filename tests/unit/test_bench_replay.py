import json
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_stairs import staircase
from vllm_stairs.bench import costs, policies, record, replay
from vllm_stairs.bench.costs import CostModel, Curve
from vllm_stairs.bench.errors import BenchError

FLAT = CostModel(Curve({1: 1.0}), Curve({1: 10.0}), 0.5)


class Pair:
    """A target and a greedy draft that agrees with it at random places of the text."""

    def __init__(self, seed, length, rate, vocabulary=50):
        source = random.Random(seed)
        self.text = [source.randrange(vocabulary) for _ in range(length)]
        self.agrees = [source.random() < rate for _ in range(length)]

    def draft(self, position, height):
        """What the draft writes after ``text[:position]``: right up to its first mistake."""
        written = []
        for index in range(position, position + height):
            right = self.agrees[index] and written == self.text[position:index]
            written.append(self.text[index] if right else -1 - index)
        return written

    def decode(self, height):
        """Decode with stairs of this height, with the reference; yields record lines."""
        position, lines = 0, []
        while position < len(self.text):
            own = min(height, len(self.text) - position - 1)
            draft = self.draft(position, own)
            predictions = self.text[position : position + own + 1]
            emitted = staircase.validate(draft, predictions)
            lines.append(
                {
                    "request": "r",
                    "position": position,
                    "draft": draft,
                    "probability": [0.9 if token >= 0 else 0.2 for token in draft],
                    "emitted": emitted,
                    "rows": own + 1,
                    "draft_ms": 2.0 * own,
                    "target_ms": 10.0 + own,
                }
            )
            position += len(emitted)
        return lines


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return record.load(path)


@given(st.integers(0, 10**6), st.integers(1, 60), st.floats(0, 0.8), st.integers(0, 4))
def test_a_shorter_height_is_replayed_exactly(tmp_path_factory, seed, length, rate, height):
    pair = Pair(seed, length, rate)
    recorded = pair.decode(60)  # Taller than any run of agreements: nothing is unknown.
    path = tmp_path_factory.mktemp("r") / "record.jsonl"
    if not any(line["draft"] for line in recorded):
        return
    found = write(path, recorded)
    score = replay.replay(found, policies.Fixed(height), FLAT)
    truth = pair.decode(height)
    if score.guessed == 0:
        assert score.steps == len(truth)
        assert score.heights[-1] == sum(
            len(line["draft"]) == len(score.heights) - 1 for line in truth
        )
    assert score.tokens == length


def test_the_recorded_height_reproduces_the_record(tmp_path):
    pair = Pair(seed=1, length=400, rate=0.6)
    recorded = pair.decode(4)
    score = replay.replay(write(tmp_path / "r.jsonl", recorded), policies.Fixed(4), FLAT)
    assert score.steps == len(recorded)
    assert score.acceptance_length == pytest.approx(400 / len(recorded))
    assert score.guessed == 0


def test_what_was_not_recorded_is_guessed_at_the_records_rate_and_reported(tmp_path):
    pair = Pair(seed=2, length=3000, rate=0.7)
    found = write(tmp_path / "r.jsonl", pair.decode(3))
    score = replay.replay(found, policies.Fixed(6), FLAT)
    truth = len(pair.decode(6))
    assert 0 < score.guessed < 0.5
    assert score.steps == pytest.approx(truth, rel=0.05)


def test_time_adds_up(tmp_path):
    found = write(tmp_path / "r.jsonl", Pair(3, 100, 0.5).decode(4))
    score = replay.replay(found, policies.Fixed(2), FLAT)
    drafted = sum(height * count for height, count in enumerate(score.heights))
    assert score.draft_ms == pytest.approx(drafted)
    assert score.target_ms == 10 * score.steps
    assert score.overhead_ms == 0.5 * score.steps
    total = score.draft_ms + score.target_ms + score.overhead_ms
    assert score.tokens_per_s == pytest.approx(1e3 * score.tokens / total)


def test_a_batch_pays_for_its_tallest_draft_and_all_rows(tmp_path):
    lines = []
    for name in "ab":
        lines += [{**line, "request": name} for line in Pair(ord(name), 50, 0.5).decode(4)]
    found = write(tmp_path / "r.jsonl", lines)
    by_rows = CostModel(Curve({1: 1.0}), Curve({1: 1.0, 101: 101.0}))
    one = replay.replay(found, policies.Fixed(0), by_rows, batch=1)
    two = replay.replay(found, policies.Fixed(0), by_rows, batch=2)
    assert (one.steps, two.steps) == (100, 50)
    assert one.target_ms == two.target_ms == 100
    assert one.tokens == two.tokens == 100


def test_plain_is_a_height_of_zero(tmp_path):
    found = write(tmp_path / "r.jsonl", Pair(3, 100, 0.5).decode(4))
    plain, scores = replay.compare(found, [policies.Fixed(2)], FLAT, 1)
    assert plain.steps == plain.tokens == 100
    assert plain.mean_height == 0
    assert scores[0].tokens == 100


def test_a_threshold_stops_after_an_unsure_token(tmp_path):
    found = write(tmp_path / "r.jsonl", Pair(4, 500, 0.6).decode(8))
    sure = replay.replay(found, policies.Threshold(0.5, 8), FLAT)
    fixed = replay.replay(found, policies.Fixed(8), FLAT)
    # Here the draft knows when it is wrong: it never drafts past a mistake, and loses nothing.
    assert sure.acceptance_length == pytest.approx(fixed.acceptance_length, rel=0.02)
    assert sure.mean_height <= sure.acceptance_length
    assert sure.tokens_per_s > fixed.tokens_per_s


def test_gain_stops_drafting_where_drafts_are_worth_nothing(tmp_path):
    found = write(tmp_path / "r.jsonl", Pair(5, 2000, 0.02).decode(4))
    dear = CostModel(Curve({1: 5.0}), Curve({1: 10.0, 5: 20.0}))
    plain, (gain, fixed) = replay.compare(
        found, [policies.Gain(4, dear), policies.Fixed(4)], dear, 1
    )
    assert gain.tokens_per_s > 0.95 * plain.tokens_per_s
    assert fixed.tokens_per_s < 0.5 * plain.tokens_per_s


def test_gain_finds_tall_stairs_where_drafts_hold(tmp_path):
    found = write(tmp_path / "r.jsonl", Pair(6, 2000, 0.95).decode(8))
    cheap = CostModel(Curve({1: 0.2}), Curve({1: 10.0, 9: 10.5}))
    _, (gain, best) = replay.compare(found, [policies.Gain(8, cheap), policies.Fixed(8)], cheap, 1)
    assert gain.tokens_per_s > 0.95 * best.tokens_per_s


def test_auto_leaves_a_useless_draft_alone(tmp_path):
    found = write(tmp_path / "r.jsonl", Pair(5, 3000, 0.02).decode(4))
    dear = CostModel(Curve({1: 5.0}), Curve({1: 10.0, 5: 20.0}), 0.5)
    plain, (auto,) = replay.compare(found, [policies.Auto(4, dear)], dear, 1)
    assert auto.tokens == 3000
    assert auto.tokens_per_s > 0.98 * plain.tokens_per_s


def test_auto_keeps_up_with_the_best_height_and_uses_confidence(tmp_path):
    found = write(tmp_path / "r.jsonl", Pair(6, 3000, 0.85).decode(8))
    cheap = CostModel(Curve({1: 1.5}), Curve({1: 10.0, 9: 10.5}), 0.5)
    scores = [policies.Fixed(height) for height in range(9)]
    _, (auto, *fixed) = replay.compare(found, [policies.Auto(8, cheap), *scores], cheap, 1)
    # This draft is unsure of its mistakes, and of nothing else.
    assert auto.tokens_per_s > 1.05 * max(score.tokens_per_s for score in fixed)
    assert auto.target_ms + auto.draft_ms + auto.overhead_ms == pytest.approx(
        1e3 * auto.tokens / auto.tokens_per_s
    )


def test_auto_decides_per_request(tmp_path):
    """Where only some requests' drafts hold, only these get tall staircases."""
    lines = []
    for number in range(48):
        own = Pair(number, 120, 0.95 if number % 3 else 0.02).decode(8)
        for line in own:
            line["probability"] = [0.6] * len(line["draft"])
            lines.append({**line, "request": number})
    found = write(tmp_path / "r.jsonl", lines)
    model = CostModel(Curve({1: 1.0}), Curve({1: 10.0, 40: 20.0}))
    auto = replay.replay(found, policies.Auto(8, model), model, batch=2)
    best = max(
        replay.replay(found, policies.Fixed(height), model, batch=2).tokens_per_s
        for height in range(9)
    )
    assert auto.heights[0] > 0.3 * auto.staircases
    assert sum(auto.heights[4:]) > 0.2 * auto.staircases
    assert auto.tokens_per_s > 1.08 * best


def test_auto_pays_for_the_text_that_its_draft_has_missed(tmp_path):
    """Off while the draft is wrong; when it comes back a longer first pass reads the gap."""
    pair = Pair(1, 1200, 0.0)
    pair.agrees[600:] = [True] * 600
    found = write(tmp_path / "r.jsonl", pair.decode(6))
    model = CostModel(Curve({1: 1.0, 101: 21.0}), Curve({1: 10.0, 9: 10.5}))
    score = replay.replay(found, policies.Auto(6, model), model)
    passes = sum(height * count for height, count in enumerate(score.heights))
    assert passes > 100
    assert score.draft_ms > 1.0 * passes + 20.0


def test_a_prompt_is_read_in_a_step_beside_those_that_decode(tmp_path):
    lines = []
    for number, prompt in enumerate((30, 20)):
        own = Pair(number, 10 + 20 * number, 0.0).decode(4)
        lines += [
            {**line, "request": number, "position": prompt + 1 + line["position"]} for line in own
        ]
    found = write(tmp_path / "r.jsonl", lines)
    assert [trace.prompt for trace in found.traces] == [30, 20]
    by_rows = CostModel(Curve({1: 1.0, 101: 11.0}), Curve({1: 10.0, 101: 20.0}))
    plain = replay.replay(found, policies.Fixed(0), by_rows)
    assert (plain.steps, plain.staircases) == (42, 40)
    assert plain.tokens == 42  # The first token of each comes with its prompt.
    assert plain.target_ms == pytest.approx(42 * 10.0 + 0.1 * (29 + 19))
    assert plain.draft_ms == 0
    # Both at once: the shorter one's end leaves the other alone.
    two = replay.replay(found, policies.Fixed(0), by_rows, batch=2)
    assert two.steps == 31
    assert two.target_ms == pytest.approx(31 * 10.0 + 0.1 * (49 + 10))
    # The first draft pass of a request also reads its prompt.
    drafting = replay.replay(found, policies.Fixed(1), by_rows)
    assert drafting.draft_ms == pytest.approx(38 + 0.1 * (30 + 20))


def test_a_third_request_is_read_while_another_decodes(tmp_path):
    lines = []
    for number, length in enumerate((5, 12, 5)):
        own = Pair(number, length, 0.0).decode(2)
        lines += [{**line, "request": number, "position": 9 + line["position"]} for line in own]
    found = write(tmp_path / "r.jsonl", lines)
    by_rows = CostModel(Curve({1: 1.0}), Curve({1: 1.0, 101: 101.0}))
    plain = replay.replay(found, policies.Fixed(0), by_rows, batch=2)
    # Two prompts; 5 steps of two; a prompt beside one; 5 of two; the last of the second.
    assert plain.steps == 1 + 5 + 1 + 5 + 1
    assert plain.target_ms == 16 + 5 * 2 + (1 + 8) + 5 * 2 + 1


def test_text_beyond_the_measured_sizes_costs_what_a_row_does_on_average(tmp_path):
    line = {**SOUND, "position": 101}
    found = write(tmp_path / "r.jsonl", [line])
    steep = CostModel(Curve({1: 1.0}), Curve({1: 10.0, 4: 10.0, 5: 14.0}))
    plain = replay.replay(found, policies.Fixed(0), steep)
    # 5 rows within the curve, 95 beyond it; then two plain steps.
    assert plain.target_ms == pytest.approx(14.0 + 95 * 1.0 + 2 * 10.0)
    assert "extrapolated" not in steep.source


def test_the_draft_has_missed_what_its_cache_lacks(tmp_path):
    """As in the engine: the newest token is never read yet, a last draft that was kept neither."""
    pair = Pair(1, 40, 0.0)
    pair.agrees[:4] = [True] * 4
    trace = write(tmp_path / "r.jsonl", pair.decode(4)).traces[0]
    lane = replay._Lane(0, trace)
    assert lane.advance(4, 4) == (4, False)
    assert lane.missed == 1  # 5 written, 3 read: it lacks the last draft and the newest token.
    lane.advance(0, 0)
    assert lane.missed == 2
    lane.advance(1, 3)  # Two drafts were left out, the first was wrong.
    assert lane.missed == 0
    for _ in range(3):
        lane.advance(0, 0)
    assert lane.missed == 3


def test_auto_is_deterministic(tmp_path):
    found = write(tmp_path / "r.jsonl", Pair(9, 800, 0.6).decode(6))
    one, two = (replay.replay(found, policies.Auto(6, FLAT), FLAT) for _ in range(2))
    assert one.heights == two.heights
    assert one.tokens_per_s == two.tokens_per_s


def test_thousands_of_steps_a_second(tmp_path):
    found = write(tmp_path / "r.jsonl", Pair(7, 20000, 0.5).decode(4))
    start = time.perf_counter()
    score = replay.replay(found, policies.Threshold(0.5, 4), FLAT)
    assert score.steps / (time.perf_counter() - start) > 5000


def test_costs_are_measured_from_the_record_without_prefill_steps(tmp_path):
    lines = Pair(8, 60, 0.5).decode(3)
    lines[4]["rows"] = 200  # A prefill in the same step.
    lines[4]["target_ms"] = 999.0
    model = write(tmp_path / "r.jsonl", lines).measured
    assert model.draft_ms(1) == 2.0
    assert model.target_ms(4) == 13.0
    assert model.target_ms(5) < 20


def test_a_step_of_several_requests_is_one_point_of_the_cost_model(tmp_path):
    lines = []
    for step in range(5):
        for name in "ab":
            lines.append(
                {"request": name, "position": 2 * step, "draft": [1], "probability": [0.5],
                 "emitted": [1, 2], "rows": 4, "draft_ms": 3.0, "target_ms": 20.0}
            )  # fmt: skip
    model = write(tmp_path / "r.jsonl", lines).measured
    assert model.target_ms.as_dict() == {"4": 20.0}
    assert model.draft_ms.as_dict() == {"2": 3.0}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (["{"], ":1: not JSON"),
        (['{"request": 1}'], ":1: expected an object with request, position"),
        (['{"request": 1, "position": 0, "draft": [1], "probability": [], "emitted": [1]}'],
         "differ in length"),
        (['{"request": 1, "position": 0, "draft": [], "probability": [], "emitted": [1, 2]}'],
         "more tokens kept"),
        (['{"request": 1, "position": 0, "draft": [], "probability": [], "emitted": [1]}'],
         "holds no draft"),
        (['{"request": 1, "position": 0, "draft": [1], "probability": [1], "emitted": [1, 2]}',
          '{"request": 1, "position": 5, "draft": [1], "probability": [1], "emitted": [1, 2]}'],
         "has a gap at position 5"),
    ],
)  # fmt: skip
def test_bad_records_get_one_line(tmp_path, lines, message):
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(BenchError, match=message):
        record.load(path)


SOUND = {
    "request": "r", "position": 0, "draft": [1, 2], "probability": [0.5, 0.25], "emitted": [1, 3],
    "rows": 3, "draft_ms": 2.0, "target_ms": 9.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"request": None}, "request must be"),
        ({"position": "0"}, "position must be"),
        ({"position": -1}, "position must be"),
        ({"position": True}, "position must be"),
        ({"draft": None}, "draft must be"),
        ({"draft": {"1": 2}}, "draft must be"),
        ({"draft": [1, "2"]}, "draft must be"),
        ({"emitted": 1}, "emitted must be"),
        ({"emitted": [1.5]}, "emitted must be"),
        ({"probability": [0.5, "0.2"]}, "probability must be a list"),
        ({"probability": [0.5, float("nan")]}, "probability must be a list"),
        ({"probability": [0.5, 1.5]}, "probability must be between"),
        ({"probability": [0.5, -0.1]}, "probability must be between"),
        ({"emitted": [2, 3]}, "emitted is not the draft's beginning"),
        ({"emitted": []}, "emitted is empty"),
        ({"rows": "3"}, "rows must be"),
        ({"rows": 0}, "rows must be"),
        ({"target_ms": None}, "target_ms must be"),
        ({"target_ms": "9"}, "target_ms must be"),
        ({"target_ms": 0}, "target_ms must be"),
        ({"target_ms": float("nan")}, "target_ms must be"),
        ({"target_ms": 10**400}, "target_ms must be"),
        ({"draft_ms": -1.0}, "draft_ms must be"),
        ({"draft_ms": float("inf")}, "draft_ms must be"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, change, message):
    path = tmp_path / "r.jsonl"
    assert write(path, [SOUND]).height == 2
    path.write_text("\n".join(map(json.dumps, [SOUND, {**SOUND, "position": 2, **change}])))
    with pytest.raises(BenchError, match=rf"r\.jsonl:2: {message}"):
        record.load(path)


@pytest.mark.parametrize("content", [b"\x93NUMPY\xff\xfe", b"[" * 100_000])
def test_what_is_no_record_at_all_gets_one_line(tmp_path, content):
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(BenchError, match=r"r\.jsonl:1: not JSON"):
        record.load(path)


def test_a_few_slow_plain_steps_are_no_gain(tmp_path):
    """A measured curve does not fall: plain is not slower than taller steps of the same record."""
    lines = Pair(11, 300, 0.02).decode(8)
    for line in lines:
        # Noise: the few low steps, at the end of the text, met a busy machine.
        line["target_ms"] = 60.0 if line["rows"] < 9 else 40.0
        line["draft_ms"] = 0.5 * len(line["draft"])
    found = write(tmp_path / "r.jsonl", lines)
    model = found.measured
    assert model.target_ms.values == sorted(model.target_ms.values)
    assert 40 < model.target_ms(1) == model.target_ms(9) < 42
    plain, (tall,) = replay.compare(found, [policies.Fixed(8)], model, 1)
    assert tall.tokens_per_s < tall.acceptance_length * plain.tokens_per_s
    assert "plain rests on 1 step at batch 1: record height-0 steps" in model.source


def test_enough_plain_steps_need_no_note(tmp_path):
    lines = Pair(12, 100, 0.3).decode(4) + [
        {**SOUND, "request": "p", "position": n, "draft": [], "probability": [], "emitted": [5],
         "rows": 1, "draft_ms": 0.0}
        for n in range(8)
    ]  # fmt: skip
    assert "plain rests" not in write(tmp_path / "r.jsonl", lines).measured.source


@given(
    st.dictionaries(
        st.integers(1, 99), st.tuples(st.floats(0.1, 1e3), st.integers(1, 50)), min_size=1
    )
)
def test_measured_curves_are_monotone_and_keep_their_weighted_mean(points):
    curve = costs.monotone(points)
    assert list(curve) == sorted(points)
    assert list(curve.values()) == sorted(curve.values())
    total = sum(ms * weight for ms, weight in points.values())
    assert sum(ms * points[size][1] for size, ms in curve.items()) == pytest.approx(total)
    already = {size: (ms, 1) for size, ms in curve.items()}
    assert costs.monotone(already) == curve


def test_a_batch_that_the_record_cannot_fill_is_refused(tmp_path):
    found = write(tmp_path / "r.jsonl", Pair(3, 100, 0.5).decode(4))
    with pytest.raises(BenchError, match="a batch of 2 needs as many requests, the record has 1"):
        replay.replay(found, policies.Fixed(2), FLAT, batch=2)


def test_extrapolation_is_noted(tmp_path):
    found = write(tmp_path / "r.jsonl", Pair(3, 100, 0.5).decode(4))
    model = CostModel(Curve({1: 1.0}), Curve({1: 10.0, 3: 11.0}), 0.0, "a machine")
    low = replay.replay(found, policies.Fixed(2), model)
    assert low.extrapolated == 0
    assert model.source == "a machine"
    tall = replay.replay(found, policies.Fixed(4), model)
    assert tall.extrapolated > 0.9
    assert model.source == "a machine; target extrapolated beyond 3 rows (up to 5)"
    assert model.as_dict()["source"] == "a machine"


def test_curves_interpolate_and_never_go_downhill_beyond_the_end():
    curve = Curve({2: 10.0, 4: 20.0})
    assert [curve(n) for n in (1, 2, 3, 4, 6)] == [10, 10, 15, 20, 30]
    assert Curve({1: 5.0, 2: 4.0})(10) == 4
    assert Curve({3: 7.0})(100) == 7


def test_cost_models_are_read_from_json(tmp_path):
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(FLAT.as_dict()))
    assert costs.load(path).as_dict() == FLAT.as_dict()
    for text in ("{}", '{"draft_ms": {}, "target_ms": {}}', '{"draft_ms": 1, "target_ms": 2}'):
        path.write_text(text)
        with pytest.raises(BenchError, match="is not a cost model"):
            costs.load(path)
    for draft, target in (("-1", "1"), ("1", "0"), ("0", "1")):
        path.write_text(f'{{"draft_ms": {{"1": {draft}}}, "target_ms": {{"1": {target}}}}}')
        with pytest.raises(BenchError, match="must be positive"):
            costs.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"draft_ms": {"1": NaN}, "target_ms": {"1": 1}}', "must be finite"),
        ('{"draft_ms": {"1": 1}, "target_ms": {"1": Infinity}}', "must be finite"),
        ('{"draft_ms": {"1": 1}, "target_ms": {"1": 1}, "overhead_ms": NaN}', "must be finite"),
        ('{"draft_ms": {"0": 1}, "target_ms": {"1": 1}}', "is not a cost model"),
        ('{"draft_ms": {"1": 1}, "target_ms": {"-4": 1}}', "is not a cost model"),
        ("[" * 100_000, "is not a cost model"),
    ],
)
def test_cost_models_out_of_range_get_one_line(tmp_path, text, message):
    path = tmp_path / "cost.json"
    path.write_text(text)
    with pytest.raises(BenchError, match=message):
        costs.load(path)


def test_a_cost_model_is_taken_from_profiled_passes():
    def profile(method, target, draft):
        return {
            "method": method,
            "seconds": {"draft": 1, "target": 1, "validation": 0.1, "rest": 0.1},
            "steps": 100,
            "target_ms_by_rows": target,
            "draft_ms_by_batch": draft,
        }

    profiles = [
        profile("plain", {"1": [10.0, 50]}, {}),
        profile("draft_model", {"5": [12.0, 50]}, {"1": [99.0, 50]}),
        profile("stairs", {"5": [14.0, 51]}, {"1": [3.0, 50]}),
    ]
    model = costs.from_profiles(profiles, "run.json")
    assert model.target_ms.as_dict() == {"1": 10.0, "5": 14.0}
    assert model.draft_ms.as_dict() == {"1": 3.0}
    assert model.overhead_ms == pytest.approx(2.0)
    with pytest.raises(BenchError, match="no profiled pass"):
        costs.from_profiles(profiles[:1], "run.json")


def test_draft_times_come_from_arms_of_fixed_height_where_there_are_any():
    def profile(arm, draft_ms):
        return {
            "arm": arm,
            "method": "stairs",
            "seconds": {"draft": 1, "target": 1, "validation": draft_ms / 100, "rest": 0.0},
            "steps": 100,
            "target_ms_by_rows": {"1": [10.0, 50]},
            "draft_ms_by_batch": {"1": [draft_ms, 50]},
        }

    arms = {
        "auto": {"speculative_config": {"stairs_height": "auto"}},
        "fixed": {"speculative_config": {"num_speculative_tokens": 4}},
    }
    auto, fixed = profile("auto", 9.0), profile("fixed", 3.0)
    model = costs.from_profiles([auto, fixed], "run.json", arms)
    assert model.draft_ms(1) == 3.0
    assert model.overhead_ms == pytest.approx(0.3)
    assert costs.from_profiles([auto], "run.json", arms).draft_ms(1) == 9.0


def test_the_h100_example_is_what_the_data_sheet_gives():
    from pathlib import Path

    path = Path(costs.__file__).parent / "data" / "h100_example.json"
    assert json.loads(path.read_text()) == costs.h100_example().as_dict()
    assert "not measured" in costs.load(path).source


@pytest.mark.parametrize(
    "text",
    ["fixed", "fixed:-1", "fixed:x", "threshold", "tall:3", "gain:0", "auto:0", "heuristic:1:2:3"],
)
def test_unknown_policies_get_one_line(text):
    with pytest.raises(BenchError, match="unknown policy"):
        policies.parse(text, height=4, costs=FLAT)


@pytest.mark.parametrize("text", ["threshold:nan", "threshold:1.5", "product:-0.1:3"])
def test_a_policy_takes_probabilities_only(text):
    with pytest.raises(BenchError, match="P is a probability, 0 to 1"):
        policies.parse(text, height=4, costs=FLAT)


@pytest.mark.parametrize(
    "text", ["fixed:5", "threshold:0.5:5", "heuristic:1:5", "gain:5", "auto:5"]
)
def test_a_policy_taller_than_the_record_is_refused(text):
    with pytest.raises(BenchError, match="taller than the record .height 4.: .* 5 or more"):
        policies.parse(text, height=4, costs=FLAT)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("fixed:0", "fixed:0"),
        ("threshold:0.4", "threshold:0.4:4"),
        ("product:0.2:3", "product:0.2:3"),
        ("heuristic", "heuristic:4:4"),
        ("gain:2", "gain:2"),
        ("auto", "auto:4"),
        ("auto:3", "auto:3"),
    ],
)
def test_policies_are_read(text, name):
    assert policies.parse(text, height=4, costs=FLAT).name == name
