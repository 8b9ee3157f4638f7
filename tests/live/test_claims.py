"""What PNG info says of img2img's own options was done: an image with one of them on is another, as it is without
tiles. What cannot be done is refused, and what has no part in tiles is not told."""

from __future__ import annotations

from typing import Any

import pytest
from client import BLIND, Reply, WebUI, difference
from conftest import TILES
from PIL import Image

PLAIN = {**TILES, "colour": "none"}
KARRAS = {"scheduler": "Karras"}
LONG = {"prompt": "a photo of a cat, " * 20}
WEIGHTS = {"prompt": "a (photo:1.6) of a cat", "cfg_scale": 30}
TIMED = {"prompt": "[a photo:a red house:0.9]", "steps": 10, "cfg_scale": 30}

SETTINGS: dict[str, tuple[str, Any, Any, dict[str, Any]]] = {
    # key in PNG info: setting, its default, another value, a request in which it counts
    "Clip skip": ("CLIP_stop_at_last_layers", 1, 3, {"cfg_scale": 30}),
    "Emphasis": ("emphasis", "Original", "None", WEIGHTS),
    "Old prompt editing timelines": ("use_old_scheduling", False, True, TIMED),
    "Pad conds": ("pad_cond_uncond", False, True, LONG),
    "Pad conds v0": ("pad_cond_uncond_v0", False, True, LONG),
    "Eta": ("eta_ancestral", 1.0, 0.2, {"sampler_name": "Euler a"}),
    "Eta DDIM": ("eta_ddim", 0.0, 0.9, {"sampler_name": "DDIM", "steps": 10}),
    "Sigma churn": ("s_churn", 0.0, 50.0, {}),
    "Sigma tmin": ("s_tmin", 0.0, 1.0, {"s_churn": 50.0, "steps": 10}),
    "Sigma tmax": ("s_tmax", 0.0, 0.4, {"s_churn": 50.0, "steps": 10}),
    "Sigma noise": ("s_noise", 1.0, 0.7, {"s_churn": 50.0}),
    "Schedule min sigma": ("sigma_min", 0.0, 0.3, KARRAS),
    "Schedule max sigma": ("sigma_max", 0.0, 8.0, KARRAS),
    "Schedule rho": ("rho", 0.0, 3.0, KARRAS),
    "Beta schedule alpha": ("beta_dist_alpha", 0.6, 0.9, {"scheduler": "Beta", "steps": 10}),
    "Beta schedule beta": ("beta_dist_beta", 0.6, 0.9, {"scheduler": "Beta", "steps": 10}),
    "Discard penultimate sigma": ("always_discard_next_to_last_sigma", False, True, {"steps": 10}),
    "Noise Schedule": ("sd_noise_schedule", "Default", "Zero Terminal SNR", {}),
    "Downcast alphas_cumprod": ("use_downcasted_alpha_bar", False, True, {}),
    "Skip Early CFG": ("skip_early_cond", 0.0, 0.6, {"steps": 10}),
    "NGMS": ("s_min_uncond", 0.0, 15.0, {"steps": 10}),
    "Token merging ratio": ("token_merging_ratio", 0.0, 0.6, {}),
    "Noise multiplier": ("initial_noise_multiplier", 1.0, 0.7, {}),
    "Extra noise": ("img2img_extra_noise", 0.0, 0.3, {}),
    "VAE Encoder": ("sd_vae_encode_method", "TAESD", "Full", {}),
    "VAE Decoder": ("sd_vae_decode_method", "TAESD", "Full", {}),
    "RNG": ("randn_source", "GPU", "NV", {}),
    "ENSD": ("eta_noise_seed_delta", 0, 31337, {"sampler_name": "Euler a"}),
}
REQUESTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Variation seed strength": ({}, {"subseed": 5, "subseed_strength": 0.5}),
    "Noise multiplier": ({}, {"initial_noise_multiplier": 0.7}),
    "Sigma churn": ({}, {"s_churn": 50.0}),
    "Eta": ({"sampler_name": "Euler a"}, {"sampler_name": "Euler a", "eta": 0.2}),
}
REFUSED: dict[str, dict[str, Any]] = {
    "Tiling": {"tiling": True},
    "Tiling, by setting": {"override_settings": {"tiling": True}},
    "Seed resize from": {"seed_resize_from_w": 64, "seed_resize_from_h": 64},
}


def check(key: str, off: list[Reply], on: list[Reply]) -> None:
    """off, on: an image without tiles and one with them."""
    if difference(off[0].image, on[0].image) == 0:
        pytest.skip(f"{key} changes nothing here")
    same, told = difference(off[1].image, on[1].image) == 0, key in on[1].fields
    if key in ("RNG", "ENSD"):
        assert same and not told, "tiles have noise of their own"
    else:
        assert not same, f"{key} is not heard"


@pytest.mark.parametrize("key", SETTINGS)
def test_a_setting_that_is_told_of_was_heard(webui: WebUI, small: Image.Image, key: str):
    name, default, value, request = SETTINGS[key]
    if name not in webui.settings:
        pytest.skip(f"this WebUI has no setting {name}")

    def set_to(value: Any) -> None:
        webui.post("options", {name: value}).raise_for_status()
        webui.img2img(small)  # A1111 hears some of them one job late

    def both() -> list[Reply]:
        return [webui.img2img(small, options, **request) for options in (None, PLAIN)]

    before = webui.get("sdapi/v1/options").json()[name]
    try:
        set_to(default)
        off = both()
        set_to(value)
        check(key, off, both())
    finally:
        set_to(before)


@pytest.mark.parametrize("key", REQUESTS)
def test_an_option_of_the_request_that_is_told_of_was_heard(webui: WebUI, small: Image.Image, key: str):
    request, on = REQUESTS[key]
    replies = [[webui.img2img(small, options, **more) for options in (None, PLAIN)] for more in (request, on)]
    check(key, *replies)


@pytest.mark.parametrize("key", REFUSED)
def test_what_tiles_cannot_follow_is_refused(webui: WebUI, small: Image.Image, key: str):
    webui.post("options", {"tiling": False}).raise_for_status()
    line = webui.refusal(small, TILES, **REFUSED[key])
    assert line.startswith("Tiling would" if "Tiling" in key else "Resize seed"), line
    if "Tiling" in key:
        told = webui.post("txt2img", webui.txt2img_body({**BLIND, "enabled": True}, **REFUSED[key]))
        assert webui.refused(told) == line
    webui.img2img(small, TILES)


def test_tiling_that_is_on_in_the_settings_is_refused(webui: WebUI, small: Image.Image):
    webui.post("options", {"tiling": True}).raise_for_status()
    try:
        assert webui.refusal(small, TILES).startswith("Tiling would")
        webui.img2img(small, TILES, tiling=False)
    finally:
        webui.post("options", {"tiling": False}).raise_for_status()
