"""Stairs-assisted generation for Hugging Face `generate()`.

The same staircase, acceptor and height policy as the vLLM plugin, for any Transformers
pair, decoder-only and encoder-decoder::

    from vllm_stairs.hf import stairs

    output = model.generate(**inputs, custom_generate=stairs(assistant))

See ``docs/paper.md``. Needs torch and transformers, not vLLM.
"""

from vllm_stairs.hf.generate import Stairs, stairs, stairs_generate
from vllm_stairs.hf.stats import StairsStats

__all__ = ["Stairs", "StairsStats", "stairs", "stairs_generate"]
