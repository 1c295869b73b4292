"""The stage ``train``: from data to a draft's folder."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_stairs.distill import acceptance
from vllm_stairs.distill.device import device_of, limited_memory, prepare_memory
from vllm_stairs.distill.draft import MADE_BY, WEIGHTS_FILE, DraftShape
from vllm_stairs.distill.errors import DistillError
from vllm_stairs.distill.settings import Reporter, Settings, hash_of
from vllm_stairs.distill.shards import Folder, another_run, check_same_run, different_settings
from vllm_stairs.folders import new_folder
from vllm_stairs.proposer.vocabulary import (
    FREQUENCIES_FILE,
    read_frequencies,
    save_frequencies,
)

if TYPE_CHECKING:
    from vllm_stairs.distill.training import Recipe

TRAINING_FILE = "training.json"
"""Beside the checkpoints: what the training depends on."""


def check_training(
    settings: Settings, shape: DraftShape, recipe: "Recipe", start_from: Path | None = None
) -> None:
    """Refuse a training that :func:`make_draft` would refuse, before the data are written for it.

    Raises:
        DistillError: there are checkpoints, and they are of another training.
    """
    from vllm_stairs.distill import training

    work = settings.work / "training"
    if training.last_checkpoint(work) is None:
        return
    chosen = _chosen(settings, shape, recipe, start_from)
    found = different_settings(work / TRAINING_FILE, chosen) or []
    # What else is noted there is not known before the data are.
    if different := [name for name in found if name in chosen]:
        raise DistillError(another_run(work, "the training", different))


def _chosen(
    settings: Settings, shape: DraftShape, recipe: "Recipe", start_from: Path | None
) -> dict[str, Any]:
    return {
        "target": settings.data_settings["target"],
        "shape": asdict(shape),
        "recipe": recipe.identity(),
        "start_from": hash_of(start_from / WEIGHTS_FILE) if start_from else None,
    }


def _counted_before(begun: Path | None, counts: Any) -> Any:
    """How often each id was written in what a draft had learned from; zeros where nobody knows."""
    try:
        before = read_frequencies(begun / FREQUENCIES_FILE) if begun else 0
    except (OSError, ValueError):
        before = 0
    return before if getattr(before, "shape", None) == counts.shape else 0 * counts


def make_draft(
    settings: Settings,
    shape: DraftShape,
    recipe: "Recipe",
    folders: Sequence[Folder],
    out: Path,
    reporter: Reporter,
    *,
    name: str = "training",
    start_from: Path | None = None,
    begun_as: Path | None = None,
) -> dict[str, acceptance.Acceptance]:
    """Train a draft and write it to ``out``.

    Args:
        settings: what to do.
        shape: of the draft.
        recipe: how to train.
        folders: the data.
        out: the draft's folder; is replaced when the draft is complete.
        reporter: is told.
        name: of the folder in ``settings.work`` for checkpoints.
        start_from: a draft to go on with, of the same shape or with fewer layers.
        begun_as: the draft that the first of several trainings began with; None: ``start_from``.

    Returns:
        The held-out acceptance by group.

    Raises:
        DistillError: the checkpoints are of another training, memory or the disk is too small,
            or ``out`` is not a draft of ours.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_stairs.distill import card, draft, training

    work = settings.work / name
    data = [folder.fingerprint() for folder in folders]
    begun = training.last_checkpoint(work) is not None
    check_same_run(
        work / TRAINING_FILE,
        {**_chosen(settings, shape, recipe, start_from), "data": data},
        "the training",
        begun=begun,
    )
    if not begun:
        (work / training.CURVE_FILE).unlink(missing_ok=True)  # It may be another shape's.
    torch.manual_seed(recipe.seed)
    device = device_of(settings.device)
    with limited_memory("lower --batch, --max-length, or choose a smaller preset"):
        target = AutoModelForCausalLM.from_pretrained(settings.target, dtype=torch.float32)
        model = draft.build(target, shape)
        if start_from:
            begun_shape = draft.shape_of(start_from, Path(settings.target), target.config)
            trained = AutoModelForCausalLM.from_pretrained(start_from, dtype=torch.float32)
            draft.begin_as(model, shape, trained.state_dict(), begun_shape)
        del target
        prepare_memory(device)
        counts = training.frequencies(folders, model.config.vocab_size)
        started = time.monotonic()
        by_group, curve = training.train(
            model,
            folders,
            recipe,
            work,
            counts=counts,
            device=device,
            say=reporter.say,
        )
    minutes = (time.monotonic() - started) / 60
    first = begun_as or (start_from if start_from != out else None)
    with new_folder(out, MADE_BY, DistillError) as folder:
        draft.save(model.to("cpu").float(), folder, Path(settings.target))
        save_frequencies(folder, counts + _counted_before(first, counts))
        (folder / "README.md").write_text(
            card.text(
                settings=settings,
                recipe=recipe,
                written=int(counts.sum()),
                by_group=by_group,
                curve=curve,
                minutes=minutes,
                model=model,
                begun_as=first.name if first else None,
            )
        )
        (folder / MADE_BY).write_text(
            json.dumps(
                {
                    "target": settings.target_name,
                    "data": settings.data_settings,
                    "shape": asdict(shape),
                    "recipe": asdict(recipe),
                    "start_from": first.name if first else None,
                    "data_sha256": data,
                    "curve": curve,
                    "acceptance": {g: asdict(a) for g, a in by_group.items()},
                },
                indent=1,
            )
            + "\n"
        )
    return by_group
