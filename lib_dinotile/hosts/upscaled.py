"""The last upscaled image, kept for the next run on the same source."""

from __future__ import annotations

import hashlib
from typing import Any

from PIL import Image


class Upscaled:
    """One image and what it was made of; the next takes its place."""

    def __init__(self, limit: int = 256 << 20) -> None:
        """limit: bytes that it may take, of which Pillow needs four a pixel; what is larger is not kept."""
        self.limit = limit
        self._kept: tuple[Any, Image.Image] | None = None

    def get(self, source: Image.Image, size: tuple[int, int], recipe: Any) -> Image.Image | None:
        """A copy of what this recipe made of the source at (width, height), if that is what is kept."""
        kept = self._kept
        if kept is None or recipe is None or kept[0] != _key(source, size, recipe):
            return None
        return kept[1].copy()

    def keep(self, source: Image.Image, size: tuple[int, int], recipe: Any, image: Image.Image) -> None:
        """Keep a copy of the image, RGB, in place of the one before. recipe: what tells it from others, besides source
        and size; None: it cannot be told, and nothing is kept."""
        fits = recipe is not None and 4 * size[0] * size[1] <= self.limit
        self._kept = (_key(source, size, recipe), image.copy()) if fits else None


def _key(source: Image.Image, size: tuple[int, int], recipe: Any) -> tuple[Any, ...]:
    return hashlib.sha256(source.tobytes()).hexdigest(), source.mode, source.size, size, recipe


def is_resampled(image: Image.Image, large: Image.Image) -> bool:
    """Whether the large image is the other by Lanczos and nothing more; not told of a flat one, which stays flat
    however it is made large."""
    flat = all(low == high for low, high in image.getextrema())
    return not flat and large == image.resize(large.size, Image.Resampling.LANCZOS)
