"""Between pixels and latents: a field over the canvas, encoded and decoded in pieces."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lib_dinotile.engine.host import Host, Interrupted
from lib_dinotile.engine.sampling import in_full_precision, is_out_of_memory
from lib_dinotile.tiling.blend import RIM, Blend
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.plan import Grid, Rect, Tiles, fewest

PIECE, LEAST, OVERLAP = 640, 256, 64
"""What is encoded or decoded apart from tiles has at most so many pixels a side, or as many as a tile if that is more;
if the memory does not hold it, half as many again and again, but no fewer than the second. Neighbours share some."""

CACHE = 128 * 2**20
"""Bytes of encoded pieces that are kept. Those of a larger canvas are encoded again when they are needed again."""


def pieces(plan: Tiles, padded: tuple[int, int], factor: int) -> Grid:
    """The fewest pieces that cover a canvas of (width, height), multiples of `factor`."""
    return _cut(Rect(0, 0, *padded), [max(PIECE, side) for side in plan.tile_size], factor)


def _cut(area: Rect, limits: list[int], factor: int) -> Grid:
    """The fewest pieces of at most (width, height) that cover the area."""
    (columns, width), (rows, height) = (
        fewest(side, limit // factor * factor, OVERLAP, factor)
        for side, limit in zip((area.width, area.height), limits)
    )
    return Grid([area.x + x for x in columns], [area.y + y for y in rows], (width, height))


def _halves(area: Rect, factor: int) -> Grid | None:
    """The area in two or four parts; None if that is no use any more."""
    limits = [max(LEAST, math.ceil((side + OVERLAP) / 2 / factor) * factor) for side in (area.width, area.height)]
    grid = _cut(area, limits, factor)
    return grid if len(grid) > 1 else None


def _encode(host: Host, canvas: Canvas, note: Callable[[str], None], piece: Rect) -> Tensor:
    """(C, h, w): a piece's latents, in full precision if they are not numbers else, in parts if memory runs out."""
    if host.interrupted():
        raise Interrupted
    pixels = canvas.crop(piece, canvas.source(piece))[None]
    try:
        latents = host.encode(pixels)[0]
        if not latents.isfinite().all():
            mended = in_full_precision(host, lambda: host.encode(pixels)[0])
            if mended is None or not mended.isfinite().all():
                note(f"the VAE gave what is not a number for the picture at {piece.x}, {piece.y}")
            else:
                line = "was encoded again in full precision: the VAE gave what is not a number"
                note(f"the picture at {piece.x}, {piece.y} {line}")
            latents = latents if mended is None else mended.to(latents)
        return latents
    except Exception as error:
        halves = _halves(piece, host.factor)
        if halves is None or not is_out_of_memory(error):
            raise
    host.free_memory()
    return SourceLatents(host, canvas, halves, note).crop(piece)


class SourceLatents:
    """What the tiles of a pass start from, as latents. However tiles overlap, a pixel is not encoded for each anew."""

    def __init__(self, host: Host, canvas: Canvas, grid: Grid, note: Callable[[str], None]) -> None:
        """grid: the pieces; note: tells the user. Nothing is encoded before it is asked for."""
        self._factor, self._grid = host.factor, grid
        cells = grid.shrink(host.factor)
        self._blend = Blend(cells, rim=1)
        size = host.channels * cells.tile_size[0] * cells.tile_size[1] * 4
        self._encoded = functools.lru_cache(max(1, CACHE // size))(functools.partial(_encode, host, canvas, note))

    def crop(self, area: Rect) -> Tensor:
        """(C, h, w) for a rectangle of the canvas in pixels, on the latent grid."""
        whole, latents = area.shrink(self._factor), None
        for piece in self._grid.touching(area):
            cells = piece.shrink(self._factor)
            part = cells.intersection(whole)
            weight = self._blend.weight(cells)[part.within(cells).slices]
            if not weight.any():
                continue
            encoded = self._encoded(piece)[(slice(None), *part.within(cells).slices)]
            if latents is None:
                latents = encoded.new_zeros(encoded.shape[0], whole.height, whole.width)
            weight = weight.to(encoded)
            latents[(slice(None), *part.within(whole).slices)] += torch.where(weight > 0, encoded, 0) * weight
        return latents


def decode(host: Host, latents: Tensor, area: Rect) -> Tensor:
    """Pixels (3, H, W) of latents (1, C, h, w) that lie there; in parts if memory runs out."""
    try:
        return host.decode(latents)[0]
    except Exception as error:
        halves = _halves(area, host.factor)
        if halves is None or not is_out_of_memory(error):
            raise
    host.free_memory()
    pixels, blend = torch.zeros(3, area.height, area.width), Blend(halves, RIM)
    for part in halves.tiles:
        inner = part.within(area)
        cut = latents[(slice(None), slice(None), *inner.shrink(host.factor).slices)]
        pixels[(slice(None), *inner.slices)] += decode(host, cut, part) * blend.weight(part)
    return pixels
