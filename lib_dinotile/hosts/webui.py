"""What A1111 and Forge share: img2img is taken over between `p.init` and the decoded samples.

`process_images` calls `p.init` once and `p.sample` per batch count, and takes what `sample` returns for pixels if it
says `already_decoded`. So the two are replaced on the processing object, and everything else of the WebUI goes on
working.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from modules import devices, images, processing, prompt_parser, sd_samplers, sd_samplers_common, shared
from PIL import Image
from torch import Tensor

from lib_dinotile import DinotileError, engine
from lib_dinotile.condition.conditioner import Conditioner, installed_adapters
from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.hosts import folders
from lib_dinotile.hosts.base import Interrupted, Residuals
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.noise import NoiseField, TileNoise

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
    def conditioned(self, condition: Residuals | None, tiles: int) -> contextlib.AbstractContextManager[None]:
        """While open, the UNet's rows of a batch of `tiles` tiles get the condition's residuals."""

    def bind(self, cond: Any, uncond: Any) -> None:
        """The tiles to come belong to an image with these conditionings (one entry of the WebUI's batches)."""
        self._cond, self._uncond = cond, uncond

    def upscalers(self) -> Sequence[str]:
        return [upscaler.name for upscaler in shared.sd_upscalers]

    def upscale(self, image: Image.Image, size: tuple[int, int], upscaler: str) -> Image.Image:
        if upscaler in RESAMPLING:
            return image.resize(size, RESAMPLING[upscaler])
        data = next(entry for entry in shared.sd_upscalers if entry.name == upscaler)
        while image.width < size[0] or image.height < size[1]:
            larger = data.scaler.do_upscale(image, data.data_path).convert("RGB")
            if larger.width <= image.width:  # one that does not enlarge, or a scale of 1
                break
            image = larger
        return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)

    def encode(self, pixels: Tensor) -> Tensor:
        self._pixels = pixels.to(self.device)
        with devices.autocast():
            return sd_samplers_common.images_tensor_to_samples(self._pixels, model=self._p.sd_model)

    def decode(self, latents: Tensor) -> Tensor:
        with devices.without_autocast():
            decoded = processing.decode_latent_batch(
                self._p.sd_model, latents, target_device=devices.cpu, check_for_nans=True
            )
        return (torch.stack(list(decoded)).float() + 1) / 2

    def sample(self, latents: Tensor, noise: TileNoise, condition: Residuals | None) -> Tensor:
        p, tiles, rng = self._p, len(latents), SamplerNoise(noise)
        cond = prompt_parser.MulticondLearnedConditioning(shape=(tiles,), batch=[self._cond] * tiles)
        uncond = None if self._uncond is None else [self._uncond] * tiles
        start = rng.next() * p.initial_noise_multiplier
        # The sampler reads these off p; Brownian noise would be seeded per image, so that overlaps would not agree.
        per_batch = {"batch_size": tiles, "all_seeds": [p.all_seeds[0]] * tiles, "iteration": 0, "rng": rng}

        def noise_sampler(*_: Any) -> Any:
            return lambda sigma, sigma_next: rng.next()

        # Zeros, but for inpainting, depth and editing checkpoints, which look at the tile's own pixels.
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


def make_host(p: Any) -> WebUIHost:
    """The host for the WebUI that this runs in."""
    if hasattr(p.sd_model, "forge_objects"):
        from lib_dinotile.hosts.forge import ForgeHost

        return ForgeHost(p)
    from lib_dinotile.hosts.a1111 import A1111Host

    return A1111Host(p)


