"""A pass over the canvas, and what becomes of the tiles that are painted in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lib_dinotile.tiling.blend import Blend
from lib_dinotile.tiling.plan import Rect, Tiles


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


@dataclass
class Painted:
    """What became of a batch of tiles."""

    tiles: list[tuple[Tensor, Tensor]]
    """As they are to be painted (3, H, W), and as they were sampled (C, h, w), half precision; as many as were done."""
    notes: Sequence[str] = ()
    """What there is to say."""
    error: BaseException | None = None
    """What broke it off."""
    kept: bool = False
    """Whether the journal has them already."""
    seconds: float | None = None
    """How long a tile took, where they were not kept."""
