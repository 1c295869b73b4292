"""Folders and files that appear whole or not at all, and what every model folder shares."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""What a draft has in common with its target: the tokenizer and the settings of generation."""


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copy those of :data:`TOKENIZER_FILES` that ``source`` holds."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)


def check_own(out_dir: Path, marker: str, failure: type[Exception]) -> None:
    """Raise ``failure`` if ``out_dir`` is there without the file ``marker``: then it is the
    user's."""
    if out_dir.exists() and not (out_dir / marker).is_file():
        raise failure(f"{out_dir} exists but was not made by this command: move it away")


@contextmanager
def new_folder(out_dir: Path, marker: str, failure: type[Exception]) -> Iterator[Path]:
    """A folder to write into; it takes its place only when the block ends well.

    Args:
        out_dir: its place.
        marker: the file that the block writes to say who made the folder; an ``out_dir``
            without it is the user's, and is left alone.
        failure: what to raise, with one line for the user.
    """
    check_own(out_dir, marker, failure)
    folder = out_dir.with_name(f".{out_dir.name}.partial")
    try:
        with writing(out_dir, failure):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            yield folder
            shutil.rmtree(out_dir, ignore_errors=True)
            folder.rename(out_dir)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """A file to write beside ``file``; it takes that place only when the block ends well."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, failure: type[Exception]) -> Iterator[None]:
    """Turn a full disk and a forbidden place into ``failure`` with one line for the user."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise failure(f"the disk is full: no room for {path}") from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
            raise failure(f"cannot write {path}: {error.strerror}") from error
        raise


def is_disk_full(error: Exception) -> bool:
    """True also for safetensors' own exception, which carries the reason as text only."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
