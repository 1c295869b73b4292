"""A draft whose output head computes logits of some ids only: the output does not change."""

import json
import logging
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vllm import LLM

from tests.engine.engines import (
    greedy,
    plain,
    stairs,
    statistics,
    tensor_parallel_2,
    token_ids,
)
from tests.engine.test_arguments import build, error, parse
from tests.engine.test_distribution import exact_distribution, p_value, sample
from tests.engine.test_identity import prompts
from tests.engine.test_sampling_params import PARAMETERS, STRUCTURES
from tests.tiny import VOCAB_SIZE, WORDS, TinyModels, copy_model
from vllm_stairs.engine.proposer import most_likely
from vllm_stairs.engine.trimmed_head import CannotTrimError, trim_head
from vllm_stairs.proposer.vocabulary import save_frequencies

SPECIAL = {0, 1, 2}
EVERY_OTHER = set(range(0, VOCAB_SIZE, 2))


def ids_file(folder: Path, ids: Collection[int]) -> str:
    file = folder / "ids.json"
    file.write_text(json.dumps(sorted(ids)))
    return str(file)


def kept_ids(engine: LLM) -> list[int] | None:
    """What the draft of an engine may write; None: everything."""

    def ask(worker: Any) -> list[int] | None:
        ids = worker.model_runner.drafter.kept_ids
        return None if ids is None else ids.tolist()

    return engine.collective_rpc(ask)[0]


@pytest.mark.parametrize("draft", ["target", "noisy", "narrow"])
def test_half_of_the_vocabulary(tiny: TinyModels, tmp_path: Path, draft: str) -> None:
    """Batches, all heights at once; nothing outside the half is ever drafted."""
    record = tmp_path / "record.jsonl"
    engine = stairs(
        tiny.target,
        getattr(tiny, draft),
        stairs_draft_vocab=ids_file(tmp_path, EVERY_OTHER & set(range(len(WORDS)))),
        stairs_record=str(record),
    )
    for batch in (1, 5, 16):
        texts = prompts(batch, seed=80 + batch)
        expected = token_ids(plain(tiny.target), texts, greedy())
        assert token_ids(engine, texts, greedy()) == expected
        ragged = [greedy(extra_args={"stairs_max_height": i % 9}) for i in range(batch)]
        assert token_ids(engine, texts, ragged) == expected
    stats = statistics(engine)
    assert 0.1 < stats["accepted_per_position"][0] / stats["drafted_per_position"][0] < 0.9
    drafted = {i for line in record.read_text().splitlines() for i in json.loads(line)["draft"]}
    assert drafted <= EVERY_OTHER | SPECIAL
    assert len(drafted) > 10


def test_a_vocabulary_that_lacks_what_the_target_says(tiny: TinyModels, tmp_path: Path) -> None:
    texts = prompts(5, seed=90)
    expected = token_ids(plain(tiny.target), texts, greedy())
    said = [i for samples in expected for i in samples[0]]
    engine = stairs(
        tiny.target,
        tiny.target,
        stairs_draft_vocab=ids_file(tmp_path, set(range(len(WORDS))) - set(said)),
    )
    assert token_ids(engine, texts, greedy()) == expected
    stats = statistics(engine)
    assert stats["drafted_per_position"][0] > 100
    # Special tokens are kept in any case.
    assert sum(stats["accepted_per_position"]) <= sum(i in SPECIAL for i in said) < 20


def test_all_ids(tiny: TinyModels, tmp_path: Path) -> None:
    """The target as its own draft is then right every time."""
    engine = stairs(
        tiny.target, tiny.target, stairs_draft_vocab=ids_file(tmp_path, range(VOCAB_SIZE))
    )
    assert kept_ids(engine) == list(range(VOCAB_SIZE))
    texts = prompts(6, seed=91)
    assert token_ids(engine, texts, greedy()) == token_ids(plain(tiny.target), texts, greedy())
    stats = statistics(engine)
    assert stats["accepted_per_position"] == stats["drafted_per_position"]
    assert stats["drafted_per_position"][-1] > 0


def test_parameters_of_requests(tiny: TinyModels, tmp_path: Path) -> None:
    """Bad words, allowed ids, biases, penalties and grammars know nothing of the draft's ids."""
    engine = stairs(
        tiny.target, tiny.noisy, stairs_draft_vocab=ids_file(tmp_path, EVERY_OTHER), height=4
    )
    params = [
        *PARAMETERS.values(),
        *(
            greedy(60, ignore_eos=False, structured_outputs=structure)
            for structure in STRUCTURES.values()
        ),
    ]
    texts = prompts(len(params), seed=92, longest=30)
    assert token_ids(engine, texts, params) == token_ids(plain(tiny.target), texts, params)


