"""What else takes part in a generation goes on doing so, once for the image and not once for every tile; what cannot
is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from client import WebUI, difference, fields, pixels
from conftest import TILES
from PIL import Image

STRONG = {"cfg_scale": 100, "denoising_strength": 0.6}
"""So that words are seen also where the checkpoint is not trained."""
PLAIN = {**TILES, "colour": "none"}
WIDTH = 768
"""Of SD 1.5's text encoder."""


@pytest.fixture(scope="module")
def lora(webui: WebUI, request: pytest.FixtureRequest) -> Iterator[str]:
    """A LoRA of random weights for the text encoder of SD 1.5, lent to the WebUI."""
    from safetensors.torch import save_file

    folder: Path = request.config.getoption("--models").parent / "Lora"
    if request.config.getoption("--base") != "sd15" or not folder.is_dir():
        pytest.skip("there is no models/Lora folder beside --models, or the checkpoint is no SD 1.5")
    name, random = f"live-tests-{os.getpid()}", torch.Generator().manual_seed(0)
    file, tensors = folder / f"{name}.safetensors", {}
    for layer in range(12):
        for part in "qkv":
            key = f"lora_te_text_model_encoder_layers_{layer}_self_attn_{part}_proj"
            tensors[f"{key}.lora_down.weight"] = torch.randn(4, WIDTH, generator=random) / 16
            tensors[f"{key}.lora_up.weight"] = torch.randn(WIDTH, 4, generator=random) / 16
            tensors[f"{key}.alpha"] = torch.tensor(4.0)
    save_file(tensors, file, metadata={"ss_base_model_version": "sd_v1"})
    try:
        webui.post("refresh-loras").raise_for_status()
        yield name
    finally:
        file.unlink()
        webui.post("refresh-loras")


@pytest.mark.parametrize("order", ["chess", "fused"])
def test_a_lora_of_the_main_prompt_reaches_every_tile(webui: WebUI, small: Image.Image, lora: str, order: str):
    options = {**PLAIN, "order": order}

    def run(prompt: str, **more: Any) -> Image.Image:
        return webui.img2img(small, {**options, **more}, prompt=prompt, **STRONG).image

    without, with_it = run("a photo"), run(f"a photo <lora:{lora}:1>")
    half = with_it.width // 2
    for side in ((0, 0, half, with_it.height), (half, 0, with_it.width, with_it.height)):
        assert difference(without.crop(side), with_it.crop(side)) > 1
    assert difference(run(f"a photo <lora:{lora}:1>", batch=1), with_it) <= 1
    assert difference(run("a photo"), without) == 0, "the LoRA is still at work"
    told = {"tile_prompt": "a photo", "tile_prompt_mode": "replace"}
    assert difference(run(f"nothing <lora:{lora}:1>", **told), with_it) <= 1, "tile prompts do without the LoRA"


def test_styles_are_part_of_the_prompt(webui: WebUI, small: Image.Image):
    styles = [style for style in webui.get("sdapi/v1/prompt-styles").json() if style["prompt"]]
    if not styles:
        pytest.skip("this WebUI has no styles")
    styled = webui.img2img(small, PLAIN, styles=[styles[0]["name"]], **STRONG)
    prompt, negative = (
        style.replace("{prompt}", text) if "{prompt}" in style else ", ".join(filter(None, (text, style)))
        for style, text in ((styles[0]["prompt"], "a photo"), (styles[0]["negative_prompt"] or "", ""))
    )
    written = webui.img2img(small, PLAIN, prompt=prompt, negative_prompt=negative, **STRONG)
    assert difference(styled.image, written.image) <= 1
    assert difference(styled.image, webui.img2img(small, PLAIN, **STRONG).image) > 1


