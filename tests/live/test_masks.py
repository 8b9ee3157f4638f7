"""Inpaint masks: what is outside of them stays, to the bit, and is not worked on."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from client import Job, WebUI, correlation, difference, encode, pixels
from conftest import TILES
from PIL import Image

BOX = (8, 8, 40, 40)
"""What the mask shows of `source`; three of six `TILES` see nothing of it, and two when upscaled see most."""
HARD = {"mask_blur": 0, "inpainting_fill": 1, "inpaint_full_res": False}
"""The request for a mask with a hard border that starts from the picture."""
FILLS = {0: "fill", 1: None, 2: "latent noise", 3: "latent nothing"}
"""What the mask starts from, as the API counts it and as PNG info names it."""


def box_mask(size: tuple[int, int], box: tuple[int, int, int, int] = BOX) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def reach(mask: Image.Image, size: tuple[int, int], blur: int = 0) -> np.ndarray:
    """Where a result of that size may differ from its source: (H, W), true there."""
    around = int(2.5 * blur + 0.5)
    ys, xs = np.nonzero(np.asarray(mask))
    spread = np.zeros((mask.height, mask.width), dtype=np.uint8)
    for y, x in zip(ys, xs):
        spread[max(0, y - around) : y + around + 1, max(0, x - around) : x + around + 1] = 255
    return np.asarray(Image.fromarray(spread).resize(size, Image.Resampling.BILINEAR)) > 0


def check_outside(image: Image.Image, source: Image.Image, inside: np.ndarray) -> None:
    """Outside it is the upscaled source, to the bit; inside something has become of it."""
    change = abs(pixels(image) - pixels(source.resize(image.size, Image.Resampling.LANCZOS))).max(2)
    assert change[~inside].max() == 0
    assert change[inside].mean() > 2


def totals(job: Job) -> set[int]:
    """How many tiles there are to paint, as the progress has it."""
    found = [
        re.fullmatch(r"DINO Tile: painting tiles: \d+ of (\d+)", look.text) for look in job.looks() if look.running
    ]
    return {int(match[1]) for match in found if match}


@pytest.mark.parametrize(
    "options, request_",
    [
        ({}, {}),
        ({"order": "linear"}, {}),
        ({"order": "fused"}, {}),
        ({"order": "none", "seams": "half tile"}, {}),
        ({"seams": "half tile + crossings"}, {}),
        ({"order": "fused", "seams": "bands"}, {}),
        ({"colour": "none"}, {}),
        ({}, {"mask_blur": 4}),
        ({"order": "fused", "seams": "bands"}, {"mask_blur": 4}),
        ({}, {"inpainting_fill": 0}),
        ({}, {"inpainting_fill": 2}),
        ({"order": "fused"}, {"inpainting_fill": 0}),
        ({"order": "fused"}, {"inpainting_fill": 3}),
        ({"scale": 1.3}, {}),
        ({}, {"override_settings": {"img2img_color_correction": True}}),
        ({}, {"sampler_name": "Euler a"}),
        ({"order": "fused"}, {"sampler_name": "DDIM", "steps": 10}),
    ],
    ids=str,
)
def test_outside_the_mask_not_a_bit_changes(webui: WebUI, source: Image.Image, options, request_):
    mask = box_mask(source.size)
    image = webui.img2img(source, {**TILES, **options}, mask=encode(mask), **{**HARD, **request_}).image
    check_outside(image, source, reach(mask, image.size, request_.get("mask_blur", 0)))


@pytest.mark.parametrize("order", ["chess", "fused"])
def test_turned_round_the_inside_stays(webui: WebUI, source: Image.Image, order: str):
    mask = box_mask(source.size)
    request = {**HARD, "mask": encode(mask), "inpainting_mask_invert": 1}
    reply = webui.img2img(source, {**TILES, "order": order}, **request)
    turned = Image.fromarray(255 - np.asarray(mask))
    check_outside(reply.image, source, reach(turned, reply.image.size))
    assert reply.fields["Mask mode"] == "Inpaint not masked"


@pytest.mark.parametrize("order", ["chess", "fused"])
def test_only_tiles_that_the_mask_touches_are_painted(webui: WebUI, source: Image.Image, order: str):
    """Upscaled the box ends at 80; the last column of tiles begins at 128, the last row at 64."""
    options = {**TILES, "order": order, "batch": 1}
    assert totals(webui.start(source, options, steps=12)) == {6}
    mask = encode(box_mask(source.size, (0, 0, 28, 28)))
    assert totals(webui.start(source, options, steps=12, mask=mask, **HARD)) == {1}


def test_a_mask_over_everything_is_none(webui: WebUI, source: Image.Image, tiled):
    everything = encode(Image.new("L", source.size, 255))
    assert difference(webui.img2img(source, TILES, mask=everything, **HARD).image, tiled.image) <= 1


@pytest.mark.parametrize("order", ["chess", "fused"])
def test_any_batch_gives_the_same_image(webui: WebUI, source: Image.Image, order: str):
    request = {**HARD, "mask": encode(box_mask(source.size)), "mask_blur": 2, "inpainting_fill": 2}
    images = [webui.img2img(source, {**TILES, "order": order, "batch": n}, **request).image for n in (1, 4)]
    assert difference(*images) <= 1


def test_every_content_is_one_of_its_own(webui: WebUI, source: Image.Image):
    request = {**HARD, "mask": encode(box_mask(source.size))}
    replies = {fill: webui.img2img(source, TILES, **{**request, "inpainting_fill": fill}) for fill in FILLS}
    for fill, reply in replies.items():
        assert reply.fields.get("Masked content") == FILLS[fill]
        check_outside(reply.image, source, reach(box_mask(source.size), reply.image.size))
        assert all(difference(reply.image, other.image) > 1 for key, other in replies.items() if key != fill)


def test_a_mask_is_taken_as_the_page_sends_it(webui: WebUI, source: Image.Image):
    """There it is drawn on a transparent ground; the API takes it in black and white, of any size, too."""
    plain = box_mask(source.size)
    drawn = Image.new("RGBA", source.size, (0, 0, 0, 0))
    drawn.paste((255, 255, 255, 255), BOX)
    large = plain.resize((448, 320), Image.Resampling.NEAREST)
    images = [
        webui.img2img(source, TILES, mask=encode(mask), **HARD).image
        for mask in (plain, drawn, plain.convert("RGB"), plain.convert("1"))
    ]
    assert [difference(images[0], image) for image in images[1:]] == [0, 0, 0]
    check_outside(webui.img2img(source, TILES, mask=encode(large), **HARD).image, source, reach(plain, (224, 160), 2))


def test_every_image_of_a_batch_keeps_to_the_mask(webui: WebUI, source: Image.Image):
    mask = box_mask(source.size)
    reply = webui.img2img(source, TILES, mask=encode(mask), batch_size=2, **HARD)
    assert len(reply.images) == 2 and difference(*reply.images) > 1
    for image in reply.images:
        check_outside(image, source, reach(mask, image.size))


@pytest.mark.parametrize("mode", [1, 2])
def test_the_mask_goes_where_the_picture_goes(webui: WebUI, source: Image.Image, mode: int):
    """Cropped or filled up to another shape, the mask is, too."""
    mask = box_mask(source.size)
    options = {**TILES, "target": "img2img size"}
    request = {"width": 160, "height": 160, "resize_mode": mode}
    before = webui.img2img(source, {**options, "order": "none"}, **request).image
    after = webui.img2img(source, options, mask=encode(mask), **request, **HARD).image
    change = abs(pixels(after) - pixels(before)).max(2)
    # In 160x160 the source is 2 times as large and cut to 80 of its 112 columns, or 160/112 times as large.
    scale, left, top = (2, -32, 0) if mode == 1 else (160 / 112, 0, (160 - 80 * 160 / 112) / 2)
    x0, y0, x1, y1 = (round(v * scale + move) for v, move in zip(BOX, (left, top, left, top)))
    assert change[max(0, y0 + 4) : y1 - 4, max(0, x0 + 4) : x1 - 4].mean() > 2
    change[max(0, y0 - 4) : y1 + 4, max(0, x0 - 4) : x1 + 4] = 0
    assert change.max() == 0


@pytest.mark.parametrize(
    "options, request_",
    [
        ({}, {}),
        ({"order": "fused"}, {"mask_blur": 4}),
        ({}, {"inpainting_fill": 0}),
        ({"scale": 1}, {"inpaint_full_res_padding": 0}),
        ({"target": "longest side", "longest": 150}, {}),
        ({"target": "img2img size"}, {"width": 120, "height": 88, "mask_blur": 2}),
        ({"order": "none", "seams": "half tile", "scale": 4}, {}),
    ],
    ids=str,
)
def test_only_masked_the_rest_stays_as_large_as_it_is(webui: WebUI, source: Image.Image, options, request_):
    mask = box_mask(source.size)
    request = {**HARD, "inpaint_full_res": True, "inpaint_full_res_padding": 8, "mask": encode(mask), **request_}
    reply = webui.img2img(source, {**TILES, **options}, **request)
    assert reply.image.size == source.size
    assert reply.fields["Size"] == "{}x{}".format(*source.size)
    assert reply.fields["Inpaint area"] == "Only masked"
    assert reply.fields["Masked area padding"] == str(request["inpaint_full_res_padding"])
    check_outside(reply.image, source, reach(mask, source.size, request["mask_blur"]))


def test_only_masked_the_surroundings_are_seen(webui: WebUI, source: Image.Image):
    """What is painted comes back to where it was: without denoising it is the picture that was there."""
    request = {**HARD, "inpaint_full_res": True, "inpaint_full_res_padding": 8, "mask": encode(box_mask(source.size))}
    image = webui.img2img(source, {**TILES, "scale": 4}, **request, denoising_strength=0).image
    assert correlation(image.crop(BOX), source.crop(BOX)) > 0.95


@pytest.mark.parametrize("side", [1, 2, 4])
@pytest.mark.parametrize(
    "options", [{"scale": 1}, {"scale": 2}, {"target": "longest side", "longest": 96}, {"order": "fused"}], ids=str
)
def test_only_masked_a_few_pixels_are_painted_too(webui: WebUI, small: Image.Image, options, side: int):
    """Of a single latent cell the model makes nothing, or fails."""
    mask = box_mask(small.size, (30, 20, 30 + side, 20 + side))
    request = {**HARD, "inpaint_full_res": True, "inpaint_full_res_padding": 0, "mask": encode(mask)}
    reply = webui.img2img(small, {**TILES, **options}, **request, denoising_strength=0.9)
    change = abs(pixels(reply.image) - pixels(small)).max(2)
    inside = np.asarray(mask) > 0
    assert change[~inside].max() == 0 and change[inside].max() > 0


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (8, 4)], ids=str)
def test_a_picture_of_a_few_pixels_is_painted(webui: WebUI, small: Image.Image, size: tuple[int, int]):
    assert webui.img2img(small.resize(size), TILES).image.size == (2 * size[0], 2 * size[1])


@pytest.mark.parametrize("only_masked", [False, True])
def test_masks_are_shown_where_the_webui_shows_them(webui: WebUI, source: Image.Image, only_masked: bool):
    """In the size of the result: the mask, and the part of the result that it leaves."""
    names = ("return_mask", "return_mask_composite", "save_mask", "save_mask_composite")
    request = {**HARD, "mask": encode(box_mask(source.size)), "mask_blur": 2, "inpaint_full_res": only_masked}
    (alone,) = webui.img2img(source, TILES, **request).images
    webui.post("options", {**dict.fromkeys(names[:2], True), **dict.fromkeys(names[2:], False)}).raise_for_status()
    try:
        plain = webui.img2img(source, None, **request).images
        image, mask, composite, *maps = webui.img2img(source, {**TILES, "maps": "semantic"}, **request).images
    finally:
        webui.post("options", dict.fromkeys(names, False)).raise_for_status()
    assert difference(image, alone) == 0 and len(maps) == 1
    assert mask.size == composite.size == image.size and composite.mode == plain[2].mode == "RGBA"
    assert difference(mask.resize(source.size), plain[1].resize(source.size)) <= (1 if only_masked else 64)
    painted = np.asarray(mask.convert("L")) == 255
    assert painted.any() and abs(pixels(composite) - pixels(image))[painted].max() <= 1
    assert np.asarray(composite)[..., 3][np.asarray(mask.convert("L")) == 0].max() == 0


EMPTY: dict[str, tuple[int, dict[str, Any]]] = {
    "black": (0, {}),
    "black, only masked": (0, {"inpaint_full_res": True}),
    "white, turned round": (255, {"inpainting_mask_invert": 1}),
}


@pytest.mark.parametrize("level, request_", EMPTY.values(), ids=EMPTY.keys())
def test_an_empty_mask_is_refused(webui: WebUI, small: Image.Image, level: int, request_):
    mask = encode(Image.new("L", small.size, level))
    line = webui.refusal(small, TILES, mask=mask, **{**HARD, **request_})
    assert line == "the inpaint mask is empty: draw one, or remove it"


def test_soft_inpainting_is_refused(webui: WebUI, small: Image.Image):
    scripts = webui.get("sdapi/v1/script-info").json()
    soft = next((s for s in scripts if s["name"] == "soft inpainting" and s["is_img2img"]), None)
    if soft is None:
        pytest.skip("this WebUI has no soft inpainting")
    args = [True, *(arg["value"] for arg in soft["args"][1:])]
    request = {"mask": encode(box_mask(small.size)), "alwayson_scripts": {"soft inpainting": {"args": args}}}
    assert "Soft inpainting does not work with tiles" in webui.refusal(small, TILES, **HARD, **request)
