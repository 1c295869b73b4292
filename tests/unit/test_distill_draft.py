"""Drafts: shape, first weights, files; on a tiny target of every type that is supported."""

import argparse
import errno
import json
from dataclasses import replace

import numpy as np
import pytest

from vllm_stairs import prepare
from vllm_stairs.distill import draft as drafts
from vllm_stairs.distill.draft import PRESETS, SUPPORTED, DraftShape
from vllm_stairs.distill.errors import DistillError
from vllm_stairs.proposer.vocabulary import (
    FREQUENCIES_FILE,
    check_index,
    read_frequencies,
    save_frequencies,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

LAYERS = 5
HAS_HEAD_DIM = ("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text")
HAS_WINDOWS = ("mistral", "phi3", "gemma2", "gemma3_text")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
IDS = torch.arange(24).reshape(2, 12) * 7 % 61


def tiny_config(kind="llama", **changes):
    """Sliding windows shorter than the text, so that a layer in another's place shows."""
    numbers = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    if kind in HAS_WINDOWS:
        numbers["sliding_window"] = 4
    if kind in HAS_HEAD_DIM:
        numbers["head_dim"] = 8
    if kind == "gemma3_text":
        numbers["layer_types"] = ["full_attention", *["sliding_attention"] * (LAYERS - 1)]
    if kind == "smollm3":
        numbers["no_rope_layers"] = [1, 1, 1, 1, 0]
    return transformers.AutoConfig.for_model(kind, **{**numbers, **changes})


def tiny_model(config, seed=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # norms begin as ones: make them differ
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save_target(model, folder, dtype=torch.float32, **options):
    model.to(dtype).save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text('{"tokenizer": true}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def load(folder, dtype=None):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def train(draft):
    """What training does to a draft, as far as its files are concerned."""
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))


def write_delta(draft, target_dir, folder, **options):
    names = drafts.frozen_names(draft, DraftShape())
    drafts.save_delta(
        draft,
        folder,
        target_name="tiny",
        target_fingerprint=drafts.target_fingerprint(target_dir, names),
        **options,
    )
    return folder


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory):
    return save_target(tiny_model(tiny_config()), tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="module")
def target(target_dir):
    return load(target_dir)


@pytest.fixture
def delta(target, target_dir, tmp_path):
    draft = drafts.build(target, DraftShape())
    train(draft)
    return write_delta(draft, target_dir, tmp_path / "delta")


# Shape


def test_layers_are_spread_over_the_target():
    assert drafts.spread(30, 1) == (0,)
    assert drafts.spread(30, 2) == (0, 29)
    assert drafts.spread(30, 3) == (0, 14, 29)
    assert drafts.spread(30, 4) == (0, 9, 19, 29)
    for total in range(2, 40):
        for count in range(2, total + 1):
            layers = drafts.spread(total, count)
            assert sorted(set(layers)) == list(layers), "different, in order"
            assert (layers[0], layers[-1], len(layers)) == (0, total - 1, count)


@pytest.mark.parametrize("kind", SUPPORTED)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_every_type(kind, name):
    config = tiny_config(kind)
    shape = drafts.resolve(config, PRESETS[name])
    assert drafts.resolve(config, shape) == shape
    assert shape.full_width == name.startswith("shared")
    made = drafts.draft_config(config, shape)
    assert made.num_hidden_layers == PRESETS[name].layers
    assert made.hidden_size == (16 if name == "narrow" else 32)
    assert made.max_position_embeddings == 64
    if name == "narrow":
        assert (shape.head_dim, shape.intermediate_size) == (4, 24)


def test_the_targets_width_in_numbers_is_the_targets_width():
    shape = drafts.resolve(tiny_config(), DraftShape(hidden_size=32))
    assert shape == drafts.resolve(tiny_config(), DraftShape())
    assert shape.full_width


def test_numbers_are_taken_as_given():
    shape = DraftShape(layers=1, hidden_size=24, heads=2, kv_heads=1, intermediate_size=20)
    config = drafts.draft_config(tiny_config(), shape)
    assert (config.hidden_size, config.intermediate_size) == (24, 20)
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)
    assert config.head_dim == 8  # as in the target, because their number is given


