"""Pictures of the closed world: regions of micro-texture whose class only sparse marks tell from afar.

A scene's canvas is `SIDE` px square. The source, 4 times smaller, shows regions in colours that say nothing of their
class, and here and there a mark, whose shape does. The texture itself is finer than the source can hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.world.textures import CLASSES, atlas
from lib_dinotile.condition.conditioner import to_tensor
from lib_dinotile.tiling.canvas import to_bytes

SIDE, FACTOR, PATCH = 256, 4, 16
"""Of the canvas in px; how many times smaller the source is; the side of what has one label, in px."""

NO_LABEL = -1
PURE = 0.9
"""A patch has a label where at least this share of it is one class."""

TEXTURE, MARK, SHADE = 0.10, 0.16, 0.02
"""Deviation of the texture, height of a mark, deviation of the shading; the canvas is 0..1."""

MARK_AREA = 5000
"""Canvas px for each mark, but every region has two, as far as there is room."""

TRAIN_ATLAS, EVALUATION_ATLAS = 1, 3


@dataclass(frozen=True)
class Scene:
    """One picture, and the truth about it."""

    sharp: Tensor
    """(3, SIDE, SIDE) float32 in 0..1, in steps of 1/255."""
    source: Tensor
    """(3, SIDE / 4, SIDE / 4), the same scale: all that an upscaler is given."""
    blurred: Tensor
    """(3, SIDE, SIDE): the source upscaled by Lanczos, what tiles start from."""
    classes: np.ndarray
    """(n,) int64: the class of each region."""
    regions: np.ndarray
    """(SIDE, SIDE) int64, the number of the region."""
    smooth: np.ndarray
    """(3, SIDE, SIDE) float32: colours, shading and marks without the texture."""
    tone: np.ndarray
    """(3, SIDE, SIDE) float32: what one deviation of texture adds."""

    @property
    def class_map(self) -> np.ndarray:
        """(SIDE, SIDE) int64."""
        return self.classes[self.regions]

    @cached_property
    def labels(self) -> np.ndarray:
        """(SIDE / PATCH, SIDE / PATCH) int64, NO_LABEL where classes meet."""
        n = SIDE // PATCH
        blocks = self.class_map.reshape(n, PATCH, n, PATCH).transpose(0, 2, 1, 3).reshape(n, n, -1)
        shares = np.stack([(blocks == label).mean(axis=2) for label in range(CLASSES)])
        return np.where(shares.max(axis=0) >= PURE, shares.argmax(axis=0), NO_LABEL)


def _mark(label: int, side: int) -> np.ndarray:
    """(side, side) float32 in 0..1: the shape that says the class, with soft borders."""
    y, x = (np.mgrid[0:side, 0:side] + 0.5) / side * 2 - 1
    radius, width = np.hypot(y, x), 0.22
    inside = np.maximum(np.abs(x), np.abs(y)) - 0.95
    distance = {
        0: np.abs(radius - 0.7) - width,  # ring
        1: np.maximum(np.minimum(np.abs(x), np.abs(y)) - width, inside),  # cross
        2: np.maximum(np.abs(np.abs(y) - 0.65) - width, inside),  # two beams
        3: np.maximum(np.abs(np.abs(x) - 0.65) - width, inside),  # two posts
        4: radius - 0.62,  # disc
        5: np.maximum(np.minimum(np.abs(x - y), np.abs(x + y)) * 0.71 - width, radius - 1.0),  # saltire
        6: np.maximum(np.abs(x + y) * 0.71 - width, radius - 1.0),  # slash
        7: np.maximum(np.abs(x - y) * 0.71 - width, radius - 1.0),  # backslash
    }[label]
    return np.clip(0.5 - distance * side / 4, 0, 1).astype(np.float32)


def _regions(rng: np.random.Generator) -> np.ndarray:
    """(SIDE, SIDE) int64: cells of three to six seeds that keep apart, with uneven borders."""
    count = int(rng.integers(3, 7))
    seeds = rng.uniform(0.1, 0.9, (1, 2))
    while len(seeds) < count:
        seed = rng.uniform(0.05, 0.95, 2)
        if np.hypot(*(seeds - seed).T).min() > 0.28:
            seeds = np.concatenate([seeds, seed[None]])
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE
    y = y + 0.02 * np.sin(rng.uniform(10, 25) * x + rng.uniform(0, 6))
    x = x + 0.02 * np.sin(rng.uniform(10, 25) * y + rng.uniform(0, 6))
    return np.argmin([(y - sy) ** 2 + (x - sx) ** 2 for sy, sx in seeds], axis=0)


def _palette(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Base colours, and what light adds to them, (count, 3) each; neighbours in the picture can be told apart."""
    bases = np.empty((0, 3))
    while len(bases) < count:
        colour = 0.5 + rng.choice((-1, 1), 3) * rng.uniform(0.07, 0.17, 3)
        if len(bases) == 0 or np.abs(bases - colour).sum(1).min() > 0.2:
            bases = np.concatenate([bases, colour[None]])
    light = 1 + rng.uniform(-0.25, 0.25, (count, 3))
    light *= rng.uniform(0.9, 1.1, (count, 1)) / light.mean(1, keepdims=True)
    return bases.astype(np.float32), light.astype(np.float32)


