"""Patch features of tiles in their surroundings, compared with those of the source."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_dinotile.dino.encoder import Facet, PatchEncoder, bicubic
from lib_dinotile.dino.field import FeatureField
from lib_dinotile.tiling.plan import Rect

CONTEXT = 1
"""Patches around a tile that are seen with it, on each side at least. More costs more and shows little more: see
benchmarks/world/README.md."""


@dataclass(frozen=True)
class TileFeatures:
    """Extracts and compares the features of tiles of one canvas.

    A tile is seen in a window: itself and what the canvas shows around it. Windows of tiles of one size have one size;
    those at the canvas's border move inward. A patch covers on the canvas what a cell of the field does.
    """

    encoder: PatchEncoder
    field: FeatureField
    """The source's features, which tiles ought to have."""
    size: tuple[int, int]
    """(width, height) of the canvas as it is worked on, in pixels."""
    layer: int = -1
    facet: Facet = "tokens"
    context: int = CONTEXT
    shift: tuple[float, float] = (0.0, 0.0)
    """How far windows lie beside the field's grid, in shares of a patch, across and down. At the canvas's borders a
    shifted window does not show all of a tile. Tiles of one patch or less are seen as they are."""

    @property
    def cell(self) -> float:
        """Pixels of the canvas along a patch."""
        return self.field.canvas[0] / self.field.features.shape[2]

    def shifted(self, across: float, down: float) -> TileFeatures:
        """The same with windows that lie elsewhere."""
        return replace(self, shift=(across, down))

    def window(self, tile: Rect) -> Rect:
        """The rectangle that is encoded for a tile, with its surroundings. Unless it is shifted its patches are cells
        of the field."""
        rows, columns = self.field.features.shape[1:]
        (x, width), (y, height) = (
            self._widen(start, side, canvas / cells, length, shift)
            for start, side, canvas, cells, length, shift in zip(
                (tile.x, tile.y), (tile.width, tile.height), self.field.canvas, (columns, rows), self.size, self.shift
            )
        )
        return Rect(x, y, width, height)

    def _widen(self, start: int, side: int, cell: float, length: int, shift: float) -> tuple[int, int]:
        """(start, width) of windows along one axis: in whole cells, and as many for every tile of this size."""
        # One cell more than a tile needs that begins with a cell.
        width = round(cell * (math.ceil((side + 1) / cell) + 1 + 2 * self.context))
        if shift == 0 or side <= cell or length < 2 * cell:
            width = min(width, length)
            return min(max(round(cell * (math.floor(start / cell) - self.context)), 0), length - width), width
        width = min(width, round(length - cell))
        first = cell * (math.floor(start / cell - shift) - self.context + shift)
        first += cell * max(0, math.ceil(-first / cell))
        first -= cell * max(0, math.ceil((first + width - length) / cell))
        return min(max(round(first), 0), length - width), width

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

    def share(self, tile: Rect) -> Tensor:
        """(h, w) in [0, 1]: how much of each of the window's patches is the tile's."""
        window = self.window(tile)
        whole = torch.zeros(window.height, window.width)
        whole[tile.intersection(window).within(window).slices] = 1
        return F.adaptive_avg_pool2d(whole[None, None], self.grid(window))[0, 0]

    def windows(self, crop: Callable[[Rect], Tensor], tiles: Sequence[Rect], pixels: Tensor) -> Tensor:
        """The windows (k, 3, H, W) of some tiles that show these pixels (k, 3, h, w), in [0, 1], on their device.

        crop: gives what is around them, (3, H, W) for a rectangle.
        """
        seen = torch.stack([crop(self.window(tile)) for tile in tiles]).to(pixels)
        for number, tile in enumerate(tiles):
            window = self.window(tile)
            part = tile.intersection(window)
            shown = pixels[(number, slice(None), *part.within(tile).slices)]
            seen[(number, slice(None), *part.within(window).slices)] = shown
        return seen

    def features(self, windows: Tensor, grid: tuple[int, int]) -> Tensor:
        """(k, D, *grid) of windows (k, 3, H, W); gradients with respect to the windows work."""
        return self.encoder(self.resized(windows, grid), self.layer, self.facet)

    def resized(self, windows: Tensor, grid: Sequence[int]) -> Tensor:
        """Windows (k, 3, H, W), as large as the encoder wants them for a grid of (rows, columns) of patches."""
        size = [cells * self.encoder.patch for cells in grid]
        if list(windows.shape[2:]) != size:
            windows = bicubic(windows, size, antialias=True)
        return windows

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
        spread = F.interpolate(values[None, None].float(), (window.height, window.width), mode=mode, **smooth)
        return spread[(0, 0, *tile.within(window).slices)]