def test_one_key_value_head_a_head_stays_so():
    config = tiny_config(num_key_value_heads=4)
    assert drafts.resolve(config, DraftShape(heads=2)).kv_heads == 2


def test_what_each_layer_is_goes_with_it():
    config = tiny_config("smollm3")
    assert drafts.draft_config(config, DraftShape()).no_rope_layers == [1, 0]
    config = tiny_config("gemma3_text")
    made = drafts.draft_config(config, DraftShape(layers=3, from_layers=(0, 1, 4)))
    assert made.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert config.num_hidden_layers == LAYERS, "the target's configuration was touched"
    config = tiny_config("qwen2", max_window_layers=LAYERS)
    assert drafts.draft_config(config, DraftShape()).max_window_layers == 2


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (DraftShape(layers=0), "0 layers: the target has 5, so choose 1 to 4"),
        (DraftShape(layers=5), "5 layers: the target has 5, so choose 1 to 4"),
        (DraftShape(layers=6, width=0.5), "6 layers: the target has 5, so choose 1 to 5"),
        (DraftShape(from_layers=(0, 5)), "layers 0, 5: choose .* from 0 to 4"),
        (DraftShape(from_layers=(-1, 4)), "from 0 to 4"),
        (DraftShape(from_layers=(3, 3)), "choose different ones, in order"),
        (DraftShape(from_layers=(3, 1)), "in order"),
        (DraftShape(from_layers=(0, 1, 4)), "2 layers from 3 of the target's"),
        (DraftShape(from_layers=(0, 4), width=0.5), "leave out either"),
        (DraftShape(width=0.0), "width of 0: choose"),
        (DraftShape(width=1.5), "width of 1.5: choose"),
        (DraftShape(hidden_size=0), "hidden size of 0: the target has 32"),
        (DraftShape(hidden_size=64), "hidden size of 64: the target has 32"),
        (DraftShape(heads=0), "heads = 0: choose at least 1"),
        (DraftShape(kv_heads=-1), "kv_heads = -1: choose at least 1"),
        (DraftShape(intermediate_size=0), "intermediate_size = 0: choose at least 1"),
        (DraftShape(heads=3), "3 attention heads do not divide a hidden size of 32"),
        (DraftShape(hidden_size=30), "4 attention heads do not divide a hidden size of 30"),
        (DraftShape(kv_heads=3), "3 key-value heads do not divide 4 attention heads"),
        (DraftShape(hidden_size=20), "heads of 5: rotary embeddings need an even number"),
        (DraftShape(tied=True), "two matrices"),
    ],
)
def test_a_number_that_does_not_fit_is_one_line(shape, says):
    with pytest.raises(DistillError, match=says) as error:
        drafts.resolve(tiny_config(), shape)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "shape", "says"),
    [
        ({"tie_word_embeddings": True}, DraftShape(tied=False), "one matrix"),
        ({"num_hidden_layers": 1}, DraftShape(layers=1), "only a narrower draft"),
        ({"kind": "qwen2"}, DraftShape(head_dim=4), "type qwen2 .* heads = 8"),
        ({"head_dim": 6}, DraftShape(hidden_size=24), "no whole heads of the target's 6"),
        (
            {
                "kind": "phi3",
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                },
            },
            DraftShape(width=0.5),
            "scaled for heads of 8, not of 4",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, DraftShape(), "is quantized"),
    ],
)
def test_a_shape_that_does_not_suit_this_target_is_one_line(config, shape, says):
    with pytest.raises(DistillError, match=says) as error:
        drafts.resolve(tiny_config(**config), shape)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["mixtral", "t5", "qwen2_vl", "mamba", "gpt2"])
def test_other_types_are_refused_by_name(kind):
    with pytest.raises(DistillError, match=f"type {kind}; these work: llama, ") as error:
        drafts.check_supported(transformers.AutoConfig.for_model(kind))
    assert all(supported in str(error.value) for supported in SUPPORTED)


# First weights


