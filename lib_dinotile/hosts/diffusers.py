"""Without a WebUI: diffusers runs the checkpoint, or the built-in model."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from lib_dinotile import DinotileError, one_line
from lib_dinotile.condition.conditioner import MINI
from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.engine.host import Batch, Host, TiledDenoiser
from lib_dinotile.engine.prediction import coefficients, from_x0, noise_level, to_x0
from lib_dinotile.engine.progress import Progress
from lib_dinotile.hosts.devices import empty_cache, find_device, find_dtype
from lib_dinotile.hosts.memory_format import fast
from lib_dinotile.hosts.patched import in_float32, patched
from lib_dinotile.settings import APPROXIMATE, AUTO, AUTOMATIC, FULL_VAE, LINEAR, TAESD, Generation
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.noise import TileNoise
from lib_dinotile.weights import open_tensors

FAMILIES = {768: "sd15", 1024: "sd2", 2048: "sdxl"}
"""Width of the text conditioning -> family, for UNets with 4 latent channels."""
RESAMPLING = {
    "Lanczos": Image.Resampling.LANCZOS,
    "Bicubic": Image.Resampling.BICUBIC,
    "Nearest": Image.Resampling.NEAREST,
}


class PixelCodec(nn.Module):
    """The built-in model works on pixels: its latents are 2x2 blocks of them, in [-1, 1]."""

    factor = 2
    channels = 12

    def encode(self, pixels: Tensor) -> Tensor:
        return F.pixel_unshuffle(pixels, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, self.factor)


class VaeCodec(nn.Module):
    """A pipeline's VAE. Encodes to the mean of its distribution, so that a tile always gives the same latent.

    Pixels and latents are float32, whatever it computes in.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        # SDXL's overflows in half precision; diffusers marks such ones.
        self.vae = vae.float() if vae.config.get("force_upcast") else vae
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.channels = vae.config.latent_channels
        self._scale, self._shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0

    def encode(self, pixels: Tensor) -> Tensor:
        latents = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode().float()
        return (latents - self._shift) * self._scale

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode((latents / self._scale + self._shift).to(self.vae.dtype)).sample.float()


