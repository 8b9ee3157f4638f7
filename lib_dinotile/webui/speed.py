"""How fast a checkpoint paints: from the last run, or from tiles that are tried out."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from modules import errors, processing, scripts, shared
from PIL import Image

from lib_dinotile.hosts.patched import patched

SLOW = 5.0
"""Seconds of a first trial above which there is no other."""
STEPS = 1, 4
"""Of the other trials."""


class Speed(NamedTuple):
    """A checkpoint's speed."""

    once: float
    """Seconds for a megapixel."""
    step: float
    """For each step of it."""
    tried: bool
    """Whether it is known from tiles that were tried out only: the WebUI painted them, without guidance."""

    def seconds(self, pixels: int, steps: int) -> float:
        return (self.once + self.step * steps) * pixels / 1e6


class Estimate(NamedTuple):
    """Seconds that a run will take, without retries."""

    seconds: float
    tried: bool
    """As `Speed.tried`."""


_speed: dict[str, Speed] = {}
"""By checkpoint."""


def _checkpoint(model: Any) -> str:
    return model.sd_checkpoint_info.filename


def learn_speed(model: Any, seconds: float, pixels: float, steps: int, tried: bool = False) -> None:
    """Keep the time that it took to paint so many pixels in so many steps each, retries and all else included."""
    if seconds > 0 and pixels and steps:
        _speed[_checkpoint(model)] = Speed(0.0, seconds * 1e6 / (pixels * steps), tried)


def _try_out(model: Any, tile: tuple[int, int]) -> None:
    """Learns from one tile of that (width, height), painted by the WebUI itself; nothing of it is kept.

    The first trial may have to load weights, so it counts only where it is so slow that more would keep the user
    waiting.
    """
    seconds = _seconds(model, tile, 1)
    if seconds > SLOW:
        learn_speed(model, seconds, tile[0] * tile[1], 1, tried=True)
        return
    few, many = (_seconds(model, tile, steps) for steps in STEPS)
    step = max(0.0, many - few) / (STEPS[1] - STEPS[0])
    megapixels = tile[0] * tile[1] / 1e6
    _speed[_checkpoint(model)] = Speed(max(0.0, few - step * STEPS[0]) / megapixels, step / megapixels, tried=True)


def _seconds(model: Any, tile: tuple[int, int], steps: int) -> float:
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
        override_settings={"save_init_img": False},
    )
    p.scripts = scripts.ScriptRunner()  # none; reForge asks which there are
    shared.state.begin(job="dinotile preview")
    began = time.perf_counter()
    try:
        with patched(shared.cmd_opts, no_prompt_history=True):  # or the prompt's arrow would bring the trial's
            processing.process_images(p)
    finally:
        p.close()
        shared.state.end()
        shared.total_tqdm.clear()
    return time.perf_counter() - began


def guess(model: Any, pixels: int, tile: tuple[int, int], steps: int) -> Estimate | None:
    """How long it will take to paint so many pixels in tiles of (width, height), or None if that cannot be said."""
    if pixels and _checkpoint(model) not in _speed:
        try:
            _try_out(model, tile)
        except Exception:
            errors.report("DINO Tile: a tile could not be tried out", exc_info=True)
    known = _speed.get(_checkpoint(model))
    return None if known is None else Estimate(known.seconds(pixels, steps), known.tried)
