"""However many tiles are sampled at once, the image is the same: residuals and noise go to their own tile's rows."""

from __future__ import annotations

import pytest
from adapters import Adapters
from client import WebUI, difference
from conftest import TILES
from PIL import Image

QUARTERS = {"scale": 2, "tile": 64, "overlap": 0}
"""A source of 64x64 becomes four tiles that touch nowhere: one wave."""
LONG = "a photograph of a smiling astronaut in an orange suit in front of a flag and a model of a shuttle, " * 6
"""More than the 75 tokens that make one chunk."""
SAMPLERS = (
    ("Euler", "Automatic", 4),
    ("Euler a", "Automatic", 4),
    ("DPM++ SDE", "Automatic", 4),
    ("DPM++ 2M", "Karras", 4),
    ("DPM++ 2S a", "Automatic", 4),
    ("Heun", "Automatic", 4),
    ("DDIM", "Automatic", 10),  # these two run fewer steps than their share, or none
    ("UniPC", "Automatic", 10),
)
PROMPTS = {
    "and": {"prompt": "a photo AND a cat"},
    "long prompt": {"prompt": LONG, "negative_prompt": "a cat"},
    "long negative prompt": {"prompt": "a photo", "negative_prompt": LONG},
    "cond and uncond apart": {"override_settings": {"batch_cond_uncond": False}},
    "apart, with and": {"override_settings": {"batch_cond_uncond": False}, "prompt": "a photo AND a cat"},
    "cfg 1": {"cfg_scale": 1},
    "scheduled prompt": {"prompt": "a [photo:cat:0.5]"},
    "full steps": {"override_settings": {"img2img_fix_steps": True}},
    "extra noise": {"override_settings": {"img2img_extra_noise": 0.1}},
}


@pytest.fixture(scope="module")
def square(photo: Image.Image) -> Image.Image:
    return photo.resize((64, 64))


def check_any_batch_gives_the_same_image(webui: WebUI, square: Image.Image, adapter: str, **request) -> None:
    def run(**options) -> Image.Image:
        return webui.img2img(square, {**QUARTERS, **options}, **request).image

    one, three = run(adapter=adapter, batch=1), run(adapter=adapter, batch=3)
    assert difference(one, three) <= 1
    assert difference(three, run(batch=4)) > 1, "the adapter is not at work"


@pytest.mark.parametrize("run, adapter", [("tiled", "None"), ("adapted", "random")])
def test_any_batch_gives_the_same_image(
    webui: WebUI, source: Image.Image, adapters: Adapters, request: pytest.FixtureRequest, run: str, adapter: str
):
    four = request.getfixturevalue(run).image
    name = adapters.random if adapter == "random" else adapter
    assert difference(webui.img2img(source, {**TILES, "adapter": name, "batch": 1}).image, four) <= 1


@pytest.mark.parametrize("sampler, scheduler, steps", SAMPLERS)
def test_with_every_kind_of_sampler(
    webui: WebUI, square: Image.Image, adapters: Adapters, sampler: str, scheduler: str, steps: int
):
    if sampler not in webui.names("samplers"):
        pytest.skip(f"this WebUI has no sampler {sampler}")
    request = {"sampler_name": sampler, "scheduler": scheduler, "steps": steps}
    check_any_batch_gives_the_same_image(webui, square, adapters.random, **request)


@pytest.mark.parametrize("request_", PROMPTS.values(), ids=PROMPTS.keys())
def test_with_every_kind_of_prompt(webui: WebUI, square: Image.Image, adapters: Adapters, request_):
    check_any_batch_gives_the_same_image(webui, square, adapters.random, **request_)
