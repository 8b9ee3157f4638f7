"""The WebUI's own always-on scripts beside DINO Tile: they act on every tile, or are refused before the first."""

from __future__ import annotations

from typing import Any

import pytest
from client import WebUI, difference, pixels
from conftest import TILES
from PIL import Image

OPTIONS = {**TILES, "colour": "none", "guidance": 1.0}
STRONG = {"cfg_scale": 15, "denoising_strength": 0.7, "negative_prompt": "a cat"}

ACT: dict[str, dict[str, Any]] = {
    "dynamicthresholding": {"Mimic Scale": 2.0},
    "freeu": {"B1": 1.5, "B2": 1.6, "S1": 0.5, "S2": 0.2},
    "hypertile": {"Tile Size": 64, "Max Depth": 0},
    "kohya hrfix": {"End Percent": 1.0},
    "latentmodifier": {"Sharpness Multiplier": 50.0, "Sharpness Method": "gaussian"},
    "perturbedattentionguidance": {"Scale": 5.0},
    "rescalecfg": {},
    "selfattentionguidance": {"Scale": 3.0},
}
"""Beginnings of their titles, with settings that are seen besides the switch."""
REFUSED = ("multidiffusion integrated", "tiled diffusion", "demofusion", "stylealign integrated")


@pytest.fixture(scope="module")
def scripts(webui: WebUI) -> dict[str, list[dict[str, Any]]]:
    """Arguments of the always-on scripts of img2img, by title."""
    found = webui.get("sdapi/v1/script-info").json()
    return {script["name"]: script["args"] for script in found if script["is_alwayson"] and script["is_img2img"]}


def switched_on(
    scripts: dict[str, list[dict[str, Any]]], beginning: str, values: dict[str, Any], on: Any = True
) -> dict[str, Any]:
    """What a request says of the script whose title begins so; skips if there is none. on: the value of its switch."""
    title = next((title for title in scripts if title.startswith(beginning)), None)
    if title is None:
        pytest.skip(f"this WebUI has no {beginning}")
    rows = scripts[title]
    assert set(values) <= {row["label"] for row in rows}
    args = [on, *(values.get(row["label"], row["value"]) for row in rows[1:])]
    return {"alwayson_scripts": {title: {"args": args}}}


@pytest.mark.parametrize("on", [True, 1, "True"], ids=repr)
@pytest.mark.parametrize("title", REFUSED)
def test_what_takes_tiles_for_images_is_refused(webui: WebUI, small: Image.Image, scripts, title: str, on: Any):
    line = webui.refusal(small, OPTIONS, **switched_on(scripts, title, {}, on))
    assert title in line.lower() and "switch it off" in line


def test_a_vae_in_tiles_of_its_own_gives_nearly_the_same_image(webui: WebUI, photo: Image.Image, scripts):
    """Tiled VAE: of a tile that is larger than its own it makes several, with statistics of the whole."""
    more = switched_on(
        scripts, "tiled vae", {"Encoder Tile Size": 64, "Decoder Tile Size": 16, "Fast Encoder Color Fix": True}
    )
    full = {"sd_vae_encode_method": "Full", "sd_vae_decode_method": "Full"}
    before = {name: webui.get("sdapi/v1/options").json()[name] for name in full}
    source, options = photo.resize((128, 96)), {**OPTIONS, "tile": 192, "guidance": 0.0}
    webui.post("options", full).raise_for_status()
    try:
        without, with_it = (webui.img2img(source, options, **given).image for given in ({}, more))
    finally:
        webui.post("options", before).raise_for_status()
    change = abs(pixels(without) - pixels(with_it))
    assert change.max() > 0, "it is not at work"
    assert change.mean() < 8


@pytest.mark.parametrize("title", ACT)
def test_what_changes_the_model_acts_on_every_tile(webui: WebUI, small: Image.Image, scripts, title: str):
    more = switched_on(scripts, title, ACT[title])
    plain, switched = (webui.post("img2img", webui.body(small, None, **STRONG, **given)) for given in ({}, more))
    if switched.status_code == 500:
        pytest.skip("with this checkpoint the WebUI itself fails")
    if difference(webui.reply(plain).image, webui.reply(switched).image) < 3:
        pytest.skip("with this checkpoint it shows nowhere")
    without, with_it = (webui.img2img(small, OPTIONS, **STRONG, **given).image for given in ({}, more))
    half = with_it.width // 2
    for side in ((0, 0, half, with_it.height), (half, 0, with_it.width, with_it.height)):
        assert difference(without.crop(side), with_it.crop(side)) > 0
    alone = webui.img2img(small, {**OPTIONS, "batch": 1}, **STRONG, **more).image
    assert difference(alone, with_it) <= 2, "tiles of a batch see each other"