@pytest.mark.parametrize("kind", SUPPORTED)
def test_what_is_left_out_of_a_draft_is_all_that_differs(kind, tmp_path):
    """Layers that add nothing can be left out: the draft of the others is the target."""
    target = tiny_model(tiny_config(kind))
    for layer in target.model.layers[1:-1]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    draft = drafts.build(target, DraftShape(layers=2))
    assert type(draft) is type(target)
    assert torch.equal(logits(draft), logits(target))
    other = drafts.build(target, DraftShape(layers=2, from_layers=(0, 3)))
    assert not torch.allclose(logits(other), logits(target), atol=1e-3)

    folder = save_target(target, tmp_path / "target")
    drafts.save(draft, tmp_path / "draft", folder)
    assert torch.equal(logits(load(tmp_path / "draft")), logits(target))


def test_the_targets_own_is_frozen_and_the_rest_is_not(target):
    shape = drafts.resolve(target.config, DraftShape(layers=3, from_layers=(0, 2, 3)))
    draft = drafts.build(target, shape)
    frozen = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert drafts.frozen_names(draft, shape) == frozen
    theirs = dict(target.named_parameters())
    for name, parameter in draft.named_parameters():
        assert parameter.requires_grad == (name not in frozen)
        assert parameter.data_ptr() not in {p.data_ptr() for p in theirs.values()}
    assert torch.equal(
        draft.model.layers[1].mlp.up_proj.weight, target.model.layers[2].mlp.up_proj.weight
    )


def test_a_draft_that_was_loaded_is_frozen_anew(target, target_dir, tmp_path):
    shape = drafts.resolve(target.config, DraftShape())
    drafts.save(drafts.build(target, shape), tmp_path / "draft", target_dir)
    draft = load(tmp_path / "draft")
    assert all(parameter.requires_grad for parameter in draft.parameters())
    drafts.freeze(draft, shape)
    assert [name for name, p in draft.named_parameters() if not p.requires_grad] == (
        drafts.frozen_names(draft, shape)
    )


def test_a_smaller_mlp_is_drawn_and_attention_is_copied(target):
    draft = drafts.build(target, DraftShape(intermediate_size=20))
    mine, theirs = draft.model.layers[1], target.model.layers[-1]
    assert torch.equal(mine.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight)
    assert mine.mlp.up_proj.weight.shape == (20, 32)
    assert mine.mlp.up_proj.weight.std() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draft_is_float32_whatever_the_target(dtype):
    target = tiny_model(tiny_config()).to(dtype)
    draft = drafts.build(target, DraftShape())
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.float32}
    assert draft.config.dtype == torch.float32
    assert torch.equal(draft.lm_head.weight, target.lm_head.weight.float())


@pytest.mark.parametrize("kind", drafts.SUPPORTED)
def test_a_draft_that_grows_begins_as_good_as_it_was(kind):
    config = tiny_config(kind)
    target = tiny_model(config)
    begun = drafts.resolve(config, DraftShape(layers=2, from_layers=(0, 4)))
    trained = drafts.build(target, begun)
    train(trained)
    shape = drafts.grown(begun, config, layers=4)
    assert shape.from_layers == (0, 1, 3, 4)
    draft = drafts.build(target, shape)
    drafts.begin_as(draft, shape, trained.state_dict(), begun)
    assert torch.allclose(logits(draft), logits(trained), atol=1e-5)
    # It learns from there: neither nothing nor, through a norm of next to nothing, far too much.
    draft(IDS).logits.log_softmax(-1)[..., 5].mean().backward()
    added, own = (
        max(float(p.grad.norm()) for p in draft.model.layers[n].parameters()) for n in (1, 0)
    )
    assert 1e-3 * own < added < 30 * own


