"""What the built-in model makes of photographs that it never saw: python benchmarks/gallery.py --out FOLDER [PHOTO ...]

For each photo, twice and four times as large: enlarged by Lanczos, painted in plain tiles, and by dinotile as it is by
default. Writes the pictures, and for each scale a sheet of parts of them side by side. Without photos: the held-out
photographs of tools/mini/images.py, as far as they are installed (`--root` says where else packages lie).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from lib_dinotile.condition.conditioner import MINI, Conditioner
from lib_dinotile.engine.flow import upscale
from lib_dinotile.hosts.diffusers import load_host
from lib_dinotile.images import read_image
from lib_dinotile.settings import Generation, Settings
from lib_dinotile.tiling.noise import NoiseField
from tools.mini.evaluate import sharpness
from tools.mini.images import HELD_OUT, package_roots, read_photo

PART = 104
"""Side of what a sheet shows of a photo, in its own pixels at twice its size; at four times half as many."""
BESIDE = 2
"""Photos in a row of a sheet."""
WAYS = ("Lanczos", "plain tiles", "dinotile")


def painted(source: Image.Image, way: str, scale: float, seed: int = 0) -> Image.Image:
    """The source (RGB) made larger in one of `WAYS`."""
    if way == "Lanczos":
        return source.resize((round(source.width * scale), round(source.height * scale)), Image.Resampling.LANCZOS)
    plain = {"guidance": 0.0, "guard": "off"}
    settings = Settings(scale=scale, **(plain if way == "plain tiles" else {"adapter": "mini"}))
    host = load_host(Generation(seed=seed))
    conditioner = Conditioner.load(settings, host, {"mini": MINI / "adapter.safetensors"})
    return upscale(host, source, settings, NoiseField(seed, host.channels), conditioner).image


def liveliest(image: Image.Image, side: int) -> tuple[int, int, int, int]:
    """The box (left, upper, right, lower) of that side with the most detail."""
    grey = np.asarray(image.convert("L"), dtype=np.float64)
    detail = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    total = np.pad(detail, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    side = min(side, *detail.shape)
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
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
    parser.add_argument("photos", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--root", type=Path, action="append", default=[], help="where else unpacked packages lie")
    parser.add_argument("--scales", type=float, nargs="+", default=[2.0, 4.0])
    parser.add_argument(
        "--largest", type=int, default=320, help="the middle of a photo, of at most so many pixels a side"
    )
    arguments = parser.parse_args()
    photos = {file.stem: read_image(file) for file in arguments.photos}
    for photo in HELD_OUT if not photos else ():
        pixels = read_photo(photo, package_roots(arguments.root))
        if pixels is not None:
            photos[Path(photo.path).stem] = Image.fromarray(pixels)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for scale in arguments.scales:
        rows = []
        for name, photo in photos.items():
            width, height = (min(side, arguments.largest) for side in photo.size)
            left, upper = (photo.width - width) // 2, (photo.height - height) // 2
            source = photo.crop((left, upper, left + width, upper + height))
            made = {way: painted(source, way, scale) for way in WAYS}
            figures = []
            for way, image in made.items():
                image.save(arguments.out / f"{name}-{scale:g}x-{way.replace(' ', '-')}.png")
                figures.append(f"{way} {sharpness(np.asarray(image)):.2f}")
            difference = np.abs(np.asarray(made[WAYS[1]], float) - np.asarray(made[WAYS[2]], float)).mean()
            print(
                f"{name} {scale:g}x: gradients {', '.join(figures)}; plain to dinotile {difference:.2f} of 255",
                flush=True,
            )
            box = liveliest(source, round(2 * PART / scale))
            parts = [image.crop(tuple(round(scale * side) for side in box)) for image in made.values()]
            rows.append(parts)
        sheet(rows, arguments.out / f"sheet-{scale:g}x.png")


if __name__ == "__main__":
    main()
