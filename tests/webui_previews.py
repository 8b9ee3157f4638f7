"""The WebUIs' modules of what makes latents of pixels and, cheaply or not, pixels of latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tests import webui_models as models
from tests.webui_samplers import Interrupted


def install(webui: Any) -> None:
    """`sd_samplers_common`, `sd_vae_approx` and `sd_vae_taesd` of that WebUI."""
    kind, neo = webui.kind, webui.kind.family == "neo"

    def download_model(path: str, url: str) -> None:
        if not Path(path).exists():
            webui.downloads.append(path)
            Path(path).touch()

    # TAESD --------------------------------------------------------------------------------------------------------
    form = {True: models.locked(models.Film), False: models.Packed if kind.packed else models.Decoder}[kind.film]
    loaded: dict[str, nn.Module] = {}

    def decoder_model() -> nn.Module | None:
        name = "taesd"
        if neo:
            name = webui.model.model_config.latent_format.taesd_decoder_name
            if name is None:
                return None
        if name not in loaded:
            webui.modules["modules.sd_vae_taesd"].download_model(str(webui.models / name), "https://")
            if not (webui.models / name).exists():
                if neo:
                    return None
                raise FileNotFoundError("TAESD model not found")
            if (webui.models / name).read_bytes() == b"large":
                raise MemoryError
            if (webui.models / name).read_bytes() == b"damaged":
                raise TypeError("expected state_dict to be dict-like, got NoneType")
            loaded[name] = webui.vae.tiny(form, 0.0).to(webui.dtype)
        return loaded[name]

    webui.module("modules.sd_vae_taesd", decoder_model=decoder_model, download_model=download_model)

    # Approximations -----------------------------------------------------------------------------------------------
    def model() -> nn.Module | None:
        if kind.family in ("forge", "neo") and not webui.model.is_webui_legacy_model():
            return None
        if "approx" not in loaded:
            webui.modules["modules.sd_vae_approx"].download_model(str(webui.models / "approx"), "https://")
            if not (webui.models / "approx").exists():  # A1111 reads it all the same, and finds it damaged
                raise TypeError("expected state_dict to be dict-like, got NoneType")
            loaded["approx"] = webui.vae.tiny(models.Decoder, -1.0, 2).to(webui.dtype)
        return loaded["approx"]

    def cheap_approximation(sample: Tensor) -> Tensor:
        weight, bias = webui.vae.factors()
        if not neo:
            return torch.einsum("...lxy,lr -> ...rxy", sample, weight)
        form = webui.model.model_config.latent_format
        if form.latent_rgb_factors is None:
            raise TypeError("must be a matrix")
        if form.latent_rgb_factors_reshape is not None:
            sample = form.latent_rgb_factors_reshape(sample)
        if sample.ndim == 5:  # of a film only its frames, as a batch
            sample = sample[0].movedim(1, 0)
        return F.linear(sample[0].movedim(0, -1), weight.T.to(sample), bias.to(sample)).permute(2, 0, 1)[None]

    webui.module(
        "modules.sd_vae_approx", model=model, cheap_approximation=cheap_approximation, download_model=download_model
    )

    # Samplers' common part ----------------------------------------------------------------------------------------
    def setup_img2img_steps(p: Any, steps: int | None = None) -> tuple[int, int]:
        if webui.modules["modules.shared"].opts.img2img_fix_steps or steps is not None:
            wanted = steps or p.steps
            return int(wanted / min(p.denoising_strength, 0.999)) if p.denoising_strength > 0 else 0, wanted - 1
        return p.steps, int(min(p.denoising_strength, 0.999) * p.steps)

    def images_tensor_to_samples(image: Tensor, approximation: Any = None, model: Any = None) -> Tensor:
        assert len(image) == 1
        return model.get_first_stage_encoding(model.encode_first_stage(image.to(webui._vae_dtype) * 2 - 1))

    def sample_to_image(samples: Tensor, index: int = 0, approximation: int | None = None) -> Image.Image:
        assert approximation == 2 and samples.ndim == (5 if kind.film else 4)
        pixels = cheap_approximation(samples[index : index + 1].float())[0].clamp(-1, 1)
        return Image.fromarray(((pixels + 1) * 127.5).byte().permute(1, 2, 0).numpy().astype(np.uint8))

    webui.module(
        "modules.sd_samplers_common", setup_img2img_steps=setup_img2img_steps, sample_to_image=sample_to_image,
        images_tensor_to_samples=images_tensor_to_samples, store_latent=lambda latents: None,
        InterruptedException=Interrupted,
    )  # fmt: skip
