"""dinotile's engine on the world's denoiser, told what each pixel shows, or not.

The denoiser is a diffusers UNet on pixel-unshuffled latents whose further input channels are the one-hot class map, all
zero where nothing is told. It knows all textures, and draws the one it is told, or any. So a prompt is the name of a
class; where a tile has several, each acts as its mask says, as with any other checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.world import WEIGHTS
from benchmarks.world.scenes import FACTOR, PATCH, SIDE
from benchmarks.world.textures import CLASSES, TEXTURES
from lib_dinotile.engine.host import Batch, Denoise, TiledDenoiser
from lib_dinotile.hosts.diffusers import DiffusersHost, PixelCodec
from lib_dinotile.settings import Generation, Settings

SETTINGS = Settings(scale=float(FACTOR), tile=64, overlap=0, batch=16, patches=SIDE // PATCH)
"""The defaults, but for the geometry that the world dictates; a tile has the size that the denoiser was trained on."""
GENERATION = Generation(steps=20, denoise=0.8, cfg=1.0)
"""For the world's figures: 16 tiles, 16 calls of the model for each."""


def one_hot(classes: np.ndarray) -> Tensor:
    """(..., h, w) int64 -> (..., CLASSES, h, w)."""
    return F.one_hot(torch.from_numpy(classes), CLASSES).movedim(-1, -3).float()


class _ClassInput(nn.Module):
    """A UNet whose further input channels are its prompt, or set beforehand."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.classes: Tensor | None = None
        """(k, CLASSES, h, w), in place of the prompts."""

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **options: Any) -> Any:
        classes = encoder_hidden_states[:, 0, :, None, None].expand(-1, -1, *x.shape[2:])
        classes = classes if self.classes is None else self.classes
        return self.unet(torch.cat([x, classes.to(x)], 1), timestep, None, **options)


def _text(prompt: str) -> tuple[Tensor, Tensor]:
    """Embeddings (1, 1, CLASSES) of a prompt, the name of a class or nothing, and of the negative one."""
    return torch.tensor([[[float(name == prompt) for name in TEXTURES]]]), torch.zeros(1, 1, CLASSES)


class WorldHost(DiffusersHost):
    """img2img in the closed world."""

    def __init__(self, generation: Generation = GENERATION, class_map: np.ndarray | None = None) -> None:
        """class_map: (H, W) int64 over the canvas, what the model is told; None tells it nothing."""
        unet = UNet2DConditionModel.from_pretrained(WEIGHTS / "unet").float().eval().requires_grad_(False)
        scheduler = DDIMScheduler.from_pretrained(WEIGHTS / "scheduler")
        super().__init__(unet, scheduler, PixelCodec(), "world", generation, _text)
        self.unet = _ClassInput(unet)
        self.class_map = class_map
        self.cell = 1  # pixels: guidance sees a colour per square, as a linear decoder shows a latent cell

    def guidance_decoder(self, choice: str) -> tuple[str, Callable[[Tensor], Tensor]]:
        (name, decode), cell = super().guidance_decoder(choice), self.cell
        return name, lambda x: F.interpolate(F.avg_pool2d(decode(x), cell), scale_factor=cell, mode="bilinear")

    def sample(self, latents: Tensor, tiled: TiledDenoiser, *more: Any) -> Tensor:
        def conditioned(x: Tensor, model: Denoise, known: Callable[[], Tensor]) -> Tensor:
            def of_batch(tiles: Tensor, batch: Batch) -> Tensor:
                if self.class_map is not None:
                    crops = np.stack([self.class_map[tile.slices] for tile in batch.tiles])
                    self.unet.classes = one_hot(crops[:, :: self.factor, :: self.factor])
                return model(tiles, batch)

            return tiled(x, of_batch, known)

        conditioned.begin = tiled.begin  # type: ignore[attr-defined]
        return super().sample(latents, conditioned, *more)  # type: ignore[arg-type]  # called, and no more
