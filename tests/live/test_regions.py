"""Every tile is told in words what it shows: regions of the source, their words, and where they act."""

from __future__ import annotations

import base64
import io
import json
import re
from typing import Any

import numpy as np
import pytest
from client import Reply, WebUI, decode, difference, encode, pixels
from PIL import Image
from test_prompts import LONG, STRONG, changed, lines

from lib_dinotile.tiling.plan import TilePlan

PAIR = {"scale": 2, "tile": 64, "overlap": 0, "batch": 2, "colour": "none", "regions": 2}
"""A source of 64x32 becomes two tiles, one beside the other: one batch."""
WHOLE = {**PAIR, "scale": 1, "tile": 128}
"""One tile of all of a source of 128x64."""
KEEPING = {"DDIM CFG++", "Euler CFG++", "DPM++ 2M CFG++"}
"""Samplers that go on with the negative prompt's x0, or noise."""


def halves(width: int) -> Image.Image:
    """Two textures side by side, the finer one left."""
    x = np.arange(width)[None] + np.arange(width // 2)[:, None]
    left, right = 90 + 60 * (x // 2 % 2), 150 + 80 * np.sin(x / 7)
    grey = np.where(np.arange(width) < width // 2, left, right)
    tint = np.where(np.arange(width)[None, :, None] < width // 2, (0.5, 0.8, 1.0), (1.0, 0.8, 0.4))
    return Image.fromarray((grey[..., None] * tint).astype(np.uint8))


@pytest.fixture(scope="module")
def pair() -> Image.Image:
    return halves(64)


def letters(webui: WebUI, source: Image.Image) -> tuple[str, str]:
    """Of the regions of the left and of the right half."""
    answer = webui.dinotile("regions", {"image": encode(source), "options": PAIR})
    assert answer.status_code == 200, answer.text
    found = sorted(answer.json()["regions"], key=lambda region: region["box"]["x"])
    assert len(found) == 2 and all(0.3 < region["share"] < 0.7 for region in found)
    return found[0]["letter"], found[1]["letter"]


@pytest.fixture(scope="module")
def named(webui: WebUI, pair: Image.Image) -> str:
    left, right = letters(webui, pair)
    return f"{left}: a cat\n{right}: a brick wall"


def generate(webui: WebUI, source: Image.Image, options: dict[str, Any], **request: Any) -> Reply:
    return webui.img2img(source, options, **{**STRONG, **request})


REQUESTS = {
    "cfg": {},
    "cfg 1": {"cfg_scale": 1, "denoising_strength": 1.0, "steps": 10},
    "and": {"prompt": "a photo AND a drawing :0.5"},
    "apart": {"override_settings": {"batch_cond_uncond": False}},
    "apart, and": {"override_settings": {"batch_cond_uncond": False}, "prompt": "a photo AND a drawing :0.5"},
    "long negative": {"negative_prompt": LONG},
    "scheduled": {"prompt": "a [photo:drawing:0.5]"},
    "weighted": {"prompt": "a (photo:1.4), [old]"},
    "DDIM": {"sampler_name": "DDIM", "steps": 10},
}


in_all_ways = pytest.mark.parametrize(
    "order, kind",
    [
        *(("chess", kind) for kind in REQUESTS),
        ("linear", "cfg"),
        *(("fused", kind) for kind in ("cfg", "and", "apart")),
    ],
)


@in_all_ways
def test_two_tiles_of_a_batch_are_told_their_own_words(
    webui: WebUI, pair: Image.Image, named: str, order: str, kind: str
):
    """As if each had been given them by a line of its own."""
    options = {**PAIR, "order": order}
    told = generate(webui, pair, {**options, "region_prompts": named}, **REQUESTS[kind])
    left, right = (line.split(": ")[1] for line in named.splitlines())
    given = generate(webui, pair, {**options, "tile_prompts": f"1: {left}\n2: {right}"}, **REQUESTS[kind])
    assert difference(told.image, given.image) <= 1
    swapped = generate(webui, pair, {**options, "tile_prompts": f"1: {right}\n2: {left}"}, **REQUESTS[kind])
    if kind == "cfg 1":  # a toy hardly hears anything then
        assert difference(told.image, given.image) < difference(told.image, swapped.image)
    else:
        assert changed(told.image, swapped.image, PAIR) == [1, 2]


@pytest.mark.parametrize("mode", ["follow", "replace"])
def test_words_come_behind_the_main_prompt_or_in_place_of_it(webui: WebUI, pair: Image.Image, named: str, mode: str):
    told = generate(webui, pair, {**PAIR, "region_prompts": named, "tile_prompt_mode": mode}, prompt="an etching")
    left = named.splitlines()[0].split(": ")[1]
    prompt = left if mode == "replace" else f"an etching, {left}"
    alone = generate(webui, pair, PAIR, prompt=prompt)
    assert changed(told.image, alone.image, PAIR) == [2]


@in_all_ways
def test_within_a_tile_words_act_where_their_region_is(webui: WebUI, order: str, kind: str):
    source, request = halves(128), {"denoising_strength": 0.4, **REQUESTS[kind]}
    left, right = letters(webui, source)
    options = {**WHOLE, "order": order}

    def told(first: str, second: str) -> np.ndarray:
        words = {"region_prompts": f"{left}: {first}\n{right}: {second}"}
        return pixels(generate(webui, source, {**options, **words}, **request).image)

    both, other = told("a cat", "a brick wall"), told("a cat", "snow")
    change = abs(both - other).mean(2)
    assert change[:, 80:].mean() > (3 if kind != "cfg 1" else 1) * change[:, :48].mean()
    one = told("a cat", "a cat")
    whole = generate(webui, source, {**options, "tile_prompt": "a cat"}, **request).image
    assert abs(one - pixels(whole)).max() <= 1


def test_any_batch_gives_the_same_image(webui: WebUI, photo: Image.Image):
    """Also with samplers that keep the negative prompt's x0 or noise of all tiles."""
    source = photo.resize((96, 64))
    options = {"scale": 2, "tile": 64, "overlap": 16, "colour": "none", "regions": 3}
    options["region_prompts"] = f"A: {LONG}\nB: a cat AND a dog\nC: a [dog:bird:0.5]"
    for sampler in ["DPM++ 2M", *sorted(KEEPING & {*webui.names("samplers")})]:
        one, three = (generate(webui, source, {**options, "batch": batch}, sampler_name=sampler) for batch in (1, 3))
        assert difference(one.image, three.image) <= 1, sampler
    told = [tile["regions"] for tile in one.extra["DINO Tile report"][0]["tiles"]]
    assert len({tuple(region["letter"] for region in tile) for tile in told}) > 1
    assert any(line.startswith("region prompts: ") for line in one.extra["DINO Tile report"][0]["notes"])


def test_a_tiles_own_line_wins(webui: WebUI, pair: Image.Image, named: str):
    both = generate(webui, pair, {**PAIR, "region_prompts": named, "tile_prompts": "1: snow"})
    assert lines(both.infotexts[0]) == "1: snow"
    right = named.splitlines()[1].split(": ")[1]
    alone = generate(webui, pair, {**PAIR, "tile_prompts": f"1: snow\n2: {right}"})
    assert difference(both.image, alone.image) <= 1


def test_without_words_and_with_regions_off_nothing_changes(webui: WebUI, pair: Image.Image, named: str):
    plain = generate(webui, pair, PAIR)
    off = generate(webui, pair, {**PAIR, "region_prompts": named, "regions": 0})
    assert difference(plain.image, off.image) == 0
    assert not [key for key in plain.fields | off.fields if key.startswith("DINO Tile region")]


def test_png_info_gives_the_image_again(webui: WebUI, pair: Image.Image, named: str):
    first = generate(webui, pair, {**PAIR, "region_prompts": named, "region_share": 0.2})
    second = webui.img2img(pair, infotext=first.infotexts[0], **STRONG)
    assert difference(first.image, second.image) == 0 and first.infotexts == second.infotexts
    assert first.fields["DINO Tile regions"] == "2" and first.fields["DINO Tile region share"] == "0.2"


def test_words_of_a_region_that_the_image_does_not_have_are_refused(webui: WebUI, pair: Image.Image):
    answer = webui.post("img2img", webui.body(pair, {**PAIR, "regions": "automatic", "region_prompts": "L: a cat"}))
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("region_prompts: there is no region L, this image has ")


@pytest.mark.parametrize(
    "options, line",
    [
        ({"region_prompts": "a cat"}, "region_prompts: 'a cat' is not a line like \"A: tabby fur\""),
        ({"region_prompts": "C: a cat"}, "region_prompts: there is no region C where regions is 2"),
        (
            {"region_prompts": "A: <lora:x:1>"},
            "prompts of tiles and regions cannot load networks such as LoRA: write them into the main prompt",
        ),
    ],
)
def test_what_is_not_allowed_is_refused(webui: WebUI, pair: Image.Image, options, line: str):
    assert webui.refusal(pair, {**PAIR, **options}) == line


def test_only_masked_is_refused(webui: WebUI, pair: Image.Image, named: str):
    mask = Image.new("L", pair.size)
    mask.paste(255, (0, 0, 20, 20))
    request = {"mask": encode(mask), "inpaint_full_res": True}
    assert webui.refusal(pair, {**PAIR, "region_prompts": named}, **request).startswith(
        "prompts per region do not work with Only masked"
    )


def test_the_api_tells_letters_shares_boxes_and_draws_them(webui: WebUI, photo: Image.Image):
    answer = webui.dinotile("regions", {"image": encode(photo), "options": {"region_prompts": "A: a suit"}})
    assert answer.status_code == 200, answer.text
    found, plan = answer.json(), TilePlan(2 * photo.width, 2 * photo.height, 512)
    regions = found["regions"]
    assert [region["letter"] for region in regions] == list("ABCDEFGHIJKL"[: len(regions)])
    shares = [region["share"] for region in regions]
    assert shares == sorted(shares, reverse=True) and abs(sum(shares) - 1) < 1e-5
    for region in regions:
        for box in (region["box"], region["crop"]):
            assert 0 <= box["x"] < box["x"] + box["width"] <= plan.width
            assert 0 <= box["y"] < box["y"] + box["height"] <= plan.height
    assert [region["words"] for region in regions] == ["a suit"] + [""] * (len(regions) - 1)
    assert found["region_prompts"] == "A: a suit"
    assert Image.open(io.BytesIO(base64.b64decode(found["image"]))).size == (found["width"], found["height"])
    small = encode(photo.resize((48, 36)))
    options = {"regions": 3}
    by_get = webui.get("dinotile/v1/regions", {"image": small, "options": json.dumps(options)})
    by_post = webui.dinotile("regions", {"image": small, "options": options})
    assert by_get.status_code == 200 and by_get.json() == by_post.json()
    assert decode(by_get.json()["image"]).width >= 96


@pytest.mark.parametrize(
    "body, line",
    [
        ({"options": {"regions": 0}}, "regions: 0 finds none, give automatic or how many"),
        ({"options": {"regions": 1}}, "regions: 1 is not allowed, give one of 0, automatic, 2, .*"),
        ({"interrogator": "nobody"}, "interrogator: 'nobody' is not installed, give one of .*"),
    ],
)
def test_the_api_refuses_in_one_line(webui: WebUI, pair: Image.Image, body, line):
    answer = webui.dinotile("regions", {"image": encode(pair), **body})
    assert answer.status_code == 422
    assert re.fullmatch(line, answer.json()["detail"]), answer.text
