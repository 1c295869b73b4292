"""Prompts, conversations, shards: with a writer that continues by rule, and no model."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.tiny import TinyModels
from vllm_stairs.bench import prompts as bench
from vllm_stairs.distill import prompts
from vllm_stairs.distill.conversations import GIVEN, GREEDY, SAMPLED, Manner, Wording, converse
from vllm_stairs.distill.errors import DistillError
from vllm_stairs.distill.generators import Request, Written
from vllm_stairs.distill.prompts import BenchmarkFilter, Seed, Turn
from vllm_stairs.distill.shards import Folder

END = 2


class Counting:
    """Writes the ids after the last one, then ends."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def write(self, requests: Sequence[Request]) -> list[Written]:
        self.requests += requests
        return [
            Written(tuple((r.tokens[-1] + i) % 60 + 5 for i in range(min(6, r.write_at_most))), END)
            for r in requests
        ]

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def tokenizer(tiny: TinyModels):
    found = AutoTokenizer.from_pretrained(tiny.target)
    found.chat_template = (
        "{% for m in messages %}{{ '<s> ' if m.role == 'user' else '' }}{{ m.content }} "
        "{{ ': ' if m.role == 'user' else '</s> ' }}{% endfor %}"
    )
    return found


def test_built_in_prompts_are_reproducible_and_of_all_kinds() -> None:
    seeds = [prompts.built_in(n, 0) for n in range(600)]
    assert seeds == [prompts.built_in(n, 0) for n in range(600)]
    assert seeds != [prompts.built_in(n, 1) for n in range(600)]
    assert {s.group for s in seeds} == set(prompts.GROUPS)
    assert any(len(s.turns) == 2 for s in seeds)
    for seed in seeds:
        for turn in seed.turns:
            assert "{" not in turn.opening
            assert turn.opening == turn.opening.rstrip(" ")
            assert turn.write_at_most > 0


def test_no_built_in_opening_comes_from_the_benchmark() -> None:
    may_use = BenchmarkFilter(prompts.benchmark_texts())
    for number in range(300):
        for turn in prompts.built_in(number, 0).turns:
            assert may_use(turn.opening), turn.opening


def test_benchmark_prompts_are_refused_whole_or_in_part() -> None:
    may_use = BenchmarkFilter(prompts.benchmark_texts())
    for prompt in bench.load("spec-bench", all_turns=True)[::20]:
        for turn in prompt.turns:
            assert not may_use(turn)
            assert not may_use("Please! " + turn.upper() + " Thanks") or len(turn.split()) < 10
    assert may_use("Tell me how a sail boat can go against the wind on a small lake in winter")


def test_files_of_prompts(tmp_path: Path) -> None:
    lines = tmp_path / "a.txt"
    lines.write_text("one two\n\nthree\n")
    assert [s.turns[0].opening for s in prompts.from_file(lines)] == ["one two", "three"]
    objects = tmp_path / "a.jsonl"
    objects.write_text(
        json.dumps({"prompt": "p"}) + "\n"
        + json.dumps({"turns": ["a", "b"], "category": "qa"}) + "\n"
        + json.dumps({"messages": [{"role": "system", "content": "s"},
                                   {"role": "user", "content": "u"}]}) + "\n"
    )  # fmt: skip
    seeds = prompts.from_file(objects)
    assert [[t.opening for t in s.turns] for s in seeds] == [["p"], ["a", "b"], ["u"]]
    assert seeds[1].group == "qa"
    for wrong in ("[]", "{}", '{"prompt": 3}', '{"turns": []}', "nonsense"):
        objects.write_text(wrong + "\n")
        with pytest.raises(DistillError, match=r"a\.jsonl:1: expected"):
            prompts.from_file(objects)
    lines.write_text("\n")
    with pytest.raises(DistillError, match="no prompt"):
        prompts.from_file(lines)
    with pytest.raises(DistillError, match="cannot read"):
        prompts.from_file(tmp_path / "missing")


