"""AUTOMATIC1111: residuals go in by hooks on the UNet's modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from modules import script_callbacks, sd_unet
from torch import Tensor

from lib_dinotile import DinotileError
from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.hosts.base import Residuals
from lib_dinotile.hosts.ldm import LdmResiduals, cfg_rows
from lib_dinotile.hosts.webui import WebUIHost


def timestep_to_sigma(alphas_cumprod: Tensor, timestep: float) -> float:
    """Noise level of a timestep, between two of the model's log-linearly as k-diffusion does (t_to_sigma)."""
    log_sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().log()
    low = min(max(int(timestep), 0), len(log_sigmas) - 1)
    high = min(low + 1, len(log_sigmas) - 1)
    share = min(max(timestep - low, 0.0), 1.0)
    return float(torch.lerp(log_sigmas[low].double(), log_sigmas[high].double(), share).exp())


class A1111Host(WebUIHost):
    def __init__(self, p: Any) -> None:
        super().__init__(p)
        model = p.sd_model
        self._unet = getattr(getattr(model, "model", None), "diffusion_model", None)
        self.base = "sdxl" if model.is_sdxl else "sd2" if model.is_sd2 else "sd15" if model.is_sd1 else "unknown"
        self.shape = UNetShape.of_ldm(self._unet) if hasattr(self._unet, "output_blocks") else None

    @property
    def channels(self) -> int:
        return getattr(self._p.sd_model, "latent_channels", 4)

    @contextlib.contextmanager
    def conditioned(self, condition: Residuals | None, tiles: int) -> Iterator[None]:
        if condition is None:
            yield
            return
        if sd_unet.current_unet is not None:
            raise DinotileError(
                f"the UNet {sd_unet.current_unet_option.label!r} (Settings, Stable Diffusion, SD Unet) takes no "
                "residuals: choose None there, or adapter None"
            )
        alphas = self._p.sd_model.alphas_cumprod.cpu()
        with LdmResiduals(self._unet, condition, lambda t: timestep_to_sigma(alphas, t)) as residuals:

            def on_step(params: script_callbacks.CFGDenoiserParams) -> None:
                denoiser = params.denoiser
                rows = cfg_rows(tiles, len(params.x), params.text_cond.shape[0])
                residuals.step(rows, denoiser.step / max(denoiser.total_steps, 1))

            script_callbacks.on_cfg_denoiser(on_step)
            try:
                yield
            finally:
                script_callbacks.remove_callbacks_for_function(on_step)
