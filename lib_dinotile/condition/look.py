"""What tiles show, patch by patch and in their surroundings, beside what the source shows there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_dinotile.dino.encoder import Facet, PatchEncoder
from lib_dinotile.dino.field import FeatureField
from lib_dinotile.tiling.plan import Rect

CONTEXT = 1
"""Patches around a tile that are seen with it, on each side at least. More costs more and shows little more: see
benchmarks/features.py."""


@dataclass(frozen=True)
class Look:
    """An encoder that looks at tiles of one canvas.

    A tile is seen in a window: itself and what the canvas shows around it. Windows of tiles of one size have one size;
    those at the canvas's border move inward. A patch covers on the canvas what a cell of the field does.
    """

    encoder: PatchEncoder
    field: FeatureField
    """What the source shows: the features that tiles ought to have."""
    size: tuple[int, int]
    """(width, height) of the canvas as it is worked on, in pixels."""
    layer: int = -1
    facet: Facet = "tokens"
    context: int = CONTEXT

    def window(self, tile: Rect) -> Rect:
        """What is seen of a tile and its surroundings. Its patches are cells of the field, to the pixel."""
        rows, columns = self.field.features.shape[1:]
        (x, width), (y, height) = (
            self._widen(start, side, canvas / cells, length)
            for start, side, canvas, cells, length in zip(
                (tile.x, tile.y), (tile.width, tile.height), self.field.canvas, (columns, rows), self.size
            )
        )
        return Rect(x, y, width, height)

    def _widen(self, start: int, side: int, cell: float, length: int) -> tuple[int, int]:
        # One cell more than a tile needs that begins with a cell: all have one size.
        width = round(cell * (math.ceil((side + 1) / cell) + 1 + 2 * self.context))
        if width >= length:
            return 0, length
        return min(max(round(cell * (math.floor(start / cell) - self.context)), 0), length - width), width

    def grid(self, window: Rect) -> tuple[int, int]:
        """(rows, columns) of the patches in a window."""
        (width, height), (rows, columns) = self.field.canvas, self.field.features.shape[1:]
        return max(1, round(window.height * rows / height)), max(1, round(window.width * columns / width))

    def own(self, tile: Rect) -> tuple[slice, slice]:
        """(rows, columns) of the window's patches that are the tile's own: those with their centre in it."""
        window = self.window(tile)
        inner, grid = tile.within(window), self.grid(window)
        slices = []
        for cells, length, start, end in zip(
            grid, (window.height, window.width), (inner.y, inner.x), (inner.bottom, inner.right)
        ):
            # Cell i is centred on (i + 0.5) * length / cells.
            first, last = -(-(2 * start * cells - length) // (2 * length)), (2 * end * cells - length) // (2 * length)
            first = min(max(first, 0), cells - 1)
            slices.append(slice(first, max(first + 1, min(last + 1, cells))))
        return slices[0], slices[1]

    def windows(self, crop: Callable[[Rect], Tensor], tiles: Sequence[Rect], pixels: Tensor) -> Tensor:
        """The windows (k, 3, H, W) of some tiles that show these pixels (k, 3, h, w), in [0, 1], on their device.

        crop: gives what is around them, (3, H, W) for a rectangle.
        """
        seen = torch.stack([crop(self.window(tile)) for tile in tiles]).to(pixels)
        for number, tile in enumerate(tiles):
            seen[(number, slice(None), *tile.within(self.window(tile)).slices)] = pixels[number]
        return seen

    def features(self, windows: Tensor, grid: tuple[int, int]) -> Tensor:
        """(k, D, *grid) of windows (k, 3, H, W); gradients with respect to the windows work."""
        size = [cells * self.encoder.patch for cells in grid]
        if list(windows.shape[2:]) != size:
            windows = F.interpolate(windows, size, mode="bicubic", align_corners=False, antialias=True)
        return self.encoder(windows, self.layer, self.facet)

    def targets(self, tiles: Sequence[Rect]) -> Tensor:
        """The features (k, D, h, w) that the windows of some tiles ought to have."""
        windows = [self.window(tile) for tile in tiles]
        return self.field.crop(windows, self.grid(windows[0]))

    def similarity(self, crop: Callable[[Rect], Tensor], tiles: Sequence[Rect], pixels: Tensor) -> Tensor:
        """(k, h, w), cosines in [-1, 1]: how much every patch of the windows shows what the source does.

        crop: gives what is around the tiles; pixels (k, 3, H, W) in [0, 1]: what they show.
        """
        targets = self.targets(tiles)
        windows = self.windows(crop, tiles, pixels.to(self.encoder.device))
        return F.cosine_similarity(self.features(windows, targets.shape[2:]), targets, dim=1)

    def to_pixels(self, tile: Rect, values: Tensor, mode: str = "bilinear") -> Tensor:
        """Values (h, w) of a window's patches, at the pixels (height, width) of the tile."""
        window = self.window(tile)
        smooth = {"align_corners": False} if mode == "bilinear" else {}
        spread = F.interpolate(values[None, None].float().cpu(), (window.height, window.width), mode=mode, **smooth)
        return spread[(0, 0, *tile.within(window).slices)]
