"""The passes over a canvas, one on top of the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lib_dinotile.settings import Settings
from lib_dinotile.tiling.blend import RIM, Blend
from lib_dinotile.tiling.plan import Rect, TilePlan, Tiles
from lib_dinotile.tiling.seams import seam_passes


@dataclass(frozen=True)
class Pass:
    """Tiles that are painted over what the passes before have painted."""

    number: int
    """From 0."""
    plan: Tiles
    blend: Blend
    tiles: Sequence[Rect]
    """Those of the plan that are painted, row by row."""
    denoise: float | None
    """Denoising strength, if not the generation's own."""
    steps: int
    """Sampling steps that a tile takes."""

    def cost(self, steps: int) -> int:
        """The sampling work of one tile: its pixels times the steps."""
        return math.prod(self.plan.tile_size) * steps

    @property
    def work(self) -> int:
        """The sampling work of all its tiles, each painted once."""
        return len(self.tiles) * self.cost(self.steps)


def passes(plan: TilePlan, settings: Settings) -> list[tuple[Tiles, Blend, float | None]]:
    """The plan, and the seam pass over it, with their weights and denoising strength."""
    seams = seam_passes(plan, settings.seams, settings.seam_width)
    first = [] if settings.order == "none" else [(plan, Blend(plan, RIM), None)]
    return first + [(grid, blend, settings.seam_denoise) for grid, blend in seams]
