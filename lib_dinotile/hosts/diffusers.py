"""Without a WebUI: diffusers runs the checkpoint, or the built-in model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor, nn

from lib_dinotile import DinotileError, Handling, one_line
from lib_dinotile.condition.conditioner import MINI
from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.engine.host import Batch, Host, TiledDenoiser
from lib_dinotile.engine.memory import is_out_of_memory
from lib_dinotile.engine.prediction import from_x0, to_x0
from lib_dinotile.engine.progress import Progress
from lib_dinotile.hosts.devices import empty_cache, find_device, find_dtype
from lib_dinotile.hosts.diffusers_addons import load_loras, load_vae, quiet
from lib_dinotile.hosts.diffusers_checkpoints import ASK
from lib_dinotile.hosts.diffusers_controlnet import ControlNet, load_controlnet
from lib_dinotile.hosts.diffusers_pipelines import load_pipeline
from lib_dinotile.hosts.diffusers_prompts import PromptEncoder, by_length
from lib_dinotile.hosts.diffusers_solvers import Solver, Step
from lib_dinotile.hosts.memory_format import fast
from lib_dinotile.hosts.patched import in_float32, patched
from lib_dinotile.settings import APPROXIMATE, AUTO, FULL_VAE, LINEAR, TAESD, Generation
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.noise import TileNoise

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
        scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
        mean, std = vae.config.get("latents_mean") or [shift], vae.config.get("latents_std") or [1.0]
        self._shift = torch.tensor(mean).view(1, -1, 1, 1)
        """Mean of the latents, of all channels or by channel."""
        self._scale = scale / torch.tensor(std).view(1, -1, 1, 1)

    def encode(self, pixels: Tensor) -> Tensor:
        latents = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode().float()
        return (latents - self._shift.to(latents)) * self._scale.to(latents)

    def decode(self, latents: Tensor) -> Tensor:
        latents = latents / self._scale.to(latents) + self._shift.to(latents)
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()


class DiffusersHost(Host):
    """img2img with a diffusers UNet.

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
        controlnet: ControlNet | None = None,
    ) -> None:
        """text: gives the embeddings (1, n, D) of a prompt and of the negative one, for SDXL also the pooled (1, D);
        progress: called with the share of an image that is done, and a line."""
        self.unet, self._codec, self._generation, self._show = unet, codec, generation, progress
        self._controlnet = controlnet
        self.factor, self.channels, self.base = codec.factor, codec.channels, base
        self.shape = UNetShape.of_diffusers(unet)
        self.device, self.dtype = unet.device, unet.dtype
        self._solver = Solver(generation, scheduler.config)
        self.alphas, self.prediction = self._solver.alphas, self._solver.prediction
        self.schedule = self._solver.schedule
        self._guided = text is not None and generation.cfg > 1
        self._text = functools.lru_cache(maxsize=64)(text) if text else None
        self.regional = text is not None
        self.prompt, self.denoise = generation.prompt, generation.denoise
        self._progress = Progress()

    def check_prompt(self, prompt: str | None) -> None:
        if self._text is None and prompt is not None:
            raise DinotileError("prompt: this model reads no prompts: leave out prompts per tile and per region")
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
        denoise = self._generation.denoise if denoise is None else denoise
        latents = latents.to(self.device, torch.float32)
        if denoise == 0:
            return latents
        steps = self._solver.begin(denoise, self.steps(denoise))
        free = None if mask is None else mask.to(latents)
        begin = latents if tiled.begin is None else tiled.begin.to(latents)
        x = steps[0].alpha.to(latents) * begin + steps[0].sigma.to(latents) * noise.next().to(latents)
        for number, step in enumerate(steps):
            model = functools.partial(self._denoise_batch, step=step, number=number, total=len(steps))
            known = functools.partial(from_x0, x, latents, step.alpha, step.sigma, self.prediction)
            prediction = tiled(x, model, known)
            if free is not None:
                prediction = torch.lerp(known(), prediction, free)
            x = self._solver.step(prediction, step, x, noise)
            self._show(self._progress.at((number + 1) / len(steps)), self._progress.text)
        return x if free is None else torch.lerp(latents, x, free)

    def _denoise_batch(self, tiles: Tensor, batch: Batch, step: Step, number: int, total: int) -> Tensor:
        """The guided prediction for a batch at the step `number` of `total`; see `engine.host.Denoise`."""
        owners = [number for number, prompts in enumerate(batch.prompts) for _ in prompts]
        if self._text is None:
            owners = list(range(len(tiles)))
        rows = torch.tensor(owners + list(range(len(tiles))) * self._guided, device=tiles.device)
        words, residuals = self._conditions(batch, step.level, number / total)
        words = words or [()] * len(rows)
        found, size = tiles.new_empty(len(rows), *tiles.shape[1:]), len(tiles) * (1 + self._guided)
        hint = batch.source() if self._controlnet and batch.source else None
        for part in by_length(words, size):  # no more at once than without regions
            own = [torch.cat(kind) for kind in zip(*(words[row] for row in part))]
            at = rows[part]
            added = residuals and [residual.index_select(0, at) for residual in residuals]
            shown = None if hint is None else hint.index_select(0, at)
            found[part] = self.predict(tiles.index_select(0, at), step.timestep, own, added, shown)
        prediction = found[: len(owners)]
        if len(owners) > len(tiles):  # each where its mask says, as A1111 adds the parts of AND
            masks = [prompt.mask for prompts in batch.prompts for prompt in prompts]
            weights = torch.stack([torch.ones(tiles.shape[-2:]) if mask is None else mask for mask in masks])
            weighted = prediction * weights[:, None].to(prediction)
            prediction = torch.zeros_like(tiles).index_add_(0, rows[: len(owners)], weighted)
        if self._guided:
            negative = found[len(owners) :]
            prediction = negative + self._generation.cfg * (prediction - negative)
        if batch.guide is None:
            return prediction
        moved = batch.guide(to_x0(tiles, prediction, step.alpha, step.sigma, self.prediction), number, total)
        return prediction if moved is None else from_x0(tiles, moved, step.alpha, step.sigma, self.prediction)

    def _conditions(
        self, batch: Batch, level: float, progress: float
    ) -> tuple[list[tuple[Tensor, ...]], Sequence[Tensor] | None]:
        """(embeddings, residuals): those of all prompts, then of a negative one for each tile, if any; of each tile.

        level: of the noise, as in `Step`.
        """
        words: list[tuple[Tensor, ...]] = []
        if self._text is not None:
            texts = [
                [self._text(self.prompt if one.text is None else one.text) for one in own] for own in batch.prompts
            ]
            # Of each kind of embedding: that of the prompt, and of the negative one.
            words = [text[::2] for own in texts for text in own] + [own[0][1::2] for own in texts] * self._guided
        return words, batch.condition.residuals(level, progress) if batch.condition else None

    def steps(self, denoise: float | None = None) -> int:
        steps, denoise = self._generation.steps, self._generation.denoise if denoise is None else denoise
        return max(1, min(round(steps * denoise), steps)) if denoise else 0

    @torch.no_grad()
    def words(self, prompt: str) -> tuple[Tensor, ...]:
        """A prompt as the UNet is given it: embeddings (1, n, D), for SDXL also the pooled one (1, D); or nothing."""
        # No gradient: what is kept would carry the text encoder's graph along.
        return () if self._text is None else self._text(prompt)[::2]

    def predict(
        self,
        x: Tensor,
        timestep: Tensor,
        words: Sequence[Tensor] = (),
        residuals: Sequence[Tensor] | None = None,
        hint: Tensor | None = None,
    ) -> Tensor:
        """The UNet's prediction for noisy latents (k, C, h, w), a row of `words` for each; timestep: () or (k,).

        hint: pixels (k, 3, H, W) for the ControlNet, whose residuals are added to those that are given. It computes in
        its own dtype, and what it gives has that of the latents.
        """
        dtype, x = x.dtype, x.to(self.dtype)
        inputs: dict[str, Any] = {"encoder_hidden_states": words[0].to(x) if words else None}
        if len(words) > 1:
            height, width = (side * self.factor for side in x.shape[-2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]], device=x.device, dtype=torch.float32)
            inputs["added_cond_kwargs"] = {"text_embeds": words[1].to(x), "time_ids": sizes.expand(len(x), -1)}
        added = residuals and [residual.to(x) for residual in residuals]
        if self._controlnet is not None and hint is not None:
            own = self._controlnet.residuals(x, timestep, inputs, hint)
            added = [one + other for one, other in zip(own, added)] if added else own
        if added:
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
        models = [self.unet, self._codec, *filter(None, [self._controlnet])]
        with in_float32(models), patched(self, dtype=torch.float32):
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
        with quiet():
            tiny = AutoencoderTiny.from_pretrained(name, use_safetensors=True, local_files_only=not download)
    except Exception as error:  # whatever the Hub's client raises
        if not download:
            return None
        raise DinotileError(
            f"decoder: {name} cannot be downloaded: {one_line(error)}; choose Automatic or full VAE"
        ) from error
    return tiny.float().eval().requires_grad_(False)


