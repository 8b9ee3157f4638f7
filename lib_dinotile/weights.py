"""safetensors files. What such a file says of its own size is held against the file before it is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib_dinotile import DinotileError

Shapes = dict[str, tuple[int, ...]]
"""Shapes of tensors, by name."""

MAX_HEADER = 8 << 20
"""Bytes. A whole SDXL checkpoint's header has under one million; safetensors itself reads up to a hundred."""

DAMAGED = (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError)
"""Errors from reading numbers and JSON in metadata that is damaged, or made to do harm."""


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git has in place of a large one that was not downloaded. OSError if it cannot be read."""
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def open_tensors(path: Path) -> Any:
    """safetensors' `safe_open` of a file, for the CPU. OSError or SafetensorError if it is none or not whole."""
    from safetensors import SafetensorError, safe_open

    if is_pointer(path):
        raise SafetensorError("it is only a Git LFS pointer, download the file itself")
    with path.open("rb") as file:
        length, there = int.from_bytes(file.read(8), "little"), path.stat().st_size - 8
    if not 0 < length <= min(there, MAX_HEADER):
        raise SafetensorError(f"a header of {length} bytes, in a file with {max(there, 0)} for it and its tensors")
    return safe_open(str(path), framework="pt", device="cpu")


def check_out(out: Path) -> None:
    """DinotileError, before any work is done, if no such file can be written."""
    if out.suffix != ".safetensors":
        raise DinotileError(f"out: {out} has to end with .safetensors")
    if not out.parent.is_dir():
        raise DinotileError(f"out: there is no folder {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise DinotileError(f"out: the folder {out.parent} is not writable")


def shapes_of(build: Callable[[], nn.Module], file: str) -> Shapes:
    """Shapes of a module's tensors, without making it. DinotileError if what `file` says of itself cannot be built."""
    try:
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:  # torch's, for absurd sizes
        raise DinotileError(f"{file} is damaged: its metadata describes nothing that can be built") from error


def check_shapes(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], file: str) -> None:
    """DinotileError if a file's tensors are not those that its metadata tells of."""
    odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if odd:
        raise DinotileError(f"{file} is damaged: tensor {odd[0]} does not fit its metadata")


Stamp = tuple[tuple[str, int, int], ...]


def stamp(name: str | Path) -> Stamp | None:
    """(name, size, time in ns) of a file, or of all files of a folder; None if it is neither."""
    path = Path(name)
    files = sorted(path.rglob("*")) if os.path.isdir(path) else [path]
    found = ((file.name, file.stat()) for file in files if os.path.isfile(file))
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in found) or None
