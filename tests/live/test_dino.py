"""Guidance, guard, report and maps, with the built-in encoder, which every WebUI has."""

from __future__ import annotations

import pytest
from client import Reply, WebUI, correlation, difference, encode, pixels
from conftest import TILES
from PIL import Image, ImageDraw

LOOK = {**TILES, "patches": 32, "encoder": "mini"}
GUIDED = {**LOOK, "guidance": 1.0, "every": 1}
WATCHED = {**LOOK, "guard": "report"}
SAMPLERS = ("Euler", "Euler a", "DPM++ 2M", "DPM++ SDE", "Heun", "LCM", "DDIM", "PLMS", "UniPC")


def report(reply: Reply) -> dict:
    """What became of the tiles of the first image."""
    return reply.extra["DINO Tile report"][0]


def scores(reply: Reply) -> list[float]:
    return [tile["after"] for tile in report(reply)["tiles"]]


def enlarged(source: Image.Image, image: Image.Image) -> Image.Image:
    return source.resize(image.size, Image.Resampling.LANCZOS)


# Guidance --------------------------------------------------------------------------------------------------------


def test_strength_zero_is_off(webui: WebUI, source: Image.Image, tiled: Reply):
    off = webui.img2img(source, {**GUIDED, "guidance": 0.0, "guidance_start": 0.25, "distance": "self-similarity"})
    assert difference(off.image, tiled.image) == 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_takes_part_with_any_sampler_and_brings_the_result_nearer(
    webui: WebUI, source: Image.Image, sampler: str
):
    if sampler not in webui.names("samplers"):
        pytest.skip(f"this WebUI has no {sampler}")
    more = {"sampler_name": sampler, "steps": 10, "denoising_strength": 0.6}
    way = {"guidance": 0.5, "every": 1}
    if sampler == "PLMS":  # it extrapolates from earlier steps: where guidance ends it goes back for a while
        way["guidance_end"] = 1.0
    plain, guided = (webui.img2img(source, {**WATCHED, **chosen}, **more) for chosen in ({}, way))
    assert difference(plain.image, guided.image) > 2
    # Another layer is compared than the one that steers.
    assert sum(scores(guided)) > sum(scores(plain))
    # It steers the picture; it does not drown it.
    base = enlarged(source, plain.image)
    assert correlation(guided.image, base) > correlation(plain.image, base) - 0.1


@pytest.mark.parametrize("request_more", [{"cfg_scale": 1}, {"prompt": "a cat AND a dog"}, {"prompt": "a " * 90}])
def test_guidance_at_cfg_1_with_and_and_with_long_prompts(webui: WebUI, source: Image.Image, request_more):
    plain, guided = webui.img2img(source, LOOK, **request_more), webui.img2img(source, GUIDED, **request_more)
    assert difference(plain.image, guided.image) > 2


@pytest.mark.parametrize("order", ["chess", "fused"])
def test_guidance_gives_the_same_image_at_any_batch_size(webui: WebUI, source: Image.Image, order: str):
    one, four = (webui.img2img(source, {**GUIDED, "order": order, "batch": batch}).image for batch in (1, 4))
    assert difference(one, four) <= 2


@pytest.mark.parametrize("distance", ["patches", "self-similarity"])
@pytest.mark.parametrize("layer", [1, 3])
def test_guidance_by_any_distance_and_layer(webui: WebUI, small: Image.Image, distance: str, layer: int):
    plain = webui.img2img(small, LOOK)
    guided = webui.img2img(small, {**GUIDED, "distance": distance, "layer": layer})
    assert difference(plain.image, guided.image) > 2


@pytest.mark.parametrize("decoder", ["TAESD", "approximate", "full VAE"])
def test_the_decoder_is_told(webui: WebUI, small: Image.Image, decoder: str):
    reply = webui.img2img(small, {**GUIDED, "decoder": decoder})
    assert f"guidance decoder: {decoder}" in report(reply)["notes"]
    assert f"guidance decoder: {decoder}" in reply.fields["DINO Tile notes"]


def test_guidance_leaves_alone_what_the_mask_does(webui: WebUI, source: Image.Image):
    mask = Image.new("L", source.size, 0)
    ImageDraw.Draw(mask).rectangle((20, 20, 60, 60), fill=255)
    from client import encode

    more = {"mask": encode(mask), "inpainting_fill": 1, "inpaint_full_res": False, "mask_blur": 0}
    plain, guided = webui.img2img(source, LOOK, **more).image, webui.img2img(source, GUIDED, **more).image
    changed = abs(pixels(plain) - pixels(guided)).max(2)
    inside = pixels(mask.resize(plain.size, Image.Resampling.BILINEAR))[..., 0] > 0
    assert changed[inside].max() > 2 and changed[~inside].max() == 0


