"""The WebUI's upscalers, to sizes that are exact."""

from __future__ import annotations

from modules import shared
from PIL import Image

RESAMPLING = {
    "Lanczos": Image.Resampling.LANCZOS,
    "Nearest": Image.Resampling.NEAREST,
    "None": Image.Resampling.LANCZOS,
}
"""Those that only resample: done here, where the WebUI rounds the size to a multiple of 8."""

MAX_FACTOR = 8
"""At once: the WebUI goes three times through a model, which may only double, and resamples what is missing then."""


def upscale(image: Image.Image, size: tuple[int, int], name: str) -> Image.Image:
    """The RGB image made exactly (width, height) large by the upscaler of that name, in as many passes as it takes."""
    if name in RESAMPLING:
        return image.resize(size, RESAMPLING[name])
    data = next(entry for entry in shared.sd_upscalers if entry.name == name)
    while not shared.state.interrupted:
        # It cuts its result to multiples of 8: let it make one at least as large.
        factor = max((-(-side // 8) * 8) / own for side, own in zip(size, image.size))
        image = data.scaler.upscale(image, min(factor, MAX_FACTOR), data.data_path).convert("RGB")
        if factor <= MAX_FACTOR:
            break
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
