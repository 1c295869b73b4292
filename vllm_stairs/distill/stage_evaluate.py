"""The stage ``evaluate``: what a target keeps of a draft, on any prompts."""

import contextlib
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from vllm_stairs.distill import acceptance, generators
from vllm_stairs.distill.device import device_of, limited_memory
from vllm_stairs.distill.draft import SUPPORTED
from vllm_stairs.distill.errors import DistillError
from vllm_stairs.distill.generators import Request
from vllm_stairs.distill.settings import Reporter, Settings
from vllm_stairs.distill.shards import save_json
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
        DistillError: there are no such prompts, or they are too long.
    """
    from vllm_stairs.bench import prompts as bench
    from vllm_stairs.bench.errors import BenchError

    try:
        chosen = bench.select(bench.load(source), limit=limit, seed=settings.seed)
    except BenchError as error:
        raise DistillError(str(error)) from None
    asked = [settings.data_settings["target"], bench.fingerprint(chosen), tokens]
    name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    file = settings.work / f"answers-{name}.json"
    if file.is_file():
        saved = json.loads(file.read_text())
    else:
        config, tokenizer = check_target(settings.target), load_tokenizer(settings.target)
        rendered = [bench.render(p.turns[:1], p.chat, tokenizer) for p in chosen]
        longest = max(len(r) for r in rendered) + tokens
        room = config.max_position_embeddings
        if longest > room:
            raise DistillError(
                f"prompts and answers of up to {longest} tokens: the target goes up to {room}; "
                "lower --judge-tokens, or give shorter prompts"
            )
        with (
            limited_memory("lower --judge-tokens, or give shorter prompts"),
            contextlib.closing(
                generators.start(
                    settings.generator,
                    settings.target,
                    dtype="float32",
                    max_length=min(longest + 8, room),
                    device=device_of(settings.device),
                )
            ) as generator,
        ):
            written = generator.write([Request(tuple(r), tokens) for r in rendered])
        saved = [
            {
                "group": p.group,
                "prompt": r,
                "answer": [*w.tokens, *(() if w.end is None else (w.end,))],
            }
            for p, r, w in zip(chosen, rendered, written, strict=True)
        ]
        save_json(file, saved, indent=None)
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
    """The acceptance of a draft on greedy texts, by group.

    Args:
        draft: its folder.
        texts: of the target.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        DistillError: the draft is of a type that is not supported, or knows fewer ids.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(draft, trust_remote_code=False)
    if config.model_type not in SUPPORTED:
        raise DistillError(
            f"the draft {draft!r} is of type {config.model_type}; these can be judged: "
            f"{', '.join(SUPPORTED)}"
        )
    if config.vocab_size <= max(int(text.tokens.max()) for text in texts):
        raise DistillError(f"the draft {draft!r} does not know all ids of the target's texts")
    with limited_memory("give a smaller draft, or --device cpu"):
        model = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32)
        return acceptance.measure(model.to(device_of(device)), texts)
