"""The paper's experiment: T5 with a small assistant, four ways to write the same text.

    python examples/reproduce_paper.py --smoke            # about two minutes on a CPU
    python examples/reproduce_paper.py                    # T5-large's shape, CPU, 8-10 minutes
    python examples/reproduce_paper.py --shape t5-3b --device cuda
    python examples/reproduce_paper.py --target google-t5/t5-large --assistant google-t5/t5-small

Methods: the large model alone; Hugging Face's assisted generation (batch 1, it takes no more);
stairs as published (a batch of growing sequences, a fixed number of assistant tokens; with
the KV caches that ours has, and at batch 1 without any, since it is not known which it had);
ours (one packed sequence, adaptive height). Runs of all methods are interleaved; figures are
medians of at least five runs at batch 1. There are 16 inputs, which larger batches use again.
Without --target a pair of small T5 models is trained on the spot and padded into the
shapes of T5-large (or T5-3B) and T5-small: real shapes and cost, a small model's text. See
docs/paper.md.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from vllm_stairs.bench.provenance import commit
from vllm_stairs.hf import StairsStats, stairs
from vllm_stairs.hf.prepack import can_prepack, prepacked
from vllm_stairs.hf.shapes import T5_SHAPES, pad_t5, t5_shape

# -- the task ---------------------------------------------------------------------------
#
# Eight dialects of a made-up language. In each, every one of 240 words is followed by one
# other word (the dialects are random permutations in one cycle), and six words end a sentence. The
# input names a dialect and the first word; the output is the sentence. A model has
# to know 1,920 transitions by heart; the assistant, smaller and trained less, knows some.

WORDS, DIALECTS, ENDS = 240, 8, 4
PAD, EOS, FIRST_DIALECT = 0, 1, 2
FIRST_WORD = FIRST_DIALECT + DIALECTS
LONGEST = 64
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


def transitions(seed: int = 7) -> torch.Tensor:
    """``table[dialect, word]`` is the word that follows: int64 ``[DIALECTS, WORDS]``."""
    generator = random.Random(seed)
    table = torch.empty(DIALECTS, WORDS, dtype=torch.long)
    for dialect in range(DIALECTS):
        cycle = list(range(WORDS))
        generator.shuffle(cycle)
        for here, there in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            table[dialect, here] = there
    return table


def make_pairs(table: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs ``[n, 3]`` and labels ``[n, LONGEST]`` (-100 after the end) of ``starts`` [n]."""
    dialect, word = starts // WORDS, starts % WORDS
    inputs = torch.stack(
        [dialect + FIRST_DIALECT, word + FIRST_WORD, torch.full_like(word, EOS)], dim=1
    )
    labels = torch.full((len(starts), LONGEST), -100)
    going = torch.ones_like(word, dtype=torch.bool)
    for column in range(LONGEST):
        word = table[dialect, word] if column else word
        ends = going & (word < ENDS)
        labels[going, column] = word[going] + FIRST_WORD
        labels[ends, column] = EOS
        going &= ~ends
    return inputs, labels


def in_words(ids: list[int]) -> str:
    """Token ids as words that can be read, and compared by BLEU."""
    words = []
    for token in ids:
        if token == EOS:
            break
        if token >= FIRST_WORD:
            number = token - FIRST_WORD
            words.append(
                SYLLABLES[number % 70] + SYLLABLES[(number * 7 + 3) % 70] + "n" * (number // 70)
            )
    return " ".join(words)


def fresh_t5(width: int, layers: int, seed: int) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=FIRST_WORD + WORDS,
        d_model=width,
        d_kv=32,
        d_ff=4 * width,
        num_layers=layers,
        num_heads=width // 32,
        dropout_rate=0.0,
        decoder_start_token_id=PAD,
    )
    model = T5ForConditionalGeneration(config)
    model.generation_config.update(
        decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=EOS, max_length=None
    )
    return model


