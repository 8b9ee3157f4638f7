"""dinotile's engine on the world's denoiser, told what each pixel shows, or not.

The denoiser is a diffusers UNet on pixel-unshuffled latents whose further input channels are the one-hot class map, all
zero where nothing is told. It knows all textures, and draws the one it is told, or any.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from benchmarks.world.scenes import FACTOR, PATCH, SIDE
from benchmarks.world.textures import CLASSES
from lib_dinotile.engine.flow import upscale
from lib_dinotile.engine.host import Batch, Denoise, TiledDenoiser
from lib_dinotile.hosts.diffusers import DiffusersHost, PixelCodec
from lib_dinotile.settings import Generation, Settings
from lib_dinotile.tiling.noise import NoiseField

CHANNELS, CODEC = 12, 2
"""Of a latent; px of the canvas per cell of it."""
CROP = 64
"""Side of what the denoiser was trained on and of the tiles it draws, in px."""
WEIGHTS = Path(__file__).parent / "weights"

SETTINGS = Settings(scale=float(FACTOR), tile=CROP, overlap=0, batch=16, patches=SIDE // PATCH)
"""The defaults, but for the geometry that the world dictates."""
GENERATION = Generation(steps=20, denoise=0.8, cfg=1.0)
"""For the world's figures: 16 tiles, 16 calls of the model for each."""


def one_hot(classes: Tensor) -> Tensor:
    """(n, H, W) int64 -> (n, CLASSES, H/2, W/2): what the model can be told."""
    return F.one_hot(classes[:, ::CODEC, ::CODEC], CLASSES).permute(0, 3, 1, 2).float()


class _ClassInput(nn.Module):
    """A UNet whose further input channels are set beforehand."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.classes: Tensor | None = None
        """(k, CLASSES, h, w); None tells it nothing."""

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        classes = x.new_zeros(len(x), CLASSES, *x.shape[2:]) if self.classes is None else self.classes.to(x)
        return self.unet(torch.cat([x, classes], 1), *arguments, **options)


class WorldHost(DiffusersHost):
    """img2img in the closed world."""

    def __init__(
        self, generation: Generation = GENERATION, class_map: np.ndarray | None = None, weights: Path = WEIGHTS
    ) -> None:
        """class_map: (H, W) int64 over the canvas, what the model is told; None tells it nothing."""
        unet = UNet2DConditionModel.from_pretrained(weights / "unet").float().eval().requires_grad_(False)
        super().__init__(unet, DDIMScheduler.from_pretrained(weights / "scheduler"), PixelCodec(), "world", generation)
        self.unet = _ClassInput(unet)
        self.class_map = class_map

    def sample(self, latents: Tensor, tiled: TiledDenoiser, *more: Any) -> Tensor:
        def conditioned(x: Tensor, model: Denoise, known: Callable[[], Tensor]) -> Tensor:
            def of_batch(tiles: Tensor, batch: Batch) -> Tensor:
                self.unet.classes = None
                if self.class_map is not None:
                    crops = [torch.from_numpy(self.class_map[tile.slices].copy()) for tile in batch.tiles]
                    self.unet.classes = one_hot(torch.stack(crops))
                return model(tiles, batch)

            return tiled(x, of_batch, known)

        return super().sample(latents, conditioned, *more)


def as_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in 0..1 -> RGB."""
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def as_pixels(image: Image.Image) -> Tensor:
    """RGB -> (3, H, W) in 0..1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def painted(host: WorldHost, source: Tensor, seed: int, settings: Settings = SETTINGS) -> Tensor:
    """The engine's result (3, H, W) for a source (3, h, w), both in 0..1."""
    noise = NoiseField(seed, CHANNELS)
    return as_pixels(upscale(host, as_image(source), settings, noise).image)
