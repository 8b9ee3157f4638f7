"""What cannot be done is refused with one line, before a tile is painted."""

from __future__ import annotations

import re
from typing import Any

import pytest
from adapters import Adapters
from client import BLIND, WebUI, difference, encode
from conftest import TILES
from PIL import Image

TILE = r"0 \(automatic\) or a whole number from 64 to 2048, a multiple of 8"
OPTIONS = {
    "unknown option": ({"scal": 2}, r"'scal' is not an option of DINO Tile: did you mean 'scale'\?"),
    "out of range": ({"scale": 9}, "scale: 9 is not allowed, give a number from 1 to 8"),
    "below range": (
        {"tile": 8},
        f"tile: 8 is not allowed, give {TILE}",
    ),
    "off the grid": (
        {"tile": 100},
        f"tile: 100 is not allowed, give {TILE}",
    ),
    "text for a number": ({"scale": "2"}, "scale: '2' is not allowed, give a number from 1 to 8"),
    "nothing for a number": ({"scale": None}, "scale: None is not allowed, give a number from 1 to 8"),
    "number for a switch": ({"enabled": 1}, "enabled: 1 is not allowed, give true or false"),
    "number for a name": ({"adapter": 3}, "adapter: 3 is not allowed, give text"),
    "unknown choice": ({"order": "spiral"}, "order: 'spiral' is not allowed, give one of chess, linear, fused, none"),
    "too much overlap": ({"overlap": 64}, "overlap: 64 is not allowed with tile 96, give at most 48"),
    "end before start": ({"start": 0.5, "end": 0.25}, "start: 0.5 is not allowed with end 0.25, give at most 0.25"),
    "unknown upscaler": ({"upscaler": "Magic"}, "upscaler: 'Magic' is not installed, give one of .*Lanczos.*"),
    "unknown adapter": ({"adapter": "nope"}, "adapter: 'nope' is not installed, give one of None.*"),
    "adapter by path": ({"adapter": "../../x"}, r"adapter: '../../x' is not installed, give one of None.*"),
    "adapter by file": ({"adapter": "/etc/hostname"}, "adapter: '/etc/hostname' is not installed, give one of None.*"),
    "unknown encoder, nothing looks": (
        {"encoder": "dinov9"},
        "encoder: 'dinov9' is not installed in .*, give one of .*",
    ),
    "unknown head, nothing looks": ({"head": "nope"}, "head: 'nope' is not installed, give one of None.*"),
    "empty adapter": ({"adapter": ""}, "adapter: '' is not installed, give one of None.*"),
}
ADAPTERS = {
    "other_shape": "adapter '{}' does not fit this checkpoint's UNet: it gives .*, the UNet takes .*",
    "other_base": "adapter '{}' is for nobase checkpoints, this one is .*: choose another adapter or None",
    "other_encoder": "adapter '{}' reads encoder 'no-such-encoder': install it, and choose that encoder",
    "other_width": r"adapter '{}' reads tokens \d+ wide, those of encoder 'mini' are \d+: choose .*",
    "cut_off": "cut-off.safetensors cannot be read as a safetensors file: .*",
    "text": "text.safetensors cannot be read as a safetensors file: .*",
    "foreign": "foreign.safetensors is not a dinotile adapter: .*",
    "mixed_up": "mixed-up.safetensors is damaged: tensor outputs.0.weight does not fit its metadata",
}


