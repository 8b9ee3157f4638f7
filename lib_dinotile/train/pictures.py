"""Pictures to train on, from a folder of photos, and what is computed of each of them only once."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from lib_dinotile import DinotileError
from lib_dinotile.images import read_image
from lib_dinotile.team import Team
from lib_dinotile.train.degradation import degrade
from lib_dinotile.train.options import Training


@dataclass(frozen=True)
class Picture:
    """What an upscaler is given, and what it ought to make of it."""

    sharp: Image.Image
    """RGB, of the canvas's size."""
    source: Image.Image
    """RGB, smaller and worse."""
    caption: str = ""


class Pictures(Protocol):
    """A list of pictures that are made when they are asked for; the same in every run."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Picture: ...

    def key(self, index: int) -> Any:
        """What tells it from all others, for JSON."""


def find_photos(folder: Path, least: int) -> tuple[list[Path], list[str]]:
    """Images of at least so many pixels a side in a folder and below it, and a line for each that is left out."""
    if not folder.is_dir():
        raise DinotileError(f"images: {folder} is not a folder")
    endings, found, left_out = Image.registered_extensions(), [], []
    for file in sorted(file for file in folder.rglob("*") if file.suffix.lower() in endings and file.is_file()):
        try:
            with Image.open(file) as image:
                size = image.size
        except Exception as error:  # decoders of damaged files raise whatever they like
            left_out.append(f"{file.name}: cannot be read as an image: {error}")
            continue
        if min(size) < least:
            left_out.append(f"{file.name}: {size[0]}x{size[1]} is smaller than a tile of {least}")
            continue
        found.append(file)
    return found, left_out


def hold_out(files: Sequence[Path], count: int) -> tuple[list[Path], list[Path]]:
    """(to train on, held out): chosen by their names, so that other files in the folder change little."""
    if len(files) <= count:
        raise DinotileError(
            f"images: {len(files)} usable ones are too few with held_out {count}: give more, or hold out fewer"
        )
    ordered = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).hexdigest())
    return sorted(ordered[count:]), sorted(ordered[:count])


class Photos:
    """The photos of some files, each in several variants: another zoom, mirrored or not, another degradation."""

    def __init__(self, files: Sequence[Path], options: Training, tile: int, variants: int) -> None:
        self._files, self._options, self._tile, self._variants = files, options, tile, variants

    def __len__(self) -> int:
        return len(self._files) * self._variants

    def _at(self, index: int) -> tuple[Path, int]:
        return self._files[index % len(self._files)], index // len(self._files)

    def key(self, index: int) -> Any:
        (file, variant), o = self._at(index), self._options
        captions = file.with_suffix(".txt")
        stamps = [[each.stat().st_size, each.stat().st_mtime_ns] for each in (file, captions) if each.is_file()]
        made_by = [o.longest, o.scale_low, o.scale_high, o.severity, o.seed, self._tile]
        return ["photo", file.name, stamps, variant, made_by]

    def __getitem__(self, index: int) -> Picture:
        (file, variant), o = self._at(index), self._options
        rng = np.random.default_rng((o.seed, variant, zlib.crc32(file.name.encode())))
        sharp = read_image(file)
        least = max(1.0, max(sharp.size) / o.longest)
        zoom = least if rng.random() < 0.5 else rng.uniform(least, max(least, min(sharp.size) / self._tile, 1.0))
        zoom = min(zoom, 2 * least, min(sharp.size) / self._tile)
        if zoom > 1:
            size = tuple(max(self._tile, round(side / zoom)) for side in sharp.size)
            sharp = sharp.resize(size, Image.Resampling.LANCZOS)
        if rng.random() < 0.5:
            sharp = ImageOps.mirror(sharp)
        scale = float(np.exp(rng.uniform(np.log(o.scale_low), np.log(o.scale_high))))
        captions = file.with_suffix(".txt")
        caption = captions.read_text(encoding="utf-8", errors="replace").strip() if captions.is_file() else ""
        return Picture(sharp, degrade(rng, sharp, scale, o.severity), caption)


class Prepared(torch.utils.data.Dataset):
    """What is computed of each picture, by name. Made once and kept on disk, in half precision."""

    def __init__(
        self, pictures: Pictures, compute: Callable[[Picture], dict[str, Tensor]], folder: Path, recipe: Any
    ) -> None:
        """recipe: all that `compute` depends on besides the picture, for JSON."""
        self.pictures, self._compute, self._folder = pictures, compute, folder
        digests = [hashlib.sha256(json.dumps([recipe, pictures.key(i)]).encode()) for i in range(len(pictures))]
        self._paths = [folder / f"{digest.hexdigest()[:32]}.safetensors" for digest in digests]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        try:
            return load_file(self._paths[index])
        except (OSError, SafetensorError):  # lost, or cut off by a crash
            self._make(index)
            return load_file(self._paths[index])

    def prepare(self, team: Team, what: str) -> None:
        """Compute what is not on disk yet. DinotileError if it cannot be written."""
        missing = [index for index in range(len(self))[team.rank :: team.size] if not self._paths[index].is_file()]
        for index in tqdm(missing, desc=what, disable=None if missing and not team.rank else True):
            self._make(index)
        team.gather(None)

    def _make(self, index: int) -> None:
        tensors = {
            name: tensor.half().cpu().contiguous() for name, tensor in self._compute(self.pictures[index]).items()
        }
        path = self._paths[index]
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part)
            part.replace(path)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise DinotileError(
                f"cache: {self._folder} cannot be written: {error}; give another --cache", 500
            ) from error
