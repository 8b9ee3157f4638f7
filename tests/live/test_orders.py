"""The orders that tiles are taken in, and the seam pass over them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from client import Job, Reply, WebUI, correlation, difference, pixels, used
from conftest import PREVIEWS, TILES
from PIL import Image

from lib_dinotile.tiling.plan import ORDERS, TilePlan
from lib_dinotile.tiling.seams import SEAMS

PLAN = TilePlan(224, 160, TILES["tile"], TILES["overlap"])
MANY = {**TILES, "tile": 64}
"""`small` upscaled is six of these, three by two."""
ONE = {**TILES, "tile": 128}
"""`small` upscaled is one of these."""
SEAM_WIDTH = 32
SAMPLERS = (
    ("Euler", "Automatic", 4),
    ("Euler a", "Automatic", 4),
    ("DPM++ 2M", "Karras", 4),
    ("DPM++ SDE", "Automatic", 4),
    ("Heun", "Automatic", 4),
    ("LCM", "Automatic", 4),
    ("DDIM", "Automatic", 10),  # these run fewer steps than their share
    ("PLMS", "Automatic", 10),
    ("UniPC", "Automatic", 10),
)
UNFUSABLE = "DDIM CFG++"
STEPS = 12
"""So many that a fast machine does not finish before it is told to stop."""


def upscaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.LANCZOS)


def bands(seams: str) -> np.ndarray:
    """Where a seam pass over `PLAN` may change the picture: (H, W), true there."""

    def along(starts: Sequence[int], tile: int, length: int) -> np.ndarray:
        middles = [(left + tile + right) / 2 for left, right in itertools.pairwise(starts)]
        places = np.arange(length) + 0.5
        half = (SEAM_WIDTH if seams == "bands" else tile) / 2
        return np.any([abs(places - middle) < half for middle in middles], axis=0)

    width, height = PLAN.tile_size
    across, down = along(PLAN.columns, width, PLAN.width), along(PLAN.rows, height, PLAN.height)
    return across[None, :] | down[:, None]


def check_only_bands_changed(image: Image.Image, before: Image.Image, seams: str) -> None:
    change, touched = abs(pixels(image) - pixels(before)).max(2), bands(seams)
    assert change[~touched].max() == 0
    assert change[touched].mean() > 1


@pytest.fixture(scope="module")
def canvases(webui: WebUI, source: Image.Image) -> dict[str, Image.Image]:
    """The source in `TILES`, in every order, without colour correction; `none` is the upscaled source."""
    request = {order: {**TILES, "order": order, "colour": "none"} for order in ORDERS}
    return {order: webui.img2img(source, options).image for order, options in request.items()}


@pytest.mark.parametrize("order", ORDERS)
def test_the_size_is_exact_and_the_picture_is_that_of_the_source(webui: WebUI, photo: Image.Image, order: str):
    source = photo.resize((101, 67))
    reply = webui.img2img(source, {**TILES, "order": order, "scale": 1.3}, denoising_strength=0.25)
    assert reply.image.size == (131, 87)
    assert reply.fields["Size"] == "131x87" and used(reply.fields, "order") == order
    assert "DINO Tile painted" not in reply.fields
    assert correlation(reply.image, upscaled(source, (131, 87))) > 0.65


@pytest.mark.parametrize("order", ["chess", "fused"])
def test_any_batch_gives_the_same_image(webui: WebUI, photo: Image.Image, order: str):
    source = photo.resize((88, 88))  # 3 by 3
    images = [webui.img2img(source, {**MANY, "order": order, "batch": batch}).image for batch in (1, 4, 16)]
    assert max(difference(images[0], image) for image in images[1:]) <= 1


def test_orders_are_not_one_and_the_same(canvases: dict[str, Image.Image]):
    for order, image in canvases.items():
        assert all(difference(image, other) > 1 for name, other in canvases.items() if name != order)


@pytest.mark.parametrize("sampler, scheduler, steps", SAMPLERS)
def test_fused_with_every_kind_of_sampler(webui: WebUI, small: Image.Image, sampler: str, scheduler: str, steps: int):
    if sampler not in webui.names("samplers"):
        pytest.skip(f"this WebUI has no sampler {sampler}")
    request = {"sampler_name": sampler, "scheduler": scheduler, "steps": steps}

    def run(tiles: dict[str, Any], order: str) -> Image.Image:
        return webui.img2img(small, {**tiles, "order": order}, **request).image

    assert difference(run(ONE, "fused"), run(ONE, "chess")) <= 1, "one tile is the whole canvas"
    first, again, chess = run(MANY, "fused"), run(MANY, "fused"), run(MANY, "chess")
    assert difference(first, again) == 0
    near = upscaled(small, (128, 96))
    assert correlation(first, near) > max(0.6, correlation(chess, near) - 0.1)


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt": "a photo AND a cat"},
        {"prompt": "a [photo:cat:0.5]"},
        {"cfg_scale": 1},
        {"override_settings": {"batch_cond_uncond": False}},
        {"subseed": 5, "subseed_strength": 0.3},
    ],
    ids=["and", "scheduled", "cfg 1", "cond and uncond apart", "variation"],
)
def test_fused_with_every_kind_of_request(webui: WebUI, small: Image.Image, request_):
    fused, chess = (webui.img2img(small, {**ONE, "order": order}, **request_).image for order in ("fused", "chess"))
    assert difference(fused, chess) <= 1
    images = [webui.img2img(small, {**MANY, "order": "fused", "batch": n}, **request_).image for n in (1, 4)]
    assert difference(*images) <= 1


def test_every_image_of_a_fused_batch_is_that_of_its_own_seed(webui: WebUI, small: Image.Image):
    options = {**MANY, "order": "fused"}
    together = webui.img2img(small, options, seed=3, batch_size=2)
    alone = [webui.img2img(small, options, seed=seed).image for seed in (3, 4)]
    assert [difference(*pair) for pair in zip(together.images, alone)] == [0, 0]


def test_a_sampler_that_cannot_be_fused_is_refused(webui: WebUI, small: Image.Image):
    if UNFUSABLE not in webui.names("samplers"):
        pytest.skip(f"this WebUI has no sampler {UNFUSABLE}")
    request = {"sampler_name": UNFUSABLE, "steps": 10}
    line = webui.refusal(small, {**MANY, "order": "fused"}, **request)
    assert line == f"order: fused does not work with the sampler {UNFUSABLE}; choose another sampler, or chess"
    assert webui.img2img(small, MANY, **request).image.size == (128, 96)


def test_none_is_the_upscaled_source_to_the_bit(canvases: dict[str, Image.Image], source: Image.Image):
    assert difference(canvases["none"], upscaled(source, (224, 160))) == 0


@pytest.mark.parametrize(
    "order, seams",
    [
        ("none", "bands"),
        ("none", "half tile"),
        ("chess", "bands"),
        ("chess", "half tile"),
        ("chess", "half tile + crossings"),
        ("linear", "bands"),
        ("fused", "bands"),
    ],
)
def test_a_seam_pass_changes_only_bands_along_the_borders(
    webui: WebUI, source: Image.Image, canvases: dict[str, Image.Image], order: str, seams: str
):
    options = {**TILES, "order": order, "seams": seams, "seam_width": SEAM_WIDTH, "colour": "none"}
    reply = webui.img2img(source, options)
    check_only_bands_changed(reply.image, canvases[order], seams)
    assert reply.fields["DINO Tile seams"] == seams
    assert "DINO Tile seam denoise" not in reply.fields  # at its default
    assert ("DINO Tile seam width" in reply.fields) == (seams == "bands")


def test_every_kind_of_seam_pass_is_one_of_its_own(webui: WebUI, small: Image.Image):
    options = {**MANY, "order": "none", "seam_width": SEAM_WIDTH}
    images = [webui.img2img(small, {**options, "seams": seams}).image for seams in SEAMS]
    assert all(difference(one, other) > 1 for n, one in enumerate(images) for other in images[:n])


def test_a_seam_pass_without_denoising_leaves_it_much_as_it_was(webui: WebUI, source: Image.Image, canvases):
    options = {**TILES, "seams": "bands", "seam_width": SEAM_WIDTH, "colour": "none"}
    before = pixels(canvases["chess"])

    def change(denoise: float) -> float:
        image = webui.img2img(source, {**options, "seam_denoise": denoise}).image
        return float(abs(pixels(image) - before)[bands("bands")].mean())

    assert change(0) < min(6, change(0.5) / 3)


def test_any_batch_gives_the_same_seam_pass(webui: WebUI, small: Image.Image):
    options = {**MANY, "order": "none", "seams": "half tile + crossings"}
    one, four = (webui.img2img(small, {**options, "batch": batch}).image for batch in (1, 4))
    assert difference(one, four) <= 1


def stop_when(webui: WebUI, job: Job, text: str) -> Reply:
    """Interrupts the job as soon as its text has that; what it gave."""
    seen = []
    for look in job.looks():
        seen.append(look.text)
        if look.running and text in look.text:
            webui.post("interrupt")
            return job.reply()
    raise AssertionError(f"{text!r} was never seen: {seen}")


def test_an_interrupted_seam_pass_keeps_what_is_painted(
    webui: WebUI, source: Image.Image, canvases: dict[str, Image.Image]
):
    options = {**TILES, "seams": "half tile + crossings", "colour": "none", "batch": 1}
    tiled = webui.img2img(source, {**TILES, "colour": "none", "batch": 1}, steps=STEPS).image
    reply = stop_when(webui, webui.start(source, options, steps=STEPS), f"painting tiles: {len(PLAN) + 1} of 15")
    painted, _, total = reply.fields["DINO Tile painted"].partition(" of ")
    assert int(total) == 15 and len(PLAN) < int(painted) < 15
    check_only_bands_changed(reply.image, tiled, "half tile")


def test_an_interrupted_fused_run_is_the_upscaled_source(webui: WebUI, source: Image.Image):
    job = webui.start(source, {**TILES, "order": "fused"}, steps=20, denoising_strength=0.6)
    reply = stop_when(webui, job, ", step 2 of ")
    assert reply.fields["DINO Tile painted"] == f"0 of {len(PLAN)}"
    assert difference(reply.image, upscaled(source, reply.image.size)) == 0


def test_a_fused_run_shows_how_far_it_is(webui: WebUI, source: Image.Image):
    job = webui.start(source, {**TILES, "order": "fused"}, steps=20, denoising_strength=0.6, **PREVIEWS)
    looks = [look for look in job.looks() if look.running]
    assert job.reply().image.size == (PLAN.width, PLAN.height)
    assert any("tiles together" in look.text for look in looks)
    shares = [look.share for look in looks if "tiles together" in look.text]
    # The run is one of two jobs that the WebUI counts; the other is the finished image.
    assert 0 <= shares[0] < 0.25 < 0.4 < shares[-1] <= 1
    previews = [look.preview for look in looks if look.preview is not None]
    assert previews
    for preview in previews:
        assert preview.width / preview.height == pytest.approx(PLAN.width / PLAN.height, rel=0.05)


def test_a_fused_run_is_encoded_and_decoded_in_pieces(webui: WebUI, photo: Image.Image):
    """Nothing is to be seen of it on a canvas that is longer than one of them."""
    source, options = photo.resize((444, 32)), {**TILES, "tile": 896, "colour": "none"}
    whole, pieces = (webui.img2img(source, {**options, "order": order}).image for order in ("chess", "fused"))
    assert pieces.size == (888, 64)
    assert correlation(whole, pieces) > 0.98
