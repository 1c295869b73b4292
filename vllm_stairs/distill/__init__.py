"""Train a draft for a target: ``vllm-stairs distill``.

The stages (:mod:`run`), each of which can be interrupted and goes on where it stopped, by what
they are made of:

* :mod:`prompts`: varied prompts, built in or given;
* :mod:`conversations`: the target writes its own continuations (:mod:`generators`), stored in
  shards (:mod:`shards`);
* :mod:`labels`: the target's distribution at every token that was written;
* :mod:`training`: a small model (:mod:`draft`) learns to agree with it (:mod:`losses`);
* :mod:`acceptance`: what a target would keep of its drafts, on held-out conversations;
* :mod:`card`: the model card.

Nothing here is needed to serve.
"""
