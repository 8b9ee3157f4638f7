"""Which part of the source img2img is about, how large it becomes, and what of it the inpaint mask leaves to paint."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
from modules import masking, processing
from PIL import Image, ImageOps

from lib_dinotile import DinotileError
from lib_dinotile.engine import flow
from lib_dinotile.images import MAX_PIXELS
from lib_dinotile.settings import Settings

LEAST = 8
"""Latent cells along each side of what `Only masked` paints, at least: a model makes nothing of less."""
FEW = 2
"""Latent cells within which a mask shows nothing but a colour."""
CROP, FILL = 1, 2
"""img2img's Resize modes that keep the proportions; the others stretch."""


def _is_small(box: tuple[int, int, int, int], scale: float) -> bool:
    """Whether a box (left, top, right, bottom) of the source, so many times larger, is no larger than `FEW` cells."""
    return max(box[2] - box[0], box[3] - box[1]) * scale <= FEW * processing.opt_f


class Area:
    """The part of the source that becomes the canvas.

    Inpainting the whole picture, that is the source; `Only masked`, it is the mask's surroundings, and what is painted
    there goes back into the source at its own size.
    """

    canvas: tuple[int, int]
    """(width, height) that is painted."""
    finished: tuple[int, int]
    """(width, height) of the result."""
    mask: Image.Image | None
    """L, over the part: white where the result may change."""
    colour_only = False
    """Whether that is so little of it that in the source's colours nothing would change."""

    def __init__(self, p: Any, settings: Settings, size: tuple[int, int]) -> None:
        """size: (width, height) of the source. DinotileError for sizes that cannot be, and for an empty mask."""
        self.infotext: dict[str, Any] = {}
        self.mask = self._box = self._overlay = None
        given, self._resize, masked = (p.width, p.height), 0, (0, 0, 0, 0)
        if p.image_mask is not None:
            self.mask = self._prepare(p).resize(size)
            masked = self.mask.getbbox() or masked
            if not any(masked):
                raise DinotileError("the inpaint mask is empty: draw one, or remove it")
        if self.mask is not None and p.inpaint_full_res:
            self.infotext = {**self.infotext, "Inpaint area": "Only masked"}
            self.infotext["Masked area padding"] = p.inpaint_full_res_padding
            box = masking.get_crop_region_v2(self.mask, p.inpaint_full_res_padding)
            if settings.target == "img2img size":
                box = masking.expand_crop_region(box, *given, *size)
            else:
                box = self._roomy(box, size, settings)
            self._box, self._overlay = box, self.mask
            self.mask = self.mask.crop(box).point(lambda level: 255 if level else 0)  # it fades when it is put back
            self.canvas = flow.canvas_size((box[2] - box[0], box[3] - box[1]), settings, given)
            self.finished = size
            self.colour_only = _is_small(masked, self.canvas[0] / (box[2] - box[0]))
            return
        self.canvas = self.finished = flow.canvas_size(size, settings, given)
        if settings.target == "img2img size":
            self._resize = p.resize_mode
            wide, high = self._part(size)
            if self._resize == FILL and wide * high > MAX_PIXELS:
                raise DinotileError(
                    f"img2img size: Resize and fill to {self.canvas[0]}x{self.canvas[1]} would enlarge this image to "
                    f"{wide}x{high} first: give a size closer to its proportions"
                )
        if self.mask is not None:
            self.mask = self.cut(self.mask).point(lambda level: min(255, 2 * level))  # as img2img does
            self.colour_only = _is_small(masked, self.canvas[0] / size[0])

    def _prepare(self, p: Any) -> Image.Image:
        """The mask as img2img prepares it: turned round if it is wanted, and blurred."""
        mask = processing.create_binary_mask(p.image_mask, round=p.mask_round).convert("L")
        if p.inpainting_mask_invert:
            mask = ImageOps.invert(mask)
            self.infotext["Mask mode"] = "Inpaint not masked"
        pixels = np.array(mask)
        for blur, along in ((p.mask_blur_x, (1, 0)), (p.mask_blur_y, (0, 1))):
            if blur > 0:
                kernel = 2 * int(2.5 * blur + 0.5)
                pixels = cv2.GaussianBlur(pixels, (1 + kernel * along[0], 1 + kernel * along[1]), blur)
        if p.mask_blur_x > 0 or p.mask_blur_y > 0:
            self.infotext["Mask blur"] = p.mask_blur
        if p.inpainting_fill != 1:
            self.infotext["Masked content"] = {0: "fill", 2: "latent noise", 3: "latent nothing"}[p.inpainting_fill]
        return Image.fromarray(pixels)

    @staticmethod
    def _roomy(box: tuple[int, int, int, int], size: tuple[int, int], settings: Settings) -> tuple[int, int, int, int]:
        """A box (left, top, right, bottom) with so much around it that its canvas has `LEAST` latent cells a side, as
        far as a source of (width, height) goes."""
        longest = max(box[2] - box[0], box[3] - box[1])
        scale = settings.scale if settings.target == "scale" else settings.longest / longest
        least, ranges = math.ceil(LEAST * processing.opt_f / scale), []
        for start, end, side in zip(box[:2], box[2:], size):
            wanted = min(side, max(end - start, least))
            start = min(max(0, start - (wanted - end + start) // 2), side - wanted)
            ranges.append((start, start + wanted))
        (left, right), (top, bottom) = ranges
        return left, top, right, bottom

    @property
    def shown_mask(self) -> Image.Image | None:
        """L, of the result's size: what the WebUI shows and saves as the mask."""
        return self._overlay or (self.mask and self.mask.resize(self.finished))

    def _part(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of what of an image of that size becomes the canvas.

        The side that is too long is cut, or the one that is too short is filled with the border's pixels.
        """
        (width, height), (wide, high) = size, self.canvas
        if self._resize not in (CROP, FILL):
            return size
        across, down = max(1, round(height * wide / high)), max(1, round(width * high / wide))
        return (across, height) if (across < width) == (self._resize == CROP) else (width, down)

    def cut(self, image: Image.Image) -> Image.Image:
        """The part of the source, or of a mask over it, that becomes the canvas."""
        if self._box is not None:
            return image.crop(self._box)
        if self._resize not in (CROP, FILL):
            return image
        (width, height), (across, down) = image.size, self._part(image.size)
        left, top = (width - across) // 2, (height - down) // 2
        if self._resize == CROP:
            return image.crop((left, top, left + across, top + down))
        border = ((-top, down - height + top), (-left, across - width + left))
        return Image.fromarray(np.pad(np.asarray(image), border + ((0, 0),) * (len(image.getbands()) > 1), mode="edge"))

    def finish(self, image: Image.Image, source: Image.Image) -> Image.Image:
        """The result, from the canvas as it was painted."""
        if self._box is None:
            return image
        left, top, right, bottom = self._box
        painted = source.copy()
        painted.paste(image.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
        return Image.composite(painted, source, self._overlay)
