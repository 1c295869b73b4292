"""Who writes the draft: bookkeeping and planning, without vLLM.

:mod:`.draft_kv` knows how far the draft's KV cache is valid; :mod:`.plan` turns that, and the
heights wanted, into the passes of the draft model. The model itself runs in
:mod:`vllm_stairs.engine.proposer`.
"""
