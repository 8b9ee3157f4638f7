"""The files that a command reads, and those that it writes: none is both."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lib_dinotile import DinotileError


def check_given(**paths: str | None) -> None:
    """DinotileError for an empty path, which stands for the current folder; None: not given. By argument or option."""
    for name, path in paths.items():
        if path is not None and not path.strip():
            raise DinotileError(f"{name}: is empty, give a file or a folder")


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
        if other == name:  # of a folder of images
            raise DinotileError(
                f"{name}: {path} would be both a result and a map or the unfinished part of another image: rename "
                "one of the two sources"
            )
        if other:
            also = "" if os.path.normpath(file) == os.path.normpath(path) else f" ({file})"
            raise DinotileError(f"{name}: {path} would overwrite {other}{also}: give another name")
        known[_identity(path)] = (name, path)


def check_report(path: Path) -> None:
    """DinotileError if no lines can be added to this file, or it holds anything but reports."""
    if os.path.isdir(path):
        raise DinotileError(f"report: {path} is a folder, give a file")
    if not os.path.isdir(path.parent):
        raise DinotileError(f"report: there is no folder {path.parent}, give another name")
    if not os.access(path if os.path.exists(path) else path.parent, os.W_OK):
        raise DinotileError(f"report: {path} cannot be written, give another name")
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


def add_report(path: Path, source: Path, report: Mapping[str, Any]) -> None:
    """Add what became of an image to the file of reports, as a line of JSON."""
    line = json.dumps({"image": str(source), **report}) + "\n"
    try:
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            with contextlib.suppress(OSError):  # half a line is no JSON
                os.truncate(path, size)
            raise
    except OSError as error:
        raise DinotileError(f"report: {path} cannot be written: {error.strerror}", 500) from error


def is_reported(path: Path, source: Path) -> bool:
    """Whether the file of reports has a line on this image."""
    start = json.dumps({"image": str(source)})[:-1]
    try:
        with path.open(encoding="utf-8") as file:
            return any(line.startswith(start) for line in file)
    except (OSError, ValueError):
        return False


def _identity(path: Path) -> object:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # not there yet
        return os.path.realpath(path).casefold()
    return found.st_dev, found.st_ino
