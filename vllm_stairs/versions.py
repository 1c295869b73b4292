"""Versions: our own, and the range of vLLM that this release was tested with.

The range is stated here and nowhere else; the guard, the documentation check and
``vllm-stairs doctor`` read it from this module.
"""

__version__ = "0.1.0"

VLLM_RUN = "0.32"
"""The minor release of vLLM whose CPU build the test suite runs on."""

VLLM_READ = "0.33"
"""The newest minor release whose sources were checked against the contract in
:mod:`vllm_stairs.engine.contract`, without being run."""

RAY_OLDEST = "2.52"
"""The first minor release of Ray that asks for a token. ``pyproject.toml`` says the same."""
