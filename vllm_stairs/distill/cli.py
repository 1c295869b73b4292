"""The command line of distillation. Heavy imports happen inside the commands."""

import argparse
import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import Any

from vllm_stairs.distill.errors import DistillError
from vllm_stairs.folders import check_own, is_disk_full

DESCRIPTION = "Train a draft for a target; see docs/distill.md."

EPILOG = """\
stages: run (default: data, then train), data, train, evaluate, delta, assemble.
Interrupted, any of them goes on where it stopped: give the same command again.

example: vllm-stairs distill --target models/smollm2-135m-instruct --out models/my-draft
         vllm-stairs distill evaluate --target models/smollm2-135m-instruct --draft models/my-draft
"""

LONGEST = 1024
"""Tokens of a conversation, unless the target or the user says otherwise."""

STAGES = ("run", "data", "train", "evaluate", "delta", "assemble")


def add_parser(subparsers: Any) -> None:
    """Register ``distill`` as a sub-command of ``vllm-stairs``."""
    parser = subparsers.add_parser(
        "distill",
        help="train a draft for a target",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("stage", nargs="?", choices=STAGES, default="run", help="default: run")
    add("--target", required=True, metavar="MODEL", help="path or id of the target")
    add("--out", type=Path, metavar="DIR", help="the folder that is made")
    add("--work", type=Path, metavar="DIR", help="for data and checkpoints (default: OUT.work)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--seed", type=int, default=0, help="of the data and of the training")

    draft = parser.add_argument_group("the draft").add_argument
    draft("--preset", default="shared-2", help="shared-2 (default), shared-3, shared-4: layers of "
          "the target's width, with its embeddings and head; narrow: half the width")  # fmt: skip
    draft("--layers", type=int, metavar="N")
    draft("--from-layers", type=int, nargs="+", metavar="I", help="target layers to begin with")
    draft("--start-from", type=Path, metavar="DIR", help="go on with a draft that there is, on "
          "other data; its shape is taken over, but it may be given more --layers")  # fmt: skip
    draft("--hidden-size", type=int, metavar="N")
    draft("--heads", type=int, metavar="N")
    draft("--kv-heads", type=int, metavar="N")
    draft("--intermediate-size", type=int, metavar="N")
    draft("--tied", action=argparse.BooleanOptionalAction, help="embeddings and head in one "
          "matrix; default: as in the target, and so it is at the target's width")  # fmt: skip

    data = parser.add_argument_group("data").add_argument
    data("--prompts", type=Path, metavar="FILE", help="one a line, or .jsonl with prompt, turns or "
         "messages; default: prompts that the target writes itself")  # fmt: skip
    data("--text", type=Path, metavar="FILE", help="text to learn from as well")
    data("--tokens", type=int, default=2_000_000, metavar="N",
         help="that the target writes; 0: --text alone")  # fmt: skip
    data("--generator", choices=("auto", "vllm", "transformers"), default="auto")
    data("--target-dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
         help="while it writes and labels; default: bfloat16 where that is fast")  # fmt: skip
    data("--answer-tokens", type=int, default=192, metavar="N")
    data("--max-length", type=int, metavar="N", help="tokens of a conversation; default: 1024, "
         "or what the target goes up to")  # fmt: skip
    data("--greedy-share", type=float, default=0.75, metavar="SHARE", help="of the answers")
    data("--keep", type=int, default=16, metavar="K", help="likeliest ids kept at a position")

    train = parser.add_argument_group("training").add_argument
    train("--loss", choices=("kl", "tv", "kl+tv"), default="kl")
    train("--epochs", type=float, default=3.0)
    train("--batch", type=int, default=16, help="conversations a step")
    train("--learning-rate", type=float, default=1e-3)
    train("--evaluations", type=int, default=10, metavar="N", help="on the way")
    train("--patience", type=int, default=3, metavar="N", help="evaluations without a gain")
    train("--full-precision", action="store_true", help="no bfloat16 in training")
    train("--head-coverage", type=float, default=0.9998, metavar="SHARE", help="of the data whose "
          "ids the loss is computed over, the most frequent ones; default: 0.9998")  # fmt: skip
    train("--max-minutes", type=float, metavar="M", help="of training; the best state so far "
          "is then the draft, and the same command goes on")  # fmt: skip
    train("--on-policy-rounds", type=int, default=0, metavar="N",
          help="the draft writes, the target judges, the draft learns; so many times")  # fmt: skip

    judge = parser.add_argument_group("evaluate, delta, assemble").add_argument
    judge("--draft", type=Path, metavar="DIR", help="the draft to judge or to store")
    judge("--delta", type=Path, metavar="DIR", help="what differs from the target")
    judge("--delta-dtype", choices=("bfloat16", "int8"), default="bfloat16", help="how it is "
          "stored; int8 takes half the room")  # fmt: skip
    judge("--judge-prompts", default="spec-bench", metavar="SOURCE", help="as in bench run")
    judge("--judge-tokens", type=int, default=96, metavar="N")
    judge("--limit", type=int, metavar="N", help="prompts, an equal share of each group")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Carry out a stage; returns the exit status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if Path(args.target).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        _check_packages()
        reporter = _Reporter()
        try:
            return _STAGES[args.stage](args, reporter)
        finally:
            reporter.close()
    except DistillError as error:
        print(f"vllm-stairs distill: error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        # Of a full disk torch.save says only where in its own source it noticed.
        if is_disk_full(error) or "inline_container.cc" in str(error):
            print("vllm-stairs distill: error: the disk is full", file=sys.stderr)
            return 2
        raise


def _check_packages() -> None:
    missing = [name for name in ("accelerate", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        raise DistillError(
            f"not installed: {', '.join(missing)}; pip install 'vllm-stairs[distill]'"
        )


class _Reporter:
    """Lines and a progress bar on the terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = Console(highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task: Any = None
        self._what = ""

    def say(self, text: str) -> None:
        """A line for the user."""
        self._console.print(text, markup=False)

    def progress(self, what: str, done: int, total: int) -> None:
        """How far a stage is."""
        if what != self._what:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._what, self._task = what, self._bar.add_task(what, total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Take the bar away, and give the terminal its cursor back."""
        if self._bar.live.is_started:
            self._bar.stop()


def _beside(folder: Path) -> Path:
    """Where the data and checkpoints of a draft's folder go."""
    return folder.absolute().with_name(f"{folder.absolute().name}.work")


def _settings(args: argparse.Namespace) -> Any:
    from vllm_stairs.distill.conversations import Manner
    from vllm_stairs.distill.device import device_of
    from vllm_stairs.distill.draft import check_supported
    from vllm_stairs.distill.run import Settings
    from vllm_stairs.distill.target import check_target, target_folder

    at_least_one = ("answer_tokens", "keep", "batch", "evaluations", "patience", "judge_tokens")
    at_least_none = ("tokens", "seed", "on_policy_rounds")
    for least, names in enumerate((at_least_none, at_least_one)):
        for name in names:
            if getattr(args, name) < least:
                raise DistillError(f"--{name.replace('_', '-')} must be at least {least}")
    for name in ("epochs", "learning_rate"):
        if not 0 < getattr(args, name) < math.inf:
            raise DistillError(f"--{name.replace('_', '-')} must be above 0")
    if not 0 <= args.greedy_share <= 1:
        raise DistillError("--greedy-share is a share: 0 to 1")
    if not 0 < args.head_coverage <= 1:
        raise DistillError("--head-coverage is a share: above 0, at most 1")
    if args.max_minutes is not None and not args.max_minutes > 0:
        raise DistillError("--max-minutes must be above 0")
    if args.max_minutes is not None and args.on_policy_rounds:
        # Resumed, the first training would go on, and the rounds had begun with another draft.
        raise DistillError("--max-minutes does not go with --on-policy-rounds")
    args.target = target_folder(args.target)
    config = check_target(args.target)
    if args.stage != "evaluate":
        check_supported(config)
        if args.keep > config.vocab_size:
            raise DistillError(f"--keep {args.keep}: the target has {config.vocab_size} ids")
    limit = getattr(config, "max_position_embeddings", LONGEST)
    if args.max_length is None:
        args.max_length = min(LONGEST, limit)
    if args.max_length > limit:
        raise DistillError(f"--max-length {args.max_length}: the target goes up to {limit}")
    if args.max_length < args.answer_tokens + 32:
        raise DistillError("--max-length must leave room for a question before the answer")
    device_of(args.device)
    work = args.work or (args.out and _beside(args.out))
    if work is None:
        raise DistillError("--work or --out must say where the data go")
    if args.out and work.resolve().is_relative_to(args.out.resolve()):
        raise DistillError("--work must lie outside --out, which is replaced as a whole")
    if args.tokens == 0 and (args.text is None or args.on_policy_rounds):
        raise DistillError("--tokens 0 needs --text, and no --on-policy-rounds: nobody writes")
    return Settings(
        target=args.target,
        work=work,
        prompts=args.prompts,
        text=args.text,
        tokens=args.tokens,
        generator=args.generator,
        dtype=args.target_dtype,
        manner=Manner(
            answer_tokens=args.answer_tokens,
            greedy_share=args.greedy_share,
            max_length=args.max_length,
        ),
        keep=args.keep,
        device=args.device,
        seed=args.seed,
    )


def _shape(args: argparse.Namespace) -> Any:
    from dataclasses import replace

    from vllm_stairs.distill.draft import PRESETS

    if args.preset not in PRESETS:
        raise DistillError(f"--preset {args.preset!r}: choose one of {', '.join(PRESETS)}")
    given = {
        name: getattr(args, name)
        for name in ("layers", "hidden_size", "heads", "kv_heads", "intermediate_size", "tied")
        if getattr(args, name) is not None
    }
    if args.from_layers:
        given["from_layers"] = tuple(args.from_layers)
        given.setdefault("layers", len(args.from_layers))
    elif "layers" in given:
        given["from_layers"] = None
    return replace(PRESETS[args.preset], **given)


def _shape_of(args: argparse.Namespace, config: Any) -> Any:
    """The shape of the draft that is to be gone on with."""
    from vllm_stairs.distill.draft import grown, shape_of

    options = ("hidden_size", "heads", "kv_heads", "intermediate_size", "tied")
    given = [name for name in options if getattr(args, name) is not None]
    if given:
        raise DistillError(
            f"--{given[0].replace('_', '-')} does not go with --start-from: that draft has a shape"
        )
    if args.start_from.resolve() == args.out.resolve():
        raise DistillError("--start-from and --out are the same folder: choose another --out")
    shape = shape_of(args.start_from, Path(args.target), config)
    if args.layers is None and args.from_layers is None:
        return shape
    return grown(shape, config, layers=args.layers, from_layers=args.from_layers)


def _data(args: argparse.Namespace, reporter: _Reporter) -> int:
    from vllm_stairs.distill.run import make_data

    make_data(_settings(args), reporter)
    return 0


def _train(args: argparse.Namespace, reporter: _Reporter) -> int:
    from vllm_stairs.distill import card
    from vllm_stairs.distill.draft import MADE_BY, MANIFEST_FILE, resolve
    from vllm_stairs.distill.run import check_training, make_data, make_draft
    from vllm_stairs.distill.shards import Folder
    from vllm_stairs.distill.target import check_target

    out = _required(args, "out")
    check_own(out, MADE_BY, DistillError)
    if (out / MANIFEST_FILE).is_file():
        raise DistillError(f"{out} holds what is stored of a draft: choose another --out")
    settings, config = _settings(args), check_target(args.target)
    # Before hours of writing.
    shape = _shape_of(args, config) if args.start_from else resolve(config, _shape(args))
    from vllm_stairs.distill.training import Recipe

    recipe = Recipe(
        loss=args.loss,
        learning_rate=args.learning_rate,
        epochs=args.epochs,
        batch=args.batch,
        evaluations=args.evaluations,
        patience=args.patience,
        mixed_precision=not args.full_precision,
        seed=args.seed,
        head_coverage=args.head_coverage,
        max_minutes=args.max_minutes,
    )
    check_training(settings, shape, recipe, args.start_from)
    if args.stage == "train":
        data = Folder(settings.work / "data", settings.data_settings)
        if not data.indices() or not all(data.labels_file(i).is_file() for i in data.indices()):
            raise DistillError(f"no whole data in {str(settings.work)!r}: run the stage data first")
    else:
        data = make_data(settings, reporter)
    folders = [data]
    found = make_draft(settings, shape, recipe, folders, out, reporter, start_from=args.start_from)
    for number in range(1, args.on_policy_rounds + 1):
        folders.append(
            make_data(settings, reporter, writer=str(out), name=f"data-of-draft-{number}")
        )
        found = make_draft(
            settings, shape, recipe, folders, out, reporter,
            name=f"training-{number}", start_from=out, begun_as=args.start_from,
        )  # fmt: skip
    reporter.say(card.table(found))
    reporter.say(f"the draft: {out}")
    return 0


def _evaluate(args: argparse.Namespace, reporter: _Reporter) -> int:
    from vllm_stairs.distill import card
    from vllm_stairs.distill.run import evaluate, greedy_texts

    draft = _draft(args)
    args.work = args.work or _beside(draft)
    texts = greedy_texts(
        _settings(args),
        args.judge_prompts,
        tokens=args.judge_tokens,
        limit=args.limit,
        reporter=reporter,
    )
    reporter.say(card.table(evaluate(str(draft), texts, args.device)))
    return 0


def _delta(args: argparse.Namespace, _: _Reporter) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_stairs.distill.draft import (
        MANIFEST_FILE,
        DraftShape,
        freeze,
        frozen_names,
        save_delta,
        target_fingerprint,
    )
    from vllm_stairs.distill.target import check_target, target_folder

    folder, target = _draft(args), Path(target_folder(args.target))
    check_own(_required(args, "delta"), MANIFEST_FILE, DistillError)
    draft = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hidden, theirs = draft.config.hidden_size, check_target(str(target)).hidden_size
    shape = DraftShape(
        draft.config.num_hidden_layers, hidden_size=None if hidden == theirs else hidden
    )
    freeze(draft, shape)
    save_delta(
        draft,
        _required(args, "delta"),
        target_name=target.name,
        target_fingerprint=target_fingerprint(target, frozen_names(draft, shape)),
        dtype=getattr(torch, args.delta_dtype),
        extras_from=folder,
    )
    return 0


def _assemble(args: argparse.Namespace, _: _Reporter) -> int:
    from vllm_stairs.distill.draft import assemble
    from vllm_stairs.distill.target import target_folder

    target = Path(target_folder(args.target))
    assemble(_required(args, "delta"), target, _required(args, "out"))
    return 0


def _draft(args: argparse.Namespace) -> Path:
    folder = _required(args, "draft")
    if not (folder / "config.json").is_file() or not any(folder.glob("model*.safetensors")):
        raise DistillError(f"no draft in {str(folder)!r}: config.json or model.safetensors missing")
    return folder


def _required(args: argparse.Namespace, name: str) -> Path:
    value: Path | None = getattr(args, name)
    if value is None:
        raise DistillError(f"the stage {args.stage} needs --{name}")
    return value


_STAGES = {
    "run": _train,
    "data": _data,
    "train": _train,
    "evaluate": _evaluate,
    "delta": _delta,
    "assemble": _assemble,
}
