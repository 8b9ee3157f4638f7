"""A run that is stopped keeps what it has painted, says so, and leaves no trace in the WebUI."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from adapters import Adapters
from client import SLACK, Job, Progress, WebUI, difference, fields, pixels
from conftest import PREVIEWS, TILES
from PIL import Image

from lib_dinotile.tiling.plan import TilePlan

PLAN = TilePlan(224, 160, TILES["tile"], TILES["overlap"], order="linear")
LINEAR = {**TILES, "order": "linear", "batch": 1}
STEPS = 12
"""So many that a fast machine does not finish before it is told to stop."""


def stop_at(webui: WebUI, job: Job, tiles: int, how: str = "interrupt") -> list[Progress]:
    """Stops the job once that many tiles are done; what was seen until then."""
    seen = []
    for look in job.looks():
        seen.append(look)
        if look.tiles is not None and look.tiles >= tiles:
            webui.post(how)
            return seen
    raise AssertionError(f"no tile {tiles} was ever seen: {[(look.share, look.text) for look in seen]}")


def check_painted(image: Image.Image, source: Image.Image, painted: int) -> None:
    """The first `painted` tiles are painted, the rest is the upscaled source."""
    upscaled = source.resize((PLAN.width, PLAN.height), Image.Resampling.LANCZOS)
    change = abs(pixels(image) - pixels(upscaled)).max(2)
    touched = np.zeros(change.shape, dtype=bool)
    for tile in PLAN.tiles[:painted]:
        touched[tile.slices] = True
        core = change[tile.y + 32 : tile.bottom - 32, tile.x + 32 : tile.right - 32]
        assert core.mean() > 1, f"{tile} is not painted"
    assert change[~touched].max() <= 1


@pytest.mark.parametrize("adapter", ["none", "random"])
def test_an_interrupted_image_keeps_the_tiles_painted(
    webui: WebUI, source: Image.Image, adapters: Adapters, adapter: str
):
    options = LINEAR if adapter == "none" else {**LINEAR, "adapter": adapters.random}
    job = webui.start(source, options, steps=STEPS)
    stop_at(webui, job, 2)
    reply = job.reply()
    assert reply.image.size == (PLAN.width, PLAN.height)
    painted, _, total = reply.fields["DINO Tile painted"].partition(" of ")
    assert int(total) == len(PLAN) and 2 <= int(painted) < len(PLAN)
    check_painted(reply.image, source, int(painted))


def test_an_interrupted_batch_says_of_every_image_what_is_painted(webui: WebUI, source: Image.Image):
    job = webui.start(source, LINEAR, steps=STEPS, batch_size=2)
    stop_at(webui, job, 2)
    reply = job.reply()
    assert len(reply.images) == 2
    first, second = (int(fields(text)["DINO Tile painted"].split(" of ")[0]) for text in reply.infotexts)
    assert 2 <= first < len(PLAN) and second == 0
    check_painted(reply.images[0], source, first)
    check_painted(reply.images[1], source, 0)


def test_a_skipped_image_does_not_mark_the_next_one(webui: WebUI, small: Image.Image):
    options = {**LINEAR, "tile": 64}
    job = webui.start(small, options, steps=STEPS, n_iter=2, seed=1)
    stop_at(webui, job, 1, "skip")
    reply = job.reply()
    assert "DINO Tile painted" in fields(reply.infotexts[0])
    assert "DINO Tile painted" not in fields(reply.infotexts[1])
    whole = webui.img2img(small, options, steps=STEPS, seed=2)
    assert difference(reply.images[1], whole.image) <= 1


def test_progress_grows_and_shows_the_canvas(webui: WebUI, source: Image.Image):
    job = webui.start(source, LINEAR, steps=STEPS, **PREVIEWS)
    seen = [look for look in job.looks() if look.tiles is not None]
    assert job.reply().image.size == (PLAN.width, PLAN.height)
    shares, tiles = [look.share for look in seen], [look.tiles for look in seen]
    assert 0 <= shares[0] < 0.3 < 0.7 < shares[-1] <= 1
    assert all(later >= earlier - SLACK for earlier, later in itertools.pairwise(shares))
    assert tiles == sorted(tiles) and len(set(tiles)) > len(PLAN) // 2
    previews = [look.preview for look in seen if look.preview is not None]
    assert previews
    for preview in previews:
        assert preview.width / preview.height == pytest.approx(PLAN.width / PLAN.height, rel=0.05)
    assert difference(previews[0], previews[-1]) > 1


@pytest.mark.parametrize("how", ["interrupt", "stop-generating"])
def test_a_stop_is_heard_within_a_step_of_the_tiles_at_work(webui: WebUI, source: Image.Image, how: str):
    """Many tiles at once, with many steps: the batch is not waited for."""
    if webui.get("openapi.json").json()["paths"].get(f"/sdapi/v1/{how}") is None:
        pytest.skip("this WebUI has no dinotile-faults, or its page no such button")
    options = {**TILES, "overlap": 0, "tile": 64, "batch": 16}
    many, few = (webui.img2img(source, options, steps=steps, denoising_strength=1.0).seconds for steps in (12, 2))
    step = (many - few) / 10
    job = webui.start(source, options, steps=60, denoising_strength=1.0)
    stop_at(webui, job, 0, how)
    stopped = time.perf_counter()
    reply = job.reply()
    waited = time.perf_counter() - stopped
    assert reply.fields["DINO Tile painted"].startswith("0 of ")
    assert waited < few + 20 * step, f"{waited:.1f} s for a step of {step:.1f} s: 60 steps were waited for"