def test_a_draft_grows_by_the_layers_that_are_chosen():
    config = tiny_config(num_hidden_layers=8)
    begun = drafts.resolve(config, DraftShape(layers=2, from_layers=(0, 4)))
    assert drafts.grown(begun, config, layers=2) == begun
    assert drafts.grown(begun, config, from_layers=(0, 3, 4)).from_layers == (0, 3, 4)
    for given, says in (
        ({"layers": 1}, "has 2 layers, not 1"),
        ({"layers": 8}, "choose 1 to 7"),
        ({"from_layers": (0, 3)}, "made of the target's layers 0, 4"),
        ({"layers": 4, "from_layers": (0, 3, 4)}, "4 layers from 3"),
    ):
        with pytest.raises(DistillError, match=says):
            drafts.grown(begun, config, **given)
    narrow = drafts.resolve(config, DraftShape(layers=2, width=0.5))
    with pytest.raises(DistillError, match="target's own width"):
        drafts.grown(narrow, config, layers=3)


def test_what_is_drawn_depends_on_the_seed_alone(target):
    shape = PRESETS["narrow"]
    first = drafts.build(target, shape)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again, other = drafts.build(target, shape), drafts.build(target, shape, seed=1)
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator was touched"
    assert torch.equal(logits(first), logits(again))
    assert not torch.equal(logits(first), logits(other))


@pytest.mark.parametrize("target_tied", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_narrow_embeddings_keep_what_fits_into_them(target_tied, tied):
    """Of rank 16, they lose nothing at a width of 16: all inner products stay."""
    target = tiny_model(tiny_config(tie_word_embeddings=target_tied))
    with torch.no_grad():
        for matrix in {target.model.embed_tokens.weight, target.lm_head.weight}:
            matrix.copy_(torch.randn(512, 16) @ torch.randn(16, 32))
    draft = drafts.build(target, replace(PRESETS["narrow"], tied=tied))
    pairs = [(draft.lm_head.weight, target.lm_head.weight)]
    if not tied:
        pairs.append((draft.model.embed_tokens.weight, target.model.embed_tokens.weight))
    assert (draft.lm_head.weight is draft.model.embed_tokens.weight) == tied
    for mine, theirs in pairs:
        assert mine.shape == (512, 16)
        assert torch.allclose(mine @ mine.T, theirs @ theirs.T, rtol=1e-3, atol=1e-2)
    assert all(parameter.requires_grad for parameter in draft.parameters())


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_narrow_draft_loads_from_its_folder(kind, tmp_path):
    target = tiny_model(tiny_config(kind))
    folder = save_target(target, tmp_path / "target")
    draft = drafts.build(target, PRESETS["narrow"])
    assert drafts.frozen_names(draft, drafts.resolve(target.config, PRESETS["narrow"])) == []
    drafts.save(draft, tmp_path / "draft", folder)
    assert torch.equal(logits(load(tmp_path / "draft")), logits(draft))
    with pytest.raises(DistillError, match="every weight of this draft is its own"):
        drafts.save_delta(draft, tmp_path / "d", target_name="tiny", target_fingerprint="")


def test_a_target_without_the_tensors_of_its_type_is_one_line():
    target = tiny_model(tiny_config())
    target.model.words, target.model.embed_tokens = target.model.embed_tokens, None
    with pytest.raises(DistillError, match=r"no tensor model\.embed_tokens\.weight"):
        drafts.build(target, DraftShape())


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_an_assembled_draft_is_the_saved_one_bit_for_bit(kind, tied, dtype, tmp_path):
    target_dir = save_target(
        tiny_model(tiny_config(kind, tie_word_embeddings=tied)), tmp_path / "target", dtype
    )
    target = load(target_dir, torch.float32)
    draft = drafts.build(target, DraftShape())
    train(draft)
    write_delta(draft, target_dir, tmp_path / "delta")
    drafts.assemble(tmp_path / "delta", target_dir, tmp_path / "assembled")

    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.bfloat16())
    drafts.save(draft, tmp_path / "saved", target_dir)
    for name in (drafts.WEIGHTS_FILE, "config.json", "tokenizer.json", "chat_template.jinja"):
        assembled, saved = (tmp_path / folder / name for folder in ("assembled", "saved"))
        assert assembled.read_bytes() == saved.read_bytes(), name

    stored = safetensors.load_file(tmp_path / "assembled" / drafts.WEIGHTS_FILE)
    assert ("lm_head.weight" in stored) != tied
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    loaded = load(tmp_path / "assembled")
    assert loaded.dtype == dtype
    assert torch.equal(loaded.lm_head.weight, load(target_dir).lm_head.weight)
    assert torch.equal(logits(load(tmp_path / "assembled", torch.float32)), logits(draft))


