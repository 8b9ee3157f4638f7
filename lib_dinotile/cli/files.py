"""The files that a command reads, and those that it writes: none is both."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from lib_dinotile import DinotileError


def check_files(reads: Mapping[str, Iterable[Path]], writes: Iterable[tuple[str, Path]]) -> None:
    """DinotileError if a file that is to be written is one that is read, or two are the same one.

    reads: files and folders by what messages call them; of a folder all files count. Links, relative paths and, where
    the disk does not tell them from small ones, capital letters make no other file.
    """
    known = {
        _identity(file): (name, file)
        for name, paths in reads.items()
        for path in paths
        for file in (path.rglob("*") if os.path.isdir(path) else [path])
        if os.path.isfile(file)
    }
    for name, path in writes:
        other, file = known.get(_identity(path), ("", path))
        if other:
            also = "" if os.path.normpath(file) == os.path.normpath(path) else f" ({file})"
            raise DinotileError(f"{name}: {path} is {other}, too{also}, which would be lost: give another name")
        known[_identity(path)] = (name, path)


def check_report(path: Path) -> None:
    """DinotileError if the file is there and holds anything but reports: lines are added to its end."""
    if not os.path.isfile(path) or path.stat().st_size == 0:
        return
    try:
        with path.open("rb") as file:
            first = json.loads(file.readline(1 << 24))
        ours = isinstance(first, dict) and "image" in first
    except (OSError, ValueError, RecursionError):
        ours = False
    if not ours:
        raise DinotileError(f"report: {path} exists already and is not a file of reports: give another name")


def _identity(path: Path) -> object:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # not there yet
        return os.path.realpath(path).casefold()
    return found.st_dev, found.st_ino
