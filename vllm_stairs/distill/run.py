"""The stages of a distillation, one after the other; each goes on where it stopped."""

from vllm_stairs.distill.settings import Reporter, Settings
from vllm_stairs.distill.stage_data import make_data
from vllm_stairs.distill.stage_evaluate import evaluate, greedy_texts
from vllm_stairs.distill.stage_train import check_training, make_draft

__all__ = [
    "Reporter",
    "Settings",
    "check_training",
    "evaluate",
    "greedy_texts",
    "make_data",
    "make_draft",
]
