"""What the engine asks of whatever runs the diffusion model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from lib_dinotile import DinotileError
from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.noise import TileNoise
from lib_dinotile.tiling.plan import Rect


class Interrupted(Exception):
    """The user stopped the sampling of a batch; its tiles are not to be painted."""


class Residuals(Protocol):
    """What a host asks for at every step of a batch of k tiles."""

    def residuals(self, sigma: float, progress: float) -> list[Tensor] | None:
        """For every slot of the UNet's shape a tensor (k, C, h / s, w / s) to be added there, or None for this step.

        sigma: noise level as in k-diffusion; progress: share of the steps already done, in [0, 1).
        """


class Host(Protocol):
    """A diffusion model with its img2img sampler, as the engine sees it.

    Pixels are float32 (k, 3, H, W) in [0, 1] on the CPU; latents are the host's own tensors (k, C, H / factor,
    W / factor) wherever it keeps them. All tiles of a call have one size, a multiple of `factor`. A batch is encoded,
    sampled and decoded before the next one: a host may keep its pixels from `encode` for `sample`.
    """

    factor: int
    """Pixels per latent cell."""
    channels: int
    """Channels of a latent."""
    base: str
    """The family of the checkpoint, as adapters name it: `sd15`, `sd2`, `sdxl`, `mini` ..."""
    shape: UNetShape | None
    """What residuals the UNet takes; None if it takes none."""
    device: torch.device
    """Where conditions are computed."""
    dtype: torch.dtype
    """In which precision conditions are computed."""

    def upscalers(self) -> Sequence[str]:
        """Names that `upscale` takes."""

    def upscale(self, image: Image.Image, size: tuple[int, int], upscaler: str) -> Image.Image:
        """The RGB image made larger to exactly (width, height) pixels."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels to latents."""

    def sample(self, latents: Tensor, tiles: Sequence[Rect], noise: TileNoise, condition: Residuals | None) -> Tensor:
        """img2img on k latents: noise them, denoise them. `Interrupted` if the user stopped it on the way.

        tiles: where they lie, for what the host keeps for the whole canvas.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels."""

    def interrupted(self) -> bool:
        """Whether the user wants to stop before the next batch."""

    def progress(self, done: int, total: int, canvas: Canvas) -> None:
        """Called before the first batch and after every batch, with the number of tiles done and the canvas."""


def check_upscaler(host: Host, upscaler: str) -> None:
    """DinotileError if the host has no upscaler of that name."""
    names = list(host.upscalers())
    if upscaler not in names:
        raise DinotileError(f"upscaler: {upscaler!r} is not installed, give one of {', '.join(names)}")