class DiffusersHost(Host):
    """img2img with a diffusers UNet and DPM-Solver++ 2M (arXiv 2211.01095), which draws no noise of its own.

    Latents are float32, also between the steps: what the UNet in half precision rounds once a step, its input and its
    output, is not rounded again by guidance and by the solver, which extrapolates from differences of x0. Beside the
    UNet's activations it costs nothing.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: Any,
        codec: PixelCodec | VaeCodec,
        base: str,
        generation: Generation,
        text: Callable[[str], tuple[Tensor, ...]] | None = None,
        progress: Callable[[float, str], None] = lambda done, text: None,
    ) -> None:
        """text: gives the embeddings (1, n, D) of a prompt and of the negative one, for SDXL also the pooled (1, D);
        progress: called with the share of an image that is done, and a line."""
        self.unet, self._codec, self._generation, self._show = unet, codec, generation, progress
        self.factor, self.channels, self.base = codec.factor, codec.channels, base
        self.shape = UNetShape.of_diffusers(unet)
        self.device, self.dtype = unet.device, unet.dtype
        self._scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
        self.alphas = self._scheduler.alphas_cumprod
        self._sigmas = noise_level(self.alphas).tolist()
        self.prediction: str = self._scheduler.config.prediction_type
        """Prediction type of the UNet: `epsilon`, `v_prediction` or `sample`."""
        self._guided = text is not None and generation.cfg > 1
        self._text = functools.lru_cache(maxsize=64)(text) if text else None
        self.regional = text is not None
        self.prompt, self.denoise = generation.prompt, generation.denoise
        self._progress = Progress()

    def check_prompt(self, prompt: str | None) -> None:
        if self._text is None and prompt is not None:
            raise DinotileError("prompt: this model reads no words, leave prompts by tile and by region out")
        if self._text is not None:
            self._text(self.prompt if prompt is None else prompt)

    def upscalers(self) -> Sequence[str]:
        return list(RESAMPLING)

    def upscale(self, image: Image.Image, size: tuple[int, int], upscaler: str) -> Image.Image:
        return image.resize(size, RESAMPLING[upscaler])

    def interrogators(self) -> Sequence[str]:
        return []

    def caption(self, images: Sequence[Image.Image], interrogator: str) -> list[str]:
        raise NotImplementedError(interrogator)

    def encode(self, pixels: Tensor) -> Tensor:
        return self._codec.encode(fast((pixels * 2).sub_(1).to(self.device)))

    def decode(self, latents: Tensor) -> Tensor:
        return (self._codec.decode(fast(latents)) + 1) / 2

    def sample(
        self,
        latents: Tensor,
        tiled: TiledDenoiser,
        noise: TileNoise,
        canvas: tuple[int, int],
        denoise: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        steps, scheduler = self._generation.steps, self._scheduler
        denoise = self._generation.denoise if denoise is None else denoise
        latents = latents.to(self.device, torch.float32)
        scheduler.set_timesteps(steps)
        if denoise == 0:
            return latents
        skipped = steps - self.steps(denoise)
        timesteps = scheduler.timesteps[skipped:]
        scheduler.set_begin_index(skipped)
        start = noise.next().to(latents)
        free = None if mask is None else mask.to(latents)
        begin = latents if tiled.begin is None else tiled.begin.to(latents)
        x = scheduler.add_noise(begin, start, timesteps[:1].repeat(len(latents)))
        for number, timestep in enumerate(timesteps):
            alpha, sigma = coefficients(self.alphas, timestep)
            model = functools.partial(self._denoise_batch, timestep=timestep, number=number, total=len(timesteps))
            known = functools.partial(from_x0, x, latents, alpha, sigma, self.prediction)
            prediction = tiled(x, model, known)
            if free is not None:
                prediction = torch.lerp(known(), prediction, free)
            x = scheduler.step(prediction, timestep, x, return_dict=False)[0]
            self._show(self._progress.at((number + 1) / len(timesteps)), self._progress.text)
        return x if free is None else torch.lerp(latents, x, free)

    def _denoise_batch(self, tiles: Tensor, batch: Batch, timestep: Tensor, number: int, total: int) -> Tensor:
        """The guided prediction for a batch at the step `number` of `total`; see `engine.host.Denoise`."""
        owners = [number for number, prompts in enumerate(batch.prompts) for _ in prompts]
        if self._text is None:
            owners = list(range(len(tiles)))
        rows = torch.tensor(owners + list(range(len(tiles))) * self._guided, device=tiles.device)
        words, residuals = self._conditions(batch, rows, timestep, number / total)
        x = self._scheduler.scale_model_input(tiles, timestep)
        outputs, size = [], len(tiles) * (1 + self._guided)  # no more at once than without regions
        for start in range(0, len(rows), size):
            at = slice(start, start + size)
            own, added = [each[at] for each in words], residuals and [each[at] for each in residuals]
            outputs.append(self.predict(x.index_select(0, rows[at]), timestep, own, added))
        found = torch.cat(outputs)
        prediction = found[: len(owners)]
        if len(owners) > len(tiles):  # each where its mask says, as A1111 adds the parts of AND
            masks = [prompt.mask for prompts in batch.prompts for prompt in prompts]
            weights = torch.stack([torch.ones(x.shape[-2:]) if mask is None else mask for mask in masks])
            weighted = prediction * weights[:, None].to(prediction)
            prediction = torch.zeros_like(tiles).index_add_(0, rows[: len(owners)], weighted)
        if self._guided:
            negative = found[len(owners) :]
            prediction = negative + self._generation.cfg * (prediction - negative)
        if batch.guide is None:
            return prediction
        alpha, sigma = coefficients(self.alphas, timestep)
        moved = batch.guide(to_x0(tiles, prediction, alpha, sigma, self.prediction), number, total)
        return prediction if moved is None else from_x0(tiles, moved, alpha, sigma, self.prediction)

    def _conditions(
        self, batch: Batch, rows: Tensor, timestep: Tensor, progress: float
    ) -> tuple[Sequence[Tensor], Sequence[Tensor] | None]:
        """(embeddings, residuals) for the UNet's rows: those of all prompts, then a negative one of each tile, if any.

        rows: the tile of each.
        """
        words: list[Tensor] = []
        if self._text is not None:
            texts = [
                [self._text(self.prompt if one.text is None else one.text) for one in own] for own in batch.prompts
            ]
            # Of each kind of embedding: those of the prompts, and of the negative one.
            kinds = zip(*(text for own in texts for text in own)), zip(*(own[0] for own in texts))
            positive, negative = ([torch.cat(kind) for kind in each] for each in kinds)
            words = positive[::2]
            if self._guided:
                words = [torch.cat(pair) for pair in zip(words, negative[1::2])]
        residuals = batch.condition.residuals(self._sigmas[int(timestep)], progress) if batch.condition else None
        return words, residuals and [residual.index_select(0, rows) for residual in residuals]

    def steps(self, denoise: float | None = None) -> int:
        steps, denoise = self._generation.steps, self._generation.denoise if denoise is None else denoise
        return max(1, min(round(steps * denoise), steps)) if denoise else 0

    @torch.no_grad()
    def words(self, prompt: str) -> tuple[Tensor, ...]:
        """A prompt as the UNet is given it: embeddings (1, n, D), for SDXL also the pooled one (1, D); or nothing."""
        # No gradient: what is kept would carry the text encoder's graph along.
        return () if self._text is None else self._text(prompt)[::2]

    def predict(
        self, x: Tensor, timestep: Tensor, words: Sequence[Tensor] = (), residuals: Sequence[Tensor] | None = None
    ) -> Tensor:
        """The UNet's prediction for noisy latents (k, C, h, w), a row of `words` for each; timestep: () or (k,).

        It computes in its own dtype, and what it gives has that of the latents.
        """
        dtype, x = x.dtype, x.to(self.dtype)
        inputs: dict[str, Any] = {"encoder_hidden_states": words[0].to(x) if words else None}
        if len(words) > 1:
            height, width = (side * self.factor for side in x.shape[-2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]], device=x.device, dtype=torch.float32)
            inputs["added_cond_kwargs"] = {"text_embeds": words[1].to(x), "time_ids": sizes.expand(len(x), -1)}
        if residuals is not None:
            added = [residual.to(x) for residual in residuals]
            inputs["down_block_additional_residuals"] = added[:-1]
            inputs["mid_block_additional_residual"] = added[-1]
        return self.unet(fast(x), timestep, **inputs, return_dict=False)[0].to(dtype)

    def guidance_decoder(self, choice: str) -> tuple[str, Callable[[Tensor], Tensor]]:
        codec = self._codec
        if isinstance(codec, PixelCodec):
            return "the model's own pixels", lambda latents: (codec.decode(latents) + 1) / 2
        if choice in (APPROXIMATE, LINEAR):
            raise DinotileError(f"decoder: only the WebUIs have the {choice} one; choose {TAESD} or {FULL_VAE}")
        tiny = None if choice == FULL_VAE else _taesd(self.base, download=choice == TAESD)
        if tiny is None:
            return FULL_VAE, lambda latents: (codec.decode(latents) + 1) / 2
        tiny.to(self.device, self.dtype)
        return TAESD, lambda latents: (tiny.decode(latents.to(tiny.dtype)).sample.float() + 1) / 2

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        with in_float32([self.unet, self._codec]), patched(self, dtype=torch.float32):
            yield

    @contextlib.contextmanager
    def precise_codec(self) -> Iterator[None]:
        """While open, pictures are encoded and decoded in float32."""
        with in_float32([self._codec]):
            yield

    def free_memory(self) -> None:
        empty_cache(self.device)

    def interrupted(self) -> bool:
        return False

    def progress(self, progress: Progress, canvas: Canvas) -> None:
        self._progress = progress
        self._show(progress.done, progress.text)


def _taesd(base: str, download: bool) -> Any:
    """The tiny autoencoder of a family of checkpoints, or None if it is not on this machine and not to be downloaded.

    DinotileError if the download fails.
    """
    from diffusers import AutoencoderTiny

    name = f"madebyollin/{'taesdxl' if base == 'sdxl' else 'taesd'}"
    try:
        tiny = AutoencoderTiny.from_pretrained(name, use_safetensors=True, local_files_only=not download)
    except Exception as error:  # whatever the Hub's client raises
        if not download:
            return None
        raise DinotileError(f"decoder: {name} cannot be downloaded: {one_line(error)}; choose full VAE") from error
    return tiny.float().eval().requires_grad_(False)


def _single_file(path: Path, config: str) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # slow to import, and mini needs none

    if path.suffix != ".safetensors":
        raise DinotileError(f"model: {path.name} is not a .safetensors file; other formats can run code, convert it")
    try:
        with open_tensors(path) as file:
            names = set(file.keys())
            sdxl = any(name.startswith("conditioner.embedders.") for name in names)
    except (OSError, SafetensorError) as error:
        raise DinotileError(f"model: {path.name} cannot be read as a safetensors file: {error}") from error
    pipeline = StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline
    more: dict[str, Any] = {"config": config} if config else {}
    if not sdxl:
        more["safety_checker"] = None
    pipe = pipeline.from_single_file(str(path), **more)
    if "v_pred" in names:  # diffusers does not look at these marks
        zero = "ztsnr" in names
        pipe.scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=zero
        )
    return pipe


def _pretrained(name: str) -> Any:
    from diffusers import DiffusionPipeline

    config = DiffusionPipeline.load_config(name)
    more = {"safety_checker": None} if "safety_checker" in config else {}
    return DiffusionPipeline.from_pretrained(name, use_safetensors=True, **more)


def load_host(
    generation: Generation,
    progress: Callable[[float, str], None] = lambda done, text: None,
    number: int = 0,
) -> DiffusersHost:
    """The host for `generation.model`, where and in the precision that `generation` says; number: of this process.

    DinotileError, one line, if the model or the device is not there, or it is no Stable Diffusion.
    """
    name, path, is_file = generation.model, Path(generation.model), os.path.isfile(generation.model)
    device = find_device(generation.device, number)
    dtype = find_dtype("fp32" if name == "mini" and generation.precision == AUTO else generation.precision, device)
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    if name == "mini":
        unet = UNet2DConditionModel.from_pretrained(MINI / "unet", use_safetensors=True).to(device, dtype).eval()
        return DiffusersHost(
            unet, DDIMScheduler.from_pretrained(MINI / "scheduler"), PixelCodec(), "mini", generation, progress=progress
        )
    if path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin") and not is_file:
        raise DinotileError(f"model: there is no file {name}")
    try:
        pipe = _single_file(path, generation.config) if is_file else _pretrained(name)
    except DinotileError:
        raise
    except Exception as error:  # whatever the libraries raise for what is missing or damaged
        hint = " (--config FOLDER spares the Hugging Face Hub)" if is_file and not generation.config else ""
        raise DinotileError(f"model: {name} cannot be loaded{hint}: {one_line(error)}") from error
    if not isinstance(getattr(pipe, "unet", None), UNet2DConditionModel) or pipe.unet.config.in_channels != 4:
        raise DinotileError(
            f"model: {name} is a {type(pipe).__name__}; give a Stable Diffusion 1.5, 2 or XL checkpoint"
        )
    if generation.prediction != AUTOMATIC:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=generation.prediction)
    codec = VaeCodec(pipe.vae)
    for part in pipe.components.values():  # before they move: the device may not have the memory for more
        if isinstance(part, nn.Module) and not (part is pipe.vae and part.config.get("force_upcast")):
            part.to(dtype)
    pipe.to(device)

    def text(prompt: str) -> tuple[Tensor, ...]:
        for name, words in (("prompt", prompt), ("negative", generation.negative)):
            count = len(pipe.tokenizer(words, truncation=False, verbose=False).input_ids)
            if count > pipe.tokenizer.model_max_length:
                raise DinotileError(
                    f"{name}: {words[:40]!r}... has {count} tokens, this checkpoint reads no more than "
                    f"{pipe.tokenizer.model_max_length}: make it shorter"
                )
        return pipe.encode_prompt(
            prompt=prompt,
            negative_prompt=generation.negative,
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )

    base = FAMILIES.get(pipe.unet.config.cross_attention_dim, "unknown")
    host = DiffusersHost(pipe.unet, pipe.scheduler, codec, base, generation, text, progress)
    text(generation.prompt)  # says at once if it is too long
    return host
