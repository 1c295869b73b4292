"""The benchmark: measures arms side by side, compares results, plots, replays.

A room of small parts. Those that decide what a figure means (:mod:`.prompts`,
:mod:`.statistics`, :mod:`.results`, :mod:`.roofline`, :mod:`.identity`, :mod:`.costs`,
:mod:`.policies`, :mod:`.replay`) import neither vLLM nor torch. An *arm* is one way of
serving the target (plain, ``draft_model``, ``ngram``, stairs); every arm lives in a
process of its own (:mod:`.arm_process`), commanded in turn by :mod:`.run`.
"""
