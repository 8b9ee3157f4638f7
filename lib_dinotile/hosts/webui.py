"""Common base of the A1111 and Forge hosts: the loaded checkpoint, sampled as a processing object says."""

from __future__ import annotations

import contextlib
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from modules import devices, processing, script_callbacks, sd_models, sd_samplers_common, shared, ui
from PIL import Image
from torch import Tensor

from lib_dinotile import DinotileError
from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.engine.host import Batch, Host, Interrupted, Prompt, TiledDenoiser
from lib_dinotile.engine.prediction import coefficients, from_x0
from lib_dinotile.engine.progress import Progress
from lib_dinotile.hosts import decoders, upscalers
from lib_dinotile.hosts.bars import Bars, stopped
from lib_dinotile.hosts.conditionings import form, stacked
from lib_dinotile.hosts.interrogators import interrogators
from lib_dinotile.hosts.memory_format import fast, fast_input
from lib_dinotile.hosts.patched import patched, seeded
from lib_dinotile.hosts.post_cfg import whole_after_parts
from lib_dinotile.hosts.samplers import DrawnRNG, Rehearsal, Steps, noise_from, other_sizes
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.noise import TileNoise

PREVIEW_SIDE = 1024
"""Longest side of the live preview, in pixels."""
ORIGINAL, LATENT_NOISE, LATENT_NOTHING = 1, 2, 3
"""The WebUI's numbers of what fills the masked area before inpainting, besides the picture itself."""


def base_of(model: Any) -> str:
    """The family of the WebUI's model; see `Host.base`."""
    marks = {"is_sdxl": "sdxl", "is_sd2": "sd2", "is_sd1": "sd15"}
    return next((base for mark, base in marks.items() if getattr(model, mark, False)), type(model).__name__.lower())


