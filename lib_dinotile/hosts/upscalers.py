"""The WebUI's upscalers, to sizes that are exact."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from modules import shared
from PIL import Image

from lib_dinotile import DinotileError
from lib_dinotile.weights import stamp

RESAMPLING = {
    "Lanczos": Image.Resampling.LANCZOS,
    "Nearest": Image.Resampling.NEAREST,
    "None": Image.Resampling.LANCZOS,
}
"""Those that only resample: done here, where the WebUI rounds the size to a multiple of 8, or lists none of them."""

MAX_FACTOR = 8
"""At once: the WebUI goes three times through a model, which may only double, and resamples what is missing then."""


def names() -> list[str]:
    """Names that `upscale` takes: the WebUI's upscalers, and those that only resample."""
    return list(dict.fromkeys([*(data.name for data in shared.sd_upscalers), *RESAMPLING]))


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


_last = Upscaled()


def upscale(image: Image.Image, size: tuple[int, int], name: str) -> Image.Image:
    """The RGB image made exactly (width, height) large by the upscaler of that name, in as many passes as it takes.

    What a model made of the last image is kept: the cells of a plot, and the next seed, begin with the same.
    """
    if name in RESAMPLING:
        return image.resize(size, RESAMPLING[name])
    data = next(entry for entry in shared.sd_upscalers if entry.name == name)
    kept = _last.get(image, size, _recipe(data))
    if kept is not None:
        return kept
    large = _by_model(image, size, data)
    # Broken off it would not be whole. The recipe anew: the model may only now have been downloaded.
    if not (shared.state.interrupted or shared.state.skipped):
        _last.keep(image, size, _recipe(data), large)
    return large


def _by_model(image: Image.Image, size: tuple[int, int], data: Any) -> Image.Image:
    while not shared.state.interrupted:
        # It cuts its result to multiples of 8: let it make one at least as large.
        factor = max((-(-side // 8) * 8) / own for side, own in zip(size, image.size))
        made = data.scaler.upscale(image, min(factor, MAX_FACTOR), data.data_path).convert("RGB")
        # Of a model that cannot be loaded the WebUI only logs that, and resamples.
        if data.data_path and factor >= 1 and not shared.state.interrupted and is_resampled(image, made):
            raise DinotileError(f"upscaler: {data.name} did nothing, the WebUI's log says why; choose another", 500)
        image = made
        if factor <= MAX_FACTOR:
            break
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _recipe(data: Any) -> tuple[Any, ...] | None:
    """All that a result depends on besides image and size; None if that is not known: there is no model file."""
    file = getattr(data, "local_data_path", data.data_path)
    if not file or not Path(file).is_file():
        return None
    opts = shared.opts
    relevant = (name for name, row in opts.data_labels.items() if row.section and row.section[0] == "upscaling")
    return data.name, stamp(file), *((name, str(getattr(opts, name))) for name in relevant)
