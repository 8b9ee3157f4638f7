"""Every sampler of the WebUI: with a single step, and with any batch; and passes that ask for few steps."""

from __future__ import annotations

import pytest
from client import WebUI, difference
from PIL import Image

ONE = {"scale": 2.0, "tile": 64, "overlap": 0, "colour": "none", "batch": 1}
REFUSED = "changes the size of tiles: choose another"
FEW = ("DPM++ 2M SDE", "DPM++ 3M SDE", "UniPC", "DPM fast", "DDIM", "PLMS")
"""Samplers that cannot do a single step, in one WebUI or in all."""


@pytest.fixture(scope="module")
def two(photo: Image.Image) -> Image.Image:
    """64x32: two tiles that touch nowhere, of one wave."""
    return photo.resize((64, 32), Image.Resampling.LANCZOS)


@pytest.fixture(scope="module")
def samplers(webui: WebUI) -> list[str]:
    return webui.names("samplers")


def notes(webui: WebUI, source: Image.Image, options: dict, **request) -> str:
    """What is said of an image that must be whole."""
    reply = webui.img2img(source, options, **request)
    assert "DINO Tile painted" not in reply.fields
    return reply.fields.get("DINO Tile notes", "")


def test_every_sampler_gives_the_same_image_in_any_batch_or_says_why_not(
    webui: WebUI, two: Image.Image, samplers: list[str]
):
    bad = {}
    for sampler in samplers:
        request = {"sampler_name": sampler, "steps": 5, "denoising_strength": 0.7}
        answer = webui.post("img2img", webui.body(two, ONE, **request))
        if answer.status_code == 422 and REFUSED in answer.text:
            continue
        pair = webui.reply(answer), webui.img2img(two, {**ONE, "batch": 2}, **request)
        off = difference(*(reply.image for reply in pair))
        if off > 1:
            bad[sampler] = off
    assert not bad


def test_every_sampler_paints_with_a_single_step_or_with_as_many_as_it_needs(
    webui: WebUI, two: Image.Image, samplers: list[str]
):
    bad = {}
    for sampler in samplers:
        for steps, denoise in ((20, 0.03), (1, 1.0)):
            request = {"sampler_name": sampler, "steps": steps, "denoising_strength": denoise}
            answer = webui.post("img2img", webui.body(two, ONE, **request))
            if answer.status_code != 200 and REFUSED not in answer.text:
                bad[sampler, steps] = answer.json()["detail"]
    assert not bad


@pytest.mark.parametrize("sampler", FEW)
def test_a_seam_pass_with_few_steps_is_painted(webui: WebUI, two: Image.Image, samplers: list[str], sampler: str):
    if sampler not in samplers:
        pytest.skip(f"this WebUI has no sampler {sampler}")
    request = {"sampler_name": sampler, "steps": 20, "denoising_strength": 0.3}
    seams = {**ONE, "seams": "half tile", "seam_denoise": 0.03}
    plain, said = webui.img2img(two, ONE, **request).image, notes(webui, two, seams, **request)
    assert difference(webui.img2img(two, seams, **request).image, plain) > 0
    if sampler == "UniPC" and not said:
        return  # Forge Neo's has the order that the steps allow
    if sampler in ("UniPC", "DPM fast", "DDIM", "PLMS"):
        assert f"sampling steps instead of 1: {sampler} cannot do fewer" in said and said.startswith("seam fix: ")
