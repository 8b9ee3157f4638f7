"""The world's diffusion model: knows all textures, and draws the one it is told, or any.

A diffusers UNet on pixel-unshuffled latents (12 channels) whose further input channels are the one-hot class map, all
zero where nothing is told.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.world.scenes import SIDE, TRAIN_ATLAS, scene
from benchmarks.world.textures import CLASSES
from lib_dinotile.engine.prediction import coefficients, to_x0
from lib_dinotile.tiling.plan import Rect
from lib_dinotile.train.loop import Schedule, fit

CHANNELS, CODEC = 12, 2
"""Of a latent; px of the canvas per cell of it."""

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": CHANNELS + CLASSES,
    "out_channels": CHANNELS,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 32,
    "cross_attention_dim": 8,
}
"""2.4 M parameters, no text. Self-attention lets all parts of a region agree on one texture."""

SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 1e-5,
    "beta_end": 5e-3,
    "prediction_type": "v_prediction",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": True,
}
"""Noise over signal is 1.0 at strength 0.75 and 1.3 at 0.85: it drowns a texture (deviation 0.2 in -1..1) but not the
colours, which extend over many pixels."""

CROP = 64
"""Side of what it trains on and of the tiles it draws, in px."""

HABIT = 0.25
"""Share of the regions, in the pictures that it isn't told about, whose class goes by their colour. So it has a habit,
as checkpoints do, and follows it where nothing else says what to draw; elsewhere in the world colours say nothing."""

_SCENES, _CROPS, _TOLD = 8, 8, 3
"""So many scenes are at hand at once, so many crops are taken of each; it is told about so many of the scenes."""


@lru_cache(maxsize=_SCENES)
def _scene(seed: int, index: int) -> tuple[Tensor, Tensor, Tensor]:
    told = index % _SCENES < _TOLD
    made = scene(np.random.default_rng((seed, index, 1)), TRAIN_ATLAS, habit=0.0 if told else HABIT)
    return made.sharp, made.blurred, one_hot(torch.from_numpy(made.class_map)[None])[0] * told


class Crops(torch.utils.data.Dataset):
    """Item i is the same in every run: (sharp, blurred) each (3, CROP, CROP) in 0..1, told (CLASSES, h, w)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        sharp, blurred, told = _scene(self.seed, index // (_SCENES * _CROPS) * _SCENES + index % _SCENES)
        y, x = np.random.default_rng((self.seed, index, 2)).integers((SIDE - CROP) // CODEC + 1, size=2)
        area = Rect(CODEC * x, CODEC * y, CROP, CROP)
        pixels, cells = (slice(None), *area.slices), (slice(None), *area.shrink(CODEC).slices)
        return sharp[pixels], blurred[pixels], told[cells]


def latents(pixels: Tensor) -> Tensor:
    """(n, 3, H, W) in 0..1 -> (n, 12, H/2, W/2) in -1..1."""
    return F.pixel_unshuffle(pixels * 2 - 1, CODEC)


def one_hot(classes: Tensor) -> Tensor:
    """(n, H, W) int64 -> (n, CLASSES, H/2, W/2): what the model can be told."""
    return F.one_hot(classes[:, ::CODEC, ::CODEC], CLASSES).permute(0, 3, 1, 2).float()


@torch.no_grad()
def sampled(
    unet: UNet2DConditionModel,
    blurred: Tensor,
    classes: Tensor | None,
    generator: torch.Generator,
    strength: float = 0.8,
    steps: int = 20,
) -> Tensor:
    """img2img from blurred tiles (n, 3, H, W) in 0..1 with DPM-Solver++ 2M; classes (n, H, W) int64, None: not told."""
    scheduler = DPMSolverMultistepScheduler.from_config(SCHEDULER_CONFIG)
    scheduler.set_timesteps(steps)
    skipped = steps - round(steps * strength)
    scheduler.set_begin_index(skipped)
    start = latents(blurred)
    told = start.new_zeros(len(start), CLASSES, *start.shape[2:]) if classes is None else one_hot(classes)
    noise = torch.randn(start.shape, generator=generator)
    x = scheduler.add_noise(start, noise, scheduler.timesteps[skipped].repeat(len(start)))
    for t in scheduler.timesteps[skipped:]:
        x = scheduler.step(unet(torch.cat([x, told], 1), t, encoder_hidden_states=None).sample, t, x).prev_sample
    return ((F.pixel_shuffle(x, CODEC) + 1) / 2).clamp(0, 1)


class DenoiserLoss:
    """Distance of the v-prediction's x0 from the sharp picture; most of the samples aren't told their class.

    Most start between the sharp and the blurred picture, the nearer to the blurred the more noise there is: img2img
    starts there, and a texture as faint as that shows only to who looks at all of a region. But never at the blurred
    one itself: it would be right then to draw none, and this model is to decide for one.
    """

    def __init__(self) -> None:
        self.alphas = DDIMScheduler(**SCHEDULER_CONFIG).alphas_cumprod

    def __call__(self, model: nn.Module, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        sharp, blurred, told = batch
        sharp, blurred = latents(sharp), latents(blurred)
        n = len(sharp)

        def random() -> Tensor:
            return torch.rand(n, generator=generator)

        t = (random() * 900).long()
        high = torch.randint(900, 1000, (n,), generator=generator)
        t = torch.where(random() < 0.04, high, t)
        share = 0.8 * random() * (t / 700).clamp(max=1) * (random() < 0.8)
        start = torch.lerp(sharp, blurred, share[:, None, None, None])
        a, s = coefficients(self.alphas, t)
        x = a * start + s * torch.randn(sharp.shape, generator=generator)
        inputs = torch.cat([x, told], 1).contiguous(memory_format=torch.channels_last)
        prediction = model(inputs, t, encoder_hidden_states=None).sample
        x0 = to_x0(x, prediction, a, s, SCHEDULER_CONFIG["prediction_type"])
        error = (x0 - sharp).square().mean((1, 2, 3))
        weight = (1 / s**2).clamp(max=25.0).flatten()
        known = told.flatten(1).any(1)
        figures = {"told": error[known].mean().item(), "untold": error[~known].mean().item()}
        return 4 * (weight * error).mean(), figures


def export_denoiser(model: UNet2DConditionModel, folder: Path) -> None:
    """Half-precision UNet and the scheduler, as diffusers folders."""
    copy.deepcopy(model).half().save_pretrained(folder / "unet")
    DDIMScheduler(**SCHEDULER_CONFIG).save_pretrained(folder / "scheduler")


def train_denoiser(schedule: Schedule, export: Path) -> None:
    """Train it and write it at every checkpoint."""
    model = UNet2DConditionModel(**UNET_CONFIG)
    fit(model, Crops(schedule.seed), DenoiserLoss(), schedule, lambda averaged, _: export_denoiser(averaged, export))
