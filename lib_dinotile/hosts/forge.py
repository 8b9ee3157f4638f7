"""Forge and its descendants, Forge Neo and reForge: residuals go in as one more of the UNet's chain of ControlNets.

They differ in whose code the model runs on (`backend`, `ldm_patched`), so that none of it is imported here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from modules import devices, processing, sd_samplers_kdiffusion, sd_samplers_timesteps
from torch import Tensor

from lib_dinotile import DinotileError
from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.engine.host import Batch, TiledDenoiser
from lib_dinotile.hosts.decoders import own_copy
from lib_dinotile.hosts.hints import crop_hint, is_spatial
from lib_dinotile.hosts.patched import in_float32, patched
from lib_dinotile.hosts.webui import WebUIHost, check_unit


def _dynamic_args() -> Any:
    """Properties of the loaded checkpoint that Forge Neo keeps apart from it; None elsewhere."""
    return getattr(sys.modules.get("backend.args"), "dynamic_args", None)


class ResidualControl:
    """The condition of the batch that the host looks at, as a ControlNet of the chain."""

    extra_hooks = None

    def __init__(self, host: ForgeHost) -> None:
        # Forge remembers the UNet that it has loaded last, and with it this link, when the image is long done.
        self._host = weakref.ref(host)
        self.previous_controlnet: Any = None
        self.transformer_options: dict[str, Any] = {}

    def set_previous_controlnet(self, previous: Any) -> ResidualControl:
        self.previous_controlnet = previous
        return self

    # Each link is asked for these two ...
    def pre_run(self, model: Any, percent_to_sigma: Callable[[float], float]) -> None:
        pass

    def cleanup(self) -> None:
        pass

    # ... and only the first for the others.
    def get_models(self) -> list[Any]:
        return [] if self.previous_controlnet is None else self.previous_controlnet.get_models()

    def get_extra_hooks(self) -> list[Any]:
        return [] if self.previous_controlnet is None else self.previous_controlnet.get_extra_hooks()

    def inference_memory_requirements(self, dtype: torch.dtype) -> float:
        previous = self.previous_controlnet
        return 0 if previous is None else previous.inference_memory_requirements(dtype)

    def get_control(self, x: Tensor, t: Tensor, *others: Any) -> Any:
        """Residuals for the rows x (n, C, h, w) at noise level t, added to those of the links before.

        The rows are whole copies of the tiles, one for each conditioning: row i is tile i modulo their number.
        """
        previous = self.previous_controlnet
        control = previous.get_control(x, t, *others) if previous is not None else None
        host = self._host()
        if host is None or host.active is None:
            return control
        denoiser, (batch, chosen) = host.denoiser, host.active
        progress = denoiser.step / max(denoiser.total_steps, 1)
        found = None if batch.condition is None else batch.condition.residuals(float(t[0]), progress)
        if found is None:
            return control
        rows = torch.tensor(chosen, device=x.device)[torch.arange(len(x), device=x.device) % len(chosen)]
        *skips, middle = (residual.to(x.device).index_select(0, rows).to(x.dtype) for residual in found)
        merged = {key: list((control or {}).get(key, ())) for key in ("input", "middle", "output")}
        for key, own in (("middle", [middle]), ("output", skips)):
            theirs = merged[key] + [None] * (len(own) - len(merged[key]))
            own += [None] * (len(theirs) - len(own))
            merged[key] = [b if a is None else a if b is None else a + b for a, b in zip(theirs, own)]
        return merged


def _masking(host: ForgeHost) -> Callable[..., tuple[Any, ...]]:
    """A modifier of conditionings that gives every part of a prompt its mask."""
    known = weakref.ref(host)  # as above

    def modify(model: Any, x: Tensor, timestep: Tensor, uncond: Any, cond: Any, *others: Any) -> tuple[Any, ...]:
        host = known()
        for part, mask in zip(cond, host.masks if host else ()):
            part["mask"] = mask.to(x)
        return model, x, timestep, uncond, cond, *others

    return modify


class ForgeHost(WebUIHost):
    def __init__(self, p: Any) -> None:
        super().__init__(p)
        objects = p.sd_model.forge_objects
        unet = objects.unet.model.diffusion_model
        self.unet = unet if hasattr(unet, "output_blocks") else None
        self.shape = UNetShape.of_ldm(self.unet) if self.unet is not None else None
        self.channels = objects.vae.latent_channels
        self.frames = getattr(objects.vae, "latent_dim", 2) == 3
        self.regional = not self.frames  # its masks have no place for frames
        self.masks: list[Tensor] = []
        """Of each part of the tiles' prompts, (k, h, w) for the k tiles that the UNet is called for."""
        self.active: tuple[Batch, list[int]] | None = None
        """The tiles of a batch that the UNet is called for; None between its calls."""
        self._canvas = (0, 0)
        model = objects.unet.model
        predictor = getattr(model, "predictor", None) or model.model_sampling
        self._levels = (predictor, predictor.sigmas) if hasattr(predictor, "set_sigmas") else None
        self._hints: list[tuple[Any, str, Tensor]] = []
        self._shown: tuple[Batch | None, list[int]] = (None, [])

    def check(self) -> None:
        p = self._p
        if getattr(_dynamic_args(), "pid", False):
            raise DinotileError(
                "PiD paints pixels, not latents, and does not work with tiles: choose another checkpoint"
            )
        if getattr(_dynamic_args(), "wan", False) and p.batch_size > 1:
            raise DinotileError("Wan takes a batch for the frames of a video: set the batch size to 1")
        if (self.channels, self.factor) == (32, 8):
            raise DinotileError(
                "Mugen's VAE joins latent cells in pairs and does not work with tiles: choose another checkpoint"
            )
        for script in self._controlnets():
            for unit in (getattr(script, "current_params", None) or {}).values():
                masked = getattr(unit, "control_mask", None) is not None
                preprocessor = getattr(getattr(unit, "preprocessor", None), "name", "")
                check_unit(type(getattr(unit, "model", None)).__name__, masked, preprocessor)

    def set_levels(self) -> None:
        p = self._p
        if hasattr(p.sd_model, "set_shift"):
            p.sd_model.set_shift(shift=p.distilled_cfg_scale)

    def restore_levels(self) -> None:
        """A job with zero terminal SNR has its own, which the WebUI takes back only at its good end."""
        if self._levels is None:
            return
        predictor, before = self._levels
        before = before.to(predictor.sigmas)
        if predictor.sigmas.shape != before.shape or not torch.equal(predictor.sigmas, before):
            predictor.set_sigmas(before)

    @property
    def denoiser(self) -> Any:
        """The WebUI's CFGDenoiser."""
        return self._p.sampler.model_wrap_cfg

    @contextlib.contextmanager
    def references_kept(self) -> Iterator[None]:
        # Editing models take what was encoded last for a picture that the next prompt refers to.
        before: list[Any] = [
            (place, name, value, list(value) if isinstance(value, list) else None)
            for place in (self._p.sd_model, _dynamic_args())
            for name in ("ini_latent", "ref_latents", "start_image")
            if (value := getattr(place, name, self)) is not self
        ]
        try:
            yield
        finally:
            for place, name, value, items in before:
                if items is not None:
                    value[:] = items
                setattr(place, name, value)

    def full_decoder(self) -> Callable[[Tensor], Tensor]:
        objects = self._p.sd_model.forge_objects
        # A copy: Forge moves its own to and fro while it makes room for the UNet.
        dtype = objects.vae.vae_dtype  # of the copy, which `full_precision` leaves alone
        vae = own_copy(objects.vae.first_stage_model, self.device, dtype)
        to_vae = getattr(vae, "process_out", None) or objects.unet.model.model_config.latent_format.process_out

        def decode(latents: Tensor) -> Tensor:
            with devices.without_autocast():
                return self._without_frame(vae.decode(to_vae(self._with_frame(latents)).to(dtype))).float()

        return decode

    def masked(self, part: Any, mask: Tensor, count: int) -> Any:
        # The CFG scale is multiplied by the sum of all weights.
        own = copy.copy(part)
        own.weight = part.weight / count
        return own

    def _image_conditioning(self, latents: Tensor, tiled: TiledDenoiser, mask: Tensor | None) -> Tensor:
        found = super()._image_conditioning(latents, tiled, mask)
        # One cell of zeros stands for no picture, and Forge takes what is as large as the latents for one.
        return F.pad(found, (0, 1)) if latents.shape[-2:] == (1, 1) and not found.any() else found

    @contextlib.contextmanager
    def conditioned(self, batch: Batch, chosen: Sequence[int], parts: Sequence[int]) -> Iterator[None]:
        self.active = batch, list(chosen)
        if self._shown[0] is not batch or self._shown[1] != self.active[1]:
            tiles = [batch.tiles[number] for number in chosen]
            for control, name, hint in self._hints:
                setattr(control, name, crop_hint(hint, tiles, self._canvas, self.image))
                control.cond_hint = None  # what it has made of the last one
            self._shown = self.active
        if len(batch.prompts[chosen[0]]) > 1:
            self.masks = [torch.stack([batch.prompts[number][part].mask for number in chosen]) for part in parts]
        try:
            yield
        finally:
            self.active, self.masks = None, []  # it knows the canvas

    @contextlib.contextmanager
    def sampling(self, tiled: TiledDenoiser, canvas: tuple[int, int]) -> Iterator[None]:
        model = self._p.sd_model
        self._canvas = canvas
        try:
            with contextlib.ExitStack() as stack:
                if not tiled.is_batch:  # the memory to be had is that for the tiles of a batch
                    for module in (sd_samplers_kdiffusion, sd_samplers_timesteps):
                        prepare = functools.partial(self._prepare, module.sampling_prepare, tiled)
                        stack.enter_context(patched(module, sampling_prepare=prepare))
                yield
        finally:
            self._hints, self._shown = [], (None, [])
            model.forge_objects = model.forge_objects_after_applying_lora.shallow_copy()

    def _prepare(self, prepare: Callable[[Any, Tensor], None], tiled: TiledDenoiser, unet: Any, x: Tensor) -> None:
        width, height = (side // self.factor for side in tiled.tile_size)
        prepare(unet, x.new_empty(tiled.limit, *x.shape[1:-2], height, width))

    def before_sampling(self, tiled: TiledDenoiser, latents: Tensor, start: Tensor, cond: Any, uncond: Any) -> Tensor:
        # What Forge's own StableDiffusionProcessingImg2Img.sample does before it samples.
        p, model = self._p, self._p.sd_model
        self.set_levels()
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
        regional = any(len(prompts) > 1 for prompts in tiled.prompts)
        if tiled.conditioned or regional:
            unet = model.forge_objects.unet.clone()
            if tiled.conditioned:
                unet.add_patched_controlnet(ResidualControl(self))
            if regional:
                unet.add_conditioning_modifier(_masking(self))
            model.forge_objects.unet = unet
        return start

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        objects, full = self._p.sd_model.forge_objects, torch.float32
        with (
            in_float32([objects.unet.model.diffusion_model, objects.vae.first_stage_model], quantized=False),
            patched(objects.unet.model, computation_dtype=full, manual_cast_dtype=full),
            patched(objects.vae, vae_dtype=full),
            devices.without_autocast(),
        ):
            yield
