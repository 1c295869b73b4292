"""The model card of a draft: what it is, how it was made, what a target keeps of it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_stairs.distill.acceptance import HEIGHT, Acceptance, mean
from vllm_stairs.distill.settings import Settings
from vllm_stairs.versions import __version__

if TYPE_CHECKING:
    from vllm_stairs.distill.training import Recipe


def table(groups: Mapping[str, Acceptance]) -> str:
    """Acceptance by group, as Markdown."""
    if not groups:
        return "Not measured: no greedy conversation was held out."
    positions = " | ".join(f"position {p}" for p in range(1, HEIGHT + 1))
    lines = [
        f"| group | acceptance length (K={HEIGHT}) | {positions} | staircases |",
        "| --- |" + " --- |" * (HEIGHT + 2),
    ]
    for name, a in sorted(groups.items()):
        kept = " | ".join(f"{share:.3f}" for share in a.per_position)
        lines.append(f"| {name} | {a.length:.2f} | {kept} | {a.staircases} |")
    first, length = mean(groups)
    lines.append(f"| **mean of the groups** | **{length:.2f}** | **{first:.3f}** |" + " |" * HEIGHT)
    return "\n".join(lines)


def text(
    *,
    settings: Settings,
    recipe: "Recipe",
    written: int,
    by_group: Mapping[str, Acceptance],
    curve: Sequence[Mapping[str, float]],
    minutes: float,
    model: Any,
    begun_as: str | None = None,
) -> str:
    """The card, as Markdown with the metadata block that model hubs read.

    Args:
        settings: of the data.
        recipe: of the training.
        written: tokens of the data that were not given.
        by_group: held-out acceptance of the trained draft; empty: nothing was held out.
        curve: of held-out acceptance over the steps; its first point is the untrained draft.
            Empty: nothing was held out.
        minutes: of training in the last session.
        model: the draft.
        begun_as: the draft that was gone on with, for the reader; None: one of ours, untrained.
    """
    name = settings.target_name
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    prompts = f"of {settings.prompts.name}" if settings.prompts else "it wrote itself"
    source = f"that the target wrote to prompts {prompts}"
    if settings.text:
        source = f"of {settings.text.name}" + (f" and {source}" if settings.tokens else "")
    begun = f"; gone on with from the draft `{begun_as}`" if begun_as else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [speculative-decoding, draft-model, distillation]
---

# A draft for {name}

Writes ahead for `{name}` in speculative decoding (vLLM with `--speculative-method stairs` or its
own `draft_model`, Transformers' assisted generation). By itself it is a poor language model.

{model.config.num_hidden_layers} layers of width {model.config.hidden_size}, {weights:,} weights,
{trained:,} of them trained; the rest are the target's own. Made by `vllm-stairs distill`
{__version__} from {written:,} tokens {source};
at most {recipe.epochs:g} passes, loss `{recipe.loss}`, {minutes:.0f} minutes in the last
session{begun}.

## Acceptance

{_judgement(by_group, curve, "Before this training" if begun_as else "Untrained")}

`token_frequencies.safetensors` counts the ids of the training data: a server can trim the
vocabulary head with it.
"""


def _judgement(
    groups: Mapping[str, Acceptance], curve: Sequence[Mapping[str, float]], before: str
) -> str:
    if not curve:
        return table(groups)
    first = curve[0]
    points = "\n".join(
        f"| {p['step']:.0f} | {p['eval_acceptance']:.3f} | {p['eval_acceptance_length']:.2f} |"
        for p in curve
    )
    return f"""\
On held-out conversations of the training's kind, greedy: share of staircases of K={HEIGHT} whose
token at each position the target keeps. {before}: first position
{first["eval_acceptance"]:.3f}, acceptance length {first["eval_acceptance_length"]:.2f}.

{table(groups)}

| step | first position | acceptance length |
| --- | --- | --- |
{points}"""
