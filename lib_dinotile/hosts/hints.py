"""ControlNet hints are made once for the whole canvas; a tile gets its part of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lib_dinotile.dino.field import FeatureField
from lib_dinotile.tiling.plan import Rect, TilePlan


def is_spatial(hint: Any) -> bool:
    """Whether a hint is a picture (n, C, H, W) and not an embedding, which belongs to the image as a whole."""
    return isinstance(hint, Tensor) and hint.ndim == 4 and min(hint.shape[-2:]) > 1


def crop_hint(hint: Tensor, tiles: Sequence[Rect], plan: TilePlan) -> Tensor:
    """(k, C, h, w): the tiles' parts of the first of the hints (n, C, H, W) for the whole canvas.

    A hint is a field over the canvas like any other. ControlNet rounds the size of its hints; one of the canvas's own
    size is cut to the bit.
    """
    width, height = plan.tile_size
    return FeatureField(hint[0], (plan.width, plan.height)).crop(tiles, (height, width))
