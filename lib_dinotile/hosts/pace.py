"""How fast tiles are painted on this machine, for a guess before they are."""

from __future__ import annotations

import time
from typing import Any

from modules import processing, shared
from PIL import Image

SLOW = 5.0
"""Seconds of a first trial above which there is no other."""
STEPS = 1, 4
"""Of the other trials."""

_known: dict[str, tuple[float, float]] = {}
"""By checkpoint: seconds for a megapixel, and for each step of it."""


def _checkpoint(model: Any) -> str:
    return model.sd_checkpoint_info.filename


def learn(model: Any, seconds: float, pixels: float, steps: int) -> None:
    """What it took to paint so many pixels in so many steps each, retries counted in, with all that belongs to it."""
    if seconds > 0 and pixels and steps:
        _known[_checkpoint(model)] = 0.0, seconds * 1e6 / (pixels * steps)


def guess(model: Any, pixels: int, steps: int) -> float | None:
    """Seconds that it will take, if anything was painted with this checkpoint before."""
    known = _known.get(_checkpoint(model))
    return None if known is None else (known[0] + known[1] * steps) * pixels / 1e6


def try_out(model: Any, tile: tuple[int, int]) -> None:
    """Learns from one tile of that (width, height), painted by the WebUI itself; nothing of it is kept.

    The first trial may have to load weights, so it counts only where it is so slow that more would keep the user
    waiting.
    """
    seconds = _paint(model, tile, 1)
    if seconds > SLOW:
        learn(model, seconds, tile[0] * tile[1], 1)
        return
    few, many = (_paint(model, tile, steps) for steps in STEPS)
    step = max(0.0, many - few) / (STEPS[1] - STEPS[0])
    megapixels = tile[0] * tile[1] / 1e6
    _known[_checkpoint(model)] = max(0.0, few - step * STEPS[0]) / megapixels, step / megapixels


def _paint(model: Any, tile: tuple[int, int], steps: int) -> float:
    """Seconds of one img2img."""
    p = processing.StableDiffusionProcessingImg2Img(
        sd_model=model,
        init_images=[Image.new("RGB", tile, "grey")],
        width=tile[0],
        height=tile[1],
        steps=steps,
        denoising_strength=1.0,
        sampler_name="Euler",
        scheduler="Automatic",
        seed=0,
        do_not_save_samples=True,
        do_not_save_grid=True,
    )
    shared.state.begin(job="dinotile preview")
    began = time.perf_counter()
    try:
        processing.process_images(p)
    finally:
        p.close()
        shared.state.end()
        shared.total_tqdm.clear()
    return time.perf_counter() - began
