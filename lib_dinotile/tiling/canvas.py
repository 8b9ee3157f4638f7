"""The canvas: the upscaled image and what has been painted on it so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib_dinotile.tiling.blend import Blend
from lib_dinotile.tiling.plan import Rect, TilePlan, Tiles

BAND = 256
"""Rows that are handled at once where the whole canvas is: a large one is never held in floats."""


class Canvas:
    """Pixels that tiles are cropped from and painted onto.

    Kept as a base (8 bit), the upscaled image to begin with, plus what the tiles changed (half precision), so a tile
    that comes back as it was leaves the canvas as it was, and an unfinished canvas goes over from painted to upscaled
    without a border. What a crop or a painted tile costs does not depend on the size of the canvas.

    It lies in the machine's own memory. Crops are made on a device, of the bytes that go there; what is painted there
    comes back in half precision, on CUDA while the next tiles are computed.
    """

    filled: bool
    """Whether tiles begin with anything but the image."""

    def __init__(
        self,
        image: Image.Image,
        plan: TilePlan,
        mask: Image.Image | None = None,
        start: Image.Image | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """image: RGB, of the plan's size. Beyond its right and lower border its last pixels are repeated.

        mask (L, of that size): where it is 0 the canvas stays the image, to the bit, where it is 255 tiles show as they
        are painted. start (RGB): what the tiles begin with instead of the image, within the mask. device: of all
        tensors that come and go.
        """
        if image.size != plan.size:
            raise ValueError(f"image of {image.size} on a canvas of {tuple(plan.size)}")
        self._size, self._padded, self.filled = plan.size, plan.padded, start is not None
        self.device = torch.device(device)
        self._base = self._pad(np.asarray(start or image))
        self._change = torch.zeros(self._base.shape, dtype=torch.float16)
        self._mask = None if mask is None else self._pad(np.asarray(mask)[:, :, None])
        self._original = None if mask is None else self._pad(np.asarray(image))
        self._levels: _Levels | None = None
        self._coming: list[tuple[Rect, Tensor, torch.cuda.Event]] = []
        """Painted pixels, on the way from a CUDA device."""

    def _pad(self, pixels: np.ndarray) -> Tensor:
        """(h, w, C) -> (C, H, W), of the padded size."""
        width, height = self._padded
        padded = torch.empty((pixels.shape[2], height, width), dtype=torch.uint8)
        for number, channel in enumerate(np.moveaxis(pixels, 2, 0)):
            border = ((0, height - channel.shape[0]), (0, width - channel.shape[1]))
            padded[number] = torch.from_numpy(np.pad(channel, border, mode="edge"))
        return padded

    def _crop(self, stored: Tensor, area: Rect) -> Tensor:
        """A part of what is stored, on the device, float32."""
        part = area.of(stored)
        if self.device.type == "cuda":
            part = part.contiguous().pin_memory().to(self.device, non_blocking=True)
        return part.to(self.device).float()

    def source(self, tile: Rect) -> Tensor:
        """Pixels that tiles of this pass started from (3, h, w) in [0, 1]: at first the upscaled image."""
        return self._crop(self._base, tile).div_(255)

    def mask(self, tile: Rect) -> Tensor | None:
        """The mask's pixels (1, h, w) in [0, 1], or None if all of the canvas is to be painted."""
        return None if self._mask is None else self._crop(self._mask, tile).div_(255)

    def shows_mask(self, tile: Rect) -> bool:
        """Whether any of a tile may change."""
        return self._mask is None or bool(tile.of(self._mask).any())

    def crop(self, tile: Rect, pixels: Tensor | None = None) -> Tensor:
        """The canvas's pixels (3, h, w) in [0, 1], with what is painted already, or with these instead."""
        pixels = self.painted(tile) if pixels is None else pixels
        if self._mask is None or self._original is None:
            return pixels
        return torch.lerp(self._crop(self._original, tile).div_(255), pixels, self._crop(self._mask, tile).div_(255))

    def change(self, tile: Rect) -> Tensor:
        """The sum of what tiles of this pass have painted over `source` (3, h, w), each with its weight."""
        self._settle()
        change = self._crop(self._change, tile)
        return change if self._levels is None else self._levels.added_to(change, tile)

    def picture(self, tile: Rect) -> Image.Image:
        """The canvas's pixels as an RGB image."""
        return Image.fromarray(to_bytes(self.crop(tile)).permute(1, 2, 0).contiguous().cpu().numpy())

    def painted(self, tile: Rect) -> Tensor:
        """Pixels as tiles have painted them (3, h, w) in [0, 1], whatever the mask."""
        return self.source(tile).add_(self.change(tile)).clamp_(0, 1)

    def paint(self, tile: Rect, pixels: Tensor, weight: Tensor) -> None:
        """Paint pixels (3, h, w) in [0, 1] with weights (h, w) in [0, 1]; over all tiles they sum to one at most."""
        self.add(tile, (pixels.float() - self.source(tile)).mul_(weight))

    def add(self, tile: Rect, change: Tensor) -> None:
        """Add to what is painted (3, h, w)."""
        if self._levels is not None:
            mask = self.mask(tile)
            self._levels.add(tile, change if mask is None else change * mask)
        change = change.half()
        if change.device.type != "cuda":
            tile.of(self._change).add_(change.cpu())
            return
        there = torch.empty(change.shape, dtype=change.dtype, pin_memory=True).copy_(change, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(change.device))
        self._coming.append((tile, there, arrived))

    def _settle(self) -> None:
        """Everything painted has arrived."""
        for tile, change, arrived in self._coming:
            arrived.synchronize()
            tile.of(self._change).add_(change)
        self._coming = []

    def keep_levels(self, plan: Tiles, blend: Blend, tiles: Sequence[Rect]) -> None:
        """From now on mind the mean colours of these tiles of a plan, for `level`; blend: weights they paint with."""
        self._levels = _Levels(plan, blend, {tile: self._counted(tile) for tile in tiles}, self.device)

    def _counted(self, tile: Rect) -> float:
        """How many pixels of a tile may change."""
        return tile.width * tile.height if self._mask is None else float(tile.of(self._mask).float().sum() / 255)

    def level(self) -> None:
        """Colours that are right in every tile can be wrong where tiles are blended: what the canvas shows of each is
        shifted to the source's mean, with the weights that it was painted with."""
        if self._levels is not None:
            self._levels.close()

    def flatten(self) -> None:
        """Make the painted pixels the base that the next tiles are painted on."""
        for band in self._bands(*self._padded):
            band.of(self._base).copy_(to_bytes(self.painted(band)))
        self._change.zero_()
        self._levels = None

    def finish(self) -> Image.Image:
        """The canvas as it stands, RGB, exactly the size of the plan's canvas. Nothing can be painted any more.

        On the CPU: a device may just have run out of memory.
        """
        self._settle()
        self.device = torch.device("cpu")
        for band in self._bands(*self._padded):
            band.of(self._base).copy_(to_bytes(self.crop(band)))
        # The memory may not be there for both these and an image.
        self._change = self._change.new_empty(0)
        self._original = self._mask = self._levels = None
        image = Image.new("RGB", self._size)
        for band in self._bands(*self._size):
            rows = band.of(self._base).permute(1, 2, 0)
            image.paste(Image.fromarray(rows.contiguous().numpy()), (0, band.y))
        return image

    @staticmethod
    def _bands(width: int, height: int) -> Iterator[Rect]:
        for top in range(0, height, BAND):
            yield Rect(0, top, width, min(BAND, height - top))

    def preview(self, side: int) -> Image.Image:
        """The canvas as it stands, with every n-th pixel so that its longer side is at most `side`."""
        self._settle()
        width, height = self._size
        step = max(1, -(-max(width, height) // side))
        index = (slice(None), slice(0, height, step), slice(0, width, step))
        pixels = self._base[index].float() / 255 + self._change[index]
        if self._mask is not None and self._original is not None:
            pixels = torch.lerp(self._original[index].float() / 255, pixels, self._mask[index].float() / 255)
        return Image.fromarray(to_bytes(pixels.clamp(0, 1)).permute(1, 2, 0).contiguous().numpy())


class _Levels:
    """How far the mean colours of tiles are from the source's, kept up as the canvas is painted."""

    shifts: Tensor | None = None
    """(3, rows, columns), once nothing is painted any more: what each tile of the plan is to be shifted by."""

    def __init__(self, plan: Tiles, blend: Blend, counted: dict[Rect, float], device: torch.device) -> None:
        """counted: the tiles that are minded, and their pixels that may change."""
        self._plan, self._blend, self._counted = plan, blend, counted
        self._sums = {tile: torch.zeros(3, device=device) for tile in counted}

    def add(self, area: Rect, change: Tensor) -> None:
        """A change (3, h, w) is painted there."""
        for tile in self._plan.touching(area):
            if tile in self._sums:
                self._sums[tile] += tile.intersection(area).within(area).of(change).sum((1, 2), dtype=torch.float32)

    def close(self) -> None:
        """Shift the levels of these tiles. Painted pixels stay; other tiles are not shifted."""
        none = torch.zeros(3)
        shifts = [
            -self._sums[tile].cpu() / self._counted[tile] if self._counted.get(tile) else none
            for tile in self._plan.tiles
        ]
        self.shifts = torch.stack(shifts).T.reshape(3, len(self._plan.rows), len(self._plan.columns))

    def added_to(self, change: Tensor, area: Rect) -> Tensor:
        """A change (3, h, w) there, shifted."""
        return change if self.shifts is None else change + self._blend.over(area, self.shifts.to(change))


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as 8 bit."""
    return (pixels * 255).round_().to(torch.uint8)
