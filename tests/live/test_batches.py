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
    ("Euler", "Automatic"),
    ("Euler a", "Automatic"),
    ("DPM++ SDE", "Automatic"),
    ("DPM++ 2M", "Karras"),
    ("DPM++ 2M SDE", "Karras"),
    ("DPM++ 2S a", "Automatic"),
    ("Heun", "Automatic"),
    ("LCM", "Automatic"),
    ("DDIM", "Automatic"),
    ("PLMS", "Automatic"),
    ("UniPC", "Automatic"),
)
PROMPTS = {
    "and": {"prompt": "a photo AND a cat"},
    "three parts": {"prompt": "a photo AND a cat :0.5 AND a dog :0.3"},
    "long prompt": {"prompt": LONG, "negative_prompt": "blur"},
    "long negative prompt": {"prompt": "a photo", "negative_prompt": LONG},
    "long and": {"prompt": f"{LONG} AND a cat"},
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
    images = [
        webui.img2img(square, {**QUARTERS, "adapter": adapter, "batch": batch}, **request).image for batch in (1, 3, 4)
    ]
    assert difference(images[0], images[2]) <= 1
    assert difference(images[0], images[1]) <= 1
    # And the adapter is at work in all of this.
    assert difference(images[2], webui.img2img(square, {**QUARTERS, "batch": 4}, **request).image) > 1


@pytest.mark.parametrize("order", ["chess", "linear"])
def test_any_batch_gives_the_same_image(webui: WebUI, source: Image.Image, adapters: Adapters, order: str):
    for adapter in ("None", adapters.random):
        options = {**TILES, "order": order, "adapter": adapter}
        one, four = (webui.img2img(source, {**options, "batch": batch}).image for batch in (1, 4))
        assert difference(one, four) <= 1


@pytest.mark.parametrize("sampler, scheduler", SAMPLERS, ids=lambda name: name)
def test_with_every_kind_of_sampler(
    webui: WebUI, square: Image.Image, adapters: Adapters, sampler: str, scheduler: str
):
    if sampler not in webui.names("samplers"):
        pytest.skip(f"this WebUI has no sampler {sampler}")
    check_any_batch_gives_the_same_image(
        webui, square, adapters.random, sampler_name=sampler, scheduler=scheduler, steps=6
    )


@pytest.mark.parametrize("request_", PROMPTS.values(), ids=PROMPTS.keys())
def test_with_every_kind_of_prompt(webui: WebUI, square: Image.Image, adapters: Adapters, request_):
    check_any_batch_gives_the_same_image(webui, square, adapters.random, **request_)
