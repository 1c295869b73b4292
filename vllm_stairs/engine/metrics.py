"""Counters of the method: kept by the worker, shown on ``/metrics`` and in the log.

vLLM's own ``vllm:spec_decode_*`` counters move as with its own methods. What they do not have
(height 0, time) is counted here by the worker of rank 0 in a small memory-mapped file that the
server process reads when it is scraped: no message between processes, no cost per step.
"""

import atexit
import contextlib
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import REGISTRY
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_stairs.engine.speculative import is_stairs
from vllm_stairs.height.ragged import REASONS

logger = init_logger("vllm.stairs.metrics")

PHASES = ("draft", "target", "validation")

OPT_OUT = "opt_out"
"""The request asked for no drafts (``stairs_max_height``)."""
SAMPLING = "sampling"
"""A request of the batch asks for what only plain decoding has."""
AWAY = "draft_away"
"""The dedicated draft is not there, or still busy with what it was asked before."""
GRAMMAR = "grammar"
"""It drafted, and a grammar refused all of it before the target saw any."""
OFF_REASONS = (*REASONS, OPT_OUT, SAMPLING, AWAY, GRAMMAR)
"""Why requests went without a draft under ``--stairs-height auto``; ``draft_away`` also else."""

DEDICATED = ("answers", "ready", "late", "restarts", "wait_seconds", "hand_over_seconds")
"""What is counted of a dedicated draft: questions answered in time; of these, the ones whose drafts
had been written before they were asked for; questions not answered in time; restarts; seconds of
asking and waiting; and of these, for questions answered in time, all but waiting for the draft's
passes."""


