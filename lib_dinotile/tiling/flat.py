"""Tiles whose source shows nothing that a model could paint better: sky, walls, blurred backgrounds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RECOMMENDED = 1.0
"""`detail` below which a tile can be passed over.

Measured on 15 photographs of scikit-image's package and the 2 of scikit-learn's, enlarged 2 and 4 times with Lanczos and
cut into 2807 tiles of 256 and 512 pixels; those below 1.8 were looked at. Below 1.0 are 141: 105 of black border, 29 of
the 39 of bare sky, 7 of blurred leaves. The faintest texture: mottling out of focus, 1.04; wires on a sky, 1.23; dark wood,
1.25; tissue, 1.4. The sky goes up to 2.0 with grain and clouds. Independent noise of 1.5 levels per channel is still flat.
"""

BLOCK = 16
"""Side of the blocks whose contrast is measured, in pixels of the halved tile."""


def detail(pixels: Tensor) -> float:
    """How much detail the source of a tile shows, in levels of 255; pixels are (3, h, w) in [0, 1], of any size.

    The contrast of the liveliest block, so it does not matter how small the part with detail is: the standard deviation
    of the brightness around the plane that fits it best, so a gradient has none. Blocks overlap by half. The tile is
    halved first, which takes more of the noise than of what has been enlarged two times and more; in a source of the
    tile's own size a line one pixel wide counts for half.
    """
    grey = torch.einsum("chw,c->hw", pixels, torch.tensor([0.299, 0.587, 0.114])) * 255
    size = [max(1, side // 2) for side in grey.shape]
    blocks = F.interpolate(grey[None, None], size, mode="bilinear", antialias=True)[0, 0]
    for axis, length in enumerate(size):  # at last (rows, columns, height, width)
        side = min(BLOCK, length)
        starts = [*range(0, length - side, BLOCK // 2), length - side]
        blocks = blocks.unfold(axis, side, 1).index_select(axis, torch.tensor(starts))
    blocks = blocks - blocks.mean((2, 3), keepdim=True)
    variance = blocks.square().mean((2, 3))
    for side, shape in zip(blocks.shape[2:], ((-1, 1), (1, -1))):  # less what the slopes of the plane account for
        ramp = torch.linspace(-1, 1, side).view(shape)
        variance -= (blocks * ramp).mean((2, 3)).square() / ramp.square().mean()
    return variance.max().clamp(min=0).sqrt().item()
