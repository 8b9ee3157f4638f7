"""The canvas: the upscaled image and what has been painted on it so far."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib_dinotile.tiling.plan import Rect, TilePlan


class Canvas:
    """Pixels that tiles are cropped from and painted onto.

    Kept as the upscaled image (8 bit) plus what the tiles changed (half precision), so a tile that comes back as it was
    leaves the canvas as it was, and an unfinished canvas goes over from painted to upscaled without a border. What a
    crop or a painted tile costs does not depend on the size of the canvas.
    """

    def __init__(self, image: Image.Image, plan: TilePlan) -> None:
        """image: RGB, of the plan's size. Beyond its right and lower border its last pixels are repeated."""
        if image.size != (plan.width, plan.height):
            raise ValueError(f"image of {image.size} on a canvas of {(plan.width, plan.height)}")
        width, height = plan.padded
        border = ((0, height - plan.height), (0, width - plan.width), (0, 0))
        pixels = np.pad(np.array(image.convert("RGB")), border, mode="edge")
        self._size = image.size
        self._source = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        self._change = torch.zeros(self._source.shape, dtype=torch.float16)

    def source(self, tile: Rect) -> Tensor:
        """The upscaled image's pixels (3, h, w) in [0, 1]."""
        return self._source[(slice(None), *tile.slices)].float() / 255

    def crop(self, tile: Rect) -> Tensor:
        """The canvas's pixels (3, h, w) in [0, 1], with what is painted already."""
        return (self.source(tile) + self._change[(slice(None), *tile.slices)].float()).clamp(0, 1)

    def paint(self, tile: Rect, pixels: Tensor, weight: Tensor) -> None:
        """Paint pixels (3, h, w) in [0, 1] with weights (h, w) in [0, 1], which sum to one over all tiles painted."""
        change = (pixels.float().cpu() - self.source(tile)) * weight
        self._change[(slice(None), *tile.slices)] += change.to(torch.float16)

    def image(self) -> Image.Image:
        """The canvas as it stands, RGB, exactly the size of the plan's canvas."""
        width, height = self._size
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        for top in range(0, height, 256):  # in bands: a large canvas is not held in floats
            band = Rect(0, top, width, min(256, height - top))
            pixels[top : band.bottom] = (self.crop(band) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        return Image.fromarray(pixels)

    def preview(self, side: int) -> Image.Image:
        """The canvas as it stands, with every n-th pixel so that its longer side is at most `side`."""
        width, height = self._size
        step = max(1, -(-max(width, height) // side))
        rows, columns = slice(0, height, step), slice(0, width, step)
        pixels = self._source[:, rows, columns].float() / 255 + self._change[:, rows, columns].float()
        return Image.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
