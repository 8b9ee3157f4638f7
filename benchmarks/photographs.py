"""Photographs for the benchmarks, and what the built-in model makes of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from lib_dinotile.condition.conditioner import Conditioner
from lib_dinotile.engine.flow import upscale
from lib_dinotile.hosts.diffusers import load_host
from lib_dinotile.images import read_image
from lib_dinotile.settings import Generation, Settings
from lib_dinotile.tiling.noise import NoiseField
from tools.mini.images import HELD_OUT, Photo, package_roots, read_photo

LANCZOS = Image.Resampling.LANCZOS
UNGUIDED: dict[str, Any] = {"guidance": 0.0, "guard": "off"}
"""Options with which nothing looks at the source."""
EXAMPLE = Path(__file__).parents[1] / "examples" / "photo.png"


def noise(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def example(side: int) -> Image.Image:
    """The repository's photo as a square."""
    return read_image(EXAMPLE).resize((side, side), LANCZOS)


def installed(photos: Iterable[Photo], roots: Sequence[Path] = ()) -> dict[str, Image.Image]:
    """Those that are there, RGB, by name; roots: where else unpacked packages lie."""
    found = {Path(photo.path).stem: read_photo(photo, package_roots(roots)) for photo in photos}
    return {name: Image.fromarray(pixels) for name, pixels in found.items() if pixels is not None}


def middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, upper = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, upper, left + width, upper + height))


def add_arguments(parser: argparse.ArgumentParser, largest: int) -> None:
    parser.add_argument("photos", nargs="*", type=Path, help="default: those that the built-in model never saw")
    parser.add_argument("--root", type=Path, action="append", default=[], help="where else unpacked packages lie")
    parser.add_argument("--largest", type=int, default=largest, help="the middle of a photo, at most so many pixels")


def given(arguments: argparse.Namespace) -> dict[str, Image.Image]:
    """The middles of the photos that are asked for, of even sides, by name."""
    photos = {file.stem: read_image(file) for file in arguments.photos} or installed(HELD_OUT, arguments.root)
    return {
        name: middle(photo, *(min(side, arguments.largest) // 2 * 2 for side in photo.size))
        for name, photo in photos.items()
    }


def enlarged(
    source: Image.Image, settings: Settings, generation: Generation, adapters: Mapping[str, Path] = {}
) -> Image.Image:
    """The source (RGB) made larger with the built-in model."""
    host = load_host(generation)
    conditioner = Conditioner.load(settings, host, adapters)
    return upscale(host, source, settings, NoiseField(generation.seed, host.channels), conditioner).image
