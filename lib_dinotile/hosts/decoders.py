"""The WebUIs' decoders for live previews, as differentiable functions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from modules import paths, sd_vae_approx, sd_vae_taesd, shared
from torch import Tensor, nn

from lib_dinotile import DinotileError, one_line
from lib_dinotile.settings import APPROXIMATE, AUTOMATIC, FULL_VAE, TAESD

Decoder = Callable[[Tensor], Tensor]


def guidance_decoder(
    choice: str, device: torch.device, dtype: torch.dtype, full: Callable[[], Decoder]
) -> tuple[str, Decoder]:
    """See `Host`; full: gives the full VAE, to pixels in [-1, 1]."""
    tried = {TAESD: _taesd, APPROXIMATE: _approximate}
    if choice == AUTOMATIC:
        for name, load in tried.items():
            if _is_there(name):
                return name, load(device, dtype)
    elif choice in tried:
        try:
            return choice, tried[choice](device, dtype)
        except Exception as error:  # whatever the download or the file raises
            raise DinotileError(f"decoder: {choice} cannot be had: {one_line(error)}; choose {FULL_VAE}") from error
    decode = full()
    return FULL_VAE, lambda latents: (decode(latents) + 1) / 2


def _is_there(name: str) -> bool:
    """Whether the WebUI would not have to download it."""
    model = shared.sd_model
    kind = "sd3" if getattr(model, "is_sd3", False) else "sdxl" if model.is_sdxl else ""
    legacy = getattr(model, "is_webui_legacy_model", lambda: True)()
    if name == TAESD:
        file = f"tae{'f1' if not legacy and not kind else 'sd3' if kind == 'sd3' else 'sd' + kind[2:]}_decoder.pth"
        return (Path(paths.models_path) / "VAE-taesd" / file).is_file()
    if not legacy:
        return False
    file = f"vaeapprox-{kind}.pt" if kind else "model.pt"
    folders = Path(paths.models_path), Path(paths.script_path) / "models"
    return any((folder / "VAE-approx" / file).is_file() for folder in folders)


def own_copy(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy: the WebUI's own may have been made under inference mode, and gradients end there."""
    with torch.inference_mode(False), torch.no_grad():
        own = copy.deepcopy(module)
        for parent in own.modules():
            for name, weight in parent._parameters.items():
                if weight is not None:
                    parent._parameters[name] = nn.Parameter(weight.detach().to(dtype).clone(), requires_grad=False)
        return own.to(device).eval()


def _taesd(device: torch.device, dtype: torch.dtype) -> Decoder:
    own = own_copy(sd_vae_taesd.decoder_model(), device, dtype)
    return lambda latents: own(latents.to(dtype)).float()


def _approximate(device: torch.device, dtype: torch.dtype) -> Decoder:
    model: Any = sd_vae_approx.model()
    if model is None:
        raise DinotileError("the WebUI has none for this checkpoint")
    own = own_copy(model, device, dtype)

    def decode(latents: Tensor) -> Tensor:
        quarter = own(latents.to(dtype)).float()
        return (nn.functional.interpolate(quarter, scale_factor=4, mode="bilinear") + 1) / 2

    return decode