CASES = [
    ("noisy", "probabilistic", "temperature"),
    ("target", "probabilistic", "logit_bias"),
    ("target", "greedy", "min_p"),
]


@pytest.mark.parametrize(("draft", "draft_sample_method", "constraint"), CASES)
def test_goodness_of_fit(
    tiny: TinyModels, tmp_path: Path, draft: str, draft_sample_method: str, constraint: str
) -> None:
    """A draft that can write only half of what the target may."""
    expected = exact_distribution(plain(tiny.target, max_logprobs=96), constraint)
    inside = sum(p for text, p in expected.items() if set(text) <= EVERY_OTHER | SPECIAL)
    assert 0.02 < inside < 0.9, "both kinds of tokens must count"
    engine = stairs(
        tiny.target,
        getattr(tiny, draft),
        height=2,
        draft_sample_method=draft_sample_method,
        max_num_seqs=128,
        stairs_draft_vocab=ids_file(tmp_path, EVERY_OTHER),
    )
    counts = sample(engine, seed=17, constraint=constraint)
    stats = statistics(engine)
    assert 100 < stats["accepted_per_position"][0] < stats["drafted_per_position"][0]
    assert p_value(counts, expected) > 1e-4


def frequent(ids: Collection[int]) -> np.ndarray:
    """Counts of which these ids make up more than 'auto' wants."""
    counts = np.ones(VOCAB_SIZE, np.int64)
    counts[list(ids)] = 10**6
    return counts


@pytest.fixture
def counted(tiny: TinyModels, tmp_path: Path) -> Path:
    """The noisy draft with token frequencies: every third id is frequent."""
    folder = copy_model(tiny.noisy, tmp_path / "counted")
    save_frequencies(folder, frequent(range(3, VOCAB_SIZE, 3)))
    return folder


def test_frequencies_in_the_draft_folder(tiny: TinyModels, counted: Path) -> None:
    """They are used without being asked for, and said so; and any vLLM can load the draft."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.stairs.proposer")
    logger.addHandler(handler)
    level, _ = logger.level, logger.setLevel("INFO")
    try:
        engine = stairs(tiny.target, counted)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    kept = sorted({*range(3, VOCAB_SIZE, 3), *SPECIAL})
    assert kept_ids(engine) == kept
    # 64 rows of 64 numbers of 4 bytes, in place of 96.
    assert [line for line in lines if "output head" in line] == [
        f"Stairs: the draft's output head keeps {len(kept)} of 96 ids (100.00 % of the counted "
        "tokens): 0.0 MiB more memory (per rank), read in each draft pass in place of 0.0 MiB."
    ]
    texts = prompts(4, seed=93)
    expected = token_ids(plain(tiny.target), texts, greedy())
    assert token_ids(engine, texts, greedy()) == expected
    assert kept_ids(stairs(tiny.target, counted, stairs_draft_vocab="full")) is None
    assert len(kept_ids(stairs(tiny.target, counted, stairs_draft_vocab=10)) or ()) == 13
    assert token_ids(plain(counted), texts, greedy()) == token_ids(
        plain(tiny.noisy), texts, greedy()
    )


def test_a_draft_without_frequencies_stays_whole(tiny: TinyModels) -> None:
    assert kept_ids(stairs(tiny.target, tiny.noisy)) is None


def variant(tiny: TinyModels, folder: Path, kind: str) -> Path:
    """A random draft of another architecture, with tied embeddings and a change to its logits."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    torch.manual_seed(3)
    model: Any
    if kind == "scaled":
        model = transformers.GraniteForCausalLM(
            transformers.GraniteConfig(**sizes, logits_scaling=3.0)
        )
    else:
        model = transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(
                **sizes,
                final_logit_softcapping=2.0,
                layer_types=["full_attention"] * 2,
                query_pre_attn_scalar=32,
            )
        )
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tiny.target / file).read_bytes())
    return folder


@pytest.mark.parametrize("kind", ["scaled", "capped"])
def test_logits_of_other_models(tiny: TinyModels, tmp_path: Path, kind: str) -> None:
    """The model's own way with logits is kept; an embedding that is the head stays usable."""
    draft = variant(tiny, tmp_path / kind, kind)
    engine = stairs(
        tiny.target, draft, height=3, stairs_draft_vocab=ids_file(tmp_path, EVERY_OTHER)
    )
    kept = kept_ids(engine)
    assert kept == sorted(EVERY_OTHER | SPECIAL)
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(5))
    logits = engine.collective_rpc(
        lambda worker: worker.model_runner.drafter.model.compute_logits(hidden)
    )[0]
    head = load_file(draft / "model.safetensors")["model.embed_tokens.weight"]
    expected = hidden @ head[kept].T
    expected = expected / 3 if kind == "scaled" else 2 * torch.tanh(expected / 2)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    texts = prompts(3, seed=94)
    assert token_ids(engine, texts, greedy()) == token_ids(plain(tiny.target), texts, greedy())
    assert statistics(engine)["drafted_per_position"][2] > 0


