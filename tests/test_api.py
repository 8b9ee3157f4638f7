"""The routes, without a WebUI."""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import types
from collections.abc import Iterator

import pytest
import torch
from PIL import Image

from lib_dinotile import DinotileError
from lib_dinotile.dino.regions import Regions
from tests.conftest import import_of_webuis
from tests.stand_in import webui
from tests.strategies import encoded

import_of_webuis("fastapi")
import_of_webuis("gradio")


@pytest.fixture
def api() -> Iterator[types.ModuleType]:
    with webui():
        yield importlib.import_module("lib_dinotile.webui.api")


@pytest.fixture
def planned(api, monkeypatch):
    """The size that a plan is made for, for an image as it is sent."""
    sizes = []

    class Made(Exception):
        pass

    def preview(size, *_):
        sizes.append(size)
        raise Made

    def size(image: str) -> tuple[int, int]:
        with pytest.raises(Made):
            api.plan(api.PlanRequest(image=image))
        return sizes.pop()

    monkeypatch.setattr(api, "_preview", preview)
    return size


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_plan_needs_no_more_of_an_image_than_its_header(planned, monkeypatch, name):
    image = base64.b64encode(encoded(Image.new("RGB", (70, 30)), name, orientation=6)).decode()
    # All formats' own come to this.
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    for text in (image, f"data:image/{name.lower()};base64,{image}", "\n".join(image)):
        assert planned(text) == (30, 70)


@pytest.mark.parametrize(
    "data, says",
    [(b"no image", "cannot be read as an image"), (b"\x89PNG\r\n\x1a\n", "cannot be read as an image")],
)
def test_what_is_no_image_is_refused_in_one_line(api, data, says):
    for text, line in ((base64.b64encode(data).decode(), says), ("?", "image: this is not base64")):
        with pytest.raises(DinotileError, match=line) as error:
            api.plan(api.PlanRequest(image=text))
        assert "\n" not in str(error.value)


def test_regions_are_told_with_their_boxes_and_words(api, monkeypatch):
    regions, asked = Regions(torch.tensor([[0, 0, 1], [0, 0, 1]]), (90, 60)), []
    made = types.SimpleNamespace(
        regions=lambda source: regions,
        asked=lambda source, found, words, name: asked.append(name) or {"A": "fur", "B": "wall"},
        region_map=lambda source, found, words: Image.new("RGB", (90, 99)),
    )
    monkeypatch.setattr(api, "_preview", lambda *_: made)
    monkeypatch.setattr(api.call_queue, "queue_lock", contextlib.nullcontext(), raising=False)
    image = base64.b64encode(encoded(Image.new("RGB", (45, 30)), "PNG")).decode()
    found = api.regions(api.RegionRequest(image=image, options={"region_prompts": "B: wall"}))
    left, right = found["regions"]
    assert (left["letter"], left["words"], right["letter"], right["words"]) == ("A", "", "B", "wall")
    assert left["box"] == {"x": 0, "y": 0, "width": 60, "height": 60} == left["crop"]
    assert right["box"] == {"x": 60, "y": 0, "width": 30, "height": 60}
    assert right["crop"] == {"x": 60, "y": 0, "width": 30, "height": 30}
    assert (found["width"], found["height"], found["region_prompts"]) == (90, 99, "B: wall")
    assert api.regions_of(image, '{"region_prompts": "B: wall"}', "") == found
    monkeypatch.setattr(api, "interrogators", lambda: {"Stub": None})
    named = api.regions(api.RegionRequest(image=image, interrogator="Stub"))
    assert asked == ["Stub"] and named["region_prompts"] == "A: fur\nB: wall"
    with pytest.raises(DinotileError, match="there is no region C, this image has 2"):
        api.regions(api.RegionRequest(image=image, options={"region_prompts": "C: sea"}))


@pytest.mark.parametrize(
    "options, interrogator, line",
    [
        ("[]", "", "options: give one dict of options"),
        ("{", "", "options: this is not JSON: .*"),
        ('{"regions": 0}', "", "regions: 0 finds none, give automatic or how many"),
        ("{}", "nobody", "interrogator: 'nobody' is not installed, give one of .*"),
    ],
)
def test_regions_that_cannot_be_told_are_refused_in_one_line(api, monkeypatch, options, interrogator, line):
    monkeypatch.setattr(api, "interrogators", lambda: {"Stub": None})
    image = base64.b64encode(encoded(Image.new("RGB", (45, 30)), "PNG")).decode()
    with pytest.raises(DinotileError, match=line) as error:
        api.regions_of(image, options, interrogator)
    assert "\n" not in str(error.value)


def test_a_semantic_map_is_of_the_whole_image(api, monkeypatch):
    image = base64.b64encode(encoded(Image.new("RGB", (70, 30), "red"), "PNG", orientation=6)).decode()
    monkeypatch.setattr(api, "_preview", lambda size, *_: types.SimpleNamespace(semantic_map=lambda source: source))
    monkeypatch.setattr(api.call_queue, "queue_lock", contextlib.nullcontext(), raising=False)
    answer = api.semantic_map(api.MapRequest(image=image))
    assert Image.open(io.BytesIO(base64.b64decode(answer["image"]))).getcolors() == [(2100, (255, 0, 0))]
    assert (answer["width"], answer["height"]) == (30, 70)
