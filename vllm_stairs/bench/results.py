"""The result file: one JSON document with a version, written whole or not at all."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vllm_stairs.bench.errors import BenchError

SCHEMA = "vllm-stairs-bench"
VERSION = 1


@dataclass
class Result:
    """Everything a run has found out so far."""

    settings: dict[str, Any]
    """What was asked for; a resumed run must ask for the same."""
    provenance: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)
    """Source, number, groups and hash of the prompts."""
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By label: method, speculative_config, start-up time, peak memory, engine facts."""
    bandwidth: dict[str, Any] | None = None
    """Memory bandwidth, measured in this run: bytes_per_s, bytes, repeats."""
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By model name: bytes of weights read per step, bytes of KV per token."""
    measurements: list[dict[str, Any]] = field(default_factory=list)
    """One entry per arm, batch, temperature and repeat."""
    profiles: list[dict[str, Any]] = field(default_factory=list)
    """One entry per arm and batch: where the time went, in a pass of its own."""
    identity: list[dict[str, Any]] = field(default_factory=list)
    """One entry per greedy arm and batch: same tokens as plain, and if not, where."""
    online: list[dict[str, Any]] = field(default_factory=list)
    """One entry per arm, request rate and repeat of ``--online``."""
    summary: list[dict[str, Any]] = field(default_factory=list)
    """What the tables show; derived from the rest."""

    def has(self, **key: Any) -> bool:
        """Whether a measurement with this arm, batch, temperature and repeat is there."""
        return any(all(m.get(k) == v for k, v in key.items()) for m in self.measurements)

    def has_online(self, **key: Any) -> bool:
        """Whether an online measurement with this arm, rate and repeat is there."""
        return any(all(m.get(k) == v for k, v in key.items()) for m in self.online)


def save(result: Result, path: Path) -> None:
    """Write a result; an interruption leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"schema": SCHEMA, "version": VERSION, **asdict(result)}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def load(path: Path) -> Result:
    """Read a result of this schema version; anything else is one clear line."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise BenchError(f"no result file {str(path)!r}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BenchError(f"{str(path)!r} is not a result file: {error}") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise BenchError(f"{str(path)!r} is not a result of vllm-stairs bench run")
    if document.get("version") != VERSION:
        raise BenchError(
            f"{str(path)!r} has result version {document.get('version')}, this release reads "
            f"version {VERSION}: measure again, or read it with the release that wrote it"
        )
    known = {f.name for f in fields(Result)}
    return Result(**{key: value for key, value in document.items() if key in known})


def open_for(path: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool) -> Result:
    """A result to fill: a new one, or with ``resume`` what an earlier run left.

    Resuming with other settings is an error that names the first one that differs.
    """
    if not path.exists() or overwrite:
        return Result(settings=settings)
    if not resume:
        raise BenchError(f"{str(path)!r} exists: pass --resume to go on with it, or --overwrite")
    result = load(path)
    plain_settings = json.loads(json.dumps(settings))
    for key in sorted({*result.settings, *plain_settings}):
        old, new = result.settings.get(key), plain_settings.get(key)
        if old != new:
            raise BenchError(
                f"cannot resume {str(path)!r}: it was made with {key}={old!r}, not {new!r}"
            )
    return result
