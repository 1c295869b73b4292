"""Tiny pairs of models, random but alike, so that some drafts are kept and some are not."""

import copy
import functools
from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 64
PAD, EOS = 0, 1


def _llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.3,
            bos_token_id=2,
        )
    )


def _gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=128,
            n_embd=32,
            n_layer=2,
            n_head=4,
            initializer_range=0.4,
            bos_token_id=2,
            eos_token_id=1,
        )
    )


def _t5() -> Any:
    """Tied embeddings alone would make it repeat itself: give its layers more say."""
    torch.manual_seed(1)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=PAD,
            initializer_factor=3.0,
        )
    )
    with torch.no_grad():
        for block in model.decoder.block:
            block.layer[0].SelfAttention.o.weight.mul_(12)
            block.layer[2].DenseReluDense.wo.weight.mul_(12)
    return model


def _bart() -> Any:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=128,
            init_std=0.4,
            pad_token_id=PAD,
            bos_token_id=2,
            eos_token_id=EOS,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    )


MAKERS = {"llama": _llama, "gpt2": _gpt2, "t5": _t5, "bart": _bart}


@functools.cache
def pair(kind: str, noise: float = 0.15, seed: int = 0) -> tuple[Any, Any]:
    """A target and an assistant: the target's weights with noise. Do not change them."""
    torch.manual_seed(seed)
    model = MAKERS[kind]().eval()
    config = model.generation_config
    config.update(pad_token_id=PAD, eos_token_id=EOS, max_length=None)
    if kind == "t5":
        config.update(decoder_start_token_id=PAD)
    assistant = copy.deepcopy(model)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.add_(torch.randn_like(weight) * noise * weight.std())
    return model, assistant


def prompts(kind: str, batch: int, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of prompts of different lengths, padded as the kind of model wants it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        missing = row * 2 % (length - 1)
        if missing:
            gap = slice(-missing, None) if kind in ("t5", "bart") else slice(0, missing)
            ids[row, gap], mask[row, gap] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def early_ends(model: Any, inputs: dict[str, torch.Tensor], count: int = 2) -> list[int]:
    """End tokens with which some rows end early: tokens that the target writes late."""
    plain = model.generate(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=None)
    ends = [EOS]
    for text in plain[:count, -30:].tolist():
        ends.append(max(set(text[:20]), key=text.index))
    return ends