def test_a_float32_delta_loses_nothing(target, target_dir, tmp_path):
    draft = drafts.build(target, DraftShape())
    train(draft)
    delta = write_delta(draft, target_dir, tmp_path / "delta", dtype=torch.float32)
    drafts.assemble(delta, target_dir, tmp_path / "draft")
    assert torch.equal(logits(load(tmp_path / "draft")), logits(draft))


def test_an_int8_delta_is_half_as_large_and_rounds_each_row_to_255_steps(
    target, target_dir, tmp_path
):
    draft = drafts.build(target, DraftShape())
    train(draft)
    with torch.no_grad():  # A row of zeros, and one that dwarfs the others.
        weight = draft.model.layers[0].mlp.down_proj.weight
        weight[0] = 0
        weight[1] *= 1000
    delta = write_delta(draft, target_dir, tmp_path / "delta", dtype=torch.int8)
    manifest = json.loads((delta / drafts.MANIFEST_FILE).read_text())
    assert (manifest["dtype"], manifest["format"]) == ("int8", 2)
    sizes = [t.numel() for t in draft.parameters() if t.requires_grad]
    assert (delta / drafts.DELTA_FILE).stat().st_size < 1.5 * sum(sizes) + 4096
    drafts.assemble(delta, target_dir, tmp_path / "draft")
    found = dict(load(tmp_path / "draft").named_parameters())
    for name, tensor in draft.named_parameters():
        if tensor.ndim == 2 and tensor.requires_grad:
            step = tensor.abs().amax(1, keepdim=True) / 127
            assert ((found[name] - tensor).abs() <= 0.501 * step).all()
        else:
            assert torch.allclose(found[name], tensor, rtol=2**-8)


def test_a_delta_holds_the_layers_and_nothing_of_the_target(delta, target):
    stored = safetensors.load_file(delta / drafts.DELTA_FILE)
    assert all(name.startswith("model.layers.") for name in stored)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    numbers = sum(tensor.numel() for tensor in stored.values())
    assert (delta / drafts.DELTA_FILE).stat().st_size < 2 * numbers + 4096
    manifest = json.loads((delta / drafts.MANIFEST_FILE).read_text())
    assert manifest["from_target"] == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]
    assert (manifest["format"], manifest["target"], manifest["dtype"]) == (1, "tiny", "bfloat16")


def test_folders_hold_no_code_and_no_pickle(target, target_dir, delta, tmp_path):
    drafts.assemble(delta, target_dir, tmp_path / "assembled")
    drafts.save(drafts.build(target, DraftShape()), tmp_path / "saved", target_dir)
    model = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    model |= {"generation_config.json"}
    assert {path.name for path in (tmp_path / "saved").iterdir()} == model
    assert {path.name for path in (tmp_path / "assembled").iterdir()} == model | {"assembled.json"}
    assert {path.name for path in delta.iterdir()} == {
        "config.json",
        "delta.json",
        "delta.safetensors",
    }