class Counters:
    """What became of the staircases since start-up.

    Args:
        values: ``[num_values(K)]``, float64, zero at the start: steps, seconds per phase,
            staircases by height, staircases by accepted drafts, times that a request went
            without a draft by reason, estimated gain, decisions to read the end of a text only,
            :data:`DEDICATED`.
        max_height: K.
    """

    def __init__(self, values: np.ndarray, max_height: int) -> None:
        size = max_height + 1
        self._values = values
        self._steps = values[0:1]
        self._seconds = values[1:4]
        self.heights = values[4 : 4 + size]
        self.accepted = values[4 + size : 4 + 2 * size]
        end = 4 + 2 * size + len(OFF_REASONS)
        self.off = values[4 + 2 * size : end]
        self._gain = values[end : end + 1]
        self._cut = values[end + 1 : end + 2]
        self._dedicated = values[end + 2 :]

    @staticmethod
    def num_values(max_height: int) -> int:
        """Length of the array."""
        return 1 + len(PHASES) + 2 * (max_height + 1) + len(OFF_REASONS) + 2 + len(DEDICATED)

    @classmethod
    def attach(cls, path: str | None, max_height: int) -> "Counters":
        """Counters in a shared file; in private memory if there is none (another host)."""
        size = cls.num_values(max_height)
        if path is not None and Path(path).is_file():
            shared = np.memmap(path, dtype=np.float64, mode="r+", shape=(size,))
            # As an ordinary array: each operation on a memmap makes a new one.
            return cls(np.asarray(shared), max_height)
        return cls(np.zeros(size), max_height)

    def observe(self, heights: np.ndarray, num_accepted: np.ndarray) -> None:
        """Count the staircases of one step: ``[n]`` heights and ``[n]`` accepted drafts."""
        self._steps += 1
        size = len(self.heights)
        self.heights += np.bincount(heights, minlength=size)
        self.accepted += np.bincount(num_accepted, minlength=size)

    def count_off(self, reasons: Iterable[str | None]) -> None:
        """Count requests without a draft in a step, by reason (None: it has one)."""
        for reason in reasons:
            if reason is not None:
                self.off[OFF_REASONS.index(reason)] += 1

    def set_gain(self, gain: float) -> None:
        """Tokens per second of late relative to plain decoding, as the policy estimates it."""
        self._gain[0] = gain

    def count_cut(self, number: int) -> None:
        """Count decisions that a draft reads the end of a text only."""
        self._cut += number

    def count_dedicated(self, name: str, amount: float = 1.0) -> None:
        """Add to one of :data:`DEDICATED`."""
        self._dedicated[DEDICATED.index(name)] += amount

    def dedicated(self) -> dict[str, float]:
        """The counts of :data:`DEDICATED`."""
        return dict(zip(DEDICATED, self._dedicated.tolist(), strict=True))

    def add_time(self, phase: str, seconds: float) -> None:
        """Add to the time spent in one of :data:`PHASES`."""
        self._seconds[PHASES.index(phase)] += seconds

    def seconds(self) -> dict[str, float]:
        """Seconds per phase, as the worker's host saw them."""
        return dict(zip(PHASES, self._seconds.tolist(), strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, positions counted from the first draft."""
        heights, accepted = self.heights.tolist(), self.accepted.tolist()
        at_least = range(1, len(heights))
        return {
            "steps": int(self._steps[0]),
            "staircases": int(sum(heights)),
            "heights": [int(count) for count in heights],
            "accepted": [int(count) for count in accepted],
            "drafted_per_position": [int(sum(heights[i:])) for i in at_least],
            "accepted_per_position": [int(sum(accepted[i:])) for i in at_least],
            "seconds": self.seconds(),
            "off": {r: int(n) for r, n in zip(OFF_REASONS, self.off.tolist(), strict=True)},
            "estimated_gain": float(self._gain[0]) or None,
            "cut_contexts": int(self._cut[0]),
            "dedicated": self.dedicated(),
        }


def create_counters_file(max_height: int) -> str | None:
    """Make the shared file, removed when this process ends. None where that is impossible."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="vllm-stairs-")
        with os.fdopen(descriptor, "wb") as file:
            file.write(bytes(8 * Counters.num_values(max_height)))
    except OSError as error:
        logger.warning("Stairs: no counters on /metrics (%s).", error)
        return None
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            with contextlib.suppress(OSError):
                os.unlink(path)

    atexit.register(remove)
    return path


class StairsStatLogger(StatLoggerBase):
    """Shows the counters on ``/metrics`` and in vLLM's periodic log (``vllm serve``)."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._counters: Counters | None = None
        config = vllm_config.speculative_config
        if not is_stairs(config) or config.stairs_counters_file is None:
            return
        self._counters = Counters.attach(config.stairs_counters_file, config.num_speculative_tokens)
        self._last = self._counters.as_dict()
        self._last_time = time.monotonic()
        labels = {
            "model_name": str(vllm_config.model_config.served_model_name),
            "engine": str(engine_index),
        }
        self._is_dedicated = config.stairs.placement == "dedicated"
        _StairsCollector.install(self._counters, labels)

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the worker counts."""

    def log_engine_initialized(self) -> None:
        """Nothing: the worker says what the draft costs."""

    def log(self) -> None:
        """One line about the time since the last one, if there was a staircase in it."""
        if self._counters is None:
            return
        now, stats = time.monotonic(), self._counters.as_dict()
        last, self._last = self._last, stats
        elapsed, self._last_time = now - self._last_time, now
        heights = np.subtract(stats["heights"], last["heights"])
        accepted = np.subtract(stats["accepted"], last["accepted"])
        staircases = heights.sum()
        if not staircases:
            return
        stair = np.arange(len(heights))
        share = {
            phase: (stats["seconds"][phase] - last["seconds"][phase]) / elapsed for phase in PHASES
        }
        logger.info(
            "Stairs: mean acceptance length: %.2f, mean height: %.2f, height 0: %.0f%% of "
            "staircases, time in draft: %.0f%%, target: %.0f%%, validation: %.0f%%",
            1 + (accepted * stair).sum() / staircases,
            (heights * stair).sum() / staircases,
            100 * heights[0] / staircases,
            *(100 * share[phase] for phase in PHASES),
        )
        off = {r: n - last["off"][r] for r, n in stats["off"].items() if n > last["off"][r]}
        reasons = ", ".join(f"{r} {100 * n / staircases:.0f}%" for r, n in off.items())
        if stats["estimated_gain"] is not None:
            logger.info(
                "Stairs: estimated speed against plain decoding: %.2f; not drafted: %s",
                stats["estimated_gain"],
                reasons or "never",
            )
        elif off:
            logger.info("Stairs: not drafted: %s", reasons)
        if self._is_dedicated:
            since = {k: n - last["dedicated"][k] for k, n in stats["dedicated"].items()}
            asked = since["answers"] + since["late"]
            logger.info(
                "Stairs: dedicated draft: asked %d times, ready beforehand: %.0f%%, too late: "
                "%.0f%%, hand-over: %.2f ms, waited for: %.0f%% of the time, restarts: %d",
                asked,
                100 * since["ready"] / max(asked, 1),
                100 * since["late"] / max(asked, 1),
                1e3 * since["hand_over_seconds"] / max(since["answers"], 1),
                100 * since["wait_seconds"] / elapsed,
                stats["dedicated"]["restarts"],
            )


class _StairsCollector:
    """Reads the counters when ``/metrics`` is scraped."""

    _installed: "_StairsCollector | None" = None

    def __init__(self, counters: Counters, labels: dict[str, str]) -> None:
        self.sources = [(counters, labels)]

    @classmethod
    def install(cls, counters: Counters, labels: dict[str, str]) -> None:
        """Show one more engine's counters; a new engine of the same name replaces the old."""
        if cls._installed is None:
            cls._installed = cls(counters, labels)
            REGISTRY.register(cls._installed)
            return
        others = [source for source in cls._installed.sources if source[1] != labels]
        cls._installed.sources = [*others, (counters, labels)]

    def collect(self) -> Iterable[Any]:
        """The metric families, in vLLM's naming."""
        height = HistogramMetricFamily(
            "vllm:spec_decode_stairs_height",
            "Height of the staircases that the target verified (0: a step without drafts).",
            labels=["model_name", "engine"],
        )
        length = HistogramMetricFamily(
            "vllm:spec_decode_stairs_acceptance_length",
            "Tokens per staircase, the target's own token included.",
            labels=["model_name", "engine"],
        )
        seconds = CounterMetricFamily(
            "vllm:spec_decode_stairs_time_seconds",
            "Time of the worker in each phase of a step.",
            labels=["model_name", "engine", "phase"],
        )
        gain = GaugeMetricFamily(
            "vllm:spec_decode_stairs_estimated_gain",
            "Speed of late against plain decoding, as the height policy estimates it.",
            labels=["model_name", "engine"],
        )
        off = CounterMetricFamily(
            "vllm:spec_decode_stairs_off",
            "Steps in which a request went without a draft, by the reason.",
            labels=["model_name", "engine", "reason"],
        )
        cut = CounterMetricFamily(
            "vllm:spec_decode_stairs_cut_contexts",
            "How often the height policy made the draft read the end of a long text only.",
            labels=["model_name", "engine"],
        )
        dedicated = CounterMetricFamily(
            "vllm:spec_decode_stairs_dedicated",
            "Of a dedicated draft: questions answered in time, with ready drafts, too late; "
            "restarts; seconds of waiting; of these, seconds of handing over.",
            labels=["model_name", "engine", "what"],
        )
        for counters, labels in self.sources:
            values = list(labels.values())
            height.add_metric(values, *_histogram(counters.heights, 0))
            length.add_metric(values, *_histogram(counters.accepted, 1))
            for phase, spent in counters.seconds().items():
                seconds.add_metric([*values, phase], spent)
            stats = counters.as_dict()
            if stats["estimated_gain"] is not None:
                gain.add_metric(values, stats["estimated_gain"])
                cut.add_metric(values, stats["cut_contexts"])
            if stats["estimated_gain"] is not None or any(stats["off"].values()):
                for reason, count in stats["off"].items():
                    off.add_metric([*values, reason], count)
            if any(stats["dedicated"].values()):
                for what, amount in stats["dedicated"].items():
                    dedicated.add_metric([*values, what], amount)
        return [height, length, seconds, gain, off, cut, dedicated]


def _histogram(counts: np.ndarray, first: int) -> tuple[list[tuple[str, float]], float]:
    """Cumulative buckets and sum of integer observations ``first``, ``first + 1``, ..."""
    cumulative = np.cumsum(counts).tolist()
    buckets = [(str(float(first + i)), value) for i, value in enumerate(cumulative)]
    buckets.append(("+Inf", cumulative[-1]))
    return buckets, float((counts * (first + np.arange(len(counts)))).sum())
