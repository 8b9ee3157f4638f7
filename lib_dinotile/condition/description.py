"""Descriptions of files of dinotile's weights, read from their headers alone."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lib_dinotile import DinotileError
from lib_dinotile.condition import adapter_file
from lib_dinotile.condition.adapter import Adapter
from lib_dinotile.dino import head
from lib_dinotile.weights import DAMAGED, Shapes, check_shapes, open_tensors, shapes_of

PRECISIONS = {"F64": "double", "F32": "single", "F16": "half", "BF16": "bfloat16"}
ADAPTER_KEYS = {
    "format",
    "version",
    "base",
    "encoder",
    "features",
    "layer",
    "slots",
    "hyperparameters",
    "heads",
    "restored",
}
HEAD_KEYS = {"format", "version", "encoder", "features", "heads"}
HEADS = "restoration heads"
"""The kind of a file of them."""
PREFIX = "heads."
"""How the names of tensors begin that are restoration heads."""
MEASURED = ".floor"
"""How they end where they are no parameters but what was measured."""


def describe(path: Path) -> dict[str, Any]:
    """Describes an adapter or restoration heads: plain values, in the order to show them.

    `made` has the metadata that dinotile itself has no use for, sorted. DinotileError, one line, for any other file.
    """
    header = _header(path)
    metadata = header.pop("__metadata__", {})
    shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    if metadata.get("format") == adapter_file.FORMAT:
        found, known = _adapter(path, metadata, shapes), ADAPTER_KEYS
    elif metadata.get("format") == head.FORMAT:
        found, known = _heads(path, metadata, shapes), HEAD_KEYS
    else:
        raise DinotileError(
            f"{path.name} holds no weights of dinotile: its metadata names no format {adapter_file.FORMAT!r} or "
            f"{head.FORMAT!r}"
        )
    dtypes = sorted({tensor["dtype"] for tensor in header.values()})
    precision = ", ".join(f"{PRECISIONS[name]} ({name})" if name in PRECISIONS else name for name in dtypes)
    size = round(path.stat().st_size / 1e6, 3)
    made = {key: metadata[key] for key in sorted(metadata.keys() - known)}
    return {**found, "precision": precision, "megabytes": size, "made": made}


def lines(description: dict[str, Any]) -> list[str]:
    """A description, one line for each value."""
    pairs = [*((name, value) for name, value in description.items() if name != "made"), *description["made"].items()]
    width = max(len(name) for name, _ in pairs) + 1
    return [f"{_printable(name + ':'):{width}} {_printable(_text(value))}" for name, value in pairs]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_text(part)}" for name, part in value.items())
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _printable(text: str) -> str:
    """Whatever is in a file, a line stays a line."""
    return text if text.isprintable() else json.dumps(text)


def _header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file whose sizes add up.

    Read by hand once safetensors has checked it: its oldest versions tell no tensor's type.
    """
    if not os.path.exists(path):
        raise DinotileError(f"{path} does not exist")
    if not os.path.isfile(path):
        raise DinotileError(f"{path} is not a file")
    try:
        with open_tensors(path):
            pass
        with path.open("rb") as file:
            return json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (OSError, SafetensorError, ValueError) as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise DinotileError(f"{path.name} cannot be read as a safetensors file: {said[0]}") from error


def _adapter(path: Path, metadata: dict[str, str], shapes: Shapes) -> dict[str, Any]:
    config = adapter_file.read_config(path)
    inside = PREFIX if "heads" in metadata else None
    own = {name: shape for name, shape in shapes.items() if not (inside and name.startswith(inside))}
    check_shapes(own, shapes_of(lambda: Adapter(config), path.name), path.name)
    found = {
        "kind": "adapter",
        "base": config.base,
        "encoder": config.encoder,
        "features": config.features,
        "layer": config.layer,
        "width": config.width,
        "blocks": config.blocks,
        "grid": config.grid,
        "unet": str(config.shape),
        "parameters": _count(own),
    }
    if inside:
        heads = {name: shape for name, shape in shapes.items() if name not in own}
        found["heads"] = _layers(path, metadata["heads"], config.features, heads)
        found["reads through a head"] = "yes" if config.restored else "no"
    return found


def _heads(path: Path, metadata: dict[str, str], shapes: Shapes) -> dict[str, Any]:
    if metadata.get("version") != head.VERSION:
        raise DinotileError(
            f"{path.name} has head format version {metadata.get('version')}, but this dinotile reads {head.VERSION}: "
            "update dinotile"
        )
    try:
        features, encoder, written = int(metadata["features"]), metadata["encoder"], metadata["heads"]
    except DAMAGED as error:
        raise DinotileError(f"{path.name} is damaged: bad head metadata ({error!r})") from error
    found = _layers(path, written, features, shapes)
    gain = _gain(metadata, found["layers"])
    return {"kind": HEADS, "encoder": encoder, "features": features, **found, **({"gain": gain} if gain else {})}


def _gain(metadata: dict[str, str], layers: list[int]) -> dict[str, str]:
    """By layer: how much nearer calibrated heads come to sharp pictures that they were not fitted to."""
    found = {}
    for layer in sorted(layers, reverse=True):
        with contextlib.suppress(*DAMAGED, ZeroDivisionError):
            raw, restored = (float(metadata[f"held out, {which} {layer}"]) for which in ("raw", "restored"))
            found[str(layer)] = f"{1 - restored / raw:.0%}"
    return found


def _layers(path: Path, written: str, features: int, shapes: Shapes) -> dict[str, Any]:
    """Layers, width within and number of parameters of restoration heads; written: their part of the metadata."""
    try:
        layers, hidden = head.read_layers(written)
    except DAMAGED as error:
        raise DinotileError(f"{path.name} is damaged: bad head metadata ({error!r})") from error
    one = shapes_of(lambda: head.RestorationHead(features, hidden), path.name)
    wanted = {f"{PREFIX}{layer}.{name}": shape for layer in layers for name, shape in one.items()}
    check_shapes(shapes, wanted, path.name)
    return {"layers": layers, "hidden": hidden, "parameters": _count(shapes)}


def _count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(MEASURED))
