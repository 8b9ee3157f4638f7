"""Tiles whose source shows nothing that a model could paint better: sky, walls, blurred backgrounds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RECOMMENDED = 0.9
"""`detail` below which a tile can be passed over.

Measured on 15 photographs of scikit-image's package and the 2 of scikit-learn's, enlarged 2 and 4 times with Lanczos
and cut into 4553 tiles of 128 to 512 pixels, judged by eye up to 1.3. Below 0.9 are 242: 186 of black border, 52 of the
73 of bare sky, 4 of blurred leaves, none with texture. The faintest: wires two or three levels darker than the sky,
0.94 and 1.23; mottling out of focus, 1.04; dark wood, 1.25. Sky with grain or thin clouds goes up to 2, blur up to 4.
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