def test_count_and_size_of_the_batch_together(webui: WebUI, small: Image.Image):
    options = {**TILES, "tile_prompts": "2: a cat"}
    together = webui.img2img(small, options, seed=3, n_iter=2, batch_size=2)
    assert [int(fields(text)["Seed"]) for text in together.infotexts] == [3, 4, 5, 6]
    for number, image in enumerate(together.images):
        assert difference(image, webui.img2img(small, options, seed=3 + number).image) <= 1


def test_hires_fix_goes_its_own_way(webui: WebUI, small: Image.Image):
    def run() -> Image.Image:
        hires = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.4}
        return webui.txt2img(**hires, hr_additional_modules=[]).image  # Forge wants to be told of modules

    before = run()
    webui.img2img(small, TILES)
    assert difference(run(), before) == 0 and before.size == (128, 128)


RIVALS: dict[str, list[Any] | None] = {
    "sd upscale": None,
    "ultimate sd upscale": ["", 64, 64, 8, 16, 64, 0.35, 16, 0, True, 0, False, 8, 0, 2, 128, 96, 2.0],
    "outpainting mk2": ["", 32, 4, ["left"], 1.0, 0.05],
}


@pytest.mark.parametrize("script, args", RIVALS.items(), ids=RIVALS.keys())
def test_scripts_that_take_the_image_apart_are_refused(webui: WebUI, photo: Image.Image, script: str, args):
    known = {entry["name"]: entry for entry in webui.get("sdapi/v1/script-info").json() if entry["is_img2img"]}
    if script not in known:
        pytest.skip(f"this WebUI has no script {script!r}")
    if args is None:
        args = [argument["value"] for argument in known[script]["args"]]
    line = webui.refusal(photo, TILES, script_name=script, script_args=args, width=128, height=128)
    assert line.lower().startswith(f"{script} and dino tile both replace img2img: "), line


def test_scripts_that_leave_it_whole_are_not(webui: WebUI, small: Image.Image):
    known = {entry["name"]: entry for entry in webui.get("sdapi/v1/script-info").json() if entry["is_img2img"]}
    if "prompt matrix" not in known:
        pytest.skip("this WebUI has no prompt matrix")
    row = [argument["value"] for argument in known["prompt matrix"]["args"]]
    request = {"script_name": "prompt matrix", "script_args": row, "prompt": "a photo|a cat"}
    reply = webui.img2img(small, {**TILES, "scale": 1.5}, **request)
    assert (96, 72) in [image.size for image in reply.images]


def test_adetailer_repairs_the_finished_image_once(webui: WebUI):
    """It finds the face in the whole image, and paints it without tiles."""
    known = {entry["name"] for entry in webui.get("sdapi/v1/script-info").json() if entry["is_img2img"]}
    if "adetailer" not in known:
        pytest.skip("this WebUI has no ADetailer")
    data = pytest.importorskip("skimage.data", reason="the photograph comes with scikit-image")
    portrait = Image.fromarray(data.astronaut()[0:256, 90:346])
    unit = {"ad_model": "mediapipe_face_full", "ad_confidence": 0.1, "ad_denoising_strength": 0.6}
    unit |= {"ad_use_inpaint_width_height": True, "ad_inpaint_width": 128, "ad_inpaint_height": 128}
    # Bands between tiles are painted, the face is not: an untrained checkpoint would make one that nothing finds.
    options = {"scale": 2, "tile": 256, "overlap": 0, "order": "none", "seams": "bands", "seam_width": 16}
    alone = webui.img2img(portrait, options).image
    scripts = {"ADetailer": {"args": [True, False, unit]}}
    image = webui.img2img(portrait, options, alwayson_scripts=scripts).image
    change = abs(pixels(image) - pixels(alone)).max(2) > 8
    assert change.any(), "no face is repaired"
    rows, columns = np.flatnonzero(change.any(1)), np.flatnonzero(change.any(0))
    assert np.ptp(rows) < 400 and np.ptp(columns) < 400, "more than a face has changed"
    progress = webui.progress()
    assert not progress.running