@torch.no_grad()
def agreement(model: Any, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    """How often the model's next token, along ``labels``, is the label."""
    hits = model(input_ids=inputs, labels=labels).logits.argmax(-1) == labels
    return float(hits[labels != -100].float().mean())


def train(
    model: T5ForConditionalGeneration,
    table: torch.Tensor,
    starts: torch.Tensor,
    validation: tuple[torch.Tensor, torch.Tensor],
    steps: int,
    until: float,
    name: str,
) -> float:
    """Train until the validation agreement reaches ``until``; return it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    reached, begin = 0.0, time.time()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 30) * max(0.05, 1.0 - step / steps)
        # Mostly beginnings of sentences (cheap), now and then whole ones.
        count, columns = (16, LONGEST) if step % 6 == 0 else (48, 12)
        some = starts[torch.randint(len(starts), (count,), generator=generator)]
        inputs, labels = make_pairs(table, some)
        loss = model(input_ids=inputs, labels=labels[:, :columns].contiguous()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            reached = agreement(model, *validation)
            if step % 100 == 0 or reached >= until:
                print(
                    f"  {name}: step {step}, held-out agreement {reached:.3f}, "
                    f"{time.time() - begin:.0f} s"
                )
            if reached >= until:
                break
    return reached


def train_pair(folder: pathlib.Path, steps: int) -> tuple[Any, Any]:
    """The trained main model and assistant; kept in ``folder`` for the next run."""
    main, helper = fresh_t5(128, 2, 0), fresh_t5(64, 1, 1)
    saved = folder / "pair.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        main.load_state_dict(state["main"])
        helper.load_state_dict(state["assistant"])
        return main.eval(), helper.eval()
    table = transitions()
    starts = torch.randperm(WORDS * DIALECTS, generator=torch.Generator().manual_seed(0))
    held_out, training = starts[:192], starts[192:]
    print("training a pair of small T5 models")
    train(main, table, training, make_pairs(table, held_out[128:]), steps, 0.97, "main")
    main.eval()
    # The assistant learns the same task, until it agrees with the main model's own text often
    # enough to be an assistant at all, and seldom enough to be a test.
    inputs, _ = make_pairs(table, held_out[128:])
    written = main.generate(inputs, max_new_tokens=LONGEST, do_sample=False)[:, 1:]
    ended = (written == EOS).long().cumsum(1) - (written == EOS).long()
    labels = written.masked_fill(ended > 0, -100)
    train(helper, table, training, (inputs, labels), 2 * steps, 0.66, "assistant")
    helper.eval()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"main": main.state_dict(), "assistant": helper.state_dict()}, saved)
    return main, helper


def own_prompts(count: int) -> list[dict[str, torch.Tensor]]:
    """``count`` held-out inputs that no training and no choice has seen."""
    starts = torch.randperm(WORDS * DIALECTS, generator=torch.Generator().manual_seed(0))
    table = transitions()
    inputs, labels = make_pairs(table, starts[:128])
    lengths = (labels != -100).sum(1)
    # Sentences of some length, as the paper's; the short ones end after a few words.
    chosen = torch.nonzero(lengths >= 12)[:count, 0]
    return [{"input_ids": inputs[index][None]} for index in chosen]


SENTENCES = [
    "The house at the end of the street has been empty for a long time.",
    "She opened the window because the room had become too warm.",
    "Every morning he walks along the river before he goes to work.",
    "The committee could not agree on the date of the next meeting.",
    "We had to wait for two hours until the train finally arrived.",
    "My grandmother used to tell us stories about the old village.",
    "The new bridge will connect both parts of the town next year.",
    "He forgot his umbrella and came home completely wet.",
    "The museum shows paintings from three different centuries.",
    "Please send me the documents before the end of the week.",
    "The children were playing in the garden when it began to rain.",
    "It is not easy to explain how the machine works.",
    "They decided to sell the car and to buy two bicycles.",
    "The teacher asked the pupils to read the first chapter at home.",
    "After the storm many trees were lying across the road.",
    "The doctor said that he should sleep more and work less.",
]


# -- measuring ---------------------------------------------------------------------------

AT_LEAST = 5
"""Runs of each method at batch 1 (where ``--repeats`` asks for so many), however long they take."""

Method = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def collate(prompts: list[dict[str, torch.Tensor]], device: str) -> dict[str, torch.Tensor]:
    width = max(prompt["input_ids"].shape[1] for prompt in prompts)
    ids = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        length = prompt["input_ids"].shape[1]
        ids[row, :length] = prompt["input_ids"][0]
        mask[row, :length] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def bleu(hypotheses: list[str], references: list[str]) -> float:
    import sacrebleu

    # The effective order: texts of fewer than four words can be identical too.
    result = sacrebleu.corpus_bleu(hypotheses, [references], use_effective_order=True)
    return float(result.score)


class Bench:
    """Times methods on the same prompts, interleaved, and compares their texts."""

    def __init__(self, model: Any, assistant: Any, words: Any, tokens: int, device: str) -> None:
        self.model, self.assistant, self.words = model, assistant, words
        self.tokens, self.device = tokens, device

    def alone(self) -> Method:
        """The large model by itself."""
        return lambda batch: self.model.generate(
            **batch, max_new_tokens=self.tokens, do_sample=False
        )

    def hf_assisted(self) -> Method:
        """Hugging Face's assisted generation, with its own defaults."""
        return lambda batch: self.model.generate(
            **batch, max_new_tokens=self.tokens, do_sample=False, assistant_model=self.assistant
        )

    def climbing(self, use_cache: bool = True, **options: Any) -> tuple[Method, StairsStats]:
        """Stairs with these options, and what counts them."""
        climber = stairs(self.assistant, **options)

        def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.model.generate(
                **batch,
                max_new_tokens=self.tokens,
                do_sample=False,
                use_cache=use_cache,
                custom_generate=climber,
            )

        return run, climber.stats

    def timed(
        self, method: Method, batch: dict[str, torch.Tensor]
    ) -> tuple[float, list[list[int]]]:
        """Seconds, and the token ids written."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        ids = method(batch)
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - begin, ids.tolist()

    def compare(
        self,
        methods: dict[str, tuple[Method, StairsStats | None]],
        batches: list[dict[str, torch.Tensor]],
        deadline: float,
        at_least: int = 1,
    ) -> dict[str, dict[str, Any]]:
        """One run of every method on every batch, in an order that rotates.

        The first of ``methods`` is the reference for text and time. Stops after the batch in
        which the deadline passes, though not before ``at_least`` batches; every method has then
        run on the same batches.
        """
        names = list(methods)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        texts: dict[str, list[list[int]]] = {name: [] for name in names}
        for number, batch in enumerate(batches):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                spent, rows = self.timed(methods[name][0], batch)
                seconds[name].append(spent)
                texts[name].extend(rows)
            if number + 1 >= at_least and time.time() > deadline:
                break
        reference = names[0]
        inputs = [
            tuple(row) for batch in batches[: number + 1] for row in batch["input_ids"].tolist()
        ]
        result = {}
        for name in names:
            own = [self.words(row) for row in texts[name]]
            ratios = [a / b for a, b in zip(seconds[name], seconds[reference], strict=True)]
            # Tokens of the text itself: what follows the end is padding.
            written = sum(
                (row.index(EOS, 1) if EOS in row[1:] else len(row) - 1) for row in texts[name]
            )
            stats = methods[name][1]
            result[name] = {
                "runs": len(seconds[name]),
                "seconds": [round(value, 4) for value in seconds[name]],
                "median_seconds": round(median(seconds[name]), 4),
                "median_time_ratio": round(median(ratios), 4),
                "tokens_per_second": round(written / sum(seconds[name]), 2),
                "bleu_against_alone": round(
                    bleu(own, [self.words(row) for row in texts[reference]]), 2
                ),
                "rows_identical": sum(
                    _text(a) == _text(b) for a, b in zip(texts[name], texts[reference], strict=True)
                ),
                "rows": len(texts[name]),
                "distinct_inputs": len(set(inputs)),
                **({"stairs": stats.as_dict()} if stats is not None and stats.steps else {}),
            }
        return result


def _text(row: list[int]) -> list[int]:
    return row[: row.index(EOS, 1) + 1] if EOS in row[1:] else row


def provenance(arguments: argparse.Namespace) -> dict[str, Any]:
    """What one needs to know to judge or repeat the figures."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if arguments.device != "cpu" else None,
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "dtype": arguments.dtype,
    }


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| kernels | batch | method | median s | time against alone | tokens/s | BLEU "
        "| rows identical | distinct inputs | acceptance | acceptance length | mean height |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kernels, batches in results["timings"].items():
        for batch, methods in batches.items():
            for name, run in methods.items():
                own = run.get("stairs", {})
                lines.append(
                    f"| {kernels} | {batch} | {name} | {run['median_seconds']:.2f} | "
                    f"{run['median_time_ratio']:.2f} | {run['tokens_per_second']:.1f} | "
                    f"{run['bleu_against_alone']:.1f} | {run['rows_identical']}/{run['rows']} | "
                    f"{run['distinct_inputs']} | "
                    f"{own.get('acceptance', '')} | {own.get('acceptance_length', '')} | "
                    f"{own.get('mean_height', '')} |"
                )
    if results["sweep"]:
        lines += [
            "",
            "Sweep of the assistant's tokens n (fixed height, batch 1): throughput against alone.",
            "",
            "| n | as published | packed | acceptance length |",
            "| --- | --- | --- | --- |",
        ]
        for n, pair in results["sweep"].items():
            lines.append(
                f"| {n} | {pair['published']['throughput']:.2f} | "
                f"{pair['packed']['throughput']:.2f} | "
                f"{pair['packed']['stairs']['acceptance_length']:.2f} |"
            )
    return "\n".join(lines)