def test_a_model_with_a_head_of_its_own_stays_as_it_is() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(8, 20)

        def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.head(hidden_states)

    with pytest.raises(CannotTrimError, match="do not come from one LogitsProcessor"):
        trim_head(Model(), (1, 2), 8, torch.float32, torch.device("cpu"))


def test_most_likely() -> None:
    """As argmax, the first of equals, also over a slice of a wider tensor."""
    wide = torch.randint(0, 4, (7, 300), generator=torch.Generator().manual_seed(6)).float()
    wide[2, 17] = torch.nan
    logits = wide[:, :250]
    expected = [17 if row == 2 else values.index(3.0) for row, values in enumerate(logits.tolist())]
    assert most_likely(logits).tolist() == expected
    assert most_likely(logits).dtype == torch.int64
    assert most_likely(logits[:1].bfloat16()).tolist() == expected[:1]


def test_tensor_parallel_2(tiny: TinyModels, tmp_path: Path) -> None:
    """Rows of both ranks' shards are kept, and each rank drafts the same."""
    texts = prompts(4, seed=95)
    reference = plain(tiny.target)
    expected = [samples[0] for samples in token_ids(reference, texts, greedy(30))]
    lacking = set(random.Random(7).sample(range(3, len(WORDS)), 10))
    kept = ids_file(tmp_path, set(range(VOCAB_SIZE)) - lacking)
    outputs, stats = tensor_parallel_2(
        tiny.target, tiny.target, texts, [[4] * 4], max_tokens=30, stairs_draft_vocab=kept
    )
    assert outputs == [expected]
    # A staircase is not kept whole only where the target says what the draft cannot, and at the
    # end of a request, where it is less tall.
    said = sum(i in lacking for text in expected for i in text)
    assert stats["accepted"][4] > 0
    assert stats["staircases"] - stats["accepted"][4] <= said + 2 * len(texts)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "must be 'auto', 'full', a number of ids"),
        (50, "there is none: name a file of ids"),
        (97, "the vocabulary has 96 ids"),
        ("./nowhere.json", "there is no such file"),
    ],
)
def test_errors(tiny: TinyModels, value: object, message: str) -> None:
    config = {"model": str(tiny.noisy), "stairs_draft_vocab": value}
    assert message in error(tiny.target, config)


def test_errors_of_files(tiny: TinyModels, tmp_path: Path) -> None:
    outside = {"model": str(tiny.noisy), "stairs_draft_vocab": ids_file(tmp_path, [5, 96])}
    assert "id 96 lies outside the vocabulary (0 to 95)" in error(tiny.target, outside)
    # What the draft does not know, although the target does.
    narrow = {"model": str(tiny.narrow), "stairs_draft_vocab": ids_file(tmp_path, [5, 95])}
    assert "id 95 lies outside" in error(tiny.target, narrow)
    other = {
        "model": str(tiny.foreign),
        "use_heterogeneous_vocab": True,
        "stairs_draft_vocab": ids_file(tmp_path, [5]),
    }
    assert "does not work with use_heterogeneous_vocab" in error(tiny.target, other)
    unlisted = copy_model(tiny.noisy, tmp_path / "unlisted")
    save_frequencies(unlisted, frequent([5]))
    (unlisted / "model.safetensors.index.json").unlink()
    assert "as weights" in error(tiny.target, {"model": str(unlisted)})
    foreign = copy_model(tiny.noisy, tmp_path / "foreign")
    save_frequencies(foreign, np.ones(200, np.int64))
    assert "belongs to another tokenizer" in error(tiny.target, {"model": str(foreign)})


def test_command_line(tiny: TinyModels, counted: Path, tmp_path: Path) -> None:
    common = ["--model", str(tiny.target), "--speculative-method", "stairs"]
    common += ["--speculative-model", str(counted), "--stairs-draft-vocab"]
    assert len(parse(*common, "7").stairs_vocabulary.ids) == 10
    assert parse(*common, "full").stairs_vocabulary is None
    assert parse(*common, ids_file(tmp_path, [9])).stairs_vocabulary.ids == (0, 1, 2, 9)


def test_too_many_frequent_ids(tiny: TinyModels, tmp_path: Path) -> None:
    folder = copy_model(tiny.noisy, tmp_path / "flat")
    save_frequencies(folder, np.ones(VOCAB_SIZE, np.int64))
    config = build(tiny.target, {"method": "stairs", "model": str(folder)})
    assert config.stairs_vocabulary is None
