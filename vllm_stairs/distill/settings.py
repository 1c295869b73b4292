"""What a distillation is to do, and who is told of it."""

import functools
import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vllm_stairs.bench.provenance import describe_model
from vllm_stairs.distill.conversations import Manner
from vllm_stairs.distill.errors import DistillError


class Reporter(Protocol):
    """Told what goes on."""

    def say(self, text: str) -> None:
        """A line for the user."""

    def progress(self, what: str, done: int, total: int) -> None:
        """How far a stage is, in tokens."""


@dataclass(frozen=True)
class Settings:
    """What to do. Where a field changes what a stage makes, it is part of its fingerprint."""

    target: str
    work: Path
    prompts: Path | None = None
    text: Path | None = None
    """Given text to learn from as well, or alone if ``tokens`` is 0."""
    tokens: int = 2_000_000
    """Tokens that the target is to write."""
    generator: str = "auto"
    dtype: str = "auto"
    """Of the target while it writes and labels."""
    manner: Manner = field(default_factory=Manner)
    keep: int = 16
    """Ids of the target's distribution that are kept at a position."""
    device: str = "auto"
    seed: int = 0

    @functools.cached_property
    def data_settings(self) -> dict[str, Any]:
        """What the shards depend on; the number of tokens can be raised later.

        Kept, because the target's weights are read for it.

        Raises:
            DistillError: the prompts or the text cannot be read.
        """
        found: dict[str, Any] = {
            "version": 1,
            "target": describe_model(self.target)["weights_hash"],
            "prompts": hash_of(self.prompts),
            "text": hash_of(self.text),
            "manner": asdict(self.manner),
            "seed": self.seed,
        }
        if self.keep != Settings.keep:  # Where it is not, as in data begun before it counted.
            found["keep"] = self.keep
        return found

    @property
    def target_name(self) -> str:
        """For the reader: the folder's name, or the id of a model that a hub's cache holds."""
        folder = Path(self.target).absolute()
        cached = folder.parent.parent.name
        if folder.parent.name == "snapshots" and cached.startswith("models--"):
            return cached.removeprefix("models--").replace("--", "/")
        return folder.resolve().name


def hash_of(path: Path | None) -> str | None:
    """SHA-256 of a file; None of none.

    Raises:
        DistillError: it cannot be read.
    """
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DistillError(f"cannot read {str(path)!r}: {error.strerror}") from None
