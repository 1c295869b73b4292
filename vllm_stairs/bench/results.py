"""The result file: one JSON document with a version, written whole or not at all."""

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vllm_stairs.bench.errors import BenchError

SCHEMA = "vllm-stairs-bench"
VERSION = 1
_SINCE = {"turns": 1, "by_group": False}
"""Settings that older results do not name, with what they were then."""


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
    partial.write_text(dumps(document))
    os.replace(partial, path)


def dumps(document: Mapping[str, Any]) -> str:
    """A document as JSON that every parser reads: no bare Infinity or NaN, a line end at its end.

    Infinity becomes ``"inf"``, a float that is no number becomes null.
    """
    return json.dumps(_writable(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def load(path: Path) -> Result:
    """Read a result of this schema version; anything else is one clear line.

    The summary is derived again, so that the tables of an older file are those of this release.
    """
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
    try:
        result = Result(**{key: value for key, value in document.items() if key in known})
        _check(result)
        _derive(result)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise BenchError(f"{str(path)!r} is damaged: {reason}") from None
    return result


def check_writable(path: Path, flag: str) -> None:
    """One line if a file cannot be written at ``path``; makes the folder that it lies in.

    Args:
        path: of the file, which may be there or not.
        flag: the option that named it.
    """
    if path.is_dir():
        raise BenchError(f"{flag} {str(path)!r} is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise BenchError(f"cannot write {flag} {str(path)!r}: {error.strerror}") from None


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, which need not be there yet."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def open_for(path: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool) -> Result:
    """A result to fill: a new one, or with ``resume`` what an earlier run left.

    Resuming with other settings is an error that names the first one that differs.
    """
    if resume and overwrite:
        raise BenchError(
            "--resume keeps what was measured and --overwrite deletes it: pass one of them"
        )
    if not path.exists() or overwrite:
        return Result(settings=settings)
    if not resume:
        raise BenchError(f"{str(path)!r} exists: pass --resume to go on with it, or --overwrite")
    result = load(path)
    before, plain_settings = with_defaults(result.settings), json.loads(json.dumps(settings))
    for key in sorted({*before, *plain_settings}):
        old, new = before.get(key), plain_settings.get(key)
        if old != new:
            raise BenchError(
                f"cannot resume {str(path)!r}: it was made with {key}={old!r}, not {new!r}"
            )
    return result


def with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a result, older ones too, with all that is read of them."""
    return {**_SINCE, **settings}


def _writable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _writable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(item) for item in value]
    return value


def _derive(result: Result) -> None:
    from vllm_stairs.bench import online, summary  # Both import this module.

    rates = result.settings.get("request_rates", [])
    if "request_rates" in result.settings:
        result.settings["request_rates"] = [float(rate) for rate in rates]
    result.summary = summary.summarise(result)
    online.summary_rows(result)


def _check(result: Result) -> None:
    """Raise ValueError or LookupError where what the tables need is missing or no number."""
    for name in ("settings", "provenance", "prompts", "arms", "models"):
        _object(getattr(result, name), name)
    for name in ("measurements", "profiles", "identity", "online"):
        if not isinstance(getattr(result, name), list):
            raise ValueError(f"{name} is not a list")
    for name in ("machine", "environment", "models"):
        _object(result.provenance.get(name) or {}, f"provenance: {name}")
    for role, model in (result.provenance.get("models") or {}).items():
        _object(model, f"provenance: model {role!r}")
    if not isinstance(result.settings["target"], str):
        raise ValueError("settings: target is not a name")
    _numbers(result.settings, ("output_tokens", "repeats"), "settings", positive=True)
    _numbers(result.prompts, ("count",), "prompts")
    _numbers(_object(result.prompts["groups"], "prompts: groups"), None, "prompts: groups")
    for label, arm in result.arms.items():
        where = f"arm {label!r}"
        if not isinstance(_object(arm, where)["method"], str):
            raise ValueError(f"{where}: method is not a name")
        for name in ("speculative_config", "engine", "peak_memory_bytes"):
            _object(arm.get(name) or {}, f"{where}: {name}")
        _numbers(arm.get("peak_memory_bytes") or {}, None, f"{where}: peak_memory_bytes")
        if arm.get("startup_seconds") is not None:
            _numbers(arm, ("startup_seconds",), where)
    if result.bandwidth is not None:
        _object(result.bandwidth, "bandwidth")
        _numbers(result.bandwidth, ("bytes_per_s",), "bandwidth", positive=True)
    for name, model in result.models.items():
        _numbers(_object(model, f"model {name!r}"), None, f"model {name!r}")
    for number, measurement in enumerate(result.measurements):
        where = f"measurement {number}"
        _check_measurement(_known_arm(result, measurement, where), where)
    for number, profile in enumerate(result.profiles):
        where = f"profile {number}"
        _numbers(_known_arm(result, profile, where), ("batch", "steps"), where)
        _numbers(_object(profile["seconds"], where), None, f"{where}: seconds")
    for number, entry in enumerate(result.identity):
        where = f"identity {number}"
        _numbers(
            _known_arm(result, entry, where), ("batch", "temperature", "requests", "same"), where
        )
        for name in ("differing", "explained"):
            if not isinstance(entry[name], list):
                raise ValueError(f"{where}: {name} is not a list")
        for found in entry["explained"]:
            for name in ("request", "verdict"):
                if name not in _object(found, f"{where}: explained"):
                    raise ValueError(f"{where}: an explanation without {name}")
            for name in ("plain", "arm"):
                if found.get(name):
                    _numbers(_object(found[name], where), ("token", "best", "second", "gap"), where)
    for number, entry in enumerate(result.online):
        where = f"online measurement {number}"
        _known_arm(result, entry, where)
        _numbers(entry, ("temperature", "repeat"), where)
        _numbers(entry, ("output_throughput",), where, positive=True)


def _check_measurement(measurement: Mapping[str, Any], where: str) -> None:
    _numbers(measurement, ("temperature", "repeat"), where)
    _numbers(measurement, ("batch", "tokens_per_s", "seconds"), where, positive=True)
    _numbers(measurement, ("mean_context_tokens",), where)
    if measurement["acceptance_length"] is not None:
        _numbers(measurement, ("acceptance_length",), where, positive=True)
    for name in ("ttft_ms", "itl_ms", "tpot_ms"):
        if measurement[name] is not None:
            table = _object(measurement[name], f"{where}: {name}")
            _numbers(table, ("p50", "p90", "p99"), f"{where}: {name}")
    for group in _object(measurement["groups"], f"{where}: groups").values():
        _numbers(_object(group, f"{where}: groups"), ("tokens", "steps"), f"{where}: groups")
    _object(measurement["digests"], f"{where}: digests")
    speculation = _object(measurement["speculation"], f"{where}: speculation")
    if "seconds" in speculation:
        seconds = _object(speculation["seconds"], f"{where}: speculation")
        _numbers(seconds, None, f"{where}: speculation: seconds")


def _known_arm(result: Result, entry: Any, where: str) -> dict[str, Any]:
    if _object(entry, where)["arm"] not in result.arms:
        raise ValueError(f"{where}: unknown arm {entry['arm']!r}")
    return dict(entry)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object")
    return value


def _numbers(
    table: Mapping[str, Any], names: Iterable[str] | None, where: str, *, positive: bool = False
) -> None:
    for name in table if names is None else names:
        value: Any = table.get(name)
        wrong = not isinstance(value, int | float) or not math.isfinite(value)
        if wrong or (positive and value <= 0):
            kind = "number above 0" if positive else "number"
            raise ValueError(f"{where}: {name} is not a {kind}")
