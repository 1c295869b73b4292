"""Tiny Llama models, random but not degenerate, that run everywhere in milliseconds.

A word-level tokenizer of 96 words makes text, stop strings, regular expressions and JSON
possible. Weights are drawn large enough that greedy text varies and that its top two logits do
not tie within rounding.
"""

import functools
import json
import shutil
from pathlib import Path

WORDS = [
    "<unk>", "<s>", "</s>",
    *"abcdefghijklmnopqrstuvwxyz",
    *"0123456789",
    *'{}[]":,.!?-_()',
    "true", "false", "null", "yes", "no", "red", "green", "blue",
    "the", "cat", "dog", "sat", "on", "mat", "ran", "to", "from", "sky", "sun", "moon",
]  # fmt: skip
VOCAB_SIZE = 96


class TinyModels:
    """Folders with models, made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @functools.cached_property
    def target(self) -> Path:
        """4 layers, hidden 64, 2 heads of 32: tensor parallel 2 works."""
        return self._model("target", seed=1)

    @functools.cached_property
    def random(self) -> Path:
        """The hostile draft: nothing in common with the target but its shape."""
        return self._model("random", seed=2, layers=2)

    @functools.cached_property
    def cut(self) -> Path:
        """The target's first three layers."""
        return self._model("cut", seed=1, layers=3)

    @functools.cached_property
    def noisy(self) -> Path:
        """The target with noise on its weights: sometimes right, sometimes wrong."""
        return self._model("noisy", seed=1, noise=0.06)

    @functools.cached_property
    def padded(self) -> Path:
        """The noisy draft with another padded vocabulary size (128 rows instead of 96)."""
        return self._model("padded", seed=1, noise=0.06, vocab_size=128)

    @functools.cached_property
    def narrow(self) -> Path:
        """The noisy draft whose embedding ends with the tokenizer (no padding rows)."""
        return self._model("narrow", seed=1, noise=0.06, vocab_size=len(WORDS))

    @functools.cached_property
    def foreign(self) -> Path:
        """A draft with another tokenizer."""
        return self._model("foreign", seed=3, words=[*WORDS[:3], *reversed(WORDS[3:])])

    def _model(
        self,
        name: str,
        seed: int,
        layers: int = 4,
        noise: float = 0.0,
        vocab_size: int = VOCAB_SIZE,
        words: list[str] = WORDS,
    ) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        folder = self.root / name
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.2,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
            state = model.state_dict()
            for tensor in state.values():
                if noise:
                    tensor += noise * tensor.std() * torch.randn_like(tensor)
            # No tokenizer writes padding ids, and neither does a trained model.
            state["lm_head.weight"][len(words) :] = 0
            extra = max(vocab_size - VOCAB_SIZE, 0)
            for key in ("model.embed_tokens.weight", "lm_head.weight"):
                # Padding rows of the head are large: a proposer that used them would show.
                rows = torch.cat([state[key], 5 * torch.randn(extra, 64)])
                state[key] = rows[:vocab_size].clone()
            config.vocab_size = vocab_size
            config.num_hidden_layers = layers
            model = LlamaForCausalLM(config)
            model.load_state_dict(state, strict=False)
        model.save_pretrained(folder)
        _save_tokenizer(folder, words)
        return folder


def _save_tokenizer(folder: Path, words: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)


def copy_model(source: Path, folder: Path, **config: object) -> Path:
    """A copy with other entries in its config.json."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder
