"""The target's distribution at every written token, stored as its likeliest ids.

One forward pass of the target over each conversation; of the distribution at a position the
``k`` likeliest ids are kept with their log-probabilities, the rest of the mass is implied.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_stairs.distill.batching import batches, padded
from vllm_stairs.distill.shards import Shard, save_arrays

ROWS_AT_ONCE = 1024
"""Positions whose logits over the whole vocabulary are held at once."""


@dataclass(frozen=True)
class Labels:
    """Of the written tokens of a shard, in order."""

    ids: npt.NDArray[np.int32]
    """The likeliest ids, best first. Shape [written, k]."""
    log_probabilities: npt.NDArray[np.float16]
    """Natural logarithms. Shape [written, k]."""

    def save(self, file: Path) -> None:
        """Write them whole."""
        save_arrays(file, {"ids": self.ids, "log_probabilities": self.log_probabilities})

    @classmethod
    def load(cls, file: Path) -> "Labels":
        """Read them."""
        from safetensors.numpy import load_file

        found = load_file(file)
        return cls(found["ids"], found["log_probabilities"])


def label(
    shard: Shard, model: Any, k: int, progress: Callable[[int], None] = lambda _: None
) -> Labels:
    """Run the target over a shard.

    Args:
        shard: what was written.
        model: the target, ``AutoModelForCausalLM``, on its device.
        k: ids to keep at a position.
        progress: is told how many tokens were done.
    """
    import torch

    written = shard.origin > 0
    row_of = np.cumsum(written) - 1
    total = int(written.sum())
    ids = np.zeros((total, k), np.int32)
    log_probabilities = np.zeros((total, k), np.float16)
    device = model.device
    with torch.inference_mode():
        for batch in batches(np.diff(shard.offsets).tolist()):
            places = [shard.conversation(n) for n in batch]
            tokens = padded([shard.tokens[place] for place in places])
            rows, positions, targets = [], [], []
            for row, place in enumerate(places):
                # The token at position p is foretold at p - 1; nothing foretells the first.
                found = np.flatnonzero(written[place][1:])
                rows.append(np.full(len(found), row))
                positions.append(found)
                targets.append(row_of[place.start + 1 + found])
            hidden = model.model(input_ids=torch.from_numpy(tokens).to(device)).last_hidden_state
            chosen = hidden[np.concatenate(rows), np.concatenate(positions)]
            where = np.concatenate(targets)
            for start in range(0, len(where), ROWS_AT_ONCE):
                part = slice(start, start + ROWS_AT_ONCE)
                best, values = _likeliest(model, chosen[part], k)
                ids[where[part]] = best
                log_probabilities[where[part]] = values
            progress(sum(int(written[place].sum()) for place in places))
    return Labels(ids, log_probabilities)


def _likeliest(
    model: Any, hidden: Any, k: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float16]]:
    """The ``k`` likeliest ids after each hidden state, best first.

    The whole vocabulary is seen at the model's own precision; the few that are kept are then
    computed in float32, because bfloat16 logits tie where the draft is to learn a difference.
    """
    import torch

    logits = finished(model.lm_head(hidden).float(), model.config)
    normaliser = logits.logsumexp(-1, keepdim=True)
    ids = logits.topk(k, dim=-1).indices
    weight = model.lm_head.weight[ids].float()  # [rows, k, hidden size]
    values = finished(torch.einsum("rkh,rh->rk", weight, hidden.float()), model.config)
    values, order = values.sort(dim=-1, descending=True)
    ids = ids.gather(-1, order)
    log_probabilities = (values - normaliser).clamp(max=0.0)
    return ids.int().cpu().numpy(), log_probabilities.half().cpu().numpy()


def finished(logits: Any, config: Any) -> Any:
    """What some types do to the head's output: Granite scales it, Gemma 2 caps it softly.

    Args:
        logits: of any shape.
        config: the model's.
    """
    import torch

    if scale := getattr(config, "logits_scaling", None):
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits
