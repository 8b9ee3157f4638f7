"""Whether the borders of tiles can be seen in the result: python benchmarks/seams.py [--passes] [--json]

A seam is gradient energy across the borders of tiles over that elsewhere in the same image; 1.0 is no seam.

Energy: squared difference of neighbouring pixels, mean of the colours. Photographs have edges of their own, which
differ by many percent from column to column, so everything is held against a reference: the same canvas as one single
tile, with the same model, seed and noise. Both images' energies are divided by what is common around that place (the
mean of both over 17 x 17 pixels, plus one level), or a few hard edges would outweigh all of a sky. Then

    seam = (energy at the lines / energy elsewhere) / (the same of the reference)

as sums over all lines, both directions and all canvases of a group. Lines are where tiles begin, where they end, and
the middles of their overlaps (with a seam pass also where its bands begin, end and peak): each of the three kinds
counts alone, and each twice, as the one difference right across the line and as the eight around it, for soft seams.
A cell of the table is the largest of the six, with its standard error (jackknife over the canvases). Elsewhere is the
nearest columns on both sides that lie in no overlap and no band, 8 pixels from any, and at the same place in the 8 x
8 pixels of a latent cell. So two things count as a seam: a step at a line, and an overlap that has more detail than
the tiles' inside.

Checked on every run, with the same images (the rows in brackets): "nowhere" takes lines in the middle between the
real ones, where no border is, and has to be 1.00; "cut" is the reference cut into tiles, the colours of each shifted
by 2 levels up or down, and has to be well above.

It computes on the CPU, in one thread, on photographs that are all there: the same figures in every run, whatever else
the machine does. Another torch or processor rounds differently, which shows in the fourth digit.

--passes: also with seam passes. --json: one last line, "worst" is the largest cell for dinotile without a seam pass.
Target: at most 1.02.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import uniform_filter
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.photographs import EXAMPLE, UNGUIDED, installed, middle
from lib_dinotile.engine.flow import upscale
from lib_dinotile.hosts.diffusers import DiffusersHost, load_host
from lib_dinotile.images import read_image
from lib_dinotile.settings import Generation, Settings
from lib_dinotile.tiling.noise import NoiseField
from lib_dinotile.tiling.plan import TilePlan
from lib_dinotile.tiling.seams import SEAMS, seam_passes
from tools.mini.images import Photo

TARGET = 1.02
SIDE, SCALE = 256, 2
"""Of the sources, and how much larger the canvases are."""
GENERATION = Generation(steps=6, denoise=0.35, device="cpu", precision="fp32")  # two UNet steps a tile
TILES = Settings(scale=SCALE, tile=128, overlap=32, batch=4, **UNGUIDED)
ORDERS = ("chess", "linear", "fused")
WITH_PASS = 2
"""Canvases of each group that the seam passes are run on."""

KINDS = ("begin", "middle", "end")
PERIOD = 8
"""Pixels of a latent cell."""
MARGIN = 8
"""Pixels between a line and what counts as elsewhere."""
BESIDE = 6
"""Columns elsewhere that a column is held against on either side."""
WINDOWS = {"step": range(1), "strip": range(-4, 4)}
PHOTOS = {
    "skimage/data/": "astronaut.png coffee.png rocket.jpg motorcycle_left.png retina.jpg hubble_deep_field.jpg "
    "brick.png grass.png gravel.png camera.png coins.png moon.png",
    "sklearn/datasets/images/": "china.jpg flower.jpg",
}


@dataclass
class Lines:
    """The lines along one axis of a canvas: line n lies between the pixels n - 1 and n."""

    length: int
    kinds: dict[str, list[int]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    covered: set[int] = field(default_factory=set)
    """Pixels that more than one tile has painted."""

    def add(self, begin: int, end: int) -> None:
        """An overlap or a band."""
        for kind, line in zip(KINDS, (begin, (begin + end) // 2, end)):
            if 0 < line < self.length:
                self.kinds[kind].append(line)
        self.covered.update(range(begin, end))

    @classmethod
    def of(cls, starts: Sequence[int], tile: int, length: int) -> Lines:
        """The lines of tiles of this size."""
        lines = cls(length)
        for left, right in itertools.pairwise(starts):
            lines.add(right, left + tile)
        return lines

    def band(self, start: int, weight: Tensor) -> None:
        """Add the band that a tile of a seam pass paints, for its weights along this axis."""
        painted = weight.nonzero()
        self.add(start + int(painted[0]), start + int(painted[-1]) + 1)

    @functools.cached_property
    def elsewhere(self) -> np.ndarray:
        """Columns that no seam can be at. Where bands cover nearly all, they do not count: only their lines do."""
        near = {line + i for kind in self.kinds.values() for line in kind for i in range(-MARGIN, MARGIN)}
        covered = {pixel + i for pixel in self.covered for i in range(-MARGIN, MARGIN + 1)}
        inner = set(range(MARGIN, self.length - MARGIN)) - near
        free = inner - covered
        return np.array(sorted(free if len(free) > self.length / 4 else inner))

    def beside(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest columns elsewhere, left and right, that lie in a latent cell as this one does."""
        same = self.elsewhere[self.elsewhere % PERIOD == place % PERIOD]
        return same[same < place][-BESIDE:], same[same > place][:BESIDE]

    @property
    def nowhere(self) -> Lines:
        """A line in the middle of everything that lies between these, where there is none."""
        lines, free = Lines(self.length, covered=self.covered), self.elsewhere
        for run in np.split(free, np.flatnonzero(np.diff(free) > 1) + 1):
            if len(run) > 4 * MARGIN:
                lines.kinds["middle"].append(int(run.mean()) // PERIOD * PERIOD)
        return lines


def plan_lines(plan: TilePlan, settings: Settings) -> tuple[Lines, Lines]:
    """Vertical and horizontal lines of dinotile's tiles and of the bands of its seam pass."""
    axes = zip((plan.columns, plan.rows), plan.tile_size, plan.padded)
    both = [Lines.of(starts, tile, length) for starts, tile, length in axes]
    for grid, blend in seam_passes(plan, settings.seams, settings.seam_width):
        if grid.columns != plan.columns:
            for tile in grid.tiles[: len(grid.columns)]:
                both[0].band(tile.x, blend.weight(tile).amax(0))
        if grid.rows != plan.rows:
            for tile in grid.tiles[:: len(grid.columns)]:
                both[1].band(tile.y, blend.weight(tile).amax(1))
    return both[0], both[1]


def columns(image: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Energies (W,) from each column's left neighbour to it, of both images, relative to what is around."""
    energies = []
    for pixels in (image.astype(float), reference.astype(float)):
        energy = np.zeros(pixels.shape[:2])
        energy[:, 1:] = (np.diff(pixels, axis=1) ** 2).mean(2)
        energies.append(energy)
    around = uniform_filter(sum(energies) / 2, 17, mode="nearest") + 1
    return tuple((energy / around).mean(0) for energy in energies)


class Pool:
    """Canvases of one group whose lines are looked at together."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], list[np.ndarray]] = {}

    def add(self, image: Image.Image, reference: Image.Image, lines: tuple[Lines, Lines]) -> None:
        """lines: vertical, horizontal."""
        pixels = [np.asarray(entry.convert("RGB")) for entry in (image, reference)]
        turned = [entry.transpose(1, 0, 2) for entry in pixels]
        rows = [(columns(*pixels), lines[0]), (columns(*turned), lines[1])]
        for kind in KINDS:
            for name, window in WINDOWS.items():
                sums = np.zeros((2, 2))
                for energies, axis in rows:
                    for place in (line + i for line in axis.kinds[kind] for i in window if 0 < line + i < axis.length):
                        left, right = axis.beside(place)
                        sums += [[one[place], (one[left].mean() + one[right].mean()) / 2] for one in energies]
                if sums.any():
                    self._sums.setdefault((kind, name), []).append(sums)

    def seam(self) -> tuple[float, float, str]:
        """The largest of the kinds and windows, its standard error, and which one it is."""
        return max((*estimate(np.array(sums)), " ".join(key)) for key, sums in self._sums.items())


def estimate(sums: np.ndarray) -> tuple[float, float]:
    """The seam of some canvases and its standard error. sums: canvas, image or reference, line or elsewhere."""
    with np.errstate(invalid="ignore"):  # a single canvas has no error
        totals = np.stack([sums.sum(0), *(sums.sum(0) - sums)])
        seams = totals[:, 0, 0] / totals[:, 0, 1] / (totals[:, 1, 0] / totals[:, 1, 1])
    return float(seams[0]), float(np.sqrt((len(sums) - 1) * seams[1:].var()))


def gradients() -> dict[str, Image.Image]:
    """Synthetic sources that are smooth everywhere."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1)
    r, one = np.hypot(x - 0.5, y - 0.5), np.ones_like(x)
    made = {
        "across": (40 + 170 * x, 60 + 150 * x, 90 + 120 * x),
        "diagonal": (30 + 90 * (x + y), 200 - 60 * (x + y), 80 + 50 * (x + y)),
        "radial": (230 - 200 * r, 210 - 220 * r, 190 - 240 * r),
        "sky": (90 + 130 * y**1.5, 140 + 90 * y, 200 + 40 * y),
        "waves": (128 + 60 * np.sin(5 * x + 3 * y), 128 + 60 * np.sin(4 * y + 1), 128 + 60 * np.cos(3 * x - 4 * y)),
        "dark": (10 + 25 * x, 8 + 20 * y, 15 + 20 * x * y),
        "bright": (250 - 25 * y, 245 - 30 * x * y, 235 - 20 * x),
        "skin": (225 - 60 * r, 180 - 70 * r + 10 * x, 150 - 60 * r + 10 * y),
        "grey": (128 * one, 128 * one, 128 * one),
    }
    return {name: Image.fromarray(np.stack(bands, 2).round().astype(np.uint8)) for name, bands in made.items()}


def photos() -> dict[str, Image.Image]:
    """The middles of photographs that the repository, scikit-image and scikit-learn come with. All of them, or the
    figures would be others."""
    files = [Photo(folder + name, "", "") for folder, names in PHOTOS.items() for name in names.split()]
    found = {"photo": read_image(EXAMPLE), **installed(files)}
    missing = [file.path for file in files if Path(file.path).stem not in found]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}: pip install '.[bench]'")
    return {name: middle(image, SIDE, SIDE) for name, image in found.items()}


def cut(reference: Image.Image, tile: int, levels: int, seed: int) -> Image.Image:
    """The image in squares, each of their colours up or down by some levels."""
    draw, pixels = np.random.default_rng(seed), np.array(reference, dtype=int)
    for top in range(0, pixels.shape[0], tile):
        for left in range(0, pixels.shape[1], tile):
            pixels[top : top + tile, left : left + tile] += draw.choice([-levels, levels], 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def canvases(
    host: DiffusersHost, source: Image.Image, seed: int, passes: bool
) -> Iterator[tuple[str, Image.Image, Image.Image, tuple[Lines, Lines]]]:
    """Row of the table, canvas, reference, and the lines to look at.

    Every order without a seam pass, and if they are asked for with each.
    """

    def make(**changes: Any) -> Image.Image:
        return upscale(host, source, replace(TILES, **changes), NoiseField(seed, host.channels)).image

    reference = make(tile=SIDE * SCALE, order="linear")
    edges = Lines.of(range(0, reference.width, TILES.tile), TILES.tile, reference.width)
    yield "[cut]", cut(reference, TILES.tile, 2, seed), reference, (edges, edges)
    plan = TilePlan(reference.width, reference.height, TILES.tile, TILES.overlap, host.factor)
    lines = plan_lines(plan, TILES)
    for order in ORDERS:
        result = make(order=order)
        yield f"dinotile {order}", result, reference, lines
        yield f"[nowhere, {order}]", result, reference, (lines[0].nowhere, lines[1].nowhere)
    for order, seams in itertools.product(ORDERS, SEAMS[1:] if passes else ()):
        lines = plan_lines(plan, replace(TILES, seams=seams))
        yield f"dinotile {order}, {seams}", make(order=order, seams=seams), reference, lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", action="store_true", help="also with seam passes; twice as long")
    parser.add_argument("--json", action="store_true", help="one last line of JSON")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # sums do not depend on how many there are
    groups, host = {"gradients": gradients(), "photos": photos()}, load_host(GENERATION)
    pools: dict[str, dict[str, Pool]] = {}
    for group, images in groups.items():
        for seed, (name, source) in enumerate(images.items()):
            print(f"  {group}: {name}", file=sys.stderr, flush=True)
            for row, *canvas in canvases(host, source, seed, arguments.passes and seed < WITH_PASS):
                pools.setdefault(row, {}).setdefault(group, Pool()).add(*canvas)
    seams = {row: {group: pool.seam() for group, pool in pooled.items()} for row, pooled in pools.items()}
    worst = max(cell[0] for order in ORDERS for cell in seams[f"dinotile {order}"].values())
    counts = ", ".join(f"{len(images)} {group}" for group, images in groups.items())
    print(f"built-in model, tiles of {TILES.tile} with overlap {TILES.overlap}; {counts}", end="")
    print(f"; seam passes: {WITH_PASS} of each" if arguments.passes else "")
    print(" " * 40 + "".join(f"{group:<32}" for group in groups).rstrip())
    for row, cells in seams.items():
        print(f"{row:<40}" + "".join(f"{v:.3f} +-{e:.3f}  {where:<16}" for v, e, where in cells.values()).rstrip())
    print(f"worst without a seam pass: {worst:.3f} (target: at most {TARGET})")
    if arguments.json:
        print(json.dumps({"worst": round(worst, 4)}))


if __name__ == "__main__":
    main()
