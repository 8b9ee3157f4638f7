"""ControlNet hints are made once for the whole canvas; a tile gets its part of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_dinotile.tiling.plan import Rect, TilePlan


def is_spatial(hint: Any) -> bool:
    """Whether a hint is a picture (n, C, H, W) and not an embedding, which belongs to the image as a whole."""
    return isinstance(hint, Tensor) and hint.ndim == 4 and min(hint.shape[-2:]) > 1


def crop_hint(hint: Tensor, tiles: Sequence[Rect], plan: TilePlan) -> Tensor:
    """(k, C, h, w): the tiles' parts of the first of the hints (n, C, H, W) for the whole canvas.

    ControlNet rounds the size of its hints; one that is not the canvas's is resized to it. Beyond the canvas its last
    pixels are repeated, as they are in the canvas itself.
    """
    whole = hint[:1].float()
    if tuple(whole.shape[-2:]) != (plan.height, plan.width):
        whole = F.interpolate(whole, (plan.height, plan.width), mode="bilinear", align_corners=False)
    width, height = plan.padded
    whole = F.pad(whole, (0, width - plan.width, 0, height - plan.height), mode="replicate")[0]
    return torch.stack([whole[(slice(None), *tile.slices)] for tile in tiles]).to(hint)
