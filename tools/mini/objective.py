"""The mini's objective: from a blurred source with noise on it to the sharp picture."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

from lib_dinotile.engine.prediction import coefficients, noise_level, to_x0

SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 1e-6,
    "beta_end": 6e-4,
    "prediction_type": "v_prediction",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": True,
}
"""Far less noise than Stable Diffusion's: its betas at strength 0.35 give a deviation of 0.98, which in the pixels of
a source drowns all that it shows; here it is 0.1 (13 of 255 grey levels). At strength 1 it is 0.48: the model
restores a source and can't paint without one."""

HIGHEST_STEP = 650
"""Timesteps trained on most: img2img at denoising strengths up to 0.65."""


def unshuffle(pixels: Tensor) -> Tensor:
    """(n, 3, H, W) -> latents (n, 12, H/2, W/2)."""
    return F.pixel_unshuffle(pixels, 2)


def flip(pairs: Tensor, generator: torch.Generator) -> Tensor:
    """One of the eight symmetries of the square, the same for the whole batch."""
    turns, mirror = torch.randint(4, (1,), generator=generator).item(), torch.rand(1, generator=generator).item() < 0.5
    pairs = torch.rot90(pairs, turns, (-2, -1))
    return pairs.flip(-1) if mirror else pairs


def restoration_inputs(
    degraded: Tensor, sharp: Tensor, alphas: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The denoiser's input on the way from a blurred source to the sharp picture.

    degraded, sharp: latents (n, 12, h, w); alphas: cumulated, (1000,). Half of the batch starts at the degraded
    picture. A third is where a sampler is that began there with more noise and knows the sharp picture by now: of the
    degraded one there is as much left as of that noise. The rest starts at the sharp picture itself.
    Returns x_t, t (n,), a_t and s_t (n, 1, 1, 1).
    """
    n = len(sharp)
    t = (torch.rand(n, generator=generator) ** 1.2 * HIGHEST_STEP).long()
    high = torch.randint(HIGHEST_STEP, len(alphas), (n,), generator=generator)
    t = torch.where(torch.rand(n, generator=generator) < 0.05, high, t)
    begun = t + (torch.rand(n, generator=generator) * (HIGHEST_STEP - t).clamp(min=0)).long()
    noise = noise_level(alphas)
    kind = torch.rand(n, generator=generator)
    share = torch.where(kind < 0.5, 1.0, torch.where(kind < 0.85, noise[t] / noise[begun], 0.0))[:, None, None, None]
    start = sharp + share * (degraded - sharp)
    a, s = coefficients(alphas, t)
    return a * start + s * torch.randn(sharp.shape, generator=generator), t, a, s


def restoration_loss(
    prediction: Tensor, x: Tensor, a: Tensor, s: Tensor, sharp: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Distance of the v-prediction's x0 from the sharp latents.

    Squared error weighted by min(1 / s^2, 100) (on v, this is uniform weight but for the lowest noise), and the
    absolute error of pixels and of their differences, which keeps edges crisp.
    """
    x0 = to_x0(x, prediction, a, s, SCHEDULER_CONFIG["prediction_type"])
    weight = (1 / s**2).clamp(max=100.0) / 50.0
    squared = (weight * (x0 - sharp) ** 2).mean()
    error = F.pixel_shuffle(x0 - sharp, 2)
    absolute = error.abs().mean()
    slope = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return squared + 0.5 * absolute + 0.25 * slope, {"squared": squared.item(), "absolute": absolute.item()}


def alphas_cumprod() -> Tensor:
    """(1000,) of the mini's schedule."""
    return DDIMScheduler(**SCHEDULER_CONFIG).alphas_cumprod
