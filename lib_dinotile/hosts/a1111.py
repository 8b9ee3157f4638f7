"""AUTOMATIC1111: residuals go in by hooks on the UNet's modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from modules import script_callbacks, sd_unet
from torch import Tensor

from lib_dinotile import DinotileError
from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.hosts.base import Residuals
from lib_dinotile.hosts.hints import crop_hint, is_spatial
from lib_dinotile.hosts.ldm import LdmResiduals, cfg_rows
from lib_dinotile.hosts.webui import WebUIHost
from lib_dinotile.tiling.plan import Rect


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

    def check_residuals(self) -> None:
        option = sd_unet.get_unet_option()
        if option is not None:
            raise DinotileError(
                f"the UNet {option.label!r} (Settings, Stable Diffusion, SD Unet) takes no residuals: choose None "
                "there, or adapter None"
            )

    @contextlib.contextmanager
    def conditioned(self, condition: Residuals | None, tiles: Sequence[Rect]) -> Iterator[None]:
        hints = self._hints(tiles)
        if condition is None and not hints:
            yield
            return
        alphas = self._p.sd_model.alphas_cumprod.cpu()

        def on_rows(rows: Tensor) -> None:
            for params, name, _, crops in hints:
                setattr(params, name, crops.index_select(0, rows.to(crops.device)))

        with LdmResiduals(self._unet, condition, lambda t: timestep_to_sigma(alphas, t), on_rows) as residuals:

            def on_step(params: script_callbacks.CFGDenoiserParams) -> None:
                denoiser = params.denoiser
                rows = cfg_rows(len(tiles), len(params.x), params.text_cond.shape[0])
                residuals.step(rows, denoiser.step / max(denoiser.total_steps, 1))

            script_callbacks.on_cfg_denoiser(on_step)
            try:
                yield
            finally:
                script_callbacks.remove_callbacks_for_function(on_step)
                for params, name, whole, _ in hints:
                    setattr(params, name, whole)

    def _hints(self, tiles: Sequence[Rect]) -> list[tuple[Any, str, Tensor, Tensor]]:
        """(parameters of a unit of sd-webui-controlnet, name, whole hint, the tiles' parts) for all its units.

        Setting `hint_cond` makes the extension forget what it has derived from the last one.
        """
        networks = [
            getattr(script, "latest_network", None)
            for script in (self._p.scripts.alwayson_scripts if self._p.scripts else ())
            if script.title().lower() == "controlnet"
        ]
        found = []
        for params in (params for network in networks if network for params in network.control_params or ()):
            for name in ("hint_cond", "effective_region_mask"):
                whole = getattr(params, name, None)
                if is_spatial(whole):
                    found.append((params, name, whole, crop_hint(whole, tiles, self.plan)))
        return found
