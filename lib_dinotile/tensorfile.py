"""safetensors files. What such a file says of its own size is held against the file before it is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lib_dinotile import DinotileError

MAX_HEADER = 8 << 20
"""Bytes. A whole SDXL checkpoint's header has under one million; safetensors itself reads up to a hundred."""

DAMAGED = (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError)
"""What comes of reading numbers and JSON out of metadata that is damaged, or made to do harm."""


def open_tensors(path: Path) -> Any:
    """safetensors' `safe_open` of a file, for the CPU. OSError or SafetensorError if it is none or not whole."""
    from safetensors import SafetensorError, safe_open

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
