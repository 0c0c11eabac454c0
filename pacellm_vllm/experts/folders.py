"""Directories that appear whole or not at all."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from pacellm_vllm.experts.errors import ExpertsError


def check_absent(target: Path) -> None:
    """Raise ``ExpertsError`` where there is something of this name."""
    if os.path.lexists(target):
        raise ExpertsError(f"pacellm: {target} exists already; choose another output directory.")


@contextlib.contextmanager
def clear_disk_errors() -> Iterator[None]:
    """Errors of the disk, and of files on it, as an ``ExpertsError``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        what = getattr(error, "strerror", None) or error
        where = getattr(error, "filename", None)
        raise ExpertsError(
            f"pacellm: writing stopped: {what}{f' ({where})' if where else ''}; the output "
            "directory was not made."
        ) from error


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside ``target`` that takes its name when the block has succeeded.

    It is removed on any exception, Ctrl-C included. What a killed run left behind is removed by
    the next one for the same target: the lock on it has gone with its process.
    """
    check_absent(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.partial-"
    for stale in target.parent.glob(f"{prefix}*"):
        with _locked(stale) as ours:
            if ours:
                shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
    try:
        with _locked(folder):
            yield folder
            folder.chmod(0o777 & ~_umask())
            check_absent(target)
            folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a directory for the block; False if another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