def _marks(rng: np.random.Generator, regions: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """(SIDE, SIDE) float32 in 0..1: the marks of all regions, each within its own and apart from the others."""
    field, taken = np.zeros((SIDE, SIDE), np.float32), np.zeros((SIDE, SIDE), bool)
    for region, label in enumerate(classes):
        inside = regions == region
        for _ in range(max(2, round(inside.sum() / MARK_AREA * rng.uniform(0.8, 1.2)))):
            for _ in range(30):
                side = int(rng.integers(22, 27))
                top, left = rng.integers(SIDE - side, size=2)
                place = slice(top, top + side), slice(left, left + side)
                if inside[place].all() and not taken[place].any():
                    field[place] = _mark(int(label), side)
                    taken[max(top - 8, 0) : top + side + 8, max(left - 8, 0) : left + side + 8] = True
                    break
    return field


def _shading(rng: np.random.Generator) -> np.ndarray:
    """(SIDE, SIDE) float32 of deviation about 1 that varies over 30 px and more."""
    coarse = Image.fromarray(rng.normal(size=(9, 9)).astype(np.float32))
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _textured(rng: np.random.Generator, regions: np.ndarray, classes: np.ndarray, seed: int) -> np.ndarray:
    """(SIDE, SIDE) float32: every region in the texture of its class, mean 0 and deviation 1."""
    fields = atlas(seed)
    result = np.empty((SIDE, SIDE), np.float32)
    for region, label in enumerate(classes):
        field = fields[label, rng.integers(fields.shape[1])]
        top, left = rng.integers(field.shape[0] - SIDE, size=2)
        inside = regions == region
        result[inside] = field[top : top + SIDE, left : left + SIDE][inside]
    return result


def as_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in 0..1 -> RGB."""
    return Image.fromarray(to_bytes(pixels).permute(1, 2, 0).numpy())


def _sharp(smooth: np.ndarray, tone: np.ndarray, texture: np.ndarray) -> Tensor:
    return torch.from_numpy(np.round(np.clip(smooth + tone * texture, 0, 1) * 255) / 255)


def scene(rng: np.random.Generator, seed: int = EVALUATION_ATLAS) -> Scene:
    """A picture; the same generator state and atlas `seed` give the same."""
    regions = _regions(rng)
    count = int(regions.max()) + 1
    classes = rng.integers(CLASSES, size=count)
    bases, light = _palette(rng, count)
    rng.random(count)  # drawn since the denoiser's pictures needed it; without it there would be other pictures
    field = MARK * _marks(rng, regions, classes) + SHADE * _shading(rng)
    tone = light[regions].transpose(2, 0, 1)
    smooth = bases[regions].transpose(2, 0, 1) + tone * (field - 0.03)
    tone = TEXTURE * tone
    sharp = _sharp(smooth, tone, _textured(rng, regions, classes, seed))
    source = as_image(sharp).resize((SIDE // FACTOR, SIDE // FACTOR), Image.Resampling.LANCZOS)
    blurred = to_tensor(source.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    return Scene(sharp, to_tensor(source), blurred, classes, regions, smooth, tone)


def evaluation_scenes(count: int, seed: int) -> Iterator[Scene]:
    """Fresh pictures; another seed, others."""
    return (scene(np.random.default_rng((seed, number, 99))) for number in range(count))


def repainted(rng: np.random.Generator, truth: Scene) -> Scene:
    """The same colours, shapes and marks with the micro-texture of another class in every region.

    Downsampled it is the same but for what a level of 255 hides; `source` and `blurred` stay those of the truth.
    """
    classes = (truth.classes + rng.integers(1, CLASSES, size=len(truth.classes))) % CLASSES
    texture = _textured(rng, truth.regions, classes, EVALUATION_ATLAS)
    return replace(truth, sharp=_sharp(truth.smooth, truth.tone, texture), classes=classes)


def repainted_scenes(count: int, seed: int) -> Iterator[tuple[Scene, Scene]]:
    """Fresh pictures, and the same repainted."""
    for number in range(count):
        rng = np.random.default_rng((seed, number, 98))
        truth = scene(rng)
        yield truth, repainted(rng, truth)