@pytest.mark.parametrize(
    "way", [{"encoder": "nowhere"}, {"head": "nowhere"}, {"layer": 9}, {"guidance_start": 0.9, "guidance_end": 0.1}]
)
def test_what_cannot_be_is_refused_in_one_line(webui: WebUI, small: Image.Image, way):
    assert next(iter(way)) in webui.refusal(small, {**GUIDED, **way})


# Guard -----------------------------------------------------------------------------------------------------------


def test_a_report_changes_nothing_and_tells_of_every_tile(webui: WebUI, source: Image.Image, tiled: Reply):
    reply = webui.img2img(source, WATCHED)
    assert difference(reply.image, tiled.image) == 0
    tiles = report(reply)["tiles"]
    assert [tile["number"] for tile in tiles] == [1, 2, 3, 4, 5, 6]
    for tile in tiles:
        assert -1 <= tile["after"] == tile["before"] <= 1 and tile["retries"] == 0 and tile["blended"] == 0
        assert tile["seconds"] > 0 and tile["width"] == 96
    assert "guard: " in reply.fields["DINO Tile notes"]


@pytest.mark.parametrize("order", ["chess", "linear", "fused"])
def test_what_is_in_doubt_is_painted_again_and_then_blended_back(webui: WebUI, small: Image.Image, order: str):
    """All of it is, and of two tiles the guard does not say that this is hopeless."""
    source, way = small, {**LOOK, "order": order, "guard_strictness": -5.0, "guard_budget": 3.0}
    more = {"denoising_strength": 0.8, "steps": 6}
    before = webui.img2img(source, {**way, "guard": "report"}, **more)
    blended = webui.img2img(source, {**way, "guard": "blend back"}, **more)
    retried = webui.img2img(source, {**way, "guard": "retry", "guard_seeds": 2, "guard_weaker": 1}, **more)
    base = enlarged(source, before.image)
    assert abs(pixels(blended.image) - pixels(base)).mean() < abs(pixels(before.image) - pixels(base)).mean()
    tiles = report(retried)["tiles"]
    doubted = [tile for tile in tiles if tile["doubt_before"] > 0]
    assert doubted and all(tile["retries"] >= 1 and tile["seeds"][0] == 1 for tile in doubted)
    assert sum(tile["doubt_after"] for tile in tiles) <= sum(tile["doubt_before"] for tile in tiles)
    assert difference(retried.image, before.image) > 2


def test_a_batch_has_a_report_for_each_image(webui: WebUI, small: Image.Image):
    reply = webui.img2img(small, WATCHED, n_iter=2, batch_size=2, override_settings={"return_grid": False})
    assert len(reply.images) == 4 and len(reply.extra["DINO Tile report"]) == 4


# Maps ------------------------------------------------------------------------------------------------------------


def test_maps_come_behind_the_image(webui: WebUI, source: Image.Image, tiled: Reply):
    reply = webui.img2img(source, {**LOOK, "maps": "both"})
    image, semantic, consistency = reply.images
    assert difference(image, tiled.image) == 0
    assert semantic.size == image.size and consistency.height > image.height
    assert len(reply.infotexts) == 3 and "DINO Tile map: semantic" in reply.infotexts[1]
    again = webui.img2img(source, {**LOOK, "maps": "semantic"}, seed=5)
    assert len(again.images) == 2 and correlation(again.images[1], semantic) > 0.9  # the colours are the source's


def test_the_enlarged_source_comes_behind_the_image(webui: WebUI, source: Image.Image, tiled: Reply):
    """As large as the image, also where that is as large as the source."""
    reply = webui.img2img(source, {**TILES, "maps": "source"})
    image, before = reply.images
    assert difference(image, tiled.image) == 0 and before.size == image.size
    assert difference(before, enlarged(source, image)) <= 1
    assert "DINO Tile map: source" in reply.infotexts[1]
    mask = Image.new("L", source.size)
    mask.paste(255, (20, 20, 60, 50))
    masked = {"mask": encode(mask), "inpaint_full_res": True, "inpaint_full_res_padding": 8}
    image, before = webui.img2img(source, {**TILES, "maps": "source"}, **masked).images
    assert image.size == before.size == source.size
