"""The stage ``evaluate``: what a target keeps of a draft, on any prompts."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from vllm_stairs.distill import acceptance, generators
from vllm_stairs.distill.device import device_of
from vllm_stairs.distill.errors import DistillError
from vllm_stairs.distill.generators import Request
from vllm_stairs.distill.settings import Reporter, Settings
from vllm_stairs.distill.target import check_target, load_tokenizer


def greedy_texts(
    settings: Settings,
    source: str,
    *,
    tokens: int,
    limit: int | None,
    reporter: Reporter,
) -> list[acceptance.Text]:
    """The target's own greedy answers to prompts of the benchmark, or of a file.

    They are kept in ``settings.work``, in float32: what a server in that precision would say.

    Args:
        settings: what to do.
        source: as in ``vllm-stairs bench run --prompts``.
        tokens: of an answer, at most.
        limit: of prompts, an equal share of each group; None: all.
        reporter: is told.

    Raises:
        DistillError: there are no such prompts.
    """
    from vllm_stairs.bench import prompts as bench
    from vllm_stairs.bench.errors import BenchError

    try:
        chosen = bench.select(bench.load(source), limit=limit, seed=settings.seed)
    except BenchError as error:
        raise DistillError(str(error)) from None
    name = hashlib.sha256(f"{source} {tokens} {limit}".encode()).hexdigest()[:12]
    file = settings.work / f"answers-{name}.json"
    if file.is_file():
        saved = json.loads(file.read_text())
    else:
        config, tokenizer = check_target(settings.target), load_tokenizer(settings.target)
        rendered = [bench.render(p.turns[:1], p.chat, tokenizer) for p in chosen]
        longest = max(len(r) for r in rendered) + tokens + 8
        generator = generators.start(
            settings.generator,
            settings.target,
            dtype="float32",
            max_length=min(longest, config.max_position_embeddings),
            device=device_of(settings.device),
        )
        try:
            written = generator.write([Request(tuple(r), tokens) for r in rendered])
        finally:
            generator.close()
        saved = [
            {
                "group": p.group,
                "prompt": r,
                "answer": [*w.tokens, *(() if w.end is None else (w.end,))],
            }
            for p, r, w in zip(chosen, rendered, written, strict=True)
        ]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(saved))
        reporter.say(f"{len(saved)} answers of the target in {file}")
    return [
        acceptance.Text(
            np.array([*item["prompt"], *item["answer"]], np.int32),
            np.r_[np.zeros(len(item["prompt"]), bool), np.ones(len(item["answer"]), bool)],
            item["group"],
        )
        for item in saved
    ]


def evaluate(
    draft: str, texts: Sequence[acceptance.Text], device: str
) -> dict[str, acceptance.Acceptance]:
    """The acceptance of a draft on greedy texts, by group."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32).to(device_of(device))
    return acceptance.measure(model, texts)