def plot(results: dict[str, Any], folder: pathlib.Path) -> list[str]:
    """Bars of time, lines of the sweep; nothing where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed: no plots")
        return []
    written = []
    for kernels, batches in results["timings"].items():
        figure, axes = pyplot.subplots(figsize=(8, 4))
        names = list(dict.fromkeys(name for runs in batches.values() for name in runs))
        for offset, name in enumerate(names):
            places = [
                i + offset * 0.8 / len(names)
                for i, runs in enumerate(batches.values())
                if name in runs
            ]
            heights = [runs[name]["median_time_ratio"] for runs in batches.values() if name in runs]
            axes.bar(places, heights, 0.8 / len(names), label=name, align="edge")
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks([i + 0.4 for i in range(len(batches))], [f"batch {b}" for b in batches])
        axes.set_ylabel("time against the large model alone")
        axes.set_title(f"{results['target']}, {kernels} kernels")
        axes.legend(fontsize=8)
        figure.tight_layout()
        path = folder / f"time_{kernels}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        written.append(path.name)
    if results["sweep"]:
        figure, axes = pyplot.subplots(figsize=(6, 4))
        heights = [int(n) for n in results["sweep"]]
        for name in ("published", "packed"):
            axes.plot(
                heights,
                [pair[name]["throughput"] for pair in results["sweep"].values()],
                marker="o",
                label={"published": "stairs as published", "packed": "packed"}[name],
            )
        axes.axhline(1.0, color="black", linewidth=0.8, label="large model alone")
        axes.set_xlabel("assistant tokens per staircase, n")
        axes.set_ylabel("throughput against alone")
        axes.set_title(f"{results['target']}, batch 1")
        axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / "sweep.png", dpi=120)
        pyplot.close(figure)
        written.append("sweep.png")
    return written


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="small shapes, about two minutes")
    parser.add_argument("--target", help="model id or folder; default: the trained, padded pair")
    parser.add_argument("--assistant", help="model id or folder, with --target")
    parser.add_argument("--shape", default="t5-large", choices=[*T5_SHAPES, "none"])
    parser.add_argument("--assistant-shape", default="t5-small", choices=[*T5_SHAPES, "none"])
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument(
        "--repeats", type=int, default=AT_LEAST, help="runs of each method per batch size"
    )
    parser.add_argument("--tokens", type=int, default=LONGEST, help="new tokens at most")
    parser.add_argument("--published-n", type=int, default=4, help="its assistant tokens")
    parser.add_argument("--sweep", default="1,2,3,4,6,8", help="heights; empty for none")
    parser.add_argument(
        "--kernels",
        default="packed",
        choices=["packed", "stock", "both"],
        help="weights packed for the CPU (for all methods alike), as PyTorch has them, or both",
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time for measuring, about")
    parser.add_argument("--train-steps", type=int, default=600)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", default="results/paper", help="folder for JSON, table, plots")
    arguments = parser.parse_args(argv)
    if bool(arguments.target) != bool(arguments.assistant):
        parser.error("--target and --assistant go together")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here: leave --device at cpu")
    if arguments.smoke:
        arguments.shape, arguments.assistant_shape = "t5-small", "none"
        arguments.batches, arguments.repeats, arguments.sweep = "1,4", 3, "2,4"
        arguments.minutes = min(arguments.minutes, 0.7)
        arguments.out = arguments.out + "-smoke"
    return arguments


def load(arguments: argparse.Namespace) -> tuple[Any, Any, Any, list[Any], str]:
    """Target, assistant, ids-to-words, prompts and what the target is."""
    if arguments.target:
        tokenizer = AutoTokenizer.from_pretrained(arguments.target)
        model, assistant = (
            AutoModelForSeq2SeqLM.from_pretrained(name)
            for name in (arguments.target, arguments.assistant)
        )
        prompts = [
            dict(tokenizer("translate English to German: " + text, return_tensors="pt"))
            for text in SENTENCES
        ]

        def words(row: list[int]) -> str:
            return str(tokenizer.decode(row, skip_special_tokens=True))

        return model, assistant, words, prompts, arguments.target
    model, assistant = train_pair(pathlib.Path(arguments.out), arguments.train_steps)
    label = f"small T5 padded to the shape of {arguments.shape}"
    if arguments.shape != "none":
        model = pad_t5(model, t5_shape(arguments.shape))
        shape = t5_shape(arguments.assistant_shape) if arguments.assistant_shape != "none" else None
        if shape is None:
            # The same vocabulary as the target; twice the width, which that needs.
            own = assistant.config.to_dict()
            vocabulary = t5_shape("t5-small").vocab_size
            shape = T5Config.from_dict(
                {**own, "vocab_size": vocabulary, "d_model": 2 * own["d_model"]}
            )
        assistant = pad_t5(assistant, shape)
    else:
        label = "small T5"
    return model, assistant, in_words, own_prompts(16), label


@contextlib.contextmanager
def kernels_for(name: str, *models: Any) -> Iterator[None]:
    with prepacked(*models) if name == "packed" else contextlib.nullcontext():
        yield


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    transformers.logging.set_verbosity_error()
    begin = time.time()
    model, assistant, words, prompts, label = load(arguments)
    dtype = getattr(torch, arguments.dtype)
    model, assistant = (member.to(arguments.device, dtype).eval() for member in (model, assistant))
    bench = Bench(model, assistant, words, arguments.tokens, arguments.device)
    folder = pathlib.Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "provenance": provenance(arguments),
        "target": label,
        "assistant": arguments.assistant or f"small T5 padded to {arguments.assistant_shape}",
        "parameters": {
            "target": model.num_parameters(),
            "assistant": assistant.num_parameters(),
        },
        "timings": {},
        "sweep": {},
    }
    kernels = ["packed", "stock"] if arguments.kernels == "both" else [arguments.kernels]
    if not (can_prepack(model) and can_prepack(assistant)):
        kernels = ["stock"]
    sizes = [int(size) for size in arguments.batches.split(",")]
    heights = [int(n) for n in arguments.sweep.split(",") if n]
    # Larger batches take longer; the sweep has the last fifth.
    weights = [size**0.5 for size in sizes]
    budget = arguments.minutes * 60 / len(kernels)
    print(f"ready after {time.time() - begin:.0f} s: {label}")

    with torch.inference_mode():
        for kernel in kernels:
            with kernels_for(kernel, model, assistant):
                timings = results["timings"][kernel] = {}
                for size, weight in zip(sizes, weights, strict=True):
                    batches = [
                        collate(
                            [prompts[(size * run + i) % len(prompts)] for i in range(size)],
                            arguments.device,
                        )
                        for run in range(arguments.repeats)
                    ]
                    published, published_stats = bench.climbing(
                        num_speculative_tokens=arguments.published_n,
                        adaptive=False,
                        layout="expanded",
                    )
                    ours, ours_stats = bench.climbing()
                    methods: dict[str, tuple[Method, StairsStats | None]] = {
                        "large model alone": (bench.alone(), None),
                        "ours": (ours, ours_stats),
                        "stairs as published": (published, published_stats),
                    }
                    if size == 1:
                        methods["Hugging Face assisted"] = (bench.hf_assisted(), None)
                        uncached, uncached_stats = bench.climbing(
                            use_cache=False,
                            num_speculative_tokens=arguments.published_n,
                            adaptive=False,
                            layout="expanded",
                        )
                        methods["stairs as published, no caches"] = (uncached, uncached_stats)
                    # Warm-up, apart: every method once, on few tokens.
                    bench.tokens, keep = min(8, arguments.tokens), bench.tokens
                    for method, _ in methods.values():
                        method(batches[0])
                    bench.tokens = keep
                    for _, stats in methods.values():
                        if stats is not None:
                            stats.reset()
                    deadline = time.time() + 0.8 * budget * weight / sum(weights)
                    timings[str(size)] = bench.compare(
                        methods, batches, deadline, at_least=AT_LEAST if size == 1 else 1
                    )
                    print(
                        f"{kernel} kernels, batch {size}: "
                        + ", ".join(
                            f"{name} {run['median_time_ratio']:.2f}"
                            for name, run in timings[str(size)].items()
                        )
                    )
                if kernel == kernels[0]:
                    deadline = time.time() + 0.2 * budget
                    for n in heights:
                        pair = {
                            "alone": (bench.alone(), None),
                            "published": bench.climbing(
                                num_speculative_tokens=n, adaptive=False, layout="expanded"
                            ),
                            "packed": bench.climbing(num_speculative_tokens=n, adaptive=False),
                        }
                        runs = bench.compare(
                            pair, [collate([p], arguments.device) for p in prompts[:2]], deadline
                        )
                        for run in runs.values():
                            run["throughput"] = round(1 / run["median_time_ratio"], 4)
                        results["sweep"][str(n)] = runs
    results["provenance"]["load_average_after"] = [round(v, 2) for v in os.getloadavg()]
    results["provenance"]["wall_seconds"] = round(time.time() - begin, 1)
    results["plots"] = plot(results, folder)
    text = table(results)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "results.md").write_text(text + "\n")
    print(text)
    print(
        f"{time.time() - begin:.0f} s; written to {folder}: "
        + ", ".join(["results.json", "results.md", *results["plots"]])
    )


if __name__ == "__main__":
    main()
