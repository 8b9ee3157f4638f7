"""The guard: does a painted tile still show what the source shows?

Its measure is one minus the cosine of `TileFeatures`, patch by patch. Features of a sharp picture differ from
those of the blurred one that it was made from even where both show the same. How much they may differ is known

- by the restoration head, if there is one: it was measured when that was trained;
- else by a rehearsal with this very source: it is shrunk by the scale once more, and how far the source looks from that
  is how far a true result may look from the source. A patch is in doubt only if it is also that much farther away than
  the plain enlarged source at its place, seen in the same way. (Of the plain source beside itself alone little can be
  learned: it is blurred on both sides.)

What a model invents covers more than a patch: single patches are no doubt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_dinotile.dino.field import FeatureField
from lib_dinotile.dino.head import Floor
from lib_dinotile.dino.tile_features import TileFeatures
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.plan import Rect

GUARD_LAYER, OTHER_LAYER = -1, -2
"""The layer whose tokens it compares, and the one where guidance has steered by that."""
LEAST_SCALE = 1.5
"""How much the source is shrunk for the rehearsal, at least."""


@dataclass
class Verdict:
    """The guard's findings at a tile, and its actions."""

    before: float
    """Lowest cosine of two by two patches with the source, as the tile was painted first."""
    after: float
    """The same at last."""
    doubt_before: float
    """Share of the tile's patches that were in doubt."""
    doubt_after: float
    """The same at last."""
    retries: int = 0
    seeds: tuple[int, ...] = ()
    """The seeds of the retries, counted from the image's own: 1 is the next."""
    blended: float = 0.0
    """Share of the tile's patches that were blended back to the source."""


class Guard:
    """Judges the tiles of one canvas."""

    def __init__(
        self, tile_features: TileFeatures, canvas: Canvas, floor: Floor, strictness: float, relative: bool
    ) -> None:
        """floor: of what is true; relative: whether also the plain enlarged source must look better. (With a head it
        is no measure: it is as far from what is aimed at as a wrong result.)"""
        self._tile_features, self._canvas, self._relative = tile_features, canvas, relative
        self.limit = floor.limit(strictness)
        """Distance from which on a patch is in doubt."""

    def distances(self, tiles: Sequence[Rect], pixels: Tensor) -> Tensor:
        """One minus the cosine (k, h, w) of the windows' patches, on the CPU, for tiles that show pixels (k, 3, H, W).

        Where the inpaint mask leaves the picture alone, that is what shows.
        """
        shown = torch.stack([self._canvas.crop(tile, image) for tile, image in zip(tiles, pixels)])
        return 1 - self._tile_features.similarity(self._canvas.crop, tiles, shown).cpu()

    def window(self, tile: Rect) -> Rect:
        """The part of the canvas that a tile is judged by: itself and what is around it."""
        return self._tile_features.window(tile)

    def plain(self, tile: Rect) -> Tensor:
        """The distances (h, w) of the plain enlarged source."""
        return self.distances([tile], self._canvas.source(tile)[None])[0]

    def score(self, tile: Rect, distances: Tensor, free: Tensor | None = None) -> float:
        """The lowest cosine of two by two of a tile's own patches; free as for `doubt`."""
        own = self.own(tile, distances, free)
        sides = [min(2, side) for side in distances.shape]
        mean = F.avg_pool2d(torch.where(own, 1 - distances, 1.0)[None, None], sides, 1)
        return float(mean.min())

    def doubt(
        self,
        tile: Rect,
        distances: Tensor,
        free: Tensor | None = None,
        plain: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """(h, w), true for the window's patches that are the tile's own and in doubt.

        free: (H, W) in [0, 1], the share of each pixel that the tile may change, if not all; patches that it may
        hardly change are not in doubt. plain: gives the distances of the plain enlarged source; it is asked for only
        where there are any to doubt.
        """
        doubt = self.own(tile, distances, free) & ~(distances <= self.limit)
        if self._relative and _blocks(doubt).any():
            doubt &= ~(distances - (self.plain(tile) if plain is None else plain()) <= self.limit)
        return _blocks(doubt)

    def own(self, tile: Rect, distances: Tensor, free: Tensor | None = None) -> Tensor:
        """(h, w), true for the window's patches that are the tile's own to change; all if it may hardly change any."""
        own = torch.zeros(distances.shape, dtype=torch.bool)
        own[self._tile_features.own(tile)] = True
        if free is None:
            return own
        window = self.window(tile)
        whole = torch.zeros(window.height, window.width)
        whole[tile.within(window).slices] = free
        mine = own & (F.adaptive_avg_pool2d(whole[None, None], distances.shape)[0, 0] > 0.5)
        return mine if mine.any() else own

    def to_pixels(self, tile: Rect, values: Tensor, mode: str = "bilinear") -> Tensor:
        """Values (h, w) of a window's patches, at the pixels (H, W) of the tile."""
        return self._tile_features.to_pixels(tile, values, mode)

    def area(self, tile: Rect, patches: Tensor) -> Tensor:
        """(1, H, W) in [0, 1], on the canvas's device: 1 for the pixels of these patches (h, w) of the window, fading
        out over half of one."""
        return self._tile_features.to_pixels(tile, patches.to(self._canvas.device))[None].clamp(max=0.25) * 4


def _blocks(patches: Tensor) -> Tensor:
    """Of (h, w) those that are part of two by two that are all true (a morphological opening)."""
    height, width = (min(2, side) for side in patches.shape)
    whole = -F.max_pool2d(-patches[None, None].float(), (height, width), 1)
    grown = F.pad(whole, (width - 1, width - 1, height - 1, height - 1))
    return F.max_pool2d(grown, (height, width), 1)[0, 0] > 0


def rehearsal_size(source: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """(width, height) that a source of (width, height) is shrunk to, to be to itself as it is to its canvas."""
    scale = max(LEAST_SCALE, *(large / small for large, small in zip(canvas, source)))
    width, height = (max(1, round(side / scale)) for side in source)
    return width, height


def rehearse(source: FeatureField, shrunk: FeatureField) -> Floor:
    """How far a true result may look from its source: as far as that from itself shrunk by as much."""
    whole = Rect(0, 0, *source.canvas)
    blurred = shrunk.crop([whole], source.features.shape[1:])[0]
    return Floor.of(1 - F.cosine_similarity(source.features, blurred, dim=0).flatten())
