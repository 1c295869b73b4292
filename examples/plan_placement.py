"""Where should the draft go? Computed, not measured: data-sheet figures and public latencies.

Prints the planning table of docs/placement.md. Change the figures to those of your machines.
"""

import random

import numpy as np

from vllm_stairs.bench.costs import CostModel, from_data_sheet
from vllm_stairs.bench.dedicated import Dedicated
from vllm_stairs.bench.policies import Fixed
from vllm_stairs.bench.record import Record, Trace
from vllm_stairs.bench.replay import replay

# H100 SXM data sheet: bytes/s of memory, dense bfloat16 operations/s. A share of both is reached.
BANDWIDTH, FLOPS, EFFICIENCY = 3.35e12, 989e12, 0.7
# vLLM's all-reduce of 4 KiB on H100 (sgl-project/sglang#2904), milliseconds by devices.
ALL_REDUCE_MS = {1: 0.0, 4: 0.0085, 8: 0.0093}
# A call of a Ray actor and back on one machine: 2,012 a second (ray-project/ray,
# release/perf_metrics/microbenchmark.json, 1_1_actor_calls_sync). Between machines of one zone a
# round trip of TCP comes on top, 0.5 ms at the 80th percentile (evanjones.ca, network latencies
# 2021).
SAME_NODE_MS, OTHER_NODE_MS = 0.5, 1.0
# Assumed: the host's part of a step, and of a draft pass.
OVERHEAD_MS, LAUNCH_MS = 1.0, 0.2

# Weights and layers.
TARGET = (70.6e9, 80)  # Llama-3.3-70B
DRAFTS = {"1B": (1.24e9, 16), "8B": (8.03e9, 32)}  # Llama-3.2-1B, Llama-3.1-8B
# Assumed: how often a draft token holds once those before it do, independent of each other.
ACCEPTANCE = {"1B": 0.7, "8B": 0.8}

REQUESTS, TOKENS, TALLEST = 64, 256, 8
BATCHES = (1, 8, 32)


def record(acceptance: float) -> Record:
    """Requests that a draft of this acceptance would meet; always the same ones."""
    source = random.Random(0)
    held = [[source.random() < acceptance for _ in range(TOKENS)] for _ in range(REQUESTS)]
    known = np.ones(TOKENS, dtype=bool)
    sure = np.full(TOKENS, acceptance)
    traces = [Trace(str(n), np.array(own), known, sure, {}) for n, own in enumerate(held)]
    return Record(tuple(traces), TALLEST, None)


def costs(draft: tuple[float, int], target_devices: int, draft_devices: int) -> CostModel:
    """Passes of target and draft, split over so many devices."""

    def communication(layers: int, devices: int) -> float:
        return (2 * layers + 1) * ALL_REDUCE_MS[devices]

    return from_data_sheet(
        name="H100 SXM",
        bandwidth=BANDWIDTH,
        flops=FLOPS,
        efficiency=EFFICIENCY,
        target_parameters=TARGET[0],
        target_devices=target_devices,
        draft_parameters=draft[0],
        draft_devices=draft_devices,
        weight_bytes=2,
        overhead_ms=OVERHEAD_MS,
        target_fixed_ms=communication(TARGET[1], target_devices),
        draft_fixed_ms=LAUNCH_MS + communication(draft[1], draft_devices),
        tallest=TALLEST,
    )


def best(name: str, model: CostModel, batch: int, dedicated: Dedicated | None) -> str:
    """The best fixed height: tokens per second against plain decoding on the same devices."""
    found = record(ACCEPTANCE[name])
    plain = replay(found, Fixed(0), model, batch)
    scores = [
        (replay(found, Fixed(height), model, batch, dedicated), height)
        for height in range(1, TALLEST + 1)
    ]
    score, height = max(scores, key=lambda scored: scored[0].tokens_per_s)
    return f"{score.tokens_per_s / plain.tokens_per_s:.2f} ({height})"


def main() -> None:
    placements: list[tuple[str, str, int, int | None, Dedicated | None]] = [
        ("8, one node", "colocated", 8, None, None),
        ("8, one node", "replicated", 8, 1, None),
        ("8 + 1, two nodes", "dedicated, overlap off", 8, 1, Dedicated(OTHER_NODE_MS, False)),
        ("8 + 1, two nodes", "dedicated", 8, 1, Dedicated(OTHER_NODE_MS)),
        ("4, one node", "replicated", 4, 1, None),
        ("4 + 1, one node", "dedicated, overlap off", 4, 1, Dedicated(SAME_NODE_MS, False)),
        ("4 + 1, one node", "dedicated", 4, 1, Dedicated(SAME_NODE_MS)),
    ]
    head = "".join(f" batch {batch} |" for batch in BATCHES)
    print(f"| draft | devices | placement | pass of the draft |{head}")
    print("| --- | --- | --- | --- |" + " --- |" * len(BATCHES))
    for name, draft in DRAFTS.items():
        for devices, placement, size, own, dedicated in placements:
            model = costs(draft, size, own or size)
            cells = "".join(f" {best(name, model, batch, dedicated)} |" for batch in BATCHES)
            print(f"| {name} | {devices} | {placement} | {model.draft_ms(1):.2f} ms |{cells}")


if __name__ == "__main__":
    main()
