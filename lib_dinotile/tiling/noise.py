"""Noise as a field over the canvas: overlapping tiles see the same noise, and a tile never needs the whole of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lib_dinotile.tiling.plan import Rect

BLOCK = 32
"""Side of the blocks that are drawn in one piece, in latent cells."""


class NoiseField:
    """Standard normal noise over an unbounded canvas of latents, as many draws of it as are asked for.

    Every block of every draw has a random stream of its own, seeded by (seed, draw, place), so any crop costs what its
    own area costs, on every machine alike (drawn on the CPU).
    """

    def __init__(self, seed: int, channels: int, subseed: int = 0, subseed_strength: float = 0.0) -> None:
        """subseed_strength in [0, 1] turns the start noise from `seed` towards that of `subseed`."""
        self._seed, self._subseed = seed % 2**64, subseed % 2**64
        self._channels, self._subseed_strength = channels, subseed_strength

    def reseeded(self, number: int) -> NoiseField:
        """Another field, by the number-th seed after this one's; variation seed and strength stay."""
        return NoiseField(self._seed + number, self._channels, self._subseed, self._subseed_strength)

    def _block(self, seed: int, draw: int, row: int, column: int) -> np.ndarray:
        stream = np.random.default_rng([seed, draw, row, column])
        return stream.standard_normal((self._channels, BLOCK, BLOCK), dtype=np.float32)

    def _crop(self, seed: int, draw: int, area: Rect) -> Tensor:
        top, left = area.y // BLOCK, area.x // BLOCK
        rows = [
            np.concatenate(
                [self._block(seed, draw, row, column) for column in range(left, -(-area.right // BLOCK))], axis=2
            )
            for row in range(top, -(-area.bottom // BLOCK))
        ]
        y, x = area.y - top * BLOCK, area.x - left * BLOCK
        return torch.from_numpy(np.concatenate(rows, axis=1)[:, y : y + area.height, x : x + area.width].copy())

    def crop(self, areas: Sequence[Rect], draw: int) -> Tensor:
        """The noise (k, C, h, w) of k areas of one size, in latent cells, at the `draw`-th draw (from 0).

        The start noise is draw 0. Towards a subseed it goes on a great circle; two independent fields are orthogonal,
        so that is cosine and sine of a quarter turn's share.
        """
        noise = torch.stack([self._crop(self._seed, draw, area) for area in areas])
        if draw == 0 and self._subseed_strength > 0:
            turn = self._subseed_strength * math.pi / 2
            other = torch.stack([self._crop(self._subseed, draw, area) for area in areas])
            noise = math.cos(turn) * noise + math.sin(turn) * other
        return noise


class TileNoise:
    """The noise of one batch of tiles, draw after draw."""

    def __init__(self, field: NoiseField, areas: Sequence[Rect]) -> None:
        """areas: the tiles in latent cells."""
        self._field, self._areas, self._draw = field, areas, 0

    def next(self) -> Tensor:
        """The next draw (k, C, h, w), float32 on the CPU; the first one is the start noise."""
        noise = self._field.crop(self._areas, self._draw)
        self._draw += 1
        return noise