def test_the_card_and_the_frequencies_go_along(target, target_dir, tmp_path):
    draft = drafts.build(target, DraftShape())
    train(draft)
    drafts.save(draft, tmp_path / "draft", target_dir)
    save_frequencies(tmp_path / "draft", np.arange(512))
    (tmp_path / "draft" / "README.md").write_text("the card")
    delta = write_delta(draft, target_dir, tmp_path / "delta", extras_from=tmp_path / "draft")
    drafts.assemble(delta, target_dir, tmp_path / "assembled")
    assert (tmp_path / "assembled" / "README.md").read_text() == "the card"
    check_index(tmp_path / "assembled")
    counts = read_frequencies(tmp_path / "assembled" / FREQUENCIES_FILE)
    assert counts.tolist() == list(range(512))
    assert torch.equal(
        load(tmp_path / "assembled").lm_head.weight, load(tmp_path / "draft").lm_head.weight
    )

    (delta / FREQUENCIES_FILE).write_bytes(b"?")
    with pytest.raises(DistillError, match=f"{FREQUENCIES_FILE} is damaged"):
        drafts.assemble(delta, target_dir, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_fingerprint_is_of_values_names_and_shapes():
    values = torch.randn(4, 6).bfloat16()
    assert drafts.fingerprint({"a": values}) == drafts.fingerprint({"a": values.float()})
    different = [
        {"b": values},
        {"a": values.reshape(6, 4)},
        {"a": values.T.contiguous().T + 1},
        {"a": values, "b": values},
    ]
    names = {drafts.fingerprint(tensors) for tensors in [{"a": values}, *different]}
    assert len(names) == 5


def test_a_target_in_shards_is_read_too(delta, target, target_dir, tmp_path):
    sharded = save_target(load(target_dir), tmp_path / "sharded", max_shard_size="20KB")
    assert not (sharded / drafts.WEIGHTS_FILE).exists()
    drafts.assemble(delta, target_dir, tmp_path / "a")
    drafts.assemble(delta, sharded, tmp_path / "b")
    first, second = (tmp_path / folder / drafts.WEIGHTS_FILE for folder in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_another_target_is_refused(delta, tmp_path):
    other = save_target(tiny_model(tiny_config(), seed=2), tmp_path / "other")
    with pytest.raises(DistillError, match=r"not the model that this draft was made for \(tiny\)"):
        drafts.assemble(delta, other, tmp_path / "draft")
    tied = save_target(tiny_model(tiny_config(tie_word_embeddings=True)), tmp_path / "tied")
    with pytest.raises(DistillError, match=r"no readable lm_head\.weight"):
        drafts.assemble(delta, tied, tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


def test_frozen_weights_that_moved_are_refused(target, target_dir, tmp_path):
    draft = drafts.build(target, DraftShape())
    with torch.no_grad():
        draft.model.norm.weight[0] += 1e-3
    with pytest.raises(DistillError, match="not those of tiny"):
        write_delta(draft, target_dir, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def without(name):
    return lambda folder: (folder / name).unlink()


def damaged(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1] + b"?")


def newer(folder):
    path = folder / drafts.MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 9}))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (without("delta.safetensors"), r"delta\.safetensors is missing"),
        (without("delta.json"), r"delta\.json is missing"),
        (without("config.json"), r"config\.json is missing"),
        (damaged("delta.safetensors"), r"delta\.safetensors is damaged"),
        (damaged("config.json"), r"config\.json is damaged"),
        (damaged("delta.json"), r"delta\.json is damaged"),
        (newer, "of format 9, which this version does not read: update"),
    ],
)
def test_a_delta_that_is_not_whole_is_one_line(delta, target_dir, tmp_path, harm, says):
    harm(delta)
    with pytest.raises(DistillError, match=says) as error:
        drafts.assemble(delta, target_dir, tmp_path / "draft")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (without("config.json"), "missing or incomplete"),
        (without("tokenizer.json"), "no tokenizer"),
        (without("model.safetensors"), r"has no model\.safetensors"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"truncated"),
            r"no readable lm_head\.weight",
        ),
    ],
)
def test_a_target_that_is_not_whole_is_one_line(delta, tmp_path, harm, says):
    target_dir = save_target(tiny_model(tiny_config()), tmp_path / "target")
    harm(target_dir)
    with pytest.raises(DistillError, match=says) as error:
        drafts.assemble(delta, target_dir, tmp_path / "draft")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "draft").exists()


def test_a_folder_of_the_users_is_left_alone(delta, target_dir, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    for folder in (mine, delta):
        before = sorted(folder.iterdir())
        with pytest.raises(DistillError, match="not made by this command"):
            drafts.assemble(delta, target_dir, folder)
        assert sorted(folder.iterdir()) == before
    for folder in (mine, target_dir):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(DistillError, match="not made by this command"):
            write_delta(drafts.build(load(target_dir), DraftShape()), target_dir, folder)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


DISK_FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("I/O error: No space left on device (os error 28)"),  # as safetensors has it
]


