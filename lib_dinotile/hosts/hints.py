"""ControlNet hints are made once for the whole canvas; a tile gets its part of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lib_dinotile.dino.field import FeatureField
from lib_dinotile.tiling.plan import Rect


def is_spatial(hint: Any) -> bool:
    """Whether a hint is a picture (n, C, H, W) and not an embedding, which belongs to the image as a whole."""
    return isinstance(hint, Tensor) and hint.ndim == 4 and min(hint.shape[-2:]) > 1


def crop_hint(hint: Tensor, tiles: Sequence[Rect], canvas: tuple[int, int], image: int = 0) -> Tensor:
    """(k, C, h, w): the tiles' parts of a hint for the whole canvas (width, height).

    hint: (n, C, H, W), for the images of a batch, over and over again; image: the number of the one that is painted.

    A hint is a field over the canvas like any other. ControlNet rounds the size of its hints; one of the canvas's own
    size is cut to the bit.
    """
    return FeatureField(hint[image % len(hint)], canvas).crop(tiles, (tiles[0].height, tiles[0].width))
