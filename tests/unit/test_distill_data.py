"""Prompts, conversations, shards: with a writer that continues by rule, and no model."""

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.tiny import TinyModels, copy_model
from vllm_stairs.bench import prompts as bench
from vllm_stairs.distill import generators, prompts, stage_data
from vllm_stairs.distill.conversations import GIVEN, GREEDY, SAMPLED, Manner, Wording, converse
from vllm_stairs.distill.device import limited_memory
from vllm_stairs.distill.errors import DistillError
from vllm_stairs.distill.generators import Request, Written
from vllm_stairs.distill.prompts import BenchmarkFilter, Seed, Turn
from vllm_stairs.distill.settings import Settings
from vllm_stairs.distill.shards import Folder
from vllm_stairs.distill.target import check_target

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


def test_a_second_turn_that_may_not_be_used_is_taken_back(tokenizer) -> None:
    one, two = Seed("x", "chat", (Turn("the cat", 4),)), (Turn("the cat", 4), Turn("dog sat", 4))
    manner = Manner(greedy_share=1.0, past_the_end_share=0.0)

    def talk_of(seed: Seed, may_use=lambda _: True, manner: Manner = manner):
        (talk,) = converse([seed], Counting(), tokenizer, manner, may_use=may_use)
        return talk

    alone, both = talk_of(one), talk_of(Seed("x", "chat", two))
    assert len(both.tokens) > len(alone.tokens)
    refused = talk_of(Seed("x", "chat", two), may_use=lambda text: "dog" not in text)
    assert (refused.tokens, refused.origin) == (alone.tokens, alone.origin)
    # So is one that leaves no room for an answer: what follows is not held in memory either.
    long = Seed("x", "chat", (Turn("the cat", 4), Turn("sat " * 5000)))
    short = Manner(greedy_share=1.0, past_the_end_share=0.0, max_length=256)
    assert talk_of(long, manner=short).tokens == alone.tokens


def test_a_template_without_a_beginning_gets_one(tiny: TinyModels) -> None:
    bare = AutoTokenizer.from_pretrained(tiny.target)  # Its template begins with the user's text.
    assert Wording.of(bare).before_user == (bare.bos_token_id,)
    writer = Counting()
    converse([Seed("x", "chat", (Turn("", 9),))], writer, bare, Manner(), may_use=lambda _: True)
    assert all(request.tokens for request in writer.requests)


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
    (tmp_path / "data" / "data.json").write_text("")
    with pytest.raises(DistillError, match=r"data\.json' is damaged: move its folder away"):
        Folder(tmp_path / "data", {"target": "t"})


def test_a_folder_without_data_is_nobodys(tmp_path: Path) -> None:
    Folder(tmp_path / "data", {"target": "t"})
    Folder(tmp_path / "data", {"target": "other"})
    assert json.loads((tmp_path / "data" / "data.json").read_text()) == {"target": "other"}
    (tmp_path / "file").touch()
    with pytest.raises(DistillError, match="file' is no folder"):
        Folder(tmp_path / "file", {})


def test_labels_of_another_kind_are_other_data(tiny: TinyModels, tmp_path: Path) -> None:
    settings = Settings(str(tiny.target), tmp_path)
    assert "keep" not in settings.data_settings  # As in data that were begun before it counted.
    assert Settings(str(tiny.target), tmp_path, keep=16).data_settings == settings.data_settings
    assert Settings(str(tiny.target), tmp_path, keep=8).data_settings != settings.data_settings


