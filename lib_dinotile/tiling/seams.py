"""The seam pass: tiles along the borders of a plan's tiles, painted over them in a band that fades out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lib_dinotile.tiling.blend import RIM, Blend
from lib_dinotile.tiling.plan import Grid, Size, TilePlan, ceil_to

SEAMS = ("none", "bands", "half tile", "half tile + crossings")


@dataclass(frozen=True)
class _Bands:
    """Strips of tiles across the borders along one axis."""

    starts: Sequence[int]
    side: int
    weights: dict[int, torch.Tensor]

    @classmethod
    def across(cls, starts: Sequence[int], tile: int, length: int, width: int, context: int, factor: int) -> _Bands:
        """starts, tile: the plan's; length: of its padded canvas; width: of the band that is painted."""
        # Tiles feather into each other over the whole overlap: the border is its middle.
        borders = [(right + left + tile) / 2 for left, right in itertools.pairwise(starts)]
        side = min(tile, ceil_to(width + 2 * context, factor))
        width = max(factor, min(width, side - 2 * factor))  # corners are rounded: it fades out within the tile
        corners = [
            min(max(round((border - side / 2) / factor) * factor, 0), length - side) if length > side else 0
            for border in borders
        ]

        def tent(border: float, corner: int) -> torch.Tensor:
            pixels = torch.arange(corner, corner + side, dtype=torch.float64) + 0.5
            return (1 - (pixels - border).abs() * 2 / width).clamp(min=0)

        weights = {}
        for border, corner in zip(borders, corners):
            near = [other for other in borders if abs(other - border) < 2 * side]  # further ones do not reach it
            total = sum(tent(other, corner) for other in near)  # over one where bands meet
            weights[corner] = (tent(border, corner) / total.clamp(min=1)).float()
        return cls(list(weights), side, weights)


def seam_passes(plan: TilePlan, seams: str, width: int) -> list[tuple[Grid, Blend]]:
    """The passes over the borders between the plan's tiles, one after the other, with the weights to paint them with.

    `bands`: first along vertical borders, then along horizontal ones, `width` pixels of them; a tile shows the plan's
    overlap on both sides of that besides. `half tile`: bands as wide as a tile, so tiles are shifted by half of one.
    `half tile + crossings`: then also tiles centred on the points where borders cross. Weights are one on the border
    and fall to zero at the edge of the band.
    """
    if seams not in SEAMS:
        raise ValueError(f"seams {seams!r} is none of {', '.join(SEAMS)}")
    if seams == "none":
        return []
    order = "linear" if plan.order == "linear" else "chess"
    (tile_width, tile_height), (columns, rows) = plan.tile_size, (plan.columns, plan.rows)
    across, down = (
        _Bands.across(starts, tile, length, width if seams == "bands" else tile, plan.overlap, plan.factor)
        for starts, tile, length in zip((columns, rows), plan.tile_size, plan.padded)
    )
    vertical = Grid(across.starts, rows, Size(across.side, tile_height), order)
    horizontal = Grid(columns, down.starts, Size(tile_width, down.side), order)
    passes = [
        (vertical, Blend(vertical, RIM, across=across.weights)),
        (horizontal, Blend(horizontal, RIM, down=down.weights)),
    ]
    if seams == "half tile + crossings":
        crossings = Grid(across.starts, down.starts, Size(across.side, down.side), order)
        passes.append((crossings, Blend(crossings, RIM, across.weights, down.weights)))
    return [entry for entry in passes if len(entry[0])]
