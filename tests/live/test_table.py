"""Every option of the table is a control, an axis of plots, and comes back from PNG info. (The command line and the
README are held against it by the tests that need no WebUI.)"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from adapters import FEATURES, Adapters
from client import SCRIPT, WebUI, difference
from conftest import TILES
from PIL import Image
from plots import SCRIPT as PLOT
from plots import Plot

from lib_dinotile.dino.head import RestorationHead, save_heads
from lib_dinotile.options import Option
from lib_dinotile.settings import Settings

OPTIONS = list(Settings.table())
INSTALLED = ("upscaler", "captions", "adapter", "head", "encoder")
"""Options whose choices are what there is."""
ELSEWHERE = {"captions"}
"""PNG info with captions is tested with the other prompts: that needs an interrogator."""

FIRST: dict[str, Any] = {
    "target": "longest side",
    "longest": 120,
    "upscaler": "Nearest",
    "tile": 80,
    "strength": 0.5,
    "start": 0.1,
    "end": 0.9,
    "guidance": 0.8,
    "guidance_start": 0.05,
    "guidance_end": 0.95,
    "every": 2,
    "views": 2,
    "distance": "self-similarity",
    "layer": 1,
    "decoder": "approximate",
    "guard": "retry",
    "guard_seeds": 1,
    "guard_weaker": 0,
    "guard_budget": 0.3,
    "guard_strictness": 2.5,
    "encoder": "mini",
    "patches": 16,
    "windows": 2,
}
SECOND: dict[str, Any] = {
    "scale": 1.5,
    "tile": 64,
    "overlap": 24,
    "order": "linear",
    "seams": "bands",
    "seam_denoise": 0.4,
    "seam_width": 24,
    "colour": "AdaIN",
    "flat": 0.3,
    "regions": "2",
    "region_prompts": 'B: grass, "wet": green',
    "region_share": 0.25,
    "tile_prompt": 'a cat, "grey": old',
    "tile_prompt_mode": "replace",
    "tile_prompts": "1: whiskers\n2: an ear, two: ears",
    "guard": "blend back",
}
"""Values that differ from the defaults; some options have a part only beside others."""


@pytest.fixture
def head(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of a restoration head for the built-in encoder, of random weights, lent to the WebUI."""
    folder = request.config.getoption("--models") / "heads" / f"live-tests-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            heads = {layer: RestorationHead(FEATURES, 8) for layer in (-1, -2, -3)}
            for each in heads.values():
                torch.nn.init.normal_(each.outer.weight, std=0.05)
        save_heads(heads, folder / "random.safetensors", "mini")
        yield f"{folder.name}/random"
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def controls(webui: WebUI) -> list[dict[str, Any]]:
    scripts = webui.get("sdapi/v1/script-info").json()
    return next(s["args"] for s in scripts if s["name"] == SCRIPT and s["is_img2img"])


def test_every_option_is_a_control(controls: list[dict[str, Any]]):
    """If only a default differs: the WebUI keeps an older one in ui-config.json, delete its lines of dinotile."""
    assert [control["label"] for control in controls] == ["DINO Tile", *(option.label for option in OPTIONS[1:])]
    for option, control in zip(OPTIONS, controls):
        assert control["value"] == option.default, option.name
        for name in ("minimum", "maximum", "step"):
            expected = 0 if name == "minimum" and option.zero else getattr(option, name)
            assert control[name] == expected, option.name
        if option.name in INSTALLED:
            assert option.default in control["choices"], option.name
        else:
            assert control["choices"] == (option.choices and list(option.choices)), option.name


def test_every_option_that_changes_the_image_is_an_axis(plot: Plot):
    assert plot.axes == [option.label for option in OPTIONS if option.infotext]


def within(option: Option, control: dict[str, Any]) -> list[Any]:
    """The values at the ends of what is allowed."""
    if control["choices"]:
        return list(control["choices"])
    if option.type is str:
        return ["1: a cat"]
    return [*([0] if option.zero else []), option.minimum, option.maximum]


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.infotext], ids=lambda option: option.name)
def test_an_axis_takes_what_is_allowed_and_nothing_else(
    webui: WebUI, plot: Plot, small: Image.Image, controls: list[dict[str, Any]], option: Option
):
    """No cell is made: what is right is followed by an axis that is not."""

    def refusal(values: list[Any]) -> str:
        other = ("Tile overlap", [-8]) if option.name != "overlap" else ("Scale", [9])
        return webui.refusal(small, TILES, script_name=PLOT, script_args=plot.args(x=(option.label, values), y=other))

    right = within(option, controls[OPTIONS.index(option)])
    assert not refusal(right).startswith(f"{option.label}: ")
    if option.type is str and option.choices is None and option.name not in INSTALLED:
        return  # any text will do
    wrong = [option.minimum - 1, option.maximum + 1] if option.type in (int, float) else ["nope"]
    for value in wrong:
        assert refusal([*right, value]).startswith(f"{option.label}: "), value


def test_every_option_comes_back_from_png_info(webui: WebUI, small: Image.Image, adapters: Adapters, head: str):
    runs = {**FIRST, "adapter": adapters.random, "head": head}, SECOND
    told = [option for option in OPTIONS if option.infotext]
    for option in told:  # each has another value than it has anyway
        given = {run[option.name] for run in runs if option.name in run}
        assert given - {option.default} or option.name in ELSEWHERE, option.name
    for options in runs:
        first = webui.img2img(small, {**TILES, **options})
        for option in told:
            if options.get(option.name, option.default) != option.default:
                assert value(first.infotexts[0], option.infotext) == str(options[option.name]), option.name
        second = webui.img2img(small, infotext=first.infotexts[0])
        assert difference(first.image, second.image) == 0
        assert first.infotexts == second.infotexts


def value(infotext: str, key: str) -> str:
    """What PNG info has under a key, as it was before it was quoted."""
    found = re.search(rf'(?:^|, ){re.escape(key)}: ("(?:\\.|[^\\"])*"|[^,]*)(?:, |$)', infotext.split("\n")[-1])
    assert found, key
    return json.loads(found[1]) if found[1].startswith('"') else found[1]


def test_what_automatic_stood_for_is_told(webui: WebUI, small: Image.Image):
    looking = {**TILES, "guidance": 0.5}
    first = webui.img2img(small, looking)
    told = {option.name: value(first.infotexts[0], option.infotext) for option in OPTIONS[-4:-2]}
    assert told["head"] == "calibrated" and told["encoder"] != "Automatic"
    decoder = first.fields["DINO Tile guidance decoder"]
    assert f"guidance decoder: {decoder}" in first.fields["DINO Tile notes"]
    second = webui.img2img(small, {**looking, **told, "decoder": decoder})
    assert difference(first.image, second.image) == 0
    assert first.infotexts == second.infotexts
