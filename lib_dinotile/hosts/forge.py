"""Forge: residuals go in as one more link of the UNet's chain of ControlNets."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from backend.patcher.controlnet import ControlBase
from backend.sampling.sampling_function import sampling_prepare
from modules import devices, processing, sd_samplers_kdiffusion, sd_samplers_timesteps
from torch import Tensor

from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.engine.host import Batch, TiledDenoiser
from lib_dinotile.hosts.decoders import own_copy
from lib_dinotile.hosts.hints import crop_hint, is_spatial
from lib_dinotile.hosts.patched import in_float32, patched
from lib_dinotile.hosts.webui import WebUIHost


class ResidualControl(ControlBase):
    """The condition of the batch that the host looks at, as a ControlNet of Forge's backend."""

    def __init__(self, host: ForgeHost) -> None:
        super().__init__(host.device)
        # Forge remembers the UNet that it has loaded last, and with it this link, when the image is long done.
        self._host = weakref.ref(host)

    def get_control(self, x: Tensor, t: Tensor, cond: Any, batched_number: int) -> Any:
        """Residuals for the rows x (n, C, h, w) at noise level t, merged with those of the links before.

        The rows are whole copies of the tiles, one for each conditioning: row i is tile i modulo their number.
        """
        previous = self.previous_controlnet
        control = previous.get_control(x, t, cond, batched_number) if previous is not None else None
        host = self._host()
        if host is None or host.active is None:
            return control
        denoiser, (batch, chosen) = host.denoiser, host.active
        progress = denoiser.step / max(denoiser.total_steps, 1)
        found = None if batch.condition is None else batch.condition.residuals(float(t[0]), progress)
        if found is None:
            return control
        rows = torch.tensor(chosen, device=x.device)[torch.arange(len(x), device=x.device) % len(chosen)]
        own = [residual.to(x.device).index_select(0, rows) for residual in found]
        return self.control_merge(None, own, control, x.dtype)


class ForgeHost(WebUIHost):
    def __init__(self, p: Any) -> None:
        super().__init__(p)
        model = p.sd_model
        unet = model.forge_objects.unet.model.diffusion_model
        self.unet = unet if hasattr(unet, "output_blocks") else None
        self.shape = UNetShape.of_ldm(self.unet) if self.unet is not None else None
        self.channels = model.forge_objects.vae.latent_channels
        self.active: tuple[Batch, list[int]] | None = None
        """The tiles of a batch that the UNet is called for; None between its calls."""
        self._canvas = (0, 0)
        self._hints: list[tuple[Any, str, Tensor]] = []
        self._shown: tuple[Batch | None, list[int]] = (None, [])

    @property
    def denoiser(self) -> Any:
        """The WebUI's CFGDenoiser."""
        return self._p.sampler.model_wrap_cfg

    def full_decoder(self) -> Callable[[Tensor], Tensor]:
        objects = self._p.sd_model.forge_objects
        # A copy: Forge moves its own to and fro while it makes room for the UNet.
        vae = own_copy(objects.vae.first_stage_model, self.device, objects.vae.vae_dtype)

        def decode(latents: Tensor) -> Tensor:
            with devices.without_autocast():
                return vae.decode(vae.process_out(latents).to(objects.vae.vae_dtype)).float()

        return decode

    @contextlib.contextmanager
    def conditioned(self, batch: Batch, chosen: Sequence[int], parts: int) -> Iterator[None]:
        self.active = batch, list(chosen)
        if self._shown[0] is not batch or self._shown[1] != self.active[1]:
            tiles = [batch.tiles[number] for number in chosen]
            for control, name, hint in self._hints:
                setattr(control, name, crop_hint(hint, tiles, self._canvas))
                control.cond_hint = None  # what it has made of the last one
            self._shown = self.active
        try:
            yield
        finally:
            self.active = None  # it knows the canvas

    @contextlib.contextmanager
    def sampling(self, tiled: TiledDenoiser, canvas: tuple[int, int]) -> Iterator[None]:
        model = self._p.sd_model
        self._canvas = canvas
        try:
            with contextlib.ExitStack() as stack:
                if not tiled.is_batch:  # the memory to be had is that for the tiles of a batch
                    for module in (sd_samplers_kdiffusion, sd_samplers_timesteps):
                        stack.enter_context(patched(module, sampling_prepare=functools.partial(self._prepare, tiled)))
                yield
        finally:
            self._hints, self._shown = [], (None, [])
            model.forge_objects = model.forge_objects_after_applying_lora.shallow_copy()

    def _prepare(self, tiled: TiledDenoiser, unet: Any, x: Tensor) -> None:
        width, height = (side // self.factor for side in tiled.tile_size)
        sampling_prepare(unet, x.new_empty(tiled.limit, x.shape[1], height, width))

    def before_sampling(self, tiled: TiledDenoiser, latents: Tensor, start: Tensor, cond: Any, uncond: Any) -> Tensor:
        # What Forge's own StableDiffusionProcessingImg2Img.sample does before it samples.
        p, model = self._p, self._p.sd_model
        model.forge_objects = model.forge_objects_after_applying_lora.shallow_copy()
        processing.apply_token_merging(model, p.get_token_merging_ratio())
        start = super().before_sampling(tiled, latents, start, cond, uncond)
        if p.modified_noise is not None:
            start, p.modified_noise = p.modified_noise, None
        self._hints = [
            (control, name, getattr(control, name))
            for control in model.forge_objects.unet.list_controlnets()  # made anew each time: nothing to put back
            for name in ("cond_hint_original", "advanced_mask_weighting")
            if is_spatial(getattr(control, name, None))
        ]
        if tiled.conditioned:
            unet = model.forge_objects.unet.clone()
            unet.add_patched_controlnet(ResidualControl(self))
            model.forge_objects.unet = unet
        return start

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        objects, full = self._p.sd_model.forge_objects, torch.float32
        with (
            in_float32([objects.unet.model.diffusion_model, objects.vae.first_stage_model]),
            patched(objects.unet.model, computation_dtype=full),
            patched(objects.vae, vae_dtype=full),
            devices.without_autocast(),
        ):
            yield
