"""AUTOMATIC1111: residuals go in by hooks on the UNet's modules."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from modules import devices, script_callbacks, sd_unet
from torch import Tensor

from lib_dinotile import DinotileError
from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.engine.host import Batch, TiledDenoiser
from lib_dinotile.engine.prediction import from_x0, timestep_to_sigma, to_x0
from lib_dinotile.hosts.hints import crop_hint, is_spatial
from lib_dinotile.hosts.ldm import LdmResiduals, cfg_rows
from lib_dinotile.hosts.patched import in_float32, patched
from lib_dinotile.hosts.webui import WebUIHost, check_unit


class A1111Host(WebUIHost):
    def __init__(self, p: Any) -> None:
        super().__init__(p)
        model = p.sd_model
        unet = getattr(getattr(model, "model", None), "diffusion_model", None)
        self.unet = unet if hasattr(unet, "output_blocks") else None
        self.shape = UNetShape.of_ldm(self.unet) if self.unet is not None else None
        self.channels = getattr(model, "latent_channels", 4)
        self.regional = getattr(model, "cond_stage_key", None) != "edit"  # InstructPix2Pix knows no AND
        self._canvas = (0, 0)
        self._whole: list[tuple[Any, str, Tensor]] = []
        self._cut: tuple[Batch | None, list[tuple[Any, str, Tensor]]] = (None, [])

    def _x0(self, denoiser: Any, x: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
        # Timestep samplers are answered with the noise, also in the callback.
        if not self._estimates_noise(denoiser):
            return output
        return to_x0(x.float(), output, *self._coefficients(denoiser, sigma), "epsilon")

    def _prediction(self, denoiser: Any, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        if not self._estimates_noise(denoiser):
            return x0
        return from_x0(x.float(), x0, *self._coefficients(denoiser, sigma), "epsilon")

    def full_decoder(self) -> Callable[[Tensor], Tensor]:
        model = self._p.sd_model
        vae = model.first_stage_model

        def decode(latents: Tensor) -> Tensor:
            with devices.without_autocast():
                return vae.decode((latents / model.scale_factor).to(devices.dtype_vae)).float()

        return decode

    def check(self) -> None:
        if any(getattr(script, "ui_batch_option_state", (None, False))[1] for script in self._controlnets()):
            raise DinotileError(
                "ControlNet's StyleAlign (Batch Options) makes the tiles of a batch look alike: switch it off, or DINO "
                "Tile"
            )
        for params in self._units():
            masked = getattr(params, "effective_region_mask", None) is not None
            check_unit(params.control_model_type.name, masked)

    def check_residuals(self) -> None:
        option = sd_unet.get_unet_option()
        if option is not None:
            raise DinotileError(
                f"the UNet {option.label!r} (Settings, Stable Diffusion, SD Unet) does not work with adapters: choose "
                "None there, or set Adapter to None"
            )

    def masked(self, part: Any, mask: Tensor, count: int) -> Any:
        # It adds the parts up, each times its weight: one per latent cell does as well as one for all.
        own = copy.copy(part)
        own.weight = part.weight * mask.to(self.device, self.dtype)
        return own

    @contextlib.contextmanager
    def conditioned(self, batch: Batch, chosen: Sequence[int], parts: Sequence[int]) -> Iterator[None]:
        hints = self._hints(batch)
        if batch.condition is None and not hints:
            yield
            return
        alphas = self._p.sd_model.alphas_cumprod.cpu()

        def on_rows(rows: Tensor) -> None:
            for params, name, crops in hints:
                setattr(params, name, crops.index_select(0, rows.to(crops.device)))

        with LdmResiduals(self.unet, batch.condition, lambda t: timestep_to_sigma(alphas, t), on_rows) as residuals:

            def on_step(params: script_callbacks.CFGDenoiserParams) -> None:
                denoiser = params.denoiser
                rows = [chosen[row] for row in cfg_rows([len(parts)] * len(chosen), len(params.x))]
                residuals.step(rows, denoiser.step / max(denoiser.total_steps, 1))

            script_callbacks.on_cfg_denoiser(on_step)
            try:
                yield
            finally:
                script_callbacks.remove_callbacks_for_function(on_step)

    @contextlib.contextmanager
    def sampling(self, tiled: TiledDenoiser, canvas: tuple[int, int]) -> Iterator[None]:
        self._canvas = canvas
        # Setting `hint_cond` makes the extension forget what it has derived from the last one. For hires fix it has a
        # larger hint besides; with both of a tile's size it takes that one, and the tile for a part of hires fix.
        self._whole = [
            (params, name, getattr(params, name))
            for params in self._units()
            for name in ("hint_cond", "hr_hint_cond", "effective_region_mask")
            if is_spatial(getattr(params, name, None))
        ]
        try:
            yield
        finally:
            for params, name, hint in self._whole:
                setattr(params, name, hint)
            self._whole, self._cut = [], (None, [])

    def _networks(self) -> list[Any]:
        """The networks of sd-webui-controlnet that are at work."""
        found = (getattr(script, "latest_network", None) for script in self._controlnets())
        return [network for network in found if network]

    def _units(self) -> list[Any]:
        """The parameters of their units."""
        return [params for network in self._networks() for params in network.control_params or ()]

    def _hints(self, batch: Batch) -> list[tuple[Any, str, Tensor]]:
        """(parameters of a unit of sd-webui-controlnet, name, the tiles' parts of its hint) for all its units."""
        if self._cut[0] is not batch:
            cut = [
                (params, name, crop_hint(hint, batch.tiles, self._canvas, self.image))
                for params, name, hint in self._whole
            ]
            self._cut = batch, cut
        return self._cut[1]

    def marked(self, cond: Any, uncond: Any) -> tuple[Any, Any]:
        # sd-webui-controlnet tells cond from uncond by a mark that it puts on what goes through `p.sample`.
        for network in self._networks():
            mark = getattr(sys.modules[type(network).__module__], "mark_prompt_context", None)
            if mark is not None:
                cond = mark([copy.copy(part) for part in cond], positive=True)
                uncond = None if uncond is None else mark(list(uncond), positive=False)
                break
        return cond, uncond

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        model, full = self._p.sd_model, torch.float32
        parts = [model.model.diffusion_model, model.first_stage_model]
        names = ("dtype_unet", "dtype_vae", "dtype_inference")
        flags = {"unet_needs_upcast": False, "force_fp16": False, "fp8": False}
        with (
            in_float32(parts),
            patched(model.first_stage_model, _dtype=full),  # Lightning keeps it besides the weights
            patched(devices, **dict.fromkeys(names, full), **flags),
            devices.without_autocast(),
        ):
            yield
