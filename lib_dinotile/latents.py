"""The latents that tiles start from: a field over the canvas, encoded in pieces."""

from __future__ import annotations

import functools

from torch import Tensor

from lib_dinotile.hosts.base import Host, Interrupted
from lib_dinotile.tiling.blend import Blend
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.plan import Grid, Rect, Tiles, fewest

PIECE, OVERLAP = 640, 64
"""What is encoded or decoded apart from tiles has at most so many pixels a side, or as many as a tile if that is more;
neighbours share so many."""

CACHE = 512 * 2**20
"""Bytes of encoded pieces that are kept. Those of a larger canvas are encoded again when they are needed again."""


def pieces(plan: Tiles, padded: tuple[int, int], factor: int) -> Grid:
    """The fewest pieces that cover a canvas of (width, height), multiples of `factor`."""
    limits = (max(PIECE, side) // factor * factor for side in plan.tile_size)
    (columns, width), (rows, height) = (fewest(side, limit, OVERLAP, factor) for side, limit in zip(padded, limits))
    return Grid(columns, rows, (width, height))


class SourceLatents:
    """What the tiles of a pass start from, as latents. However tiles overlap, every pixel is encoded but once."""

    def __init__(self, host: Host, canvas: Canvas, grid: Grid) -> None:
        """grid: the pieces. Nothing is encoded before it is asked for."""
        self._host, self._canvas, self._grid = host, canvas, grid
        cells = grid.shrink(host.factor)
        self._blend = Blend(cells, rim=1)
        size = host.channels * cells.tile_size[0] * cells.tile_size[1] * 4
        self._encoded = functools.lru_cache(max(1, CACHE // size))(self._encode)

    def _encode(self, piece: Rect) -> Tensor:
        if self._host.interrupted():
            raise Interrupted
        return self._host.encode(self._canvas.crop(piece, self._canvas.source(piece))[None])[0]

    def crop(self, area: Rect) -> Tensor:
        """(C, h, w) for a rectangle of the canvas in pixels, on the latent grid."""
        factor, whole, latents = self._host.factor, area.shrink(self._host.factor), None
        for piece in self._grid.touching(area):
            encoded, cells = self._encoded(piece), piece.shrink(factor)
            if latents is None:
                latents = encoded.new_zeros(encoded.shape[0], whole.height, whole.width)
            part = cells.intersection(whole)
            weight = self._blend.weight(cells)[part.within(cells).slices].to(encoded)
            latents[(slice(None), *part.within(whole).slices)] += (
                encoded[(slice(None), *part.within(cells).slices)] * weight
            )
        return latents
