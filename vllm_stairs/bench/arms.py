"""Arms: the ways of serving the target that are measured against each other.

An arm is written ``[label@]method[:key=value,...]``:

* ``plain``: vLLM without speculation.
* ``draft_model:k=4``: vLLM's own; ``table=1-4:4/5-16:2`` is its batch-size table.
* ``ngram:k=4,max=4,min=1``: vLLM's own prompt lookup.
* ``stairs:k=4,layout=expanded``: any other key is the option ``stairs_<key>``.

``draft=PATH`` overrides the run's draft, ``spec.KEY=VALUE`` reaches vLLM's
``speculative_config`` as it stands.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_stairs.bench.errors import BenchError
from vllm_stairs.config import MAX_NUM_SPECULATIVE_TOKENS, OPTION_PREFIX, parse_options

METHODS = ("plain", "draft_model", "ngram", "stairs")


@dataclass(frozen=True)
class Arm:
    """One arm: a label and what it tells vLLM about speculation."""

    label: str
    method: str
    speculative_config: dict[str, Any] | None = field(default=None, hash=False)
    """None for plain."""

    @property
    def height(self) -> int:
        """The largest number of draft tokens a step; 0 for plain."""
        return int((self.speculative_config or {}).get("num_speculative_tokens", 0))

    @property
    def draft(self) -> str | None:
        """Path or id of the draft model, if the method has one."""
        return (self.speculative_config or {}).get("model")


def parse(text: str, draft: str | None) -> Arm:
    """Read one arm.

    Args:
        text: see this module's docstring.
        draft: the run's draft model, for the methods that need one.

    Raises:
        BenchError: in one line, for whatever can be told to be wrong without vLLM.
    """
    head, _, rest = text.partition(":")
    label, at, method = head.rpartition("@")
    if at and not label.strip():
        raise BenchError(f"arm {text!r}: the label before the @ is empty")
    if method not in METHODS:
        raise BenchError(f"arm {text!r}: unknown method {method!r}, expected {', '.join(METHODS)}")
    options = _options(text, rest)
    if not at:
        label = text.replace(",", " ") if rest else method
    if method == "plain":
        if options:
            raise BenchError(f"arm {text!r}: plain takes no options")
        return Arm(label, method)
    config: dict[str, Any] = {"method": method}
    height = _count(text, "k", options.pop("k", 4))
    if method == "stairs" and height > MAX_NUM_SPECULATIVE_TOKENS:
        raise BenchError(f"arm {text!r}: k must be at most {MAX_NUM_SPECULATIVE_TOKENS} for stairs")
    config["num_speculative_tokens"] = height
    if method == "ngram":
        longest = _count(text, "max", options.pop("max", 4))
        shortest = _count(text, "min", options.pop("min", min(2, longest)))
        if shortest > longest:
            raise BenchError(f"arm {text!r}: min ({shortest}) is greater than max ({longest})")
        config["prompt_lookup_max"], config["prompt_lookup_min"] = longest, shortest
    else:
        model = options.pop("draft", draft)
        if not model:
            raise BenchError(f"arm {text!r} needs a draft model: pass --draft or draft=PATH")
        config["model"] = str(model)
    if "table" in options:
        config["num_speculative_tokens_per_batch_size"] = _table(text, str(options.pop("table")))
    for key, value in options.items():
        if key.startswith("spec."):
            name = key.removeprefix("spec.")
        elif method == "stairs":
            name = key if key.startswith(OPTION_PREFIX) else OPTION_PREFIX + key
        else:
            raise BenchError(
                f"arm {text!r}: unknown option {key!r} (vLLM's own keys are written spec.{key}=...)"
            )
        if not name or name in config:
            raise BenchError(f"arm {text!r}: {key} is empty, given twice or set by the arm itself")
        config[name] = value
    if method == "stairs":
        try:
            given = parse_options({k: v for k, v in config.items() if k.startswith(OPTION_PREFIX)})
        except ValueError as error:
            raise BenchError(f"arm {text!r}: {error}") from None
        # A result has to say it: readers treat heights that are chosen differently.
        config.setdefault("stairs_height", given.height)
    return Arm(label, method, config)


def parse_all(texts: Sequence[str], draft: str | None) -> list[Arm]:
    """Read the arms of a run; their labels must differ."""
    arms = [parse(text, draft) for text in texts]
    labels = [arm.label for arm in arms]
    for label in labels:
        if labels.count(label) > 1:
            raise BenchError(f"two arms are called {label!r}: give one a name, NAME@method:...")
    return arms


def default_arms(draft: str | None) -> list[str]:
    """What is measured when no arm was named."""
    if not draft:
        return ["plain", "ngram:k=4"]
    return [
        "plain",
        "draft_model:k=2",
        "draft_model:k=4",
        "draft_model:k=4,table=1-4:4/5-16:2/17-4096:1",
        "ngram:k=4",
        "stairs:k=4,height=fixed",
        "stairs:k=4",
    ]


def sweep_arms(heights: Sequence[int], *, stock: bool) -> list[str]:
    """The paper's sweep over the size of the assistant's batch, as arms."""
    fixed = [f"stairs:k={height},height=fixed" for height in heights]
    return ["plain", *(f"draft_model:k={height}" for height in heights if stock), *fixed]


def _options(text: str, rest: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise BenchError(f"arm {text!r}: expected key=value, got {part!r}")
        if key in options:
            raise BenchError(f"arm {text!r}: {key} is given twice")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def _count(text: str, key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BenchError(f"arm {text!r}: {key} must be a whole number of at least 1")
    return value


def _table(text: str, value: str) -> list[list[int]]:
    rows: list[list[int]] = []
    for part in value.split("/"):
        batches, _, tallest = part.partition(":")
        first, _, last = batches.partition("-")
        try:
            rows.append([int(first), int(last or first), int(tallest)])
        except ValueError:
            raise BenchError(
                f"arm {text!r}: a table is written FIRST-LAST:K/FIRST-LAST:K, got {part!r}"
            ) from None
    ends = [0, *(row[1] for row in sorted(rows))]
    for (low, high, height), end in zip(sorted(rows), ends, strict=False):
        if low > high or low <= end or height < 0 or (end == 0 and low != 1):
            raise BenchError(
                f"arm {text!r}: a table starts at batch size 1, its ranges ascend and do not "
                f"overlap, no height is negative: {low}-{high}:{height}"
            )
    return rows
