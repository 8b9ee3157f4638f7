"""The interface between the engine and a host, which runs the diffusion model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from lib_dinotile import DinotileError
from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.engine.progress import Progress
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.noise import TileNoise
from lib_dinotile.tiling.plan import Rect


class Interrupted(Exception):
    """The user stopped the sampling of a batch; its tiles are not to be painted."""


class Residuals(Protocol):
    """Residuals for the UNet, asked for at every step of a batch of k tiles."""

    def residuals(self, sigma: float, progress: float) -> list[Tensor] | None:
        """For every slot of the UNet's shape a tensor (k, C, h / s, w / s) to be added there, or None for this step.

        sigma: noise level as in k-diffusion; progress: share of the steps already done, in [0, 1).
        """

    def forget(self) -> None:
        """Other batches come before this one's next step: nothing large need be kept until then."""


class Steering(Protocol):
    """Changes the x0 that the model predicts for a batch of k tiles."""

    def __call__(self, x0: Tensor, step: int, total: int, chosen: Sequence[int] | None = None) -> Tensor | None:
        """The predicted x0 (k, C, h, w), moved; None if this step (from 0) of so many is left alone.

        chosen: numbers of the tiles in the batch that it shows, if not all. It may be called under inference mode.
        """


@dataclass(frozen=True)
class Prompt:
    """What a tile shows, or a part of it."""

    text: str | None = None
    """None is the main prompt."""
    mask: Tensor | None = None
    """(h, w), float32 on the CPU, in [0, 1]: how much it counts at each latent cell of the tile. None: everywhere."""


@dataclass(frozen=True)
class Batch:
    """Tiles that the model sees together."""

    tiles: Sequence[Rect]
    """Where they lie on the canvas, in pixels."""
    prompts: Sequence[Sequence[Prompt]]
    """Of each tile: one without a mask, or several whose masks sum to one."""
    condition: Residuals | None
    guide: Steering | None = None
    source: Callable[[], Tensor] | None = None
    """Gives the pixels (k, 3, H, W) in [0, 1] of the enlarged source there."""


Denoise = Callable[[Tensor, Batch], Tensor]
"""The model's output (k, C, h, w) at the current step for the noisy latents (k, C, h, w) of a batch."""


class TiledDenoiser(Protocol):
    """Denoises the latents that are sampled, tile by tile."""

    is_batch: bool
    """Whether the latents are one batch of tiles, and not a canvas."""
    pixels: Callable[[], Tensor] | None
    """Gives the pixels (k, 3, H, W) that the tiles of the batch start from; None for a canvas."""
    tile_size: tuple[int, int]
    """(width, height) of the tiles in pixels."""
    limit: int
    """How many of them the model sees at once, at most."""
    conditioned: bool
    """Whether the batches have conditions."""
    prompts: Sequence[Sequence[Prompt]]
    """Of each of its tiles; see `Batch`."""
    begin: Tensor | None = None
    """Latents that are noised in place of those given to `Host.sample`, of the same shape; None: those are. What stays
    stays as the given ones have it."""

    def __call__(self, x: Tensor, model: Denoise, known: Callable[[], Tensor]) -> Tensor:
        """The model's output for all of x, at one step.

        known: gives what the output is where the picture stays as it is, of x's shape.
        """


class Host(Protocol):
    """A diffusion model with its img2img sampler, as the engine sees it.

    Pixels are float32 (k, 3, H, W) in [0, 1], latents (k, C, H / factor, W / factor) in the host's own dtype, both on
    its device. All tiles of a call have one size, a multiple of `factor`.
    """

    factor: int
    """Pixels per latent cell."""
    channels: int
    """Channels of a latent."""
    base: str
    """The family of the checkpoint, as adapters name it: `sd15`, `sd2`, `sdxl`, `mini` ..."""
    shape: UNetShape | None
    """Shape of the residuals that the UNet takes; None if it takes none."""
    device: torch.device
    """Where all but the canvas is."""
    dtype: torch.dtype
    """In which precision conditions are computed."""
    prompt: str
    """The main prompt."""
    denoise: float
    """The generation's denoising strength."""
    regional: bool
    """Whether a tile may have several prompts, each where its mask says."""

    def check_prompt(self, prompt: str | None) -> None:
        """DinotileError if the model would not read all of a tile's prompt; None is the main prompt."""

    def upscalers(self) -> Sequence[str]:
        """Names that `upscale` takes."""

    def upscale(self, image: Image.Image, size: tuple[int, int], upscaler: str) -> Image.Image:
        """The RGB image made larger to exactly (width, height) pixels."""

    def interrogators(self) -> Sequence[str]:
        """Names that `caption` takes."""

    def caption(self, images: Sequence[Image.Image], interrogator: str) -> list[str]:
        """A caption of each of the RGB images."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels to latents."""

    def sample(
        self,
        latents: Tensor,
        tiled: TiledDenoiser,
        noise: TileNoise,
        canvas: tuple[int, int],
        denoise: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """img2img on latents (n, C, h, w): noise them, denoise them. `Interrupted` if the user stopped it on the way.

        tiled: the tiles through which the model sees them; canvas: (width, height) of the whole in pixels, for what the
        host keeps for it; denoise: denoising strength, if not the generation's own; mask (n, 1, h, w): 1 where the
        latents may change, 0 where they stay, in between how far. The result may hold what is not finite where the
        model gave that.
        """

    def steps(self, denoise: float | None = None) -> int:
        """How many sampling steps `sample` takes at a denoising strength, if not the generation's own."""

    def steps_note(self, denoise: float | None = None) -> str:
        """Words for the user if those are more than was asked for, since the sampler cannot do so few."""
        return ""

    def batch_note(self) -> str:
        """Words for the user if tiles cannot be sampled together, since they would not come out the same."""
        return ""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels."""

    def guidance_decoder(self, choice: str) -> tuple[str, Callable[[Tensor], Tensor]]:
        """(name, function) of what latents (k, C, h, w) are seen through as pixels (k, 3, H, W), about in [0, 1].

        Gradients work, and float32 comes and goes, also under inference mode. choice: one of `settings.DECODERS`.
        DinotileError if that is not to be had.
        """

    def full_precision(self) -> AbstractContextManager[None]:
        """While open, the model computes in float32."""

    def free_memory(self) -> None:
        """Gives back what the last call left allocated; called after it ran out of memory."""

    def interrupted(self) -> bool:
        """Whether the user wants to stop before the next batch."""

    def progress(self, progress: Progress, canvas: Canvas) -> None:
        """Called before every batch and at the end: how far the run is, and the canvas as it stands."""


def check_name(kind: str, name: str, names: Sequence[str]) -> None:
    """DinotileError if the host has no `kind` of that name."""
    if name not in names:
        raise DinotileError(f"{kind}: {name!r} is not installed, give one of {', '.join(names)}")
