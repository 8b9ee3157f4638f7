"""What A1111 and Forge share: the loaded checkpoint as a host, sampled as a processing object says."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from modules import devices, processing, prompt_parser, sd_samplers_common, shared
from PIL import Image
from torch import Tensor

from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.hosts.base import Interrupted, Residuals
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.noise import TileNoise
from lib_dinotile.tiling.plan import Rect, TilePlan

PREVIEW_SIDE = 1024
"""Longest side of the live preview, in pixels."""
RESAMPLING = {
    "Lanczos": Image.Resampling.LANCZOS,
    "Nearest": Image.Resampling.NEAREST,
    "None": Image.Resampling.LANCZOS,
}
"""Upscalers that only resample: done here to the exact size, where the WebUI rounds it to a multiple of 8."""


@contextlib.contextmanager
def overridden(target: Any, **values: Any) -> Iterator[None]:
    """Attributes of an object set for a while; put back, or taken away again, whatever happens."""
    before = {name: target.__dict__[name] for name in values if name in target.__dict__}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name in values:
            if name in before:
                setattr(target, name, before[name])
            elif name in target.__dict__:
                delattr(target, name)


class SamplerNoise:
    """A batch's noise, as the samplers draw it: `next()` in place of `p.rng`, on the sampler's device."""

    def __init__(self, noise: TileNoise) -> None:
        self._noise = noise

    def next(self) -> Tensor:
        return self._noise.next().to(devices.device)


class WebUIHost:
    """The loaded checkpoint, sampled as the processing object `p` says; see `Host`."""

    factor = processing.opt_f
    base: str
    shape: UNetShape | None
    plan: TilePlan
    """The canvas that is worked on; set before the first tile is sampled."""

    def __init__(self, p: Any) -> None:
        self._p = p
        self.device = devices.device
        self.dtype = devices.dtype
        self._cond: Any = None
        self._uncond: Any = None
        self._pixels: Tensor | None = None

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of a latent."""

    @abstractmethod
    def conditioned(
        self, condition: Residuals | None, tiles: Sequence[Rect]
    ) -> contextlib.AbstractContextManager[None]:
        """While open, the UNet's rows of these tiles get the condition's residuals, and ControlNets their hints."""

    def check_residuals(self) -> None:
        """DinotileError if residuals cannot reach the UNet as it is set up now."""

    def bind(self, cond: Any, uncond: Any) -> None:
        """The tiles to come belong to an image with these conditionings (one entry of the WebUI's batches)."""
        self._cond, self._uncond = cond, uncond

    def upscalers(self) -> Sequence[str]:
        return [upscaler.name for upscaler in shared.sd_upscalers]

    def upscale(self, image: Image.Image, size: tuple[int, int], upscaler: str) -> Image.Image:
        if upscaler in RESAMPLING:
            return image.resize(size, RESAMPLING[upscaler])
        data = next(entry for entry in shared.sd_upscalers if entry.name == upscaler)
        # It cuts its result to multiples of 8: let it make one at least as large, and resample that to the exact size.
        factor = max((-(-side // 8) * 8) / own for side, own in zip(size, image.size))
        larger = data.scaler.upscale(image, factor, data.data_path).convert("RGB")
        return larger if larger.size == size else larger.resize(size, Image.Resampling.LANCZOS)

    def encode(self, pixels: Tensor) -> Tensor:
        self._pixels = pixels.to(self.device)
        return torch.cat([self._encode(tile) for tile in self._pixels.split(1)])

    def _encode(self, tile: Tensor) -> Tensor:
        """One at a time, as the WebUI does. It draws from the VAE's distribution with whatever state torch's generator
        happens to have; here every tile gets the same draw, so that a tile always has the same latent."""
        with self._own_random(), devices.autocast():
            return sd_samplers_common.images_tensor_to_samples(tile, model=self._p.sd_model)

    @contextlib.contextmanager
    def _own_random(self) -> Iterator[None]:
        """torch's generators in a state that is always the same, and afterwards as they were."""
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(0)
            yield

    def decode(self, latents: Tensor) -> Tensor:
        with devices.without_autocast():
            decoded = processing.decode_latent_batch(
                self._p.sd_model, latents, target_device=devices.cpu, check_for_nans=True
            )
        return (torch.stack(list(decoded)).float() + 1) / 2

    def sample(self, latents: Tensor, tiles: Sequence[Rect], noise: TileNoise, condition: Residuals | None) -> Tensor:
        p, count, rng = self._p, len(tiles), SamplerNoise(noise)
        cond = prompt_parser.MulticondLearnedConditioning(shape=(count,), batch=[self._cond] * count)
        uncond = None if self._uncond is None else [self._uncond] * count
        start = rng.next() * p.initial_noise_multiplier
        # The sampler reads these off p; Brownian noise would be seeded per image, so that overlaps would not agree.
        per_batch = {"batch_size": count, "all_seeds": [p.all_seeds[0]] * count, "iteration": 0, "rng": rng}

        def noise_sampler(*_: Any) -> Any:
            return lambda sigma, sigma_next: rng.next()

        # Zeros, but for inpainting, depth and editing checkpoints, which look at the tile's own pixels.
        with self._own_random():
            image_conditioning = p.img2img_image_conditioning(self._pixels * 2 - 1, latents)
        with (
            overridden(p, **per_batch),
            overridden(p.sampler, create_noise_sampler=noise_sampler),
            self.conditioned(condition, tiles),
        ):
            start = self.before_sampling(latents, start, cond, uncond)
            samples = p.sampler.sample_img2img(p, latents, start, cond, uncond, image_conditioning=image_conditioning)
        if shared.state.interrupted or shared.state.skipped:
            raise Interrupted
        return samples

    def before_sampling(self, latents: Tensor, start: Tensor, cond: Any, uncond: Any) -> Tensor:
        """Lets other extensions in; returns the start noise, which they may have changed."""
        p = self._p
        if p.scripts is not None:
            p.scripts.process_before_every_sampling(p, x=latents, noise=start, c=cond, uc=uncond)
        return start

    def interrupted(self) -> bool:
        state = shared.state
        return state.interrupted or state.skipped or state.stopping_generation

    def progress(self, done: int, total: int, canvas: Canvas) -> None:
        if done:
            shared.state.nextjob()
        shared.state.textinfo = f"DINO Tile: {done} of {total} tiles"
        if shared.opts.live_previews_enable:
            shared.state.assign_current_image(canvas.preview(PREVIEW_SIDE))
