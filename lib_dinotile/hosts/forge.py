"""Forge: residuals go in as one more link of the UNet's chain of ControlNets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from backend.patcher.controlnet import ControlBase
from modules import processing
from torch import Tensor

from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.hosts.base import Residuals
from lib_dinotile.hosts.hints import crop_hint, is_spatial
from lib_dinotile.hosts.webui import WebUIHost
from lib_dinotile.tiling.plan import Rect


class ResidualControl(ControlBase):
    """The condition of a batch of tiles, as a ControlNet of Forge's backend."""

    def __init__(self, condition: Residuals, tiles: int, sampler: Any, device: torch.device) -> None:
        super().__init__(device)
        self._condition, self._tiles, self._sampler = condition, tiles, sampler

    def get_control(self, x: Tensor, t: Tensor, cond: Any, batched_number: int) -> Any:
        """Residuals for the rows x (n, C, h, w) at noise level t, merged with those of the links before.

        The rows are whole copies of the batch, one for each conditioning: row i is tile i modulo the number of tiles.
        """
        previous = self.previous_controlnet
        control = previous.get_control(x, t, cond, batched_number) if previous is not None else None
        denoiser = self._sampler.model_wrap_cfg
        found = self._condition.residuals(float(t[0]), denoiser.step / max(denoiser.total_steps, 1))
        if found is None:
            return control
        rows = torch.arange(len(x), device=x.device) % self._tiles
        own = [residual.to(x.device).index_select(0, rows) for residual in found]
        return self.control_merge(None, own, control, x.dtype)


class ForgeHost(WebUIHost):
    def __init__(self, p: Any) -> None:
        super().__init__(p)
        model = p.sd_model
        unet = model.forge_objects.unet.model.diffusion_model
        self.base = "sdxl" if model.is_sdxl else "sd2" if model.is_sd2 else "sd15" if model.is_sd1 else "unknown"
        self.shape = UNetShape.of_ldm(unet) if hasattr(unet, "output_blocks") else None
        self._condition: Residuals | None = None
        self._tiles: Sequence[Rect] = ()

    @property
    def channels(self) -> int:
        return self._p.sd_model.forge_objects.vae.latent_channels

    @contextlib.contextmanager
    def conditioned(self, condition: Residuals | None, tiles: Sequence[Rect]) -> Iterator[None]:
        model = self._p.sd_model
        self._condition, self._tiles = condition, tiles
        try:
            yield
        finally:
            self._condition, self._tiles = None, ()
            model.forge_objects = model.forge_objects_after_applying_lora.shallow_copy()

    def before_sampling(self, latents: Tensor, start: Tensor, cond: Any, uncond: Any) -> Tensor:
        # What Forge's own StableDiffusionProcessingImg2Img.sample does before it samples.
        p, model = self._p, self._p.sd_model
        model.forge_objects = model.forge_objects_after_applying_lora.shallow_copy()
        processing.apply_token_merging(model, p.get_token_merging_ratio())
        start = super().before_sampling(latents, start, cond, uncond)
        if p.modified_noise is not None:
            start, p.modified_noise = p.modified_noise, None
        for control in model.forge_objects.unet.list_controlnets():  # made anew for every batch: nothing to put back
            for name in ("cond_hint_original", "advanced_mask_weighting"):
                whole = getattr(control, name, None)
                if is_spatial(whole):
                    setattr(control, name, crop_hint(whole, self._tiles, self.plan))
        if self._condition is not None:
            unet = model.forge_objects.unet.clone()
            unet.add_patched_controlnet(ResidualControl(self._condition, len(latents), p.sampler, self.device))
            model.forge_objects.unet = unet
        return start