@pytest.mark.parametrize("options, line", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_that_are_not_allowed(webui: WebUI, small: Image.Image, options, line: str):
    refusal = webui.refusal(small, {**TILES, **options})
    assert re.fullmatch(line, refusal), refusal


@pytest.mark.parametrize("option", ["adapter", "captions", "encoder", "head", "upscaler"])
def test_a_plan_names_what_is_not_installed_too(webui: WebUI, option: str):
    answer = webui.dinotile("plan", {"width": 64, "height": 48, "options": {option: "nope"}})
    assert webui.refused(answer).startswith(f"{option}: 'nope' is not installed")


def test_the_api_names_the_extension_not_a_class(webui: WebUI, small: Image.Image):
    answer = webui.post("img2img", webui.body(small, {**TILES, "scale": 9})).json()
    assert answer["error"] == "DINO Tile" and "Error" not in str(answer)


def test_a_dict_switches_it_on_unless_it_says_no(webui: WebUI, small: Image.Image):
    def size(options: dict[str, Any]) -> tuple[int, int]:
        return webui.img2img(small, alwayson_scripts={"dino tile": {"args": [options]}}).image.size

    cheap, plain = {"order": "none", **BLIND}, webui.img2img(small).image.size  # Forge Neo rounds it
    assert size({**cheap, "scale": 3}) == (192, 144)
    assert size({**cheap, "scale": 3, "enabled": False}) == size({}) == plain


@pytest.mark.parametrize("kind, line", ADAPTERS.items(), ids=ADAPTERS.keys())
def test_adapters_that_do_not_fit(webui: WebUI, small: Image.Image, adapters: Adapters, kind: str, line: str):
    name = getattr(adapters, kind)
    refusal = webui.refusal(small, {**TILES, "adapter": name})
    assert re.fullmatch(line.format(re.escape(name)), refusal), refusal


def test_an_encoder_that_is_not_there(webui: WebUI, small: Image.Image, adapters: Adapters):
    for encoder in ("no-such-encoder", "../../../x", "/etc"):
        refusal = webui.refusal(small, {**TILES, "adapter": adapters.random, "encoder": encoder})
        assert refusal.startswith(f"encoder: '{encoder}' is not installed in "), refusal


def test_a_canvas_that_is_too_large(webui: WebUI, small: Image.Image):
    assert "at most 65536 pixels a side" in webui.refusal(small.resize((9000, 8)), {**TILES, "scale": 8})


def test_sources_of_different_sizes(webui: WebUI, small: Image.Image):
    sources = [encode(small), encode(small.resize((40, 40)))]
    assert "one size" in webui.refusal(small, TILES, init_images=sources, batch_size=2)


def test_more_sources_than_the_batch_has_places(webui: WebUI, small: Image.Image):
    assert "batch" in webui.refusal(small, TILES, init_images=[encode(small)] * 2, batch_size=1)


@pytest.mark.parametrize("args", [["yes"], [True, "scale", 9.0], [True, "scale", 2.0, 2048, "Lanczos", 100]])
def test_arguments_by_position_that_are_not_allowed(webui: WebUI, small: Image.Image, args):
    assert "is not allowed, give" in webui.refusal(small, alwayson_scripts={"dino tile": {"args": args}})


def test_hyper_tile(webui: WebUI, small: Image.Image):
    if "Hypertile" not in webui.get("sdapi/v1/scripts").json()["img2img"]:
        pytest.skip("this WebUI has no HyperTile")
    if "hypertile_enable_unet" not in webui.settings:  # an overridden setting would not be put back
        pytest.skip("the API of this WebUI has no settings of extensions")
    webui.post("options", {"hypertile_enable_unet": False}).raise_for_status()
    more = {"override_settings": {"hypertile_enable_unet": True}}
    assert "HyperTile does not work with DINO Tile" in webui.refusal(small, TILES, **more)


def test_a_refiner(webui: WebUI, small: Image.Image):
    checkpoint = webui.get("sdapi/v1/sd-models").json()[0]["title"]
    assert "set Refiner to None" in webui.refusal(small, TILES, refiner_checkpoint=checkpoint, refiner_switch_at=0.5)


def test_while_switched_off_its_controls_may_be_at_anything(webui: WebUI, small: Image.Image):
    plain = webui.img2img(small).image
    odd = webui.img2img(small, alwayson_scripts={"dino tile": {"args": [False, 99.0, "None", 64, 64]}}).image
    assert difference(plain, odd) == 0
