"""The restoration head: what the features of a degraded picture would be if it were sharp.

A residual map over the tokens of a frozen encoder, identity until trained; the idea is that of SeeSR's
degradation-aware prompt extractor (arXiv 2311.16518), on one encoder's tokens. It is trained by gradient descent
(lib_dinotile/train/head.py), or linear and fitted in closed form (calibration.py).
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lib_dinotile import DinotileError, one_line
from lib_dinotile.dino.encoder import PatchEncoder
from lib_dinotile.weights import Stamp, check_shapes, open_tensors, shapes_of, stamp

FORMAT, VERSION = "dinotile-head", "2"


@dataclass(frozen=True)
class Floor:
    """How values of true patches spread."""

    median: float
    spread: float
    """Median absolute deviation times 1.4826, which for a normal distribution is its standard deviation."""

    @classmethod
    def of(cls, values: Tensor) -> Floor:
        values = values.cpu()
        median = values.median()
        return cls(float(median), max(float((values - median).abs().median()) * 1.4826, 1e-4))

    def limit(self, strictness: float) -> float:
        """So many deviations above the median."""
        return self.median + strictness * self.spread


class RestorationHead(nn.Module):
    """Tokens in, tokens out; each sees its 3x3 neighbours. With its last layer at zero, its first state, it changes
    nothing."""

    floor: Tensor
    """(2,): median and robust deviation of one minus the cosine between what it makes of a degraded picture and what
    the encoder sees in the sharp one, patch by patch, on pictures that it was not trained on. Zeros: not measured."""

    def __init__(self, features: int, hidden: int) -> None:
        """features: width of the encoder's tokens; hidden: width within, 0 for a linear head."""
        super().__init__()
        self.features, self.hidden = features, hidden
        if hidden:
            self.norm = nn.LayerNorm(features)
            self.inner = _neighbours(features, hidden)
        self.outer = nn.Conv2d(hidden, features, 1) if hidden else _neighbours(features, features)
        self.register_buffer("floor", torch.zeros(2))
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, D, h, w), float32, of a degraded picture -> those that the sharp one would have."""
        if not self.hidden:
            return tokens + self.outer(tokens)
        seen = self.norm(tokens.movedim(1, -1)).movedim(-1, 1)
        return tokens + self.outer(nn.functional.gelu(self.inner(seen)))


def _neighbours(into: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(into, out, 3, padding=1, padding_mode="replicate")


def read_layers(written: str) -> tuple[list[int], int]:
    """(layers, width within) of the heads in a file, from their part of its metadata. One of DAMAGED if that is."""
    metadata = json.loads(written)
    return sorted({int(layer) for layer in metadata["layers"]}), int(metadata["hidden"])


def pack(heads: Mapping[int, RestorationHead]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, in half precision, and metadata by which a file keeps the heads for some layers of an encoder."""
    first = next(iter(heads.values()))
    tensors = {f"heads.{layer}.{name}": t for layer, head in heads.items() for name, t in head.state_dict().items()}
    metadata = {"heads": json.dumps({"layers": sorted(heads), "hidden": first.hidden}), "features": str(first.features)}
    return {name: tensor.half().cpu().contiguous() for name, tensor in tensors.items()}, metadata


def save_heads(heads: Mapping[int, RestorationHead], path: Path, encoder: str, **extra: str) -> None:
    """Write the heads for some layers of an encoder (its id) into a file of their own, all of it or nothing.

    Layers are counted from the end: -1 is the last; extra: how they were made. OSError if it cannot be written.
    """
    tensors, metadata = pack(heads)
    described = {**extra, **metadata, "format": FORMAT, "version": VERSION, "encoder": encoder}
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(save(tensors, described))  # save_file's files are readable by one user only
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_heads(
    path: Path, encoder: str, features: int, device: torch.device | str = "cpu"
) -> dict[int, RestorationHead]:
    """The heads in a file, their own or an adapter's, by layer.

    DinotileError, one line, if there are none or they are not for this encoder.
    """
    try:
        with open_tensors(path) as file:
            metadata = file.metadata() or {}
            if not metadata.get("format", "").startswith("dinotile-") or "heads" not in metadata:
                raise DinotileError(f"{path.name} has no restoration head of dinotile's")
            if metadata["format"] == FORMAT and metadata.get("version") != VERSION:
                raise DinotileError(f"{path.name} has another head format than this dinotile reads: update dinotile")
            if metadata["encoder"] != encoder or int(metadata["features"]) != features:
                raise DinotileError(
                    f"head {path.name} is for encoder {metadata['encoder']!r}, not {encoder!r}: choose that one, "
                    "or no head"
                )
            layers, hidden = read_layers(metadata["heads"])
            wanted = shapes_of(lambda: RestorationHead(features, hidden), path.name)
            all_wanted = {f"heads.{layer}.{name}": shape for layer in layers for name, shape in wanted.items()}
            # Before anything of that size is made.
            check_shapes({name: tuple(file.get_slice(name).get_shape()) for name in all_wanted}, all_wanted, path.name)
            heads = {}
            # Made outside of inference mode, and without drawing from the next generation's random numbers.
            with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
                for layer in layers:
                    head = RestorationHead(features, hidden)
                    head.load_state_dict({name: file.get_tensor(f"heads.{layer}.{name}") for name in wanted})
                    heads[layer] = head.to(device).eval().requires_grad_(False)
            return heads
    except DinotileError:
        raise
    except Exception as error:  # whatever safetensors and torch raise for what is damaged
        raise DinotileError(f"head {path.name} cannot be read: {one_line(error)}") from error


def heads_in(file: Path, encoder: PatchEncoder) -> Mapping[int, RestorationHead]:
    """`load_heads` for an encoder, on its device; from memory if the file was read before."""
    return _read(file, stamp(file), encoder.id, encoder.width, encoder.device)


def forget_heads() -> None:
    """Gives up the heads that are kept in memory."""
    _read.cache_clear()


@functools.lru_cache(maxsize=2)
def _read(
    file: Path, state: Stamp | None, encoder: str, features: int, device: torch.device
) -> Mapping[int, RestorationHead]:
    return load_heads(file, encoder, features, device)
