"""What earlier tiles have painted, as a later one that overlaps them sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_dinotile.tiling.blend import Blend
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.plan import Rect

HALF, TRACE = 0.5, 0.02
"""Shares of a pixel: with more than the first it counts as painted, less than the second tells nothing of it."""

MEET = 13
"""Pixels over which a tile goes over from what its neighbours have painted to its own."""


@dataclass(frozen=True)
class Seen:
    """What neighbours show of one tile."""

    pixels: Tensor
    """(3, h, w) in [0, 1]: what they have painted, as if with full weight."""
    held: Tensor
    """(1, h, w), true for whole latent cells that are theirs."""
    hold: Tensor
    """(1, h, w) in [0, 1]: `held`, fading out at its border."""


class Neighbours:
    """The tiles of a pass that are painted."""

    def __init__(self, canvas: Canvas, blend: Blend, factor: int) -> None:
        self._canvas, self._blend, self._factor = canvas, blend, factor
        self._tiles: list[Rect] = []

    def add(self, tile: Rect) -> None:
        """A tile is painted."""
        self._tiles.append(tile)

    def seen(self, tile: Rect) -> Seen | None:
        """What the tiles painted so far show of this one, if anything."""
        share = torch.zeros(1, tile.height, tile.width)
        for other in self._tiles:
            part = other.intersection(tile)
            if part is not None:
                share[(0, *part.within(tile).slices)] += self._blend.weight(other)[part.within(other).slices]
        if not share.any():
            return None
        told = share > TRACE
        change = self._canvas.change(tile) * torch.where(told, 1 / share, 0)
        cells = -F.max_pool2d(-(share > HALF).float(), self._factor)
        held = cells.repeat_interleave(self._factor, -1).repeat_interleave(self._factor, -2)
        hold = F.avg_pool2d(held, MEET, 1, MEET // 2, count_include_pad=False) * told
        return Seen((self._canvas.source(tile) + change).clamp(0, 1), held > 0, hold)
