"""Pictures to train on, from a folder of photos, and what is computed of each of them only once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
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

from lib_dinotile import DinotileError, one_line
from lib_dinotile.dino.degradation import degrade
from lib_dinotile.engine.team import Team
from lib_dinotile.images import endings, read_image, read_size, unread
from lib_dinotile.train.options import Training

CELL = 8
"""Pixels a latent cell, at most."""
CHAIN = 1
"""Grows when pictures of the same options come out otherwise, so that no older cache is taken for them."""
SHOWN = 5
"""Lines about pictures that are left out."""


@dataclass(frozen=True)
class Picture:
    """An upscaler's input, and the result that it ought to have."""

    sharp: Image.Image
    """RGB, of the canvas's size."""
    source: Image.Image
    """RGB, smaller and worse."""
    caption: str = ""
    name: str = ""


class Pictures(Protocol):
    """A list of pictures that are made when they are asked for; the same in every run."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Picture: ...

    def key(self, index: int) -> Any:
        """Its identity, for JSON."""


def find_photos(folder: Path, least: int, held_out: int) -> tuple[list[Path], list[Path], list[str]]:
    """Images of at least so many pixels a side in a folder and below it: (to train on, held out, left out and why).

    Held-out ones are chosen by their names alone, so that other files in the folder change little. DinotileError if
    there are too few.
    """
    if not folder.is_dir():
        raise DinotileError(f"images: {folder} is not a folder")
    kinds, everything = endings(), [file for file in folder.rglob("*") if file.is_file()]
    files = [file for file in everything if file.suffix.lower() in kinds]
    found, left_out = [], [line for line in [unread(everything)] if line]
    for file in sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).hexdigest()):
        try:
            with file.open("rb") as opened:
                size = read_size(opened, file.name)
        except (DinotileError, OSError) as error:
            left_out.append(one_line(error))
            continue
        if min(size) < least:
            left_out.append(f"{file.name}: {size[0]}x{size[1]} is smaller than a tile of {least}")
            continue
        found.append(file)
    if len(found) <= held_out:
        raise DinotileError(
            f"images: {len(found)} usable ones are too few with held_out {held_out}: give more, or hold out fewer"
        )
    return sorted(found[held_out:]), sorted(found[:held_out]), left_out


def say_left_out(lines: Sequence[str]) -> None:
    for line in lines[:SHOWN]:
        print(f"left out: {line}")
    if len(lines) > SHOWN:
        print(f"left out: {len(lines) - SHOWN} more")


class Photos:
    """The photos of some files, each in several variants: another zoom, mirrored or not, another degradation."""

    def __init__(self, folder: Path, files: Sequence[Path], options: Training, tile: int, variants: int) -> None:
        """folder: what the files' names are counted from."""
        self._folder, self._files, self._options = folder, files, options
        self._tile, self._variants = tile, variants

    def __len__(self) -> int:
        return len(self._files) * self._variants

    def _at(self, index: int) -> tuple[Path, int]:
        return self._files[index % len(self._files)], index // len(self._files)

    def key(self, index: int) -> Any:
        (file, variant), o = self._at(index), self._options
        captions = file.with_suffix(".txt")
        stamps = [[each.stat().st_size, each.stat().st_mtime_ns] for each in (file, captions) if each.is_file()]
        made_by = [o.longest, o.scale_low, o.scale_high, o.severity, o.seed, self._tile]
        return ["photo", CHAIN, file.relative_to(self._folder).as_posix(), stamps, variant, made_by]

    def __getitem__(self, index: int) -> Picture:
        (file, variant), o = self._at(index), self._options
        rng = np.random.default_rng((o.seed, variant, zlib.crc32(file.name.encode())))
        sharp = read_image(file)
        if min(sharp.size) < self._tile:
            raise DinotileError(f"{file.name}: {sharp.width}x{sharp.height} is smaller than a tile of {self._tile}")
        least = max(1.0, max(sharp.size) / o.longest)
        zoom = least if rng.random() < 0.5 else rng.uniform(least, max(least, min(sharp.size) / self._tile, 1.0))
        zoom = min(zoom, 2 * least, min(sharp.size) / self._tile)
        if zoom > 1:
            size = tuple(max(self._tile, round(side / zoom)) for side in sharp.size)
            sharp = sharp.resize(size, Image.Resampling.LANCZOS)
        # Whole latent cells: the canvas is not padded.
        sharp = sharp.crop((0, 0, sharp.width // CELL * CELL, sharp.height // CELL * CELL))
        if rng.random() < 0.5:
            sharp = ImageOps.mirror(sharp)
        scale = float(np.exp(rng.uniform(np.log(o.scale_low), np.log(o.scale_high))))
        captions = file.with_suffix(".txt")
        caption = captions.read_text(encoding="utf-8", errors="replace").strip() if captions.is_file() else ""
        return Picture(sharp, degrade(rng, sharp, scale, o.severity), caption, file.name)


class Prepared(torch.utils.data.Dataset):
    """Tensors computed from each picture, by name. Made once and kept on disk, in half precision."""

    def __init__(
        self, pictures: Pictures, compute: Callable[[Picture], dict[str, Tensor]], folder: Path, recipe: Any
    ) -> None:
        """recipe: all that `compute` depends on besides the picture, for JSON."""
        self._pictures, self._compute, self._folder = pictures, compute, folder
        digests = [hashlib.sha256(json.dumps([recipe, pictures.key(i)]).encode()) for i in range(len(pictures))]
        paths = [folder / f"{digest.hexdigest()[:32]}.safetensors" for digest in digests]
        self._entries = list(enumerate(paths))
        """(number of the picture, its file)."""

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        path = self._entries[index][1]
        try:
            return load_file(path)
        except (OSError, SafetensorError):  # lost, or cut off by a crash
            self._write(path, self.picture(index))
            return load_file(path)

    def picture(self, index: int) -> Picture:
        """The picture itself."""
        return self._pictures[self._entries[index][0]]

    def prepare(self, team: Team, what: str) -> list[str]:
        """Compute what is not on disk yet. Pictures that cannot be read are left out: a line for each.

        DinotileError if the disk has not the space for all of it, or it cannot be written.
        """
        missing = [entry for entry in self._entries[team.rank :: team.size] if not entry[1].is_file()]
        unread: list[tuple[int, str]] = []
        for done, (number, path) in enumerate(
            tqdm(missing, desc=what, disable=None if missing and not team.rank else True)
        ):
            try:
                picture = self._pictures[number]
            except DinotileError as error:
                unread.append((number, str(error)))
                continue
            self._write(path, picture)
            if done == 0:
                self._check_space(path.stat().st_size, (len(missing) - 1) * team.size)
        lost = dict(entry for each in team.gather(unread) for entry in each)
        self._entries = [entry for entry in self._entries if entry[0] not in lost]
        return list(lost.values())

    def _check_space(self, each: int, count: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if each * count > free:
            space = f"needs {each * count / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free"
            raise DinotileError(f"cache: {self._folder} {space}: give another --cache, or fewer --variants", 500)

    def _write(self, path: Path, picture: Picture) -> None:
        tensors = {name: tensor.half().cpu().contiguous() for name, tensor in self._compute(picture).items()}
        odd = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if odd:
            raise DinotileError(f"{picture.name}: its {odd[0]} contains NaN: leave it out", 500)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part)
            part.replace(path)
        except (OSError, SafetensorError) as error:
            message = f"cache: {self._folder} cannot be written: {error}; give another --cache"
            raise DinotileError(message, 500) from error
        finally:
            part.unlink(missing_ok=True)
