"""The WebUI's decoders for live previews, as differentiable functions."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from modules import errors, sd_vae_approx, sd_vae_taesd
from torch import Tensor, nn
from torch.nn import functional as F

from lib_dinotile import DinotileError, one_line
from lib_dinotile.engine.memory import is_out_of_memory
from lib_dinotile.hosts.patched import patched
from lib_dinotile.settings import APPROXIMATE, AUTOMATIC, FULL_VAE, LINEAR, TAESD

Decoder = Callable[[Tensor], Tensor]


def guidance_decoder(
    choice: str,
    device: torch.device,
    dtype: torch.dtype,
    latent: tuple[int, ...],
    factor: int,
    full: Callable[[], Decoder],
) -> tuple[str, Decoder]:
    """See `Host`. latent: shape of the model's latents without height and width, (C,) or (C, 1) where it knows frames;
    factor: pixels per latent cell; full: gives the full VAE, to pixels in [-1, 1]."""
    load: dict[str, Callable[[bool], Decoder | None]] = {
        TAESD: lambda download: _taesd(download, device, dtype, len(latent) > 1),
        APPROXIMATE: lambda download: _approximate(download, device, dtype),
        LINEAR: lambda download: _linear(latent, factor),
    }
    if choice == AUTOMATIC:
        for name in load:
            try:
                decoder = load[name](False)
            except FileNotFoundError:
                continue
            except Exception as error:  # whatever a damaged file raises
                if is_out_of_memory(error):
                    raise
                errors.report(f"DINO Tile: {name} cannot be read, another decoder takes its place", exc_info=True)
                continue
            if decoder is not None:
                return name, decoder
    elif choice in load:
        try:
            decoder = load[choice](True)
        except Exception as error:  # whatever the download or the file raises
            raise DinotileError(
                f"decoder: {choice} is not available: {one_line(error)}; choose {AUTOMATIC} or {FULL_VAE}"
            ) from error
        if decoder is None:
            raise DinotileError(
                f"decoder: the WebUI has no {choice} for this checkpoint; choose {AUTOMATIC} or {FULL_VAE}"
            )
        return choice, decoder
    decode = full()
    return FULL_VAE, lambda latents: (decode(latents) + 1) / 2


def _own(module: Any, model: Callable[[], Any], download: bool) -> Any:
    """The decoder that the WebUI has for the loaded checkpoint; None or FileNotFoundError if it has none."""

    def find(path: str, url: str) -> None:
        if not Path(path).is_file():  # before it is read: A1111 would take it for a damaged one
            raise FileNotFoundError(path)

    with patched(module, **({} if download else {"download_model": find})):
        return model()


@functools.cache
def with_gradients(module: type[Any]) -> type[Any]:
    """The class without `torch.no_grad` or `torch.inference_mode` as a decorator of its `forward`."""
    forward: Any = module.forward
    if getattr(forward, "__globals__", {}).get("__name__") != "torch.utils._contextlib":
        return module
    return type(module.__name__, (module,), {"forward": forward.__wrapped__})


def own_copy(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy that passes gradients on: the WebUI's own may have been made, or run, under inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        own = copy.deepcopy(module)
        for parent in own.modules():
            for name, weight in parent._parameters.items():
                if weight is not None:
                    parent._parameters[name] = nn.Parameter(weight.detach().to(dtype).clone(), requires_grad=False)
            parent.__class__ = with_gradients(parent.__class__)
        return own.to(device).eval()


def _taesd(download: bool, device: torch.device, dtype: torch.dtype, frames: bool) -> Decoder | None:
    model = _own(sd_vae_taesd, sd_vae_taesd.decoder_model, download)
    if model is None:
        return None
    own = own_copy(model, device, dtype)
    return lambda latents: own((latents[:, :, None] if frames else latents).to(dtype)).float()


def _approximate(download: bool, device: torch.device, dtype: torch.dtype) -> Decoder | None:
    model = _own(sd_vae_approx, sd_vae_approx.model, download)
    if model is None:
        return None
    own = own_copy(model, device, dtype)

    def decode(latents: Tensor) -> Tensor:
        quarter = own(latents.to(dtype)).float()
        return (F.interpolate(quarter, scale_factor=4, mode="bilinear") + 1) / 2

    return decode


def _linear(latent: tuple[int, ...], factor: int) -> Decoder | None:
    """The WebUI's linear approximation of the VAE, asked channel by channel: a latent cell is a colour, or a few."""
    count = latent[0]
    with torch.inference_mode(False), torch.no_grad():
        cells = torch.cat([torch.zeros(1, count), torch.eye(count)]).reshape(count + 1, *latent, 1, 1)
        try:
            colours = torch.cat([sd_vae_approx.cheap_approximation(cell[None]).float().cpu() for cell in cells])
        except Exception:  # whatever it raises where it has none for this checkpoint
            return None
        # (1 + C, 3, r, r): of nothing, then of each channel.
        bias, weight = colours[0].mean((-2, -1)), colours[1:] - colours[:1]

    def decode(latents: Tensor) -> Tensor:
        latents = latents.float()
        small = F.conv_transpose2d(latents, weight.to(latents), bias.to(latents), stride=weight.shape[-1])
        size = [side * factor for side in latents.shape[-2:]]
        return (F.interpolate(small, size=size, mode="bilinear") + 1) / 2

    return decode
