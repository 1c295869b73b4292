"""The only room that touches vLLM's internals.

====================== ==========================================================
:mod:`.plugin`         the entry point; puts the hooks in place
:mod:`.contract`       what we take for granted in vLLM, and the check of it
:mod:`.arguments`      flags and ``speculative_config`` -> a checked configuration
:mod:`.speculative`    that configuration, a subclass of vLLM's own
:mod:`.frontend`       admission of requests, statistics
:mod:`.worker`         vLLM's worker with our model runner
:mod:`.runner`         vLLM's model runner with our proposer, scorer and acceptor
:mod:`.proposer`       the draft model in the engine
:mod:`.acceptor`       stairs validation in place of vLLM's rejection sampler
:mod:`.metrics`        counters, ``/metrics``, the log line
:mod:`.cpu`            what the CPU platform needs (``libiomp5``)
====================== ==========================================================
"""
