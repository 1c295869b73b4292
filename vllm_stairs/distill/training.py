"""The draft learns to agree with the target, with Transformers' own trainer."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from vllm_stairs.distill import acceptance
from vllm_stairs.distill.acceptance import Acceptance, Text
from vllm_stairs.distill.batching import padded
from vllm_stairs.distill.conversations import GREEDY
from vllm_stairs.distill.errors import DistillError
from vllm_stairs.distill.labels import Labels, finished
from vllm_stairs.distill.losses import distance
from vllm_stairs.distill.shards import Folder, Shard, save_json
from vllm_stairs.processor import fast_bfloat16
from vllm_stairs.proposer.vocabulary import covering_ids

COMMON = 0.97
"""The most frequent ids that make up this share of the data take part in every step."""
LIKELY = 1e-3
"""Probability above which an id takes part in the step in which the target gives it that."""
CURVE_FILE = "curve.json"
"""Beside the checkpoints: the acceptance over the steps."""


@dataclass(frozen=True)
class Recipe:
    """How to train."""

    loss: str = "kl"
    learning_rate: float = 1e-3
    epochs: float = 3.0
    batch: int = 16
    """Conversations a step."""
    evaluations: int = 10
    """Times that the acceptance is measured on the way, at even distances."""
    patience: int = 3
    """Stop after so many evaluations without a better acceptance length."""
    mixed_precision: bool = True
    seed: int = 0
    head_coverage: float = 0.9998
    """The loss is computed over the most frequent ids that make up this share of the data, above
    0, at most 1: the head over a whole vocabulary would take most of the time, for ids that hardly
    occur."""
    max_minutes: float | None = None
    """A training that has run for so long stops, is judged and saved; None: no limit. The schedule
    of the learning rate stays that of ``epochs``."""

    def identity(self) -> dict[str, Any]:
        """What a training that goes on must have in common with the one that was stopped.

        The limit of time may differ. The share of the ids counts only where it was chosen:
        trainings begun before it could be are gone on with.
        """
        found = asdict(self)
        del found["max_minutes"]
        if self.head_coverage == Recipe.head_coverage:
            del found["head_coverage"]
        return found


class Examples(torch.utils.data.Dataset[dict[str, Any]]):
    """Conversations to train on, with their labels.

    All of them are in memory: about 5 bytes a token and 6 a label.
    """

    def __init__(self, folders: Sequence[Folder]) -> None:
        self._items: list[tuple[Shard, Labels, npt.NDArray[np.int64], int]] = []
        for folder in folders:
            for index in folder.indices():
                shard, labels = folder.load(index), Labels.load(folder.labels_file(index))
                row_of = np.cumsum(shard.origin > 0) - 1
                for number in np.flatnonzero(~shard.held_out).tolist():
                    if (shard.origin[shard.conversation(number)][1:] > 0).any():
                        self._items.append((shard, labels, row_of, number))

    def __len__(self) -> int:
        return len(self._items)

    def lengths(self) -> list[int]:
        """Of the conversations, in tokens."""
        return [int(s.offsets[n + 1] - s.offsets[n]) for s, _, _, n in self._items]

    def __getitem__(self, item: int) -> dict[str, Any]:
        shard, labels, row_of, number = self._items[item]
        place = shard.conversation(number)
        positions = np.flatnonzero(shard.origin[place][1:] > 0)
        rows = row_of[place.start + 1 + positions]
        return {
            "input_ids": shard.tokens[place],
            "positions": positions,
            "ids": labels.ids[rows],
            "log_probabilities": labels.log_probabilities[rows],
        }


def columns_of_step(
    ids: torch.Tensor, log_probabilities: torch.Tensor, common: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of the trained head that a step needs.

    A head over many thousand ids is half of a small draft's work, and most of them have no part in
    a step: neither frequent nor likely anywhere in it. They count with the rest.

    Args:
        ids: columns of the trained head of the target's likeliest ids, or -1. Shape [positions, k].
        log_probabilities: the target's, of the same.
        common: columns of the frequent ids, which take part in every step. Shape [common].
        size: columns of the trained head.

    Returns:
        The columns that take part, ascending, and ``ids`` as indices into these, or -1.
    """
    taking_part = torch.zeros(size, dtype=torch.bool, device=ids.device)
    taking_part[common] = True
    taking_part[ids[(ids >= 0) & (log_probabilities > math.log(LIKELY))]] = True
    place = torch.where(taking_part, taking_part.cumsum(0) - 1, -1)
    return taking_part.nonzero().squeeze(-1), place[ids.clamp(min=0)].where(ids >= 0, -1)


