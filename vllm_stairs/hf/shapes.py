r"""A small trained T5 in the shape of a large one, without changing its function.

Where no weights of T5-large can be had, its *cost* can still be measured: every matrix
multiplication of the large model is done, at its real size, while the text is the small
model's. This is what it is: real shapes and real cost, a small model's text. It says
nothing about what T5-large would write, nor about how often T5-small would agree with it.

How it is exact. Let the small model have width *a*, the large one width *D*:

- the residual stream is padded with zeros from *a* to *D*; every matrix that writes to it
  has zero rows there, every matrix that reads it zero columns;
- the root mean square norm then divides by a norm over *D* instead of *a* entries:
  :math:`x / \sqrt{\tfrac{a}{D} \overline{x^2} + \epsilon'}` with
  :math:`\epsilon' = \tfrac{a}{D} \epsilon` is :math:`\sqrt{D/a}` times the small model's,
  so the norm's weights are multiplied by :math:`\sqrt{a/D}`;
- T5 multiplies the decoder's output by :math:`D^{-1/2}` before the (tied) head; the final
  norm's weights take the factor :math:`\sqrt{D/a}` that makes it :math:`a^{-1/2}` again;
- added heads, key dimensions and feed-forward units have zero weights out (and in);
- added layers read the stream with random weights and write zeros into it;
- added vocabulary entries must never be written, nor take part in the softmax. One of the added
  dimensions carries a constant that is lost in rounding next to the stream (1e-5), is read
  by no layer, and is blown up by the final norm; the added entries, which are zero elsewhere,
  turn it into a logit far below all others.
"""

import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

T5_SHAPES: dict[str, dict[str, int]] = {
    "t5-small": {"d_model": 512, "d_kv": 64, "num_heads": 8, "d_ff": 2048, "num_layers": 6},
    "t5-large": {"d_model": 1024, "d_kv": 64, "num_heads": 16, "d_ff": 4096, "num_layers": 24},
    "t5-3b": {"d_model": 1024, "d_kv": 128, "num_heads": 32, "d_ff": 16384, "num_layers": 24},
}
"""The published shapes; the vocabulary has 32,128 entries in all of them."""

T5_VOCABULARY = 32128


def t5_shape(name: str) -> T5Config:
    """The configuration of one of `T5_SHAPES`."""
    if name not in T5_SHAPES:
        raise ValueError(f"unknown shape {name!r}: choose one of {', '.join(T5_SHAPES)}")
    return T5Config(
        vocab_size=T5_VOCABULARY, decoder_start_token_id=0, dropout_rate=0.0, **T5_SHAPES[name]
    )


def _place(weight: Tensor, like: Tensor, heads: tuple[int, int, int] | None, side: int) -> Tensor:
    """Zeros shaped ``like``, ``weight`` in the corner; along ``side`` spread over heads.

    ``heads`` = (number, old key size, new key size): along ``side`` the old entries are
    grouped by head and each group is padded to the new key size.
    """
    result = torch.zeros_like(like)
    if heads is None:
        result[tuple(slice(0, size) for size in weight.shape)] = weight
        return result
    number, old, new = heads
    for head in range(number):
        source = weight.narrow(side, head * old, old)
        other = slice(0, source.shape[1 - side])
        span = slice(head * new, head * new + old)
        result[(span, other) if side == 0 else (other, span)] = source
    return result


@torch.no_grad()
def pad_t5(
    small: T5ForConditionalGeneration, shape: T5Config, seed: int = 0
) -> T5ForConditionalGeneration:
    """Return a model of ``shape`` that computes what ``small`` computes.

    Args:
        small: a trained T5 (version 1.0: not gated, tied embeddings), float32.
        shape: the configuration to reach; no dimension smaller than ``small``'s.
        seed: of the random weights in added layers, which write nothing.
    """
    have, want = small.config, T5Config.from_dict(shape.to_dict())
    if have.is_gated_act or want.is_gated_act or not have.scale_decoder_outputs:
        raise ValueError("pad_t5 takes T5 version 1.0 models: not gated, tied embeddings")
    for name in ("vocab_size", "d_model", "d_kv", "num_heads", "d_ff", "num_layers"):
        if getattr(have, name) > getattr(want, name):
            raise ValueError(
                f"pad_t5 can only grow a model: {name} is {getattr(have, name)}, "
                f"the shape has {getattr(want, name)}"
            )
    grows = want.vocab_size > have.vocab_size
    if grows and want.d_model == have.d_model:
        raise ValueError("pad_t5 needs a larger d_model to add vocabulary entries")
    ratio = have.d_model / want.d_model
    for name in ("dense_act_fn", "feed_forward_proj", "pad_token_id", "eos_token_id"):
        setattr(want, name, getattr(have, name))
    want.relative_attention_num_buckets = have.relative_attention_num_buckets
    want.relative_attention_max_distance = have.relative_attention_max_distance
    want.decoder_start_token_id = have.decoder_start_token_id
    want.layer_norm_epsilon = have.layer_norm_epsilon * ratio
    want.dropout_rate = have.dropout_rate
    with torch.device("meta"):
        large = T5ForConditionalGeneration(want)
    large = large.to_empty(device="cpu").eval()
    large.tie_weights()

    shared = _place(small.shared.weight, large.shared.weight, None, 0)
    spare = have.d_model
    if grows:
        shared[: have.vocab_size, spare] = 1e-5
        shared[have.vocab_size :, spare] = -1e6
    large.shared.weight.copy_(shared)
    generator = torch.Generator().manual_seed(seed)
    heads = (have.num_heads, have.d_kv, want.d_kv)
    for old_stack, new_stack in ((small.encoder, large.encoder), (small.decoder, large.decoder)):
        decoder = new_stack is large.decoder
        final = ratio**0.5 / (ratio**0.5 if decoder else 1.0)
        new_norm = new_stack.final_layer_norm.weight
        new_norm.copy_(_place(old_stack.final_layer_norm.weight * final, new_norm, None, 0))
        if decoder and grows:
            new_norm[spare] = 1e6
        for index, block in enumerate(new_stack.block):
            if index >= len(old_stack.block):
                for name, weight in block.named_parameters():
                    if name.endswith(("o.weight", "wo.weight")):
                        weight.zero_()
                    elif name.endswith("layer_norm.weight"):
                        weight.fill_(1.0)
                    else:
                        weight.normal_(0.0, want.d_model**-0.5, generator=generator)
                continue
            old = dict(old_stack.block[index].named_parameters())
            for name, weight in block.named_parameters():
                if name.endswith("layer_norm.weight"):
                    weight.copy_(_place(old[name] * ratio**0.5, weight, None, 0))
                elif name.endswith((".q.weight", ".k.weight", ".v.weight")):
                    weight.copy_(_place(old[name], weight, heads, 0))
                elif name.endswith(".o.weight"):
                    weight.copy_(_place(old[name], weight, heads, 1))
                else:  # feed-forward, relative attention bias
                    weight.copy_(_place(old[name], weight, None, 0))
    large.generation_config = small.generation_config
    return large
