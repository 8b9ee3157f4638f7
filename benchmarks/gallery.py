"""Photographs that the built-in model never saw, upscaled by it: python benchmarks/gallery.py --out FOLDER [PHOTO ...]

For each photo, twice and four times as large: enlarged by Lanczos, painted in plain tiles, and by dinotile as it is by
default. Writes the pictures, and for each scale a sheet of parts of them side by side. Without photos: the held-out
photographs of tools/mini/images.py, as far as they are installed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from scipy.signal import convolve

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.photographs import LANCZOS, UNGUIDED, add_arguments, enlarged, given
from lib_dinotile.condition.conditioner import MINI
from lib_dinotile.settings import Generation, Settings

PART = 104
"""Side of what a sheet shows of a photo, in its own pixels at twice its size; at four times half as many."""
BESIDE = 2
"""Photos in a row of a sheet."""
WAYS = ("Lanczos", "plain tiles", "dinotile")


def painted(source: Image.Image, way: str, scale: float) -> Image.Image:
    """The source (RGB) made larger in one of `WAYS`."""
    if way == "Lanczos":
        return source.resize((round(source.width * scale), round(source.height * scale)), LANCZOS)
    settings = Settings(scale=scale, **(UNGUIDED if way == "plain tiles" else {"adapter": "mini"}))
    return enlarged(source, settings, Generation(), {"mini": MINI / "adapter.safetensors"})


def liveliest(image: Image.Image, side: int) -> tuple[int, int, int, int]:
    """The box (left, upper, right, lower) of that side with the most detail."""
    grey = np.asarray(image.convert("L"), dtype=np.float64)
    detail = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    side = min(side, *detail.shape)
    sums = convolve(detail, np.ones((side, side)), "valid")
    y, x = np.unravel_index(sums.argmax(), sums.shape)
    return int(x), int(y), int(x) + side, int(y) + side


def sheet(photos: Sequence[Sequence[Image.Image]], file: Path) -> None:
    """A photo after the other, each in all ways, every part shown pixel by pixel."""
    side, gap, between, top, dpi = photos[0][0].width, 4, 16, 26, 100
    beside = min(BESIDE, len(photos))
    group, rows = len(WAYS) * (side + gap) - gap + between, -(-len(photos) // beside)
    width, height = beside * group - between, top + rows * (side + gap) - gap
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor="white")
    for number, parts in enumerate(photos):
        row, place = divmod(number, beside)
        for column, (way, part) in enumerate(zip(WAYS, parts)):
            left = place * group + column * (side + gap)
            figure.figimage(np.asarray(part), left, height - top - row * (side + gap) - side, origin="upper")
            if row == 0:
                x, y = (left + side / 2) / width, 1 - top / 2 / height
                figure.text(x, y, way, ha="center", va="center", fontsize=11)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, largest=320)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scales", type=float, nargs="+", default=[2.0, 4.0])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for scale in arguments.scales:
        rows = []
        for name, source in given(arguments).items():
            made = {way: painted(source, way, scale) for way in WAYS}
            for way, image in made.items():
                image.save(arguments.out / f"{name}-{scale:g}x-{way.replace(' ', '-')}.png")
            print(f"{name} {scale:g}x", flush=True)
            box = [round(scale * side) for side in liveliest(source, round(2 * PART / scale))]
            rows.append([image.crop(box) for image in made.values()])
        sheet(rows, arguments.out / f"sheet-{scale:g}x.png")


if __name__ == "__main__":
    main()