@dataclass(frozen=True)
class Collator:
    """Puts conversations side by side; padding stands at the end, where nothing sees it."""

    column: torch.Tensor
    """Of each id, its column in the trained head, or -1. Shape [vocabulary]."""

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """One batch."""
        tokens = padded([item["input_ids"] for item in items])
        longest = tokens.shape[1]
        return {
            "input_ids": torch.from_numpy(tokens),
            "positions": torch.from_numpy(
                np.concatenate(
                    [row * longest + item["positions"] for row, item in enumerate(items)]
                )
            ),
            "ids": self.column[torch.from_numpy(np.concatenate([i["ids"] for i in items])).long()],
            "log_probabilities": torch.from_numpy(
                np.concatenate([i["log_probabilities"] for i in items])
            ),
        }


class DraftTrainer(Trainer):
    """Transformers' trainer with our loss and our measure."""

    control: Any

    def __init__(
        self,
        *args: Any,
        head_ids: torch.Tensor,
        common: torch.Tensor,
        loss: str,
        held_out: Sequence[Text],
        lengths: list[int],
        curve_file: Path,
        say: Callable[[str], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.head_ids = head_ids.to(self.args.device)
        self.common = common.to(self.args.device)
        self.loss_kind = loss
        self.held_out = held_out
        self.lengths = lengths
        self.curve_file = curve_file
        self.say = say
        self.curve: list[dict[str, float]] = []

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Distance to the target at every labelled position."""
        columns, ids = columns_of_step(
            inputs["ids"], inputs["log_probabilities"], self.common, len(self.head_ids)
        )
        # Only the whole model's forward is wrapped in it by itself.
        with self.accelerator.autocast():
            hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
            chosen = hidden.reshape(-1, hidden.shape[-1])[inputs["positions"]]
            head = model.lm_head.weight[self.head_ids[columns]]
            logits = torch.nn.functional.linear(chosen, head)
        logits = finished(logits.float(), model.config)
        found: torch.Tensor = distance(self.loss_kind, logits, ids, inputs["log_probabilities"])
        return found

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Acceptance on held-out text: a line for the user, and a point of the curve, which is
        kept on disk for a run that is resumed."""
        with self.accelerator.autocast():
            by_group = acceptance.measure(self.model, self.held_out)
        first, length = acceptance.mean(by_group)
        figures = {"eval_acceptance": first, "eval_acceptance_length": length}
        step, steps = self.state.global_step, self.args.max_steps
        self.curve.append({"step": step, **figures})
        save_json(self.curve_file, self.curve)
        positions = ", ".join(f"{share:.3f}" for share in acceptance.mean_per_position(by_group))
        self.say(
            f"step {step} of {steps} ({step / steps:.0%}): held-out acceptance by position "
            f"{positions}, acceptance length at K={acceptance.HEIGHT} {length:.2f}"
        )
        self.log(dict(figures))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, figures
        )
        return figures

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return Order(self.args.train_batch_size, self.lengths, self.args.seed)


class Order(LengthGroupedSampler):
    """Conversations of like length together, in an order that the epoch alone decides: the same
    one in a run that is gone on with."""

    def __init__(self, batch: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch, lengths=lengths)
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called before an epoch by accelerate."""
        self.generator = torch.Generator().manual_seed(self._seed + epoch)


class TimeLimit(TrainerCallback):
    """Ends a training that has run for so many minutes, as its last step would have."""

    def __init__(self, minutes: float, say: Callable[[str], None]) -> None:
        self._minutes, self._say = minutes, say
        self._started = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Called by the trainer."""
        self._started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the trainer."""
        if time.monotonic() - self._started >= 60 * self._minutes:
            self._say(f"stopping after {self._minutes:g} minutes, at step {state.global_step}")
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = control.should_training_stop = True


def held_out_texts(folders: Sequence[Folder], at_most: int = 400) -> list[Text]:
    """The target's greedy conversations that are never trained on."""
    texts = []
    for folder in folders:
        for shard in folder.shards() if folder.of_target else ():
            for number in np.flatnonzero(shard.held_out).tolist():
                place = shard.conversation(number)
                greedy = shard.origin[place] == GREEDY
                if greedy.any():
                    group = shard.groups[shard.group[number]]
                    texts.append(Text(shard.tokens[place], greedy, group))
    return texts[:at_most]


def frequencies(folders: Sequence[Folder], vocabulary: int) -> npt.NDArray[np.int64]:
    """How often each id was written. Shape [vocabulary]."""
    counts = np.zeros(vocabulary, np.int64)
    for folder in folders:
        for shard in folder.shards():
            counts += np.bincount(shard.tokens[shard.origin > 0], minlength=vocabulary)
    return counts


def trained_ids(counts: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.int64]:
    """The most frequent ids that make up a share of the data, ascending; see :class:`Recipe`."""
    return np.sort(covering_ids(counts, share))


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete one: the trainer writes its state last."""
    found = [f.parent for f in folder.glob("checkpoint-*/trainer_state.json") if _whole(f)]
    return max(found, key=_step, default=None)


def _whole(file: Path) -> bool:
    try:
        json.loads(file.read_text())
    except ValueError:  # The disk was full, or the trainer killed.
        return False
    return True


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def evaluations_without_gain(curve: Sequence[Mapping[str, float]], every: int) -> int:
    """How many evaluations there were after the best one.

    Args:
        curve: its first point is the untrained draft and does not count.
        every: steps from one evaluation to the next; those at a limit of time do not count.
    """
    trained = curve[1:]
    if not trained:
        return 0
    lengths = [point["eval_acceptance_length"] for point in trained]
    return sum(p["step"] % every == 0 for p in trained[lengths.index(max(lengths)) + 1 :])


def train(
    draft: Any,
    folders: Sequence[Folder],
    recipe: Recipe,
    work: Path,
    *,
    counts: npt.NDArray[np.int64],
    device: str,
    say: Callable[[str], None],
) -> tuple[dict[str, Acceptance], list[dict[str, float]]]:
    """Train ``draft`` in place; goes on from the last checkpoint in ``work``.

    Without a greedy conversation that is held out, nothing is measured: the training does not stop
    early, and its last state is the draft.

    Args:
        draft: the model; parameters that do not require gradients stay.
        folders: the data.
        recipe: how.
        work: for checkpoints.
        counts: :func:`frequencies` of the data. Shape [vocabulary].
        device: ``cpu`` or ``cuda``.
        say: is given lines for the user.

    Returns:
        The held-out acceptance of the best state, by group, and the curve of it over the steps,
        beginning with the untrained draft.

    Raises:
        DistillError: there is nothing to learn from.
    """
    examples = Examples(folders)
    if not len(examples):
        raise DistillError("nothing to learn from: no conversation was kept, give other prompts")
    held_out = held_out_texts(folders)
    head_ids = torch.from_numpy(trained_ids(counts, recipe.head_coverage))
    column = torch.full((draft.config.vocab_size,), -1)
    column[head_ids] = torch.arange(len(head_ids))
    steps = max(1, int(len(examples) * recipe.epochs / recipe.batch))
    every = max(1, steps // recipe.evaluations)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, max(1, steps // 20)),
        weight_decay=0.01,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=recipe.mixed_precision and (device == "cuda" or fast_bfloat16()),
        use_cpu=device == "cpu",
        eval_strategy="steps" if held_out else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=bool(held_out),
        metric_for_best_model="eval_acceptance_length",
        greater_is_better=True,
        logging_steps=max(1, every // 4),
        report_to=[],
        remove_unused_columns=False,
        dataloader_drop_last=False,
        seed=recipe.seed,
        data_seed=recipe.seed,
    )
    if arguments.n_gpu > 1:  # Else the trainer would split batches among all devices.
        arguments._n_gpu = 1
    stopper = EarlyStoppingCallback(recipe.patience)
    callbacks: list[TrainerCallback] = [stopper] if held_out else []
    if recipe.max_minutes is not None:
        callbacks.append(TimeLimit(recipe.max_minutes, say))
    trainer = DraftTrainer(
        model=draft,
        args=arguments,
        train_dataset=examples,
        eval_dataset=[],
        data_collator=Collator(column),
        callbacks=callbacks,
        head_ids=head_ids,
        common=column[torch.from_numpy(trained_ids(counts, COMMON))],
        loss=recipe.loss,
        held_out=held_out,
        lengths=examples.lengths(),
        curve_file=work / CURVE_FILE,
        say=say,
    )
    say(
        f"training on {len(examples)} conversations, {steps} steps, {len(head_ids)} of "
        f"{draft.config.vocab_size} ids; held out: {len(held_out)}"
    )
    if not held_out:
        say("no greedy conversation is held out: nothing is measured, the last state is the draft")
    checkpoint = last_checkpoint(work)
    if checkpoint is not None:
        done = _step(checkpoint)
        if held_out and trainer.curve_file.is_file():
            points = json.loads(trainer.curve_file.read_text())
            trainer.curve = [point for point in points if point["step"] <= done]
        without_gain = evaluations_without_gain(trainer.curve, every)
        if done >= steps or without_gain >= recipe.patience:
            say(f"the training has ended, at step {done}")
            _load_best(draft, checkpoint)
            return acceptance.measure(draft, held_out), trainer.curve
        say(f"going on from step {done}")
        stopper.early_stopping_patience_counter = without_gain
    if held_out and not trainer.curve:
        trainer.evaluate()  # Untrained: the checkpoint is loaded below.
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    best = acceptance.measure(trainer.model, held_out)
    return best, trainer.curve


def _load_best(draft: Any, last: Path) -> None:
    """Load the best state that an ended training has kept; its last one if none was judged.

    Args:
        draft: is loaded into.
        last: checkpoint.
    """
    step = json.loads((last / "trainer_state.json").read_text())["best_global_step"]
    best = last.with_name(f"checkpoint-{step}")
    folder = best if best.is_dir() else last
    draft.load_state_dict(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    )