def load_host(
    generation: Generation,
    progress: Callable[[float, str], None] = lambda done, text: None,
    number: int = 0,
) -> DiffusersHost:
    """The host for `generation.model`, where and in the precision that `generation` says; number: of this process.

    DinotileError, one line, if the model or the device is not there, or it is no Stable Diffusion.
    """
    name = generation.model
    device = find_device(generation.device, number)
    dtype = find_dtype("fp32" if name == "mini" and generation.precision == AUTO else generation.precision, device)
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    if name == "mini":
        unet = UNet2DConditionModel.from_pretrained(MINI / "unet", use_safetensors=True).to(device, dtype).eval()
        return DiffusersHost(
            unet, DDIMScheduler.from_pretrained(MINI / "scheduler"), PixelCodec(), "mini", generation, progress=progress
        )
    with quiet():
        pipe = load_pipeline(generation)
    load_loras(pipe, generation.lora)
    if generation.vae:
        pipe.vae = load_vae(pipe.vae, generation.vae)
    controlnet = load_controlnet(pipe.unet, generation.controlnet, generation.controlnet_strength)
    codec = VaeCodec(pipe.vae)
    for part in pipe.components.values():  # before they move: the device may not have the memory for more
        if isinstance(part, nn.Module) and not (part is pipe.vae and part.config.get("force_upcast")):
            part.to(dtype)
    pipe.to(device)
    controlnet = controlnet and controlnet.to(device, dtype)

    base = FAMILIES.get(pipe.unet.config.cross_attention_dim, "unknown")
    text = PromptEncoder(pipe, generation.negative, generation.clip_skip)
    host = DiffusersHost(pipe.unet, pipe.scheduler, codec, base, generation, text, progress, controlnet)
    _try_out(host, name, generation.controlnet)
    return host


@torch.no_grad()
def _try_out(host: DiffusersHost, name: str, controlnet: str) -> None:
    """Every part of a model at work once, on a few pixels; DinotileError if they do not go with each other."""
    side, step = 8 * host.factor, torch.tensor(500)
    pixels = torch.zeros(1, 3, side, side)
    with _fitting(f"model: the parts of {name} do not fit each other"):
        latents, words = host.encode(pixels), host.words(host.prompt)
        shape = host.decode(host.predict(latents, step, words)).shape
    if controlnet:
        with _fitting(f"controlnet: {controlnet} does not fit {name}"):
            host.predict(latents, step, words, hint=pixels)
    if shape != (1, 3, side, side):
        raise DinotileError(f"model: {name} makes {side}x{side} pixels {shape[-1]}x{shape[-2]}; {ASK}")


def _fitting(line: str) -> Handling:
    """DinotileError, beginning with the line, for whatever models raise that do not fit each other."""

    def tell(error: Exception) -> bool:
        if isinstance(error, (DinotileError, MemoryError)) or is_out_of_memory(error):
            return False
        raise DinotileError(f"{line}: {one_line(error)}") from error

    return Handling(tell)