class Told:
    """A reporter."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, what: str, done: int, total: int) -> None:
        assert done >= 0


def test_few_tokens_take_few_conversations(tiny: TinyModels, tmp_path, monkeypatch) -> None:
    settings, told = Settings(str(tiny.target), tmp_path, tokens=300), Told()
    writer = Counting()
    monkeypatch.setattr(generators, "start", lambda *_, **__: writer)
    folder = Folder(tmp_path / "data", {})
    stage_data._write(settings, folder, settings.target, told)
    assert sum(folder.load(i).written for i in folder.indices()) >= 300
    assert len(writer.requests) < 400
    assert told.said[-1].startswith("shard ")


def test_prompts_that_are_used_up_are_not_waited_for(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{a} {b} cat\n" for a in "abcdef" for b in "ghijkl"))
    settings, told = Settings(str(tiny.target), tmp_path, prompts=file), Told()
    folder = Folder(tmp_path / "data", {})
    monkeypatch.setattr(generators, "start", lambda *_, **__: Counting())
    stage_data._write(settings, folder, settings.target, told)
    assert told.said[-1] == "every prompt is used"
    before = folder.fingerprint()
    monkeypatch.delattr(generators, "start")  # Nothing is left to be written.
    stage_data._write(settings, folder, settings.target, told)
    assert told.said[-1].endswith("every prompt is used")
    assert folder.fingerprint() == before


def test_given_text_is_cut_into_shards(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "text.txt"
    words = [f"{a} {b}" for a in "abcdefghijklm" for b in "nopqrstuvwxyz"]
    file.write_text(" ".join(words))
    settings = Settings(
        str(tiny.target), tmp_path, text=file, tokens=0, manner=Manner(max_length=50)
    )
    monkeypatch.setattr(stage_data, "TALKS_A_SHARD", 3)
    folder = Folder(tmp_path / "data", {})
    stage_data._take_text(settings, folder)
    first = stage_data.TEXT_SHARDS
    assert folder.indices() == [first, first + 1, first + 2]  # 338 tokens: 7 pieces.
    tokens = [t for shard in folder.shards() for t in shard.tokens.tolist()]
    assert tokens == AutoTokenizer.from_pretrained(tiny.target)(file.read_text())["input_ids"]
    before = folder.fingerprint()
    folder.file(first).unlink()  # As after a kill: it is written last.
    stage_data._take_text(settings, folder)
    assert folder.fingerprint() == before
    for empty in ("", "cat"):
        file.write_text(empty)
        with pytest.raises(DistillError, match="no text in"):
            stage_data._take_text(settings, Folder(tmp_path / "other", {}))


def test_greedy_text_is_the_targets_best_whatever_its_makers_recommend(
    tiny: TinyModels, tmp_path: Path
) -> None:
    request = Request(tuple(range(5, 15)), 24, past_the_end=True)
    (plain,) = generators.start(
        "transformers", str(tiny.target), dtype="float32", max_length=64, device="cpu"
    ).write([request])
    target = copy_model(tiny.target, tmp_path / "target")
    (target / "generation_config.json").write_text(
        json.dumps({"repetition_penalty": 9.0, "top_k": 3, "do_sample": True, "eos_token_id": 2})
    )
    writer = generators.start(
        "transformers", str(target), dtype="float32", max_length=64, device="cpu"
    )
    assert writer.write([request]) == [plain]


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("unable to mmap 5 bytes from file <x>: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
)
def test_too_little_memory_says_what_to_lower(failure: Exception) -> None:
    with pytest.raises(DistillError, match="^out of memory: lower it$"), limited_memory("lower it"):
        raise failure
    with pytest.raises(RuntimeError, match="other"), limited_memory("lower it"):
        raise RuntimeError("other")


def test_a_target_of_a_hubs_cache_is_named_by_its_id(tmp_path: Path) -> None:
    cached = tmp_path / "models--Some--Model-1B" / "snapshots" / "12fd25f77366fa6b"
    assert Settings(str(cached), tmp_path).target_name == "Some/Model-1B"
    assert Settings(str(tmp_path / "model" / "."), tmp_path).target_name == "model"


def without(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


@pytest.mark.parametrize(
    ("harm", "config", "says"),
    [
        (without("config.json"), {}, "no target"),
        # Transformers makes a tokenizer of three tokens where there is none.
        (without("tokenizer.json", "tokenizer_config.json"), {}, "no tokenizer with the target"),
        (without("model.safetensors"), {}, "has no weights"),
        (without(), {"model_type": "newest"}, "does not know; these work: llama, "),
        (
            without(),
            {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}},
            "these work: llama, ",
        ),
    ],
)
def test_a_target_that_will_not_do_is_one_line(
    tiny: TinyModels, tmp_path: Path, harm, config, says
) -> None:
    target = copy_model(tiny.target, tmp_path / "target", **config)
    harm(target)
    with pytest.raises(DistillError, match=says) as error:
        check_target(str(target))
    assert "\n" not in str(error.value)


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
