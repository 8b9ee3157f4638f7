"""ControlNet and the adapter together: both count, neither replaces the other."""

from __future__ import annotations

from typing import Any

import pytest
from adapters import Adapters
from client import WebUI, difference, encode
from conftest import TILES
from PIL import Image

WEIGHT = 0.1
"""Enough to be seen, also where the ControlNet is not trained."""
OPTIONS = {**TILES, "tile": 128}
"""A multiple of 64, where every UNet and ControlNet halves evenly."""


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
    return {"enabled": True, "image": encode(source), "module": "None", "model": found, "weight": WEIGHT}


def controlled(webui: WebUI, source: Image.Image, unit: dict[str, Any], **options: Any) -> Image.Image:
    return webui.img2img(source, {**OPTIONS, **options}, alwayson_scripts={"ControlNet": {"args": [unit]}}).image


def test_both_have_their_effect(webui: WebUI, source: Image.Image, unit: dict[str, Any], adapters: Adapters):
    images = {
        "neither": webui.img2img(source, OPTIONS).image,
        "adapter": webui.img2img(source, {**OPTIONS, "adapter": adapters.random}).image,
        "ControlNet": controlled(webui, source, unit),
        "both": controlled(webui, source, unit, adapter=adapters.random),
    }
    names = list(images)
    for number, one in enumerate(names):
        for other in names[number + 1 :]:
            assert difference(images[one], images[other]) > 1, f"{one} is the same as {other}"


def test_an_untrained_adapter_changes_nothing(
    webui: WebUI, source: Image.Image, unit: dict[str, Any], adapters: Adapters
):
    alone = controlled(webui, source, unit)
    assert difference(controlled(webui, source, unit, adapter=adapters.untrained), alone) == 0


@pytest.mark.parametrize("tile", [128, 96])
def test_any_batch_gives_the_same_image(
    webui: WebUI, source: Image.Image, unit: dict[str, Any], adapters: Adapters, tile: int
):
    one, four = (controlled(webui, source, unit, adapter=adapters.random, tile=tile, batch=batch) for batch in (1, 4))
    assert difference(one, four) <= 1
