"""Padding a T5 into a larger shape, and packed weights, leave its function alone."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from vllm_stairs.hf.prepack import PackedLinear, can_prepack, prepacked
from vllm_stairs.hf.shapes import T5_SHAPES, pad_t5, t5_shape


def small_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        initializer_factor=2.0,
    )
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():  # norms as after training
        for name, weight in model.named_parameters():
            if "layer_norm" in name:
                weight.copy_(torch.rand_like(weight) + 0.5)
    return model


SHAPE = T5Config(
    vocab_size=77,
    d_model=72,
    d_kv=20,
    d_ff=100,
    num_layers=5,
    num_heads=6,
    decoder_start_token_id=0,
)


def test_padding_changes_no_logit() -> None:
    small = small_t5()
    large = pad_t5(small, SHAPE)
    assert large.config.d_model == 72
    assert len(large.decoder.block) == 5
    ids, mask = torch.randint(2, 50, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    written = torch.randint(2, 50, (3, 7))
    with torch.no_grad():
        a, b = (
            model(input_ids=ids, attention_mask=mask, decoder_input_ids=written).logits
            for model in (small, large)
        )
    torch.testing.assert_close(b[..., :50], a, rtol=1e-4, atol=1e-4)
    assert b[..., 50:].max() < a.min() - 1000
    torch.testing.assert_close(b.softmax(-1)[..., :50], a.softmax(-1), rtol=1e-4, atol=1e-4)


def test_shapes_are_the_published_ones() -> None:
    for name in T5_SHAPES:
        assert t5_shape(name).vocab_size == 32128
    with torch.device("meta"):
        assert T5ForConditionalGeneration(t5_shape("t5-large")).num_parameters() == 737_668_096
        assert T5ForConditionalGeneration(t5_shape("t5-small")).num_parameters() == 60_506_624
    with pytest.raises(ValueError, match="choose one of t5-small, t5-large, t5-3b"):
        t5_shape("t5-huge")


def test_a_model_cannot_shrink() -> None:
    with pytest.raises(ValueError, match="can only grow"):
        pad_t5(pad_t5(small_t5(), SHAPE), small_t5().config)


def test_packed_weights() -> None:
    config = T5Config(vocab_size=600, d_model=256, d_kv=64, d_ff=512, num_layers=1, num_heads=4)
    model = T5ForConditionalGeneration(config).eval()
    if not can_prepack(model):
        pytest.skip("no packed kernels here")
    ids = torch.randint(2, 600, (2, 5))
    with torch.no_grad():
        before = model(input_ids=ids, decoder_input_ids=ids).logits
        with prepacked(model):
            assert any(isinstance(module, PackedLinear) for module in model.modules())
            packed = model(input_ids=ids, decoder_input_ids=ids).logits
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    torch.testing.assert_close(packed, before, rtol=1e-3, atol=1e-3)