def resized_by(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(width, height) that img2img's *Resize by* makes of those of an image: each WebUI rounds in its own way."""
    step = 8 if hasattr(sd_models, "forge_model_reload") else 1  # Forge has it; A1111 and reForge do not
    count = getattr(ui, "sRound", lambda side: int(side) // step * step)  # Forge Neo brings its own
    width, height = (count(side * scale) for side in size)
    return width, height


CELLS = 8
"""Latent cells a side of a picture that only shows what a checkpoint makes of it."""
WHOLE = 1.0
"""Denoising strength that leaves nothing of the source."""

ON_THE_WHOLE = ("inpaint_only", "reference_", "tile_colorfix")
"""How the names of ControlNet's preprocessors begin that put latents of the whole image into every step, in Forge."""


def _stopped_or_not() -> contextlib.AbstractContextManager[None]:
    """While open, tiles are decoded as ever, though the user has stopped the run: the WebUIs have an option to take the
    live preview's decoder then."""
    return patched(shared.state, interrupted=False) if shared.state.interrupted else contextlib.nullcontext()


def check_unit(kind: str, masked: bool, preprocessor: str = "") -> None:
    """DinotileError for a ControlNet whose model and preprocessor are called that, if tiles cannot follow it."""
    for word, name in (("lllite", "ControlNet-LLLite"), ("fooocus", "Fooocus Inpaint")):
        if word in kind.lower():
            raise DinotileError(f"{name} does not work with tiles: choose another ControlNet")
    if preprocessor.startswith(ON_THE_WHOLE):
        raise DinotileError(
            f"the ControlNet preprocessor {preprocessor} looks at the whole image and does not work with tiles: choose "
            "another"
        )
    if "ipadapter" in kind.lower() and masked:
        raise DinotileError("IP-Adapter with a mask does not work with tiles: remove the mask, or switch DINO Tile off")


class WebUIHost(Host):
    """The loaded checkpoint, sampled as the processing object `p` says; see `Host`."""

    channels: int
    regional = True
    frames = False
    """Whether the model is one for videos, whose latents are (k, C, 1, h, w) for images."""
    unet: torch.nn.Module | None
    """The UNet, if it is one of the ldm kind."""
    shape: UNetShape | None
    prompt = ""
    image = 0
    """The number of the one in its batch that is painted."""

    def __init__(self, p: Any) -> None:
        self._job = weakref.ref(p)
        self.base = base_of(p.sd_model)
        self.factor = processing.opt_f  # some WebUIs set it for each checkpoint
        self.device = devices.device
        # reForge calls that what the UNet is stored in.
        self.dtype = devices.dtype if devices.dtype.itemsize > 1 else torch.float16
        self.denoise = p.denoising_strength
        self._negative = ""
        self._main: tuple[Any, Any] = (None, None)
        self._others: dict[tuple[str | None, tuple[int, int]], tuple[Any, Any]] = {}
        self._known_steps: dict[tuple[int, float], Steps] = {}
        self.bars = Bars()

    @property
    def _p(self) -> Any:
        """The processing object: it has us, so we do not keep it alive."""
        return self._job()

    @abstractmethod
    def conditioned(
        self, batch: Batch, chosen: Sequence[int], parts: Sequence[int]
    ) -> contextlib.AbstractContextManager[None]:
        """While open, the UNet's rows of these tiles get their residuals, and ControlNets their hints.

        chosen: the numbers, in the batch, of the tiles that the UNet is called for; parts: which of its prompts each of
        the parts belongs to that AND cuts each tile's into.
        """

    @abstractmethod
    def masked(self, part: Any, mask: Tensor, count: int) -> Any:
        """A part of a conditioning, as AND makes them, for the one of `count` prompts of a tile that has this mask
        (h, w)."""

    @abstractmethod
    def full_precision(self) -> contextlib.AbstractContextManager[None]:
        """While open, UNet and VAE compute in float32."""

    def check(self) -> None:
        """DinotileError if the WebUI, as it is set up now, does what tiles cannot follow."""

    def _controlnets(self) -> list[Any]:
        """The WebUI's scripts for ControlNets."""
        scripts = self._p.scripts.alwayson_scripts if self._p.scripts else ()
        return [script for script in scripts if script.title().lower() == "controlnet"]

    def check_residuals(self) -> None:
        """DinotileError if residuals cannot reach the UNet as it is set up now."""

    def bind(self, prompt: str, negative: str, cond: Any, uncond: Any, image: int = 0) -> None:
        """The tiles to come belong to that image of the batch, with these prompts and conditionings (entries of the
        batches)."""
        self.prompt, self._negative, self.image = prompt, negative, image
        self._main, self._others = (cond, uncond), {}

    def _conditioning(self, prompt: str | None, size: tuple[int, int]) -> tuple[Any, Any]:
        """Conditionings of a tile of that (width, height), as entries of the batches; None is the main prompt."""
        sized = self.base == "sdxl"  # its conditioning has the size of what it paints: a tile's, not the canvas's
        if prompt is None and not sized:
            return self._main
        key = prompt, size if sized else (0, 0)
        if key not in self._others:
            p, texts = self._p, [self.prompt if prompt is None else prompt]
            more = {"width": size[0], "height": size[1], "c": None, "uc": None}
            with patched(p, prompts=texts, negative_prompts=[self._negative], **more), devices.autocast():
                p.setup_conds()
                self._others[key] = self.marked(p.c.batch[0], None if p.uc is None else p.uc[0])
        return self._others[key]

    def _joined(self, prompts: Sequence[Prompt], entries: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
        """The conditionings of a tile as one, from those of its prompts: as parts of AND, each where its mask says."""
        if len(prompts) == 1:
            return entries[0]
        parts = []
        for prompt, (cond, _) in zip(prompts, entries):
            assert prompt.mask is not None  # there are several
            parts += [self.masked(part, prompt.mask, len(prompts)) for part in cond]
        return parts, entries[0][1]

    def marked(self, cond: Any, uncond: Any) -> tuple[Any, Any]:
        """Conditionings as other extensions want them to be when they reach the sampler."""
        return cond, uncond

    def upscalers(self) -> Sequence[str]:
        return upscalers.names()

    def upscale(self, image: Image.Image, size: tuple[int, int], upscaler: str) -> Image.Image:
        return upscalers.upscale(image, size, upscaler)

    def check_prompt(self, prompt: str | None) -> None:
        """The WebUI cuts prompts of any length into as many parts as the model needs."""

    def interrogators(self) -> Sequence[str]:
        return list(interrogators())

    def caption(self, images: Sequence[Image.Image], interrogator: str) -> list[str]:
        return interrogators()[interrogator](images)

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.cat([self._encode(tile) for tile in pixels.to(self.device).split(1)])

    def _encode(self, tile: Tensor) -> Tensor:
        """One at a time, as the WebUI does. It draws from the VAE's distribution with whatever state torch's generator
        happens to have; here every tile gets the same draw, so that a tile always has the same latent."""
        with seeded(self.device), devices.autocast(), self.references_kept():
            latent = sd_samplers_common.images_tensor_to_samples(fast(tile), model=self._p.sd_model)
        return self._without_frame(latent)

    def references_kept(self) -> contextlib.AbstractContextManager[None]:
        """While open, what is encoded does not become a reference image of the next prompt."""
        return contextlib.nullcontext()

    def _with_frame(self, latents: Tensor) -> Tensor:
        """Latents (k, C, h, w) as the model knows them."""
        return latents.unsqueeze(2) if self.frames else latents

    def _without_frame(self, latents: Tensor) -> Tensor:
        """The other way round."""
        return latents.squeeze(2) if self.frames else latents

    def decode(self, latents: Tensor) -> Tensor:
        return torch.cat([self._decode(latent) for latent in latents.split(1)])

    def _decode(self, latent: Tensor) -> Tensor:
        size = [side * self.factor for side in latent.shape[-2:]]
        broken = torch.full((1, 3, *size), torch.nan, device=self.device)
        if not latent.isfinite().all():
            return broken
        with devices.without_autocast():
            try:
                with _stopped_or_not():
                    decoded = processing.decode_latent_batch(
                        self._p.sd_model, self._with_frame(fast(latent)), target_device=self.device, check_for_nans=True
                    )
            except getattr(devices, "NansException", ()):
                return broken
        return (torch.stack(list(decoded)).reshape(1, 3, *size).float() + 1) / 2

    def sample(
        self,
        latents: Tensor,
        tiled: TiledDenoiser,
        noise: TileNoise,
        canvas: tuple[int, int],
        denoise: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        p, count, rng = self._p, len(latents), DrawnRNG(lambda: self._with_frame(noise.next().to(devices.device)))
        start = rng.next() * p.initial_noise_multiplier
        free = None if mask is None else mask.to(latents)
        # The sampler reads these off p; Brownian noise would be seeded per image, so that overlaps would not agree.
        values: dict[str, Any] = {
            "batch_size": count,
            "all_seeds": [p.all_seeds[0]] * count,
            "iteration": 0,
            "rng": rng,
        }
        if denoise is not None:
            values["denoising_strength"] = denoise

        # All now: a text encoder that is loaded amid sampling may push out the UNet.
        for text in {prompt.text for prompts in tiled.prompts for prompt in prompts}:
            self._conditioning(text, tiled.tile_size)
        cond, uncond = stacked([self._conditioning(None, tiled.tile_size)] * count)
        image_conditioning = self._image_conditioning(latents, tiled, mask)
        steps = self._steps_at(denoise).told
        denoiser = p.sampler.model_wrap_cfg
        stops = list[bool]()
        forward = self._tiled_forward(denoiser, tiled, latents, free, stops)
        begin = self._with_frame(latents if tiled.begin is None else tiled.begin.to(latents))
        if free is not None and denoise is None and p.inpainting_fill in (LATENT_NOISE, LATENT_NOTHING):
            content = rng.next().to(begin) if p.inpainting_fill == LATENT_NOISE else torch.zeros_like(begin)
            begin = torch.lerp(begin, content, self._with_frame(free))
        with (
            contextlib.closing(rng),
            patched(p, **values),
            self.bars.own(),
            self.sampling(tiled, canvas),
            fast_input(self.unet),
        ):
            start = self.before_sampling(tiled, begin, start, cond, uncond)
            width, height = tiled.tile_size  # some schedules depend on it
            with (
                patched(p, width=width, height=height),
                noise_from(p.sampler, begin.shape, rng.next) as drawn,
                patched(denoiser, forward=drawn.without(forward)),
            ):
                samples = p.sampler.sample_img2img(
                    p, begin, start, cond, uncond, steps=steps, image_conditioning=image_conditioning
                )
            samples = self._without_frame(samples)
        if stops:
            raise Interrupted
        return samples if free is None else torch.lerp(latents.to(samples), samples, free.to(samples))

    def steps(self, denoise: float | None = None) -> int:
        return self._steps_at(denoise).taken

    def steps_note(self, denoise: float | None = None) -> str:
        return self._steps_at(denoise).note

    def batch_note(self) -> str:
        told = self._steps_at(WHOLE).told
        with patched(self._p, denoising_strength=WHOLE):  # with little noise there is little to see
            if not self._rehearsal().alone(told):
                return ""
        name = self._p.sampler_name
        return f"tiles are sampled one at a time: with {name} the tiles of a batch would influence each other"

    def _rehearsal(self) -> Rehearsal:
        self.set_levels()
        return Rehearsal(self._p, self.channels, self.frames)

    def _steps_at(self, denoise: float | None) -> Steps:
        p = self._p
        with patched(p, **({} if denoise is None else {"denoising_strength": denoise})):
            key = p.steps, p.denoising_strength
            if key not in self._known_steps:
                self._known_steps[key] = self._rehearsal().steps()
        return self._known_steps[key]

    def _tiled_forward(
        self, denoiser: Any, tiled: TiledDenoiser, latents: Tensor, free: Tensor | None, stops: list[bool]
    ) -> Any:
        """In place of the `forward` of the WebUI's CFGDenoiser: tile by tile.

        stops: gets an entry if the user stops it on the way.
        """
        inner, stopped = denoiser.forward, sd_samplers_common.InterruptedException

        def forward(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
            x = self._without_frame(x)
            if x.shape != latents.shape:  # as SMEA samplers do
                raise other_sizes(self._p)
            if denoiser.need_last_noise_uncond and not tiled.is_batch:
                raise self._sampler_cannot_be_fused()
            step = denoiser.step
            self.bars.advance(step / max(denoiser.total_steps, 1))

            def model(tiles: Tensor, batch: Batch) -> Tensor:
                entries = [
                    [self._conditioning(prompt.text, tiled.tile_size) for prompt in prompts]
                    for prompts in batch.prompts
                ]
                alike: dict[Any, list[int]] = {}
                for number, conds in enumerate(entries):
                    alike.setdefault(tuple(form(cond) for cond, _ in conds), []).append(number)
                outputs, noises = [], []
                back = torch.tensor([number for chosen in alike.values() for number in chosen]).argsort()
                with whole_after_parts(extra) as (more, show_whole):
                    for chosen in alike.values():
                        if self.interrupted():
                            raise stopped  # to the WebUI's sampler, which ends as it does
                        denoiser.step = step  # it counts its calls
                        joined = [self._joined(batch.prompts[number], entries[number]) for number in chosen]
                        parts = [at for at, (one, _) in enumerate(entries[chosen[0]]) for _ in one]
                        noisy, (cond, uncond) = tiles[chosen], stacked(joined)
                        image = extra["image_cond"]
                        image = image[chosen] if tiled.is_batch else noisy.new_zeros(len(chosen), *image.shape[1:])
                        own = {**extra, **more, "cond": cond, "uncond": uncond, "image_cond": image}
                        with (
                            self.conditioned(batch, chosen, parts),
                            self._steered(batch, chosen, denoiser, noisy, sigma),
                        ):
                            outputs.append(inner(self._with_frame(noisy), sigma[:1].expand(len(chosen)), **own))
                        noises.append(denoiser.last_noise_uncond)
                    show_whole(back)
                if denoiser.need_last_noise_uncond:
                    denoiser.last_noise_uncond = torch.cat(noises)[back]
                return self._without_frame(torch.cat(outputs)[back])

            def known() -> Tensor:
                return self._output_for(denoiser, x, sigma, latents)

            try:
                output = tiled(x, model, known)
            except stopped:
                stops.append(True)
                raise
            if not tiled.is_batch:
                self._preview(denoiser, output)
            return self._with_frame(output if free is None else torch.lerp(known().to(output), output, free.to(output)))

        return forward

    @contextlib.contextmanager
    def _steered(self, batch: Batch, chosen: Sequence[int], denoiser: Any, x: Tensor, sigma: Tensor) -> Iterator[None]:
        """While open, the x0 predicted for these tiles of the batch is moved as the batch's guide says.

        x (k, C, h, w): their noisy latents, as the denoiser gets them.
        """
        guide, failed = batch.guide, list[Exception]()
        if guide is None:
            yield
            return

        def after(params: script_callbacks.AfterCFGCallbackParams) -> None:
            try:
                x0 = self._x0(denoiser, x, self._without_frame(params.x), sigma)
                moved = guide(x0, denoiser.step, denoiser.total_steps, chosen)
                if moved is not None:
                    params.x = self._with_frame(self._prediction(denoiser, x, moved, sigma)).to(params.x)
            except Exception as error:  # the WebUI would only log it
                failed.append(error)

        script_callbacks.on_cfg_after_cfg(after)
        try:
            yield
            if failed:
                raise failed.pop(0)
        finally:
            script_callbacks.remove_callbacks_for_function(after)
            failed.clear()  # an error has the frames of `after`, and they have the list: its tensors would stay

    def _x0(self, denoiser: Any, x: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
        """x0 of an output in the WebUI's after-CFG callback; for most samplers it is that output."""
        return output

    def _prediction(self, denoiser: Any, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        """The other way round."""
        return x0

    @abstractmethod
    def full_decoder(self) -> Callable[[Tensor], Tensor]:
        """The full VAE with gradients: (k, C, h, w) to (k, 3, H, W) in [-1, 1], float32."""

    def guidance_decoder(self, choice: str) -> tuple[str, Callable[[Tensor], Tensor]]:
        latent = (self.channels, 1) if self.frames else (self.channels,)
        return decoders.guidance_decoder(choice, self.device, self.dtype, latent, self.factor, self.full_decoder)

    @staticmethod
    def _estimates_noise(denoiser: Any) -> bool:
        """Whether the denoiser answers with the noise, as for DDIM, PLMS and UniPC, and not with the picture."""
        return getattr(denoiser, "classic_ddim_eps_estimation", False) or denoiser.mask_before_denoising

    def _output_for(self, denoiser: Any, x: Tensor, sigma: Tensor, latents: Tensor) -> Tensor:
        """The denoiser's output at x for which these would be the latents without noise."""
        if not self._estimates_noise(denoiser):
            return latents.to(x)
        return from_x0(x, latents, *self._coefficients(denoiser, sigma), "epsilon")

    @staticmethod
    def _coefficients(denoiser: Any, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, see `coefficients`, for samplers whose noise levels are timesteps."""
        return coefficients(denoiser.inner_model.inner_model.alphas_cumprod, sigma[:1].round())

    def _image_conditioning(self, latents: Tensor, tiled: TiledDenoiser, mask: Tensor | None) -> Tensor:
        """Zeros, but for inpainting, depth and editing checkpoints, which look at a tile's own pixels."""
        p = self._p
        with seeded(self.device):
            if tiled.pixels is not None:
                pixels = tiled.pixels().to(self.device)
                seen = None if mask is None else F.interpolate(mask.to(pixels), scale_factor=self.factor)
                return p.img2img_image_conditioning(pixels * 2 - 1, latents, seen)
            return self._without_pixels(latents)

    def _without_pixels(self, latents: Tensor) -> Tensor:
        """`_image_conditioning` of no picture. DinotileError for a checkpoint that looks at one."""
        pixels = torch.zeros(1, 3, CELLS * self.factor, CELLS * self.factor, device=self.device)
        conditioning = self._p.img2img_image_conditioning(pixels, latents[..., :CELLS, :CELLS])
        if conditioning.shape[-1] > 1:
            raise DinotileError("order: fused does not work with inpainting checkpoints; choose chess")
        return conditioning

    def _sampler_cannot_be_fused(self) -> DinotileError:
        return DinotileError(
            f"order: fused does not work with the sampler {self._p.sampler_name}; choose another sampler, or chess"
        )

    def check_fused(self) -> None:
        """DinotileError for a sampler or a checkpoint whose tiles cannot be fused."""
        if "cfg++" in self._p.sampler_name.lower():
            raise self._sampler_cannot_be_fused()
        with seeded(self.device):
            self._without_pixels(self._with_frame(torch.zeros(1, self.channels, CELLS, CELLS, device=self.device)))

    def set_levels(self) -> None:
        """Noise levels of the model for this job, where they are not the same for all."""

    def restore_levels(self) -> None:
        """The model's noise levels as they were when the job began, where the WebUI does not see to that."""

    @contextlib.contextmanager
    def sampling(self, tiled: TiledDenoiser, canvas: tuple[int, int]) -> Iterator[None]:
        """While open, these views of a canvas of (width, height) are sampled."""
        yield

    def before_sampling(self, tiled: TiledDenoiser, latents: Tensor, start: Tensor, cond: Any, uncond: Any) -> Tensor:
        """Lets other extensions in; returns the start noise, which they may have changed."""
        p = self._p
        if p.scripts is not None:
            p.scripts.process_before_every_sampling(p, x=latents, noise=start, c=cond, uc=uncond)
        return start

    def free_memory(self) -> None:
        devices.torch_gc()

    def interrupted(self) -> bool:
        return stopped()

    def progress(self, progress: Progress, canvas: Canvas) -> None:
        self.bars.show(progress)
        if shared.opts.live_previews_enable:
            shared.state.assign_current_image(canvas.preview(PREVIEW_SIDE))

    def _preview(self, denoiser: Any, output: Tensor) -> None:
        """The canvas while it is sampled as a whole, made small before it is decoded cheaply."""
        state, opts = shared.state, shared.opts
        self.bars.say(f", step {denoiser.step} of {denoiser.total_steps}")
        every = opts.show_progress_every_n_steps
        if (
            opts.live_previews_enable
            and every > 0
            and denoiser.step % every == 0
            and not self._estimates_noise(denoiser)
        ):
            step = max(1, -(-max(output.shape[-2:]) * self.factor // PREVIEW_SIDE))
            cheap = 2 if opts.show_progress_type == "Full" else None
            state.assign_current_image(
                sd_samplers_common.sample_to_image(self._with_frame(output[..., ::step, ::step]), approximation=cheap)
            )
