"""How much of a pixel each tile paints."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lib_dinotile.tiling.plan import Rect, Tiles

RIM = 8
"""Pixels of a tile's edge that are not painted where a neighbour paints them: the model saw nothing beyond it."""


def _ramp(start: int, starts: Sequence[int], tile: int, rim: int) -> Tensor:
    """Weights (tile,) of the tile at `start` along one axis: they sum to one over all tiles at every pixel.

    Where two tiles overlap, the weight goes over from one to the other linearly, but for the outer `rim` of each (at
    most a quarter of the overlap), where a model that cannot look beyond a tile's edge paints worst. Where border tiles
    crowd and more than two overlap, the linear weights are normalised.
    """
    pixels = torch.arange(start, start + tile, dtype=torch.float64) + 0.5

    def rise(inward: Tensor, overlap: int) -> Tensor:
        cut = min(rim, overlap // 4)
        return (inward - cut) / ((overlap - 2 * cut) or 1)

    def tent(index: int) -> Tensor:
        left, weight = starts[index], torch.ones_like(pixels)
        if index > 0:
            weight = weight.minimum(rise(pixels - left, starts[index - 1] + tile - left))
        if index < len(starts) - 1:
            weight = weight.minimum(rise(left + tile - pixels, left + tile - starts[index + 1]))
        return weight.clamp(min=0)

    near = [i for i, other in enumerate(starts) if abs(other - start) < tile]
    total = torch.stack([tent(i) for i in near]).sum(0)
    return (tent(starts.index(start)) / total).float()


class Blend:
    """The feathered weights of tiles: a partition of unity over what they cover.

    The tiles are a grid, so the weight of a tile is the product of a row of weights and a column of weights, each a
    partition of unity by itself; nothing of the canvas's size is kept.
    """

    def __init__(
        self,
        plan: Tiles,
        rim: int = 0,
        across: Mapping[int, Tensor] | None = None,
        down: Mapping[int, Tensor] | None = None,
    ) -> None:
        """rim: how much of a tile's edge has no weight where another tile is there to show it, a quarter of what they
        share at most; across, down: other weights (width,) and (height,) for the tiles at these columns and rows."""
        width, height = plan.tile_size
        self._across = across or {x: _ramp(x, plan.columns, width, rim) for x in plan.columns}
        self._down = down or {y: _ramp(y, plan.rows, height, rim) for y in plan.rows}

    def weight(self, tile: Rect) -> Tensor:
        """Weights (height, width) of a tile of the plan, in [0, 1]."""
        return self._down[tile.y][:, None] * self._across[tile.x][None, :]

    def over(self, area: Rect, values: Tensor) -> Tensor:
        """Values (C, rows, columns), one for each tile of the plan, blended at the pixels (C, height, width) there, on
        the device of the values."""
        down, rows = _matrix(self._down, area.y, area.height)
        across, columns = _matrix(self._across, area.x, area.width)
        return torch.einsum("crk,ry,kx->cyx", values[:, rows][:, :, columns], down.to(values), across.to(values))

    def to(self, device: torch.device | str) -> Blend:
        """The same, on a device."""
        moved = copy.copy(self)
        moved._across = {x: row.to(device) for x, row in self._across.items()}
        moved._down = {y: column.to(device) for y, column in self._down.items()}
        return moved


def _matrix(weights: Mapping[int, Tensor], start: int, length: int) -> tuple[Tensor, slice]:
    """Weights (n, length) of the n tiles along an axis that show any of [start, start + length), and which they are."""
    starts = sorted(weights)
    near = [number for number, at in enumerate(starts) if at - length < start < at + len(weights[at])]
    rows = weights[starts[0]].new_zeros(len(near), length)
    for row, number in zip(rows, near):
        at, own = starts[number], weights[starts[number]]
        low, high = max(at, start), min(at + len(own), start + length)
        row[low - start : high - start] = own[low - at : high - at]
    return rows, slice(near[0], near[-1] + 1) if near else slice(0, 0)
