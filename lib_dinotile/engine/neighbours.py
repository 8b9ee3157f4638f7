"""Pixels and latents that earlier tiles have painted, for later ones that overlap them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_dinotile.tiling.blend import Blend
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.plan import Rect, Tiles

HALF, TRACE = 0.5, 0.02
"""Shares of a pixel: with more than the first it counts as painted, less than the second counts as nothing."""


@dataclass(frozen=True)
class PaintedNeighbours:
    """The part of one tile that neighbours have painted."""

    change: Tensor
    """(3, H, W): what they add to the source's pixels, as if with full weight."""
    hold: Tensor
    """(1, H, W) in [0, 1]: 1 for what is theirs, fading out to where they show nothing."""
    latents: Tensor
    """(C, h, w): what they were sampled as."""
    held: Tensor
    """(1, h, w), true for latent cells that are theirs."""


class Neighbours:
    """The tiles of a pass that are painted, as far as others overlap them."""

    def __init__(self, canvas: Canvas, plan: Tiles, blend: Blend, factor: int) -> None:
        """blend: the weights that tiles are painted with, on the canvas's device; factor: pixels per latent cell."""
        self._canvas, self._plan, self._blend, self._factor = canvas, plan, blend, factor
        self._done: set[Rect] = set()
        self._sampled: dict[Rect, list[tuple[Rect, Tensor]]] = {}

    def add(self, tile: Rect, latents: Tensor) -> None:
        """A tile is painted, sampled as these latents (C, h, w)."""
        self._done.add(tile)
        self._sampled.pop(tile, None)
        for other in self._plan.touching(tile):
            if other not in self._done:
                part = tile.intersection(other).within(tile).shrink(self._factor)
                self._sampled.setdefault(other, []).append((tile, part.of(latents).clone()))

    def of(self, tile: Rect) -> PaintedNeighbours | None:
        """The part of this tile that is painted so far, if any."""
        neighbours = self._sampled.get(tile)
        if not neighbours:
            return None
        factor, device = self._factor, self._canvas.device
        share = torch.zeros(1, tile.height, tile.width, device=device)
        most, latents = torch.zeros(1, tile.height // factor, tile.width // factor, device=device), None
        for other, sampled in neighbours:
            part = other.intersection(tile)
            weight = part.within(other).of(self._blend.weight(other))[None]
            part.within(tile).of(share).add_(weight)
            sampled = sampled.to(device)
            if latents is None:
                latents = sampled.new_zeros(len(sampled), *most.shape[1:])
            # A cell is as it was sampled for the tile that shows most of it.
            cells, weight = part.within(tile).shrink(factor), F.avg_pool2d(weight, factor)
            weight = weight * sampled.isfinite().all(0, keepdim=True)
            cells.of(latents).copy_(torch.where(weight > cells.of(most), sampled, cells.of(latents)))
            cells.of(most).copy_(torch.maximum(weight, cells.of(most)))
        held = (-F.max_pool2d(-(share > HALF).float(), factor) > 0) & (most > 0)
        # At the border of what is held the neighbours show alone: a step that the model leaves there is not seen.
        known = share > TRACE
        hold = (share / HALF).clamp_(max=1).mul_(known)
        change = self._canvas.change(tile).mul_(known / share.clamp_(min=TRACE))
        return PaintedNeighbours(change, hold, latents, held)
