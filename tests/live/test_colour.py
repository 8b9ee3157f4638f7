"""Colour correction, and flat tiles that are passed over."""

from __future__ import annotations

import re

import numpy as np
import pytest
from client import WebUI, correlation, difference, encode, pixels, used
from conftest import TILES
from PIL import Image

from lib_dinotile.tiling.flat import RECOMMENDED
from lib_dinotile.tiling.plan import TilePlan

PLAN = TilePlan(224, 160, TILES["tile"], TILES["overlap"])


def shifts(image: Image.Image, source: Image.Image, plan: TilePlan) -> np.ndarray:
    """How far the mean of a channel is from the upscaled source's, in levels: the worst channel of every tile."""
    change = pixels(image) - pixels(source.resize(image.size, Image.Resampling.LANCZOS))
    return np.array([abs(change[tile.slices].mean((0, 1))).max() for tile in plan.tiles])


@pytest.mark.parametrize("order", ["chess", "linear", "fused"])
def test_a_tile_has_the_colour_of_its_source(webui: WebUI, photo: Image.Image, order: str):
    """Tiles that share nothing: what is seen of them is what was painted."""
    source = photo.resize((96, 64))
    plan = TilePlan(192, 128, 64, 0)
    options = {**TILES, "tile": 64, "overlap": 0, "order": order}
    found = {colour: webui.img2img(source, {**options, "colour": colour}) for colour in ("none", "AdaIN", "wavelet")}
    moved = {colour: shifts(reply.image, source, plan) for colour, reply in found.items()}
    assert moved["none"].max() > 4
    assert moved["AdaIN"].max() < 0.5 and moved["wavelet"].max() < 0.5, moved
    assert all(used(reply.fields, "colour") == colour for colour, reply in found.items())


@pytest.mark.parametrize("order", ["chess", "linear", "fused"])
def test_where_tiles_are_blended_colours_stay_near(webui: WebUI, source: Image.Image, order: str):
    """A tile shows a part of what was painted, and AdaIN sees to the mean of the whole only."""
    none, adain, wavelet = (
        shifts(webui.img2img(source, {**TILES, "order": order, "colour": colour}).image, source, PLAN).mean()
        for colour in ("none", "AdaIN", "wavelet")
    )
    assert adain < none / 2 and wavelet < none / 4, (none, adain, wavelet)


def test_after_a_seam_pass_colours_are_near_too(webui: WebUI, source: Image.Image):
    options = {**TILES, "seams": "half tile", "seam_denoise": 0.4}
    plain, corrected = (
        shifts(webui.img2img(source, {**options, "colour": colour}).image, source, PLAN)
        for colour in ("none", "wavelet")
    )
    assert corrected.mean() < plain.mean() / 3


def test_wavelet_is_the_default_and_keeps_detail_that_the_model_made(webui: WebUI, source: Image.Image, tiled):
    wavelet = webui.img2img(source, {**TILES, "colour": "wavelet"}).image
    assert difference(tiled.image, wavelet) == 0
    near = source.resize(wavelet.size, Image.Resampling.LANCZOS)
    assert abs(pixels(wavelet) - pixels(near)).mean() > 4
    assert correlation(wavelet, near) > 0.6


@pytest.fixture(scope="module")
def half_flat(photo: Image.Image) -> Image.Image:
    """A sky on the left, 96 of 160 wide, and texture on the right; 320x96 upscaled are five tiles of 96."""
    sky = np.linspace((120, 150, 200), (140, 165, 205), 48).astype(np.uint8)[:, None].repeat(160, 1)
    image = Image.fromarray(sky)
    texture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    image.paste(Image.blend(photo.resize((64, 48)), Image.fromarray(texture), 0.5), (96, 0))
    return image


@pytest.mark.parametrize("order", ["chess", "linear", "fused"])
def test_flat_tiles_are_the_upscaled_source_to_the_bit(webui: WebUI, half_flat: Image.Image, order: str):
    plan = TilePlan(320, 96, TILES["tile"], TILES["overlap"])
    reply = webui.img2img(half_flat, {**TILES, "order": order, "flat": RECOMMENDED})
    change = abs(pixels(reply.image) - pixels(half_flat.resize((320, 96), Image.Resampling.LANCZOS))).max(2)
    flat = [number for number, tile in enumerate(plan.tiles, 1) if tile.right <= 2 * 96 - 8]
    first = min(tile.x for tile in plan.tiles if tile.right > 2 * 96 - 8)
    assert len(flat) == 2 and change[:, :first].max() == 0
    assert change[:, 2 * 96 :].mean() > 4
    notes = reply.fields["DINO Tile notes"]
    assert re.fullmatch(r"flat tiles skipped: 1-2", notes), notes
    assert reply.fields["DINO Tile flat"] == str(RECOMMENDED)
    assert "DINO Tile painted" not in reply.fields


def test_switched_off_flat_tiles_are_painted(webui: WebUI, half_flat: Image.Image):
    reply = webui.img2img(half_flat, {**TILES, "flat": 0})
    change = abs(pixels(reply.image) - pixels(half_flat.resize((320, 96), Image.Resampling.LANCZOS)))
    assert change[:, :128].mean() > 1
    assert "DINO Tile notes" not in reply.fields


def test_a_picture_that_is_flat_all_over_is_only_upscaled(webui: WebUI, half_flat: Image.Image):
    sky = half_flat.crop((0, 0, 80, 48))
    for more in ({}, {"order": "fused"}, {"seams": "half tile"}):
        reply = webui.img2img(sky, {**TILES, "flat": RECOMMENDED, **more})
        assert difference(reply.image, sky.resize((160, 96), Image.Resampling.LANCZOS)) == 0, more
        assert reply.fields["DINO Tile notes"] == "flat tiles skipped: 1-2", more


@pytest.mark.parametrize("fill", [0, 1, 2])
def test_what_a_mask_is_filled_with_does_not_make_a_tile_flat(webui: WebUI, source: Image.Image, fill: int):
    mask = Image.new("L", source.size, 255)
    mask.paste(0, (0, 0, 8, source.height))
    request = {"mask": encode(mask), "mask_blur": 0, "inpainting_fill": fill, "inpaint_full_res": False}
    reply = webui.img2img(source, {**TILES, "flat": 8}, **request)
    assert "flat" not in reply.fields.get("DINO Tile notes", "")
