"""Work that only one process does while others wait for it, with progress, and where its results are kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

WAIT = 0.5
"""Seconds between two looks at whether another process is done."""

Progress = Callable[[str, float], None]
"""Called with a description of the work and the share of it that is done, in [0, 1]. An exception ends the work."""


def silent(text: str, share: float) -> None:
    """A `Progress` that shows nothing."""


def models_folder(kind: str) -> Path:
    """Where models of a kind (`encoders`, `heads`) are kept where no WebUI says so: among the models of the WebUI that
    this is an extension of; else in the user's cache."""
    extensions = Path(__file__).parents[3]
    if extensions.name == "extensions" and (extensions.parent / "models").is_dir():
        return extensions.parent / "models" / "dinotile" / kind
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dinotile" / kind


@contextlib.contextmanager
def locked(file: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """While open, other processes wait that want the same lock file, and call `waiting` every now and then.

    The file's folder is made. Where locks cannot be had, nobody waits.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        while not _acquired(lock):
            waiting()
    except OSError:
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):  # on Windows it goes when it is released
                file.unlink()
            lock.release()


def _acquired(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=WAIT)
        return True
    except Timeout:
        return False
