"""How fast tiles are painted on this machine, for a guess before they are."""

from __future__ import annotations

import time
from typing import Any

from modules import processing, shared
from PIL import Image

SLOW = 5.0
"""Seconds of a first trial above which there is no second."""
STEPS = 4
"""Of the second trial."""

_known: dict[str, float] = {}
"""By checkpoint: seconds for one step of one megapixel."""


def _checkpoint(model: Any) -> str:
    return model.sd_checkpoint_info.filename


def learn(model: Any, seconds: float, pixels: int, steps: int) -> None:
    """What it took to paint so many pixels in so many steps each, with all that belongs to it."""
    if seconds > 0 and pixels and steps:
        _known[_checkpoint(model)] = seconds * 1e6 / (pixels * steps)


def guess(model: Any, pixels: int, steps: int) -> float | None:
    """Seconds that it will take, if anything was painted with this checkpoint before."""
    pace = _known.get(_checkpoint(model))
    return None if pace is None else pace * pixels * steps / 1e6


def try_out(model: Any, tile: tuple[int, int]) -> None:
    """Learns from one tile of that (width, height), painted by the WebUI itself; nothing of it is kept.

    The first trial may load weights, so it counts only where it is so slow that a second would keep the user waiting.
    """
    for steps in (1, STEPS):
        p = processing.StableDiffusionProcessingImg2Img(
            sd_model=model,
            init_images=[Image.new("RGB", tile, "grey")],
            width=tile[0],
            height=tile[1],
            steps=steps,
            denoising_strength=1.0,
            sampler_name="Euler",
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
        seconds = time.perf_counter() - began
        learn(model, seconds, tile[0] * tile[1], steps)
        if seconds > SLOW:
            return