def test_a_conversation_is_the_chat_template_with_what_was_written(tokenizer) -> None:
    writer = Counting()
    seed = Seed("x", "chat", (Turn("the cat", 4, "?"), Turn("now", 0)))
    (talk,) = converse(
        [seed], writer, tokenizer, Manner(greedy_share=1.0, past_the_end_share=0.0),
        may_use=lambda _: True,
    )  # fmt: skip
    first, answer, second = writer.requests
    assert first.temperature == Manner().user_temperature
    assert first.write_at_most == 4
    assert answer.temperature == second.temperature == 0.0
    ids = tokenizer("<s> the cat", add_special_tokens=False)["input_ids"]
    assert list(first.tokens) == ids
    # A later request is a longer beginning of the same text.
    assert talk.tokens[: len(first.tokens)] == list(first.tokens)
    assert talk.tokens[: len(answer.tokens)] == list(answer.tokens)
    assert talk.tokens[: len(second.tokens)] == list(second.tokens)
    origin = talk.origin
    assert origin[: len(ids)] == [GIVEN] * len(ids)
    assert origin[len(ids) : len(ids) + 4] == [SAMPLED] * 4
    written = [o for o in origin if o == GREEDY]
    assert len(written) == 2 * (6 + 1)  # Two answers, their ends included.
    assert talk.tokens[-1] == END


def test_a_user_who_says_nothing_or_a_benchmark_prompt_is_dropped(tokenizer) -> None:
    class Silent(Counting):
        def write(self, requests: Sequence[Request]) -> list[Written]:
            return [Written((), END) for _ in requests]

    seeds = [Seed("x", "chat", (Turn("the", 4),))]
    manner = Manner()
    assert converse(seeds, Silent(), tokenizer, manner, may_use=lambda _: True) == []
    assert converse(seeds, Counting(), tokenizer, manner, may_use=lambda _: False) == []


def test_conversations_stay_within_the_length(tokenizer) -> None:
    manner = Manner(max_length=70, answer_tokens=192)
    seeds = [Seed(str(n), "chat", (Turn("the " * n, 30), Turn("", 40))) for n in range(1, 60)]
    for talk in converse(seeds, Counting(), tokenizer, manner, may_use=lambda _: True):
        assert len(talk.tokens) <= 70 + 1


def test_a_template_that_hides_texts_is_refused(tokenizer) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = "nothing"
    with pytest.raises(DistillError, match="chat template"):
        Wording.of(tokenizer)


def test_shards_keep_everything_and_nothing_twice(tokenizer, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "data", {"target": "t"})
    seeds = [Seed(str(n), "ab"[n % 2], (Turn(f"cat {n % 7}"),)) for n in range(20)]
    talks = converse(seeds, Counting(), tokenizer, Manner(), may_use=lambda _: True)
    seen = folder.seen()
    folder.save(0, talks, seen)
    shard = folder.load(0)
    texts = {tuple(shard.tokens[shard.conversation(n)]) for n in range(len(shard))}
    assert texts == {tuple(t.tokens) for t in talks}
    assert len(shard) == len(texts)
    assert shard.groups == ("a", "b")
    assert folder.seen() == seen
    again = folder.save(1, talks, seen)
    assert len(again) == 0
    print_before = folder.fingerprint()
    assert Folder(tmp_path / "data", {"target": "t"}).fingerprint() == print_before
    with pytest.raises(DistillError, match=r"another run .*target"):
        Folder(tmp_path / "data", {"target": "other"})
    assert folder.indices() == [0, 1]  # Nothing was destroyed.


def test_held_out_conversations_are_few_and_greedy(tokenizer, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "data", {})
    words = "abcdefghijklmnopqrstuvwxyz"
    seeds = [
        Seed(f"{a}{b}{c}", "g", (Turn(f"{a} {b} {c}"),))
        for a in words for b in words[:8] for c in words[:6]
    ]  # fmt: skip
    talks = converse(seeds, Counting(), tokenizer, Manner(), may_use=lambda _: True)
    shard = folder.save(0, talks, set())
    share = shard.held_out.mean()
    assert 0.005 < share < 0.06
    for number in np.flatnonzero(shard.held_out):
        assert (shard.origin[shard.conversation(number)] == GREEDY).any()
