"""ControlNet and the adapter together: both count, neither replaces the other."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from adapters import Adapters
from client import WebUI, difference, encode
from PIL import Image

WEIGHT = 0.1
"""Enough to be seen, also where the ControlNet is not trained."""
ONE_TILE = {"scale": 2, "tile": 256, "overlap": 0}
"""The whole canvas in one tile, which gets the whole control image."""
MANY = {"scale": 2, "tile": 128, "overlap": 16, "order": "linear"}

GRIDS = [pytest.param(ONE_TILE, id="one tile"), pytest.param(MANY, id="many tiles")]


@pytest.fixture(scope="module")
def unit(webui: WebUI, request: pytest.FixtureRequest, source: Image.Image) -> dict[str, Any]:
    """A unit that shows the ControlNet the source."""
    model = request.config.getoption("--controlnet")
    if not model:
        pytest.skip("no ControlNet is named: give --controlnet MODEL")
    answer = webui.get("controlnet/model_list")
    if answer.status_code != 200:
        pytest.skip("this WebUI has no ControlNet")
    names = answer.json()["model_list"]
    found = next((name for name in names if name == model or name.split(" [")[0] == model), None)
    assert found, f"--controlnet {model!r} is none of {', '.join(names)}"
    modules = webui.get("controlnet/module_list").json()["module_list"]
    none = next(name for name in modules if name.lower() == "none")
    return {"enabled": True, "image": encode(source), "module": none, "model": found, "weight": WEIGHT}


def controlled(webui: WebUI, source: Image.Image, unit: dict[str, Any], options: dict[str, Any]) -> Image.Image:
    """The image alone: what follows it are the units' own pictures."""
    return webui.img2img(source, options, alwayson_scripts={"ControlNet": {"args": [unit]}}).images[0]


@pytest.mark.parametrize("grid", GRIDS)
def test_both_have_their_effect(webui: WebUI, source: Image.Image, unit, adapters: Adapters, grid):
    adapted = {**grid, "adapter": adapters.random}
    images = {
        "neither": webui.img2img(source, grid).image,
        "the adapter": webui.img2img(source, adapted).image,
        "ControlNet": controlled(webui, source, unit, grid),
        "both": controlled(webui, source, unit, adapted),
    }
    for one, other in itertools.combinations(images, 2):
        assert difference(images[one], images[other]) > 1, f"{one} and {other} make the same image"


@pytest.mark.parametrize("grid", GRIDS)
def test_an_untrained_adapter_changes_nothing(webui: WebUI, source: Image.Image, unit, adapters: Adapters, grid):
    alone = controlled(webui, source, unit, grid)
    assert difference(controlled(webui, source, unit, {**grid, "adapter": adapters.untrained}), alone) == 0


@pytest.mark.parametrize("tile", [64, 96])
def test_any_batch_gives_the_same_image(webui: WebUI, source: Image.Image, unit, adapters: Adapters, tile: int):
    options = {"scale": 2, "tile": tile, "overlap": 0, "adapter": adapters.random}
    one, four = (controlled(webui, source, unit, {**options, "batch": batch}) for batch in (1, 4))
    assert difference(one, four) <= 1


def test_a_tile_gets_its_own_part_of_the_control_image(webui: WebUI, photo: Image.Image, unit):
    """Where the control image changes, the tiles there change, and no others."""
    source = photo.resize((112, 64))  # two tiles side by side
    control = source.copy()
    control.paste((0, 0, 0), (source.width - 32, 0, source.width, source.height))
    one, other = (
        controlled(webui, source, {**unit, "image": encode(image)}, {**MANY, "overlap": 0})
        for image in (source, control)
    )
    near, far = (0, 0, 80, one.height), (one.width - 64, 0, one.width, one.height)
    assert difference(one.crop(near), other.crop(near)) == 0
    assert difference(one.crop(far), other.crop(far)) > 1
