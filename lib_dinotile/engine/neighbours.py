"""What earlier tiles have painted, as a later one that overlaps them sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_dinotile.tiling.blend import Blend
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.plan import Rect, Tiles

HALF, TRACE = 0.5, 0.02
"""Shares of a pixel: with more than the first it counts as painted, less than the second tells nothing of it."""


@dataclass(frozen=True)
class Seen:
    """What neighbours show of one tile."""

    pixels: Tensor
    """(3, H, W) in [0, 1]: what they have painted, as if with full weight."""
    hold: Tensor
    """(1, H, W) in [0, 1]: 1 for what is theirs, fading out to where they show nothing."""
    latents: Tensor
    """(C, h, w): what they were sampled as."""
    held: Tensor
    """(1, h, w), true for latent cells that are theirs."""


class Neighbours:
    """The tiles of a pass that are painted, as far as others overlap them."""

    def __init__(self, canvas: Canvas, plan: Tiles, blend: Blend, factor: int) -> None:
        self._canvas, self._plan, self._blend, self._factor = canvas, plan, blend, factor
        self._done: set[Rect] = set()
        self._told: dict[Rect, list[tuple[Rect, Tensor]]] = {}

    def add(self, tile: Rect, latents: Tensor) -> None:
        """A tile is painted, sampled as these latents (C, h, w). Others hold on to it if those are finite."""
        self._done.add(tile)
        self._told.pop(tile, None)
        if not latents.isfinite().all():
            return
        for other in self._plan.touching(tile):
            if other not in self._done:
                part = tile.intersection(other).within(tile).shrink(self._factor)
                self._told.setdefault(other, []).append((tile, latents[(slice(None), *part.slices)].clone()))

    def seen(self, tile: Rect) -> Seen | None:
        """What the tiles painted so far show of this one, if anything."""
        told = self._told.get(tile)
        if not told:
            return None
        factor, share = self._factor, torch.zeros(1, tile.height, tile.width)
        most, latents = torch.zeros(1, tile.height // factor, tile.width // factor), None
        for other, sampled in told:
            part = other.intersection(tile)
            weight = self._blend.weight(other)[part.within(other).slices][None]
            share[(slice(None), *part.within(tile).slices)] += weight
            if latents is None:
                latents = sampled.new_zeros(len(sampled), *most.shape[1:])
            # A cell is as it was sampled for the tile that shows most of it.
            cells = (slice(None), *part.within(tile).shrink(factor).slices)
            weight = F.avg_pool2d(weight, factor)
            latents[cells] = torch.where(weight > most[cells], sampled, latents[cells])
            most[cells] = torch.maximum(weight, most[cells])
        if not share.any():
            return None
        known = share > TRACE
        change = self._canvas.change(tile) * torch.where(known, 1 / share, 0)
        held = -F.max_pool2d(-(share > HALF).float(), factor) > 0
        # At the border of what is held the neighbours show alone: a step that the model leaves there is not seen.
        hold = (share / HALF).clamp(max=1) * known
        return Seen((self._canvas.source(tile) + change).clamp(0, 1), hold, latents, held)
