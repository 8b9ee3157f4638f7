"""The canvas: the upscaled image and what has been painted on it so far."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib_dinotile.tiling.plan import Rect, TilePlan

BAND = 256
"""Rows that are handled at once where the whole canvas is: a large one is never held in floats."""


class Canvas:
    """Pixels that tiles are cropped from and painted onto.

    Kept as a base (8 bit), the upscaled image to begin with, plus what the tiles changed (half precision), so a tile
    that comes back as it was leaves the canvas as it was, and an unfinished canvas goes over from painted to upscaled
    without a border. What a crop or a painted tile costs does not depend on the size of the canvas.
    """

    filled: bool
    """Whether tiles begin with anything but the image."""

    def __init__(
        self, image: Image.Image, plan: TilePlan, mask: Image.Image | None = None, start: Image.Image | None = None
    ) -> None:
        """image: RGB, of the plan's size. Beyond its right and lower border its last pixels are repeated.

        mask (L, of that size): where it is 0 the canvas stays the image, to the bit, where it is 255 tiles show as they
        are painted. start (RGB): what the tiles begin with instead of the image, within the mask.
        """
        if image.size != (plan.width, plan.height):
            raise ValueError(f"image of {image.size} on a canvas of {(plan.width, plan.height)}")
        self._size, self._padded, self.filled = image.size, plan.padded, start is not None
        self._base = self._pad(np.asarray(start or image))
        self._change = torch.zeros(self._base.shape, dtype=torch.float16)
        self._mask = None if mask is None else self._pad(np.asarray(mask)[:, :, None])
        self._original = None if mask is None else self._pad(np.asarray(image))

    def _pad(self, pixels: np.ndarray) -> Tensor:
        """(h, w, C) -> (C, H, W), of the padded size."""
        width, height = self._padded
        padded = torch.empty((pixels.shape[2], height, width), dtype=torch.uint8)
        for number, channel in enumerate(np.moveaxis(pixels, 2, 0)):
            border = ((0, height - channel.shape[0]), (0, width - channel.shape[1]))
            padded[number] = torch.from_numpy(np.pad(channel, border, mode="edge"))
        return padded

    def source(self, tile: Rect) -> Tensor:
        """What tiles of this pass started from (3, h, w) in [0, 1]: at first the upscaled image."""
        return self._base[(slice(None), *tile.slices)].float().div_(255)

    def mask(self, tile: Rect) -> Tensor | None:
        """The mask's pixels (1, h, w) in [0, 1], or None if all of the canvas is to be painted."""
        return None if self._mask is None else self._mask[(slice(None), *tile.slices)].float().div_(255)

    def crop(self, tile: Rect, pixels: Tensor | None = None) -> Tensor:
        """The canvas's pixels (3, h, w) in [0, 1], with what is painted already, or with these instead."""
        pixels = self.painted(tile) if pixels is None else pixels
        if self._mask is None:
            return pixels
        return torch.lerp(self._original[(slice(None), *tile.slices)].float() / 255, pixels, self.mask(tile))

    def change(self, tile: Rect) -> Tensor:
        """The sum of what tiles of this pass have painted over `source` (3, h, w), each with its weight."""
        return self._change[(slice(None), *tile.slices)].float()

    def picture(self, tile: Rect) -> Image.Image:
        """The canvas's pixels as an RGB image."""
        return Image.fromarray(to_bytes(self.crop(tile)).permute(1, 2, 0).contiguous().numpy())

    def painted(self, tile: Rect) -> Tensor:
        """What tiles have painted (3, h, w) in [0, 1], whatever the mask."""
        return (self.source(tile) + self.change(tile)).clamp(0, 1)

    def paint(self, tile: Rect, pixels: Tensor, weight: Tensor) -> None:
        """Paint pixels (3, h, w) in [0, 1] with weights (h, w) in [0, 1]; over all tiles they sum to one at most."""
        self.add(tile, (pixels.float() - self.source(tile)) * weight)

    def add(self, tile: Rect, change: Tensor) -> None:
        """Add to what is painted (3, h, w)."""
        self._change[(slice(None), *tile.slices)] += change.to(torch.float16)

    def flatten(self) -> None:
        """What is painted becomes the base that the next tiles are painted on."""
        for band in self._bands(*self._padded):
            rows = (slice(None), *band.slices)
            self._base[rows] = to_bytes(self.painted(band))
            self._change[rows] = 0

    def finish(self) -> Image.Image:
        """The canvas as it stands, RGB, exactly the size of the plan's canvas. Nothing can be painted any more."""
        for band in self._bands(*self._padded):
            self._base[(slice(None), *band.slices)] = to_bytes(self.crop(band))
        del self._change, self._original  # the memory may not be there for both these and an image
        image = Image.new("RGB", self._size)
        for band in self._bands(*self._size):
            rows = self._base[(slice(None), *band.slices)].permute(1, 2, 0)
            image.paste(Image.fromarray(rows.contiguous().numpy()), (0, band.y))
        return image

    @staticmethod
    def _bands(width: int, height: int) -> Iterator[Rect]:
        for top in range(0, height, BAND):
            yield Rect(0, top, width, min(BAND, height - top))

    def preview(self, side: int) -> Image.Image:
        """The canvas as it stands, with every n-th pixel so that its longer side is at most `side`."""
        width, height = self._size
        step = max(1, -(-max(width, height) // side))
        index = (slice(None), slice(0, height, step), slice(0, width, step))
        pixels = self._base[index].float() / 255 + self._change[index].float()
        if self._mask is not None:
            pixels = torch.lerp(self._original[index].float() / 255, pixels, self._mask[index].float() / 255)
        return Image.fromarray(to_bytes(pixels.clamp(0, 1)).permute(1, 2, 0).contiguous().numpy())


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as 8 bit."""
    return (pixels * 255).round().to(torch.uint8)
