"""The command line of distillation. Heavy imports happen inside the commands."""

import argparse
import importlib.util
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
    add("--seed", type=int, default=0)

    draft = parser.add_argument_group("the draft").add_argument
    draft("--preset", default="shared-2", help="shared-2 (default), shared-3, shared-4: layers of "
          "the target's width, with its embeddings and head; narrow: half the width")  # fmt: skip
    draft("--layers", type=int, metavar="N")
    draft("--from-layers", type=int, nargs="+", metavar="I", help="target layers to begin with")
    draft("--hidden-size", type=int, metavar="N")
    draft("--heads", type=int, metavar="N")
    draft("--kv-heads", type=int, metavar="N")
    draft("--intermediate-size", type=int, metavar="N")

    data = parser.add_argument_group("data").add_argument
    data("--prompts", type=Path, metavar="FILE", help="one a line, or .jsonl with prompt, turns or "
         "messages; default: prompts that the target writes itself")  # fmt: skip
    data("--text", type=Path, metavar="FILE", help="text to learn from as well")
    data("--tokens", type=int, default=2_000_000, metavar="N", help="that the target writes")
    data("--generator", choices=("auto", "vllm", "transformers"), default="auto")
    data("--target-dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
         help="while it writes and labels; default: bfloat16 where that is fast")  # fmt: skip
    data("--answer-tokens", type=int, default=192, metavar="N")
    data("--max-length", type=int, default=1024, metavar="N", help="tokens of a conversation")
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
        return _STAGES[args.stage](args)
    except DistillError as error:
        print(f"vllm-stairs distill: error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if is_disk_full(error):
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
            self._bar.stop()


def _settings(args: argparse.Namespace) -> Any:
    from vllm_stairs.distill.conversations import Manner
    from vllm_stairs.distill.device import device_of
    from vllm_stairs.distill.run import Settings
    from vllm_stairs.distill.target import check_target, target_folder

    at_least_one = ("answer_tokens", "keep", "batch", "evaluations")
    for name, least in (("tokens", 0), *((name, 1) for name in at_least_one)):
        if getattr(args, name) < least:
            raise DistillError(f"--{name.replace('_', '-')} must be at least {least}")
    if not 0 <= args.greedy_share <= 1:
        raise DistillError("--greedy-share is a share: 0 to 1")
    if not 0 < args.head_coverage <= 1:
        raise DistillError("--head-coverage is a share: above 0, at most 1")
    if args.max_minutes is not None and not args.max_minutes > 0:
        raise DistillError("--max-minutes must be above 0")
    if args.max_minutes is not None and args.on_policy_rounds:
        # Resumed, the first training would go on, and the rounds had begun with another draft.
        raise DistillError("--max-minutes does not go with --on-policy-rounds")
    if args.max_length < args.answer_tokens + 32:
        raise DistillError("--max-length must leave room for a question before the answer")
    args.target = target_folder(args.target)
    config = check_target(args.target)
    limit = getattr(config, "max_position_embeddings", args.max_length)
    if args.max_length > limit:
        raise DistillError(f"--max-length {args.max_length}: the target goes up to {limit}")
    device_of(args.device)
    work = args.work or (args.out and args.out.with_name(f"{args.out.name}.work"))
    if work is None:
        raise DistillError("--work or --out must say where the data go")
    if args.tokens == 0 and args.text is None:
        raise DistillError("--tokens 0 needs --text: there is nothing to learn from")
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
        for name in ("layers", "hidden_size", "heads", "kv_heads", "intermediate_size")
        if getattr(args, name) is not None
    }
    if args.from_layers:
        given["from_layers"] = tuple(args.from_layers)
        given.setdefault("layers", len(args.from_layers))
    elif "layers" in given:
        given["from_layers"] = None
    return replace(PRESETS[args.preset], **given)


def _data(args: argparse.Namespace) -> int:
    from vllm_stairs.distill.run import make_data

    make_data(_settings(args), _Reporter())
    return 0


def _train(args: argparse.Namespace) -> int:
    from vllm_stairs.distill import card
    from vllm_stairs.distill.draft import resolve
    from vllm_stairs.distill.run import MADE_BY, make_data, make_draft
    from vllm_stairs.distill.shards import Folder
    from vllm_stairs.distill.target import check_target

    out = _required(args, "out")
    check_own(out, MADE_BY, DistillError)
    settings, shape = _settings(args), _shape(args)
    shape = resolve(check_target(settings.target), shape)  # Before hours of writing.
    reporter = _Reporter()
    if args.stage == "train":
        folders = [Folder(settings.work / "data", settings.data_settings)]
        if not folders[0].indices():
            raise DistillError(f"no data in {str(settings.work)!r}: run the stage data first")
    else:
        folders = [make_data(settings, reporter)]
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
    found = make_draft(settings, shape, recipe, folders, out, reporter)
    for number in range(1, args.on_policy_rounds + 1):
        folders.append(
            make_data(settings, reporter, writer=str(out), name=f"data-of-draft-{number}")
        )
        found = make_draft(
            settings, shape, recipe, folders, out, reporter,
            name=f"training-{number}", start_from=out,
        )  # fmt: skip
    reporter.say(card.table(found))
    reporter.say(f"the draft: {out}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from vllm_stairs.distill import card
    from vllm_stairs.distill.run import evaluate, greedy_texts

    draft = _required(args, "draft")
    args.work = args.work or draft.with_name(f"{draft.name}.work")
    if not (draft / "config.json").is_file():
        raise DistillError(f"no draft in {str(draft)!r}")
    reporter = _Reporter()
    texts = greedy_texts(
        _settings(args),
        args.judge_prompts,
        tokens=args.judge_tokens,
        limit=args.limit,
        reporter=reporter,
    )
    reporter.say(card.table(evaluate(str(draft), texts, args.device)))
    return 0


def _delta(args: argparse.Namespace) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_stairs.distill.draft import (
        DraftShape,
        freeze,
        frozen_names,
        save_delta,
        target_fingerprint,
    )
    from vllm_stairs.distill.target import check_target

    folder, target = _required(args, "draft"), Path(args.target)
    if not (folder / "config.json").is_file():
        raise DistillError(f"no draft in {str(folder)!r}")
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
        extras_from=folder,
    )
    return 0


def _assemble(args: argparse.Namespace) -> int:
    from vllm_stairs.distill.draft import assemble

    assemble(_required(args, "delta"), Path(args.target), _required(args, "out"))
    return 0


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
