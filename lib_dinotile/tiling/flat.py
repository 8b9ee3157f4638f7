"""Tiles whose source shows nothing that is worth painting."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RECOMMENDED = 1.3
"""`detail` below which a tile can be passed over."""

BLOCK = 16
"""Side of the blocks whose contrast is measured, in pixels of the halved tile."""


def detail(pixels: Tensor) -> float:
    """The contrast of the liveliest place of a tile (3, h, w) in [0, 1], in levels of 255."""
    grey = torch.einsum("chw,c->hw", pixels, pixels.new_tensor([0.299, 0.587, 0.114])) * 255
    size = [max(1, side // 2) for side in grey.shape]
    blocks = F.interpolate(grey[None, None], size, mode="bilinear", antialias=True)[0, 0]
    for axis, length in enumerate(size):
        side = min(BLOCK, length)
        starts = [*range(0, length - side, BLOCK // 2), length - side]
        blocks = blocks.unfold(axis, side, 1).index_select(axis, torch.tensor(starts))
    blocks = blocks - blocks.mean((2, 3), keepdim=True)
    variance = blocks.square().mean((2, 3))
    for axis in (2, 3):
        side = blocks.shape[axis]
        ramp = torch.arange(side) - (side - 1) / 2
        ramp = ramp[:, None] if axis == 2 else ramp
        variance -= (blocks * ramp).mean((2, 3)).square() / ramp.square().mean().clamp(min=0.01)
    return variance.max().clamp(min=0).sqrt().item()
