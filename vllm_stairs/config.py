"""Every option of the method: typed, bounded, described. Imports neither vLLM nor torch.

The command line (``--stairs-*``), ``--speculative-config '{"stairs_*": ...}'`` and
``LLM(speculative_config=...)`` are all generated from, and checked by, this one class.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

METHOD = "stairs"
"""The name of the speculative method."""

OPTION_PREFIX = "stairs_"
"""What the options are called in ``speculative_config``: this, then the field's name."""

DEFAULT_NUM_SPECULATIVE_TOKENS = 4
"""The largest height of a staircase where the user names none."""

MAX_NUM_SPECULATIVE_TOKENS = 64
"""No staircase is taller: vLLM's rejection sampler ends at 128 drafts of a request, and no
draft model is worth following that far."""

DRAFT_SUFFIX = "-draft"
"""A draft that lies beside the target under the target's name and this suffix is used when
no draft is named: ``models/smollm2-135m-instruct`` and ``models/smollm2-135m-instruct-draft``."""

MAX_HEIGHT_ARG = "stairs_max_height"
"""``vllm_xargs`` / ``SamplingParams.extra_args`` key: one request's own largest height.
0 opts the request out of speculation."""


class StairsOptions(BaseModel):
    """The options of the method ``stairs``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Literal["packed", "expanded"] = Field(
        default="packed",
        description="How the target reads a staircase: 'packed' as one multi-token query, "
        "'expanded' as one row per stair (the published batch; the reference for the packed "
        "path and for attention backends without a multi-token decode path).",
    )
    height: Literal["fixed", "auto"] = Field(
        default="auto",
        description="How tall staircases are: 'auto' chooses 0 to num_speculative_tokens for each "
        "request and step from the acceptance, the confidences and the times that it measures; "
        "'fixed' always drafts as far as allowed.",
    )
    draft_vocab: str | int = Field(
        default="auto",
        description="The ids that the draft may write; its output head computes logits of these "
        "only. 'auto': where the draft's folder holds token_frequencies.safetensors, the most "
        "frequent ids; 'full': all; a number: so many of the most frequent; or a file of ids (a "
        "JSON list, one id a line, or safetensors with 'ids').",
    )
    draft_weights: Literal["auto", "bfloat16", "full"] = Field(
        default="auto",
        description="On CPU, where target and draft run in float32: the type in which the draft's "
        "matrices are held and multiplied. 'auto': bfloat16 if the processor has arithmetic for "
        "it; 'bfloat16'; 'full': float32. What the draft writes is checked by the target either "
        "way.",
    )
    placement: Literal["colocated", "replicated", "dedicated"] = Field(
        default="colocated",
        description="Where the draft lives: 'colocated', on the target's devices, sharded as the "
        "target is; 'replicated', whole on every rank, without communication; 'dedicated', on a "
        "device of its own, placed there by Ray.",
    )
    overlap: Literal["auto", "off"] = Field(
        default="auto",
        description="With placement 'dedicated': 'auto', the draft writes on while the target "
        "verifies, as if its draft held; 'off', it waits.",
    )
    draft_node: str | None = Field(
        default=None,
        min_length=1,
        description="With placement 'dedicated': the node of the Ray cluster that the draft runs "
        "on, by address, host name, Ray's node name or node id; by default the target's if it has "
        "room.",
    )
    draft_resources: dict[str, float] | None = Field(
        default=None,
        description="With placement 'dedicated': what the draft takes of its node, as a JSON "
        'object of Ray resources such as {"GPU": 1, "CPU": 4}; custom ones select nodes. By '
        "default one GPU, or on CPU machines an eighth of the cores, at least one.",
    )
    ray_address: str | None = Field(
        default=None,
        min_length=1,
        description="With placement 'dedicated': HOST:PORT of a running Ray cluster (its GCS), "
        "'auto' for the one on this machine, 'local' for an instance of the server's own. By "
        "default what RAY_ADDRESS says, else 'local'.",
    )
    record: str | None = Field(
        default=None,
        min_length=1,
        description="Append one JSON line per staircase to this file (what the draft wrote with "
        "its probabilities, what the target kept, rows and times of the step), for "
        "`vllm-stairs bench replay`. Costs time; not for production.",
    )

    @field_validator("draft_vocab", mode="before")
    @classmethod
    def _read_draft_vocab(cls, value: object) -> str | int:
        """Numbers also come as text, from the command line; paths as such."""
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+", value):
            value = int(value)
        if (isinstance(value, str) and value) or (type(value) is int and value > 0):
            return value
        raise ValueError(
            "must be 'auto', 'full', a number of ids (1 or more) or the path of a file of ids"
        )

    @field_validator("draft_resources", mode="before")
    @classmethod
    def _read_draft_resources(cls, value: object) -> dict[str, float] | None:
        """From the command line it comes as text."""
        if value is None:
            return None
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                value = False
        if isinstance(value, Mapping) and all(
            isinstance(name, str)
            and name
            and isinstance(amount, int | float)
            and not isinstance(amount, bool)
            and math.isfinite(amount)
            and amount >= 0
            for name, amount in value.items()
        ):
            return {name: float(amount) for name, amount in value.items()}
        raise ValueError(
            'must be a JSON object of Ray resources and amounts, such as {"GPU": 1, "CPU": 4}'
        )


def option_names() -> list[str]:
    """The options as they are written in ``speculative_config``."""
    return [OPTION_PREFIX + name for name in StairsOptions.model_fields]


def parse_options(values: Mapping[str, Any]) -> StairsOptions:
    """Check ``stairs_*`` values.

    Args:
        values: option name with prefix -> value, for example ``{"stairs_layout": "packed"}``.

    Raises:
        ValueError: in one sentence: an unknown option (naming the known ones) or a value that
            the option cannot take (naming what it can).
    """
    try:
        return StairsOptions(
            **{name.removeprefix(OPTION_PREFIX): value for name, value in values.items()}
        )
    except ValidationError as error:
        problem = error.errors()[0]
        name = OPTION_PREFIX + ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            raise ValueError(
                f"Unknown option {name!r}; the method 'stairs' takes: {', '.join(option_names())}."
            ) from None
        message = problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"Option {name}={problem['input']!r}: {message}.") from None


def request_max_height(extra_args: Mapping[str, Any] | None) -> int | None:
    """One request's own ceiling, or None where it sets none.

    Raises:
        ValueError: in one sentence, if the value is no whole number >= 0.
    """
    if not extra_args or MAX_HEIGHT_ARG not in extra_args:
        return None
    value = extra_args[MAX_HEIGHT_ARG]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        value = None
    try:
        height = int(value)
        if height < 0 or float(value) != height:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{MAX_HEIGHT_ARG}={extra_args[MAX_HEIGHT_ARG]!r}: must be a whole number >= 0 "
            "(0: no speculation for this request)."
        ) from None
    return height
