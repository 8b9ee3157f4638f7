"""Micro-textures that downsampling by 4 takes away: one field a class, without colour.

Each painter takes a generator and a side in px and returns (side, side) float64 of any scale; `atlas` brings them to
one contrast. Periods are 2.5 to 6 px. What a picture 4 times smaller could still hold is filtered out: frequencies of
at most `LOWEST` cycles/px in both directions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

LOWEST = 0.165
"""Cycles/px; half the sampling rate of a picture 4 times smaller is 0.125."""

Painter = Callable[[np.random.Generator, int], np.ndarray]
Gain = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _filtered(field: np.ndarray, gain: Gain) -> np.ndarray:
    """The field with its spectrum times `gain(fy, fx)`, frequencies in cycles/px; deviation 1."""
    fy, fx = np.meshgrid(np.fft.fftfreq(field.shape[0]), np.fft.rfftfreq(field.shape[1]), indexing="ij")
    field = np.fft.irfft2(np.fft.rfft2(field) * gain(fy, fx), s=field.shape)
    return field / field.std()


def _smooth(rng: np.random.Generator, side: int, period: float) -> np.ndarray:
    """(side, side) noise without detail finer than about `period` px, deviation 1."""
    return _filtered(rng.normal(size=(side, side)), lambda fy, fx: np.exp(-0.5 * (np.hypot(fy, fx) * period) ** 2))


def _strands(rng: np.random.Generator, side: int, angle: float, frequency: float, along: float) -> np.ndarray:
    """Lines at `angle`: noise of `frequency` cycles/px across them, `along` (deviation) along them."""

    def gain(fy: np.ndarray, fx: np.ndarray) -> np.ndarray:
        u, v = fx * np.cos(angle) + fy * np.sin(angle), fy * np.cos(angle) - fx * np.sin(angle)
        return np.exp(-0.5 * ((np.abs(v) - frequency) / 0.03) ** 2 - 0.5 * (u / along) ** 2)

    return np.tanh(1.5 * _filtered(rng.normal(size=(side, side)), gain))


def fur(rng: np.random.Generator, side: int) -> np.ndarray:
    """Hairs that fall to the lower right."""
    return _strands(rng, side, np.pi / 4, 0.27, 0.02)


def cloth(rng: np.random.Generator, side: int) -> np.ndarray:
    """A plain weave, four pixels a pair of threads."""
    y, x = np.mgrid[0:side, 0:side] + 0.5 + np.stack([_smooth(rng, side, 24), _smooth(rng, side, 24)]) * 0.4
    return np.tanh(2 * np.sin(np.pi * x / 2) * np.sin(np.pi * y / 2))


def leaves(rng: np.random.Generator, side: int) -> np.ndarray:
    """Veins: chevrons that point up."""
    y, x = np.mgrid[0:side, 0:side] + np.stack([_smooth(rng, side, 24), _smooth(rng, side, 24)]) * 0.4
    fold = np.abs((x % 16) - 8)
    return np.sin(2 * np.pi * (0.26 * y - 0.17 * fold))


def pebbles(rng: np.random.Generator, side: int) -> np.ndarray:
    """Round stones of 4 px with dark gaps."""
    ring = _filtered(
        rng.normal(size=(side, side)), lambda fy, fx: np.exp(-0.5 * ((np.hypot(fy, fx) - 0.225) / 0.02) ** 2)
    )
    return np.clip(ring, -1.5, 0.7)


def brick(rng: np.random.Generator, side: int) -> np.ndarray:
    """A running bond, bricks of 6 x 3 px."""
    y, x = np.mgrid[0:side, 0:side] + 0.5 + np.stack([_smooth(rng, side, 24), _smooth(rng, side, 24)]) * 0.25
    row = np.floor(y / 3)
    flat = np.minimum((y % 3), 3 - (y % 3)) / 1.5
    end = np.minimum((x + 3 * (row % 2)) % 6, 6 - (x + 3 * (row % 2)) % 6) / 1.5
    return np.clip(np.minimum(flat, end), 0, 0.7)


def bark(rng: np.random.Generator, side: int) -> np.ndarray:
    """Ridges that run upwards, with cracks between them."""
    return np.clip(_strands(rng, side, np.pi / 2, 0.23, 0.03), -1, 0.4)


def water(rng: np.random.Generator, side: int) -> np.ndarray:
    """Ripples that run from left to right."""
    y, _ = np.mgrid[0:side, 0:side] + _smooth(rng, side, 40) * 1.0
    return np.sin(2 * np.pi * y / 4)


def sand(rng: np.random.Generator, side: int) -> np.ndarray:
    """Grains of 2 to 3 px."""
    return _filtered(rng.normal(size=(side, side)), lambda fy, fx: 1 / (1 + np.exp(-(np.hypot(fy, fx) - 0.36) / 0.02)))


TEXTURES: dict[str, Painter] = {
    painter.__name__: painter for painter in (fur, cloth, leaves, pebbles, brick, bark, water, sand)
}
"""Name of the class -> its painter; a label is the position in this table."""
CLASSES = len(TEXTURES)


def _finish(field: np.ndarray) -> np.ndarray:
    """High-passed, deviation 1, nothing beyond 2.2."""
    kept = _filtered(field, lambda fy, fx: 1 / (1 + np.exp(-(np.maximum(np.abs(fy), fx) - LOWEST) / 0.004)))
    return np.clip(kept, -2.2, 2.2).astype(np.float32)


@lru_cache(maxsize=4)
def atlas(seed: int, side: int = 512, variants: int = 3) -> np.ndarray:
    """(CLASSES, variants, side, side) float32 fields of mean 0 and deviation 1 whose edges nearly meet."""
    return np.stack(
        [
            [_finish(painter(np.random.default_rng((seed, label, i)), side)) for i in range(variants)]
            for label, painter in enumerate(TEXTURES.values())
        ]
    )