@pytest.mark.parametrize("failure", DISK_FULL)
def test_a_full_disk_is_one_line_and_destroys_nothing(
    delta, target, target_dir, tmp_path, monkeypatch, failure
):
    def fail(*_, **__):
        raise failure

    draft = drafts.build(target, DraftShape())
    out = tmp_path / "draft"
    drafts.assemble(delta, target_dir, out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr("safetensors.torch.save_file", fail)
    for action in (
        lambda: drafts.assemble(delta, target_dir, out),
        lambda: drafts.save(draft, out, target_dir),
        lambda: write_delta(draft, target_dir, tmp_path / "new"),
    ):
        with pytest.raises(DistillError, match="the disk is full: no room for "):
            action()
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta", "draft"]


def test_saving_again_leaves_other_files_alone(target, target_dir, tmp_path):
    draft = drafts.build(target, DraftShape())
    drafts.save(draft, tmp_path, target_dir)
    (tmp_path / "notes").write_text("mine")
    train(draft)
    drafts.save(draft, tmp_path, target_dir, dtype=torch.bfloat16)
    assert (tmp_path / "notes").read_text() == "mine"
    assert not list(tmp_path.glob("*.partial"))
    assert load(tmp_path).dtype == torch.bfloat16


# vllm-stairs prepare draft


def command(models_dir, what):
    return prepare.run(argparse.Namespace(what=what, models_dir=models_dir))


@pytest.fixture
def models_dir(target_dir, tmp_path, monkeypatch):
    """The target under the name of the real one, and no draft shipped."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / prepare.TARGET).symlink_to(target_dir)
    monkeypatch.setattr(prepare, "SHIPPED_DRAFTS", tmp_path / "drafts")
    return folder


def ship(target, target_dir):
    draft = drafts.build(target, DraftShape())
    train(draft)
    write_delta(draft, target_dir, prepare.SHIPPED_DRAFTS / prepare.TARGET)


def test_prepare_assembles_the_shipped_draft_once(models_dir, target, target_dir):
    ship(target, target_dir)
    out = models_dir / "smollm2-135m-instruct-draft"
    assert command(models_dir, "draft") == 0
    assert logits(load(out)).shape == (2, 12, 512)
    before = (out / drafts.WEIGHTS_FILE).read_bytes()
    made = (out / drafts.WEIGHTS_FILE).stat().st_mtime_ns
    assert command(models_dir, "draft") == 0
    assert (out / drafts.WEIGHTS_FILE).stat().st_mtime_ns == made
    ship(target, target_dir)  # as a later version does
    assert command(models_dir, "draft") == 0
    assert (out / drafts.WEIGHTS_FILE).read_bytes() != before


def test_prepare_says_that_no_draft_is_shipped(models_dir, capsys):
    assert command(models_dir, "draft") == 1
    error = capsys.readouterr().err
    assert error.startswith("vllm-stairs prepare: no trained draft for smollm2-135m-instruct")
    assert "vllm-stairs distill" in error
    assert error.count("\n") == 1


def test_prepare_all_makes_the_draft_if_there_is_one(models_dir, target, target_dir, monkeypatch):
    for name in ("prepare_smollm2", "random_draft", "cut_draft"):
        monkeypatch.setattr(prepare, name, lambda *_, **__: None)
    assert command(models_dir, "all") == 0
    assert not (models_dir / prepare.TRAINED_DRAFT).exists()
    ship(target, target_dir)
    assert command(models_dir, "all") == 0
    assert (models_dir / prepare.TRAINED_DRAFT / drafts.WEIGHTS_FILE).is_file()


def test_prepare_refuses_another_target_in_one_line(models_dir, target, target_dir, capsys):
    ship(target, target_dir)
    (models_dir / prepare.TARGET).unlink()
    assert command(models_dir, "draft") == 1
    assert "vllm-stairs prepare smollm2" in capsys.readouterr().err
    save_target(tiny_model(tiny_config(), seed=2), models_dir / prepare.TARGET)
    capsys.readouterr()
    assert command(models_dir, "draft") == 1
    lines = capsys.readouterr().err.splitlines()
    assert "not the model that this draft was made for" in lines[-1]
    assert not (models_dir / prepare.TRAINED_DRAFT).exists()
