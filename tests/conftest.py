"""Shared by all tests: where models are, and vLLM's environment on CPU."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before vLLM is imported anywhere. Engines run in the test's own process unless a test is about
# processes.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers that have ended their work spend seconds on tidying up, until vLLM loses patience.
os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "1")

import hypothesis
import pytest

from tests.memory import free_engines
from tests.tiny import TinyModels

REPOSITORY = Path(__file__).resolve().parent.parent

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs GPUs where there are none: deselected, neither passed nor skipped."""
    import torch

    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="module", autouse=True)
def _free_memory() -> Iterator[None]:
    """Of engines that were one module's alone."""
    yield
    free_engines()


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The prepared models (``make test`` prepares them)."""
    return Path(os.environ.get("VLLM_STAIRS_MODELS", REPOSITORY / "models"))


@pytest.fixture(scope="session")
def smollm2(models_dir: Path) -> Path:
    """SmolLM2-135M-Instruct; a missing model fails the test, it does not skip it."""
    folder = models_dir / "smollm2-135m-instruct"
    assert (folder / "model.safetensors").is_file(), f"{folder} is missing: run `make test`"
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Tiny Llama models of our own making, and drafts for them."""
    return TinyModels(tmp_path_factory.mktemp("tiny"))
