"""Stairs speculative decoding for stock vLLM.

A plugin: installed beside vLLM, it adds the speculative method ``stairs``. See
``docs/how-it-works.md``; the method itself is on one screen in
:mod:`vllm_stairs.staircase`.
"""

from vllm_stairs.versions import __version__

__all__ = ["__version__"]