def refuse(p: Any, error: DinotileError) -> None:
    """Let the job fail with this error. The WebUI only logs what a script's hook raises, and would go on without it."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    p.init = fail


class Takeover:
    """One img2img job of the WebUI, done by the engine."""

    def __init__(self, p: Any, settings: Settings) -> None:
        """Changes nothing yet; DinotileError if img2img is set up in a way that tiles cannot follow."""
        if p.image_mask is not None:
            raise DinotileError("DINO Tile does not paint inpaint masks: switch it off, or use the img2img tab")
        sizes = {image.size for image in p.init_images}
        if len(sizes) != 1:
            raise DinotileError("DINO Tile upscales a batch only if all its images have one size")
        if len(p.init_images) > p.batch_size:
            count = len(p.init_images)
            raise DinotileError(f"batch size {p.batch_size} is too small for {count} images: make it {count}")
        self._p, self._settings = p, settings
        self.size = engine.canvas_size(sizes.pop(), settings.scale)
        self._host: WebUIHost | None = None
        self._conditioner: Conditioner | None = None
        self._sources: list[Image.Image] = []

    def apply(self) -> None:
        """Replace `init` and `sample` of the processing object."""
        p = self._p
        p.width, p.height = self.size
        p.init, p.sample = self.init, self.sample
        # A new dict: the cells of an X/Y/Z plot share theirs.
        p.extra_generation_params = {**p.extra_generation_params, **self._settings.infotext}

    def init(self, all_prompts: list[str], all_seeds: list[int], all_subseeds: list[int]) -> None:
        """In place of `p.init`: everything that can go wrong before the first tile goes wrong here."""
        p, opts = self._p, shared.opts
        p.sampler = sd_samplers.create_sampler(p.sampler_name, p.sd_model)
        p.extra_generation_params["Denoising strength"] = p.denoising_strength
        if p.initial_noise_multiplier != 1.0:
            p.extra_generation_params["Noise multiplier"] = p.initial_noise_multiplier
        if opts.sd_vae_encode_method != "Full":
            p.extra_generation_params["VAE Encoder"] = opts.sd_vae_encode_method
        if opts.sd_vae_decode_method != "Full":
            p.extra_generation_params["VAE Decoder"] = opts.sd_vae_decode_method
        p.init_latent = p.mask = p.nmask = p.mask_for_overlay = p.overlay_images = p.paste_to = None
        if len(p.init_images) > 1:
            p.batch_size = len(p.init_images)
        self._sources = [images.flatten(image, opts.img2img_background_color) for image in p.init_images]
        if opts.img2img_color_correction and p.color_corrections is None:
            corrections = [processing.setup_color_correction(source) for source in self._sources]
            p.color_corrections = corrections * (p.batch_size // len(corrections))

        self._host = make_host(p)
        self._conditioner = Conditioner.load(
            self._settings, self._host, installed_adapters(folders.adapters()), folders.encoders(), trusted=False
        )
        plan = engine.make_plan(self._host, self.size, self._settings)
        batches = sum(1 for _ in plan.batches(self._settings.batch)) * p.batch_size
        state = shared.state
        if not state.processing_has_refined_job_count:  # once: it may be one image of many, or a cell of a plot
            state.job_count = max(state.job_count, p.n_iter) * (batches + 1)  # the WebUI counts a finished one itself
            state.processing_has_refined_job_count = True
        steps = sd_samplers_common.setup_img2img_steps(p)[1] + 1
        shared.total_tqdm.updateTotal(batches * p.n_iter * steps)

    def sample(
        self,
        conditioning: Any,
        unconditional_conditioning: Any,
        seeds: list[int],
        subseeds: list[int],
        subseed_strength: float,
        prompts: list[str],
    ) -> list[Tensor]:
        """In place of `p.sample`: upscales every image of the batch; pixels (3, H, W) in [-1, 1]."""
        p, host = self._p, self._host
        samples, painted = processing.DecodedSamples(), []
        for number in range(len(seeds)):
            uncond = None if unconditional_conditioning is None else unconditional_conditioning[number]
            host.bind(conditioning.batch[number], uncond)
            noise = NoiseField(seeds[number], host.channels, subseeds[number], subseed_strength)
            source = self._sources[number % len(self._sources)]
            try:
                # The WebUI's own preview would show single tiles; `progress` shows the canvas.
                with overridden(shared.state, do_set_current_image=lambda: None, current_latent=None):
                    result = engine.upscale(host, source, self._settings, noise, self._conditioner)
            except engine.UnfinishedError as error:
                self._keep(error.result.image, seeds[number], prompts[number])
                raise
            painted.append(None if result.complete else f"{result.painted} of {len(result.plan)}")
            # The WebUI cuts off the fraction when it makes bytes of these: aim at the middle of a level.
            pixels = torch.from_numpy(np.array(result.image)).permute(2, 0, 1)
            samples.append((pixels.float() + 0.5) / 127.5 - 1)
        # One entry per image of the batch; the WebUI leaves out what is None.
        p.extra_generation_params["DINO Tile painted"] = painted
        return samples

    def _keep(self, image: Image.Image, seed: int, prompt: str) -> None:
        """Saves what a failed run has painted where the finished image would have gone."""
        if self._p.save_samples():
            path = self._p.outpath_samples
            images.save_image(
                image, path, "", seed, prompt, shared.opts.samples_format, p=self._p, suffix="-unfinished"
            )
