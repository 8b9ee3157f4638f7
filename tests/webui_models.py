"""Small latent diffusion models with the parts that the WebUIs' models have: VAE, UNet or transformer, noise schedule,
prompts, decoders for previews."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, TOKEN = 8, 6
STEPS = 1000
ALPHAS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2).cumprod(0).float()
SIGMAS = ((1 - ALPHAS) / ALPHAS).sqrt()


def locked(module: type[nn.Module]) -> type[nn.Module]:
    """The class with its `forward` under inference mode, as Forge Neo has those of its VAEs."""
    return type(module.__name__, (module,), {"forward": torch.inference_mode()(module.forward)})


# VAE and what comes in its place --------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Pixels (n, 3, H, W) in [-1, 1] to (n, C, H / 8, W / 8): the mean of each square, mixed into C channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, channels, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.mix(F.avg_pool2d(pixels, 8))


class Decoder(nn.Module):
    """The other way round; `scale`: pixels per cell."""

    def __init__(self, channels: int, scale: int = 8) -> None:
        super().__init__()
        self.mix, self.scale = nn.Conv2d(channels, 3, 1), scale

    def forward(self, latents: Tensor) -> Tensor:
        return F.interpolate(self.mix(latents), scale_factor=self.scale)


class Film(Decoder):
    """As the TAEHV of Forge Neo: latents (n, C, 1, h, w) to pixels (n, 3, H, W) in [0, 1]."""

    def forward(self, latents: Tensor) -> Tensor:
        assert latents.ndim == 5
        return super().forward(latents.squeeze(2))


class Packed(Decoder):
    """As the TAESD of Flux.2: a cell of (n, 4 C, h, w) is four of the VAE's."""

    def forward(self, latents: Tensor) -> Tensor:
        return super().forward(F.pixel_shuffle(latents, 2))


class Vae(nn.Module):
    """Draws from its distribution with torch's own generator."""

    SCALE = 0.6

    def __init__(self, channels: int, film: bool, packed: bool, lock: bool, biased: bool) -> None:
        """channels: of its own cells, 8 pixels a side; packed: its latents have four of them in one; biased: grey is
        not the latent zero."""
        super().__init__()
        self.film, self.packed = film, packed
        self.encoder = (locked(Encoder) if lock else Encoder)(channels)
        self.decoder = (locked(Decoder) if lock else Decoder)(channels)
        # Its own attribute in Lightning's models, which is what A1111 asks.
        self._dtype = torch.float32
        into = torch.linalg.qr(torch.randn(channels, 3)).Q
        offset = torch.full((channels,), 0.2 if biased else 0.0)
        self.encoder.mix.weight.data = into[:, :, None, None].clone()
        self.encoder.mix.bias.data = offset.clone()
        self.decoder.mix.weight.data = into.T[:, :, None, None].clone()
        self.decoder.mix.bias.data = -(into.T @ offset)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def encode(self, pixels: Tensor) -> Tensor:
        latents = self.encoder(pixels)
        latents = latents + 0.01 * torch.randn_like(latents)
        latents = F.pixel_unshuffle(latents, 2) if self.packed else latents
        return latents.unsqueeze(2) if self.film else latents

    def decode(self, latents: Tensor) -> Tensor:
        assert latents.ndim == (5 if self.film else 4)
        latents = latents.squeeze(2) if self.film else latents
        pixels = self.decoder(F.pixel_shuffle(latents, 2) if self.packed else latents)
        return pixels.unsqueeze(2) if self.film else pixels

    def process_in(self, latents: Tensor) -> Tensor:
        return latents * self.SCALE

    def process_out(self, latents: Tensor) -> Tensor:
        return latents / self.SCALE

    def factors(self) -> tuple[Tensor, Tensor]:
        """Weight (C, 3) and bias (3,) of its pixels in [-1, 1] as a linear function of a cell's latents."""
        return (self.decoder.mix.weight.detach()[:, :, 0, 0].float() / self.SCALE).T, self.decoder.mix.bias.float()

    def tiny(self, kind: type[Decoder], low: float, scale: int = 8) -> nn.Module:
        """A decoder of a kind that gives its pixels as [low, 1], and about the same ones."""
        weight, bias = (values.clone() for values in self.factors())
        made = kind(len(weight), scale)
        span = (1 - low) / 2
        made.mix.weight.data = (weight.T * span * 0.97)[:, :, None, None].clone()
        made.mix.bias.data = (bias + 1) * span + low
        return made.eval()


# What predicts the noise ---------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A residual block of the ldm kind, as far as its shape can be read off it."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.out_channels = out
        self.conv = nn.Conv2d(channels, out, 3, padding=1)
        self.time, self.text = nn.Linear(2, out), nn.Linear(TOKEN, out)

    def forward(self, h: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        more = self.time(emb) + self.text(context.mean(1))
        return torch.tanh(self.conv(h) + more[:, :, None, None])


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels, self.op = channels, nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, h: Tensor) -> Tensor:
        return self.op(h)


class Upsample(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return F.interpolate(h, scale_factor=2)


class Block(nn.Sequential):
    def forward(self, h: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            h = layer(h, emb, context) if isinstance(layer, Layer) else layer(h)
        return h


def timed(timesteps: Tensor, like: Tensor) -> Tensor:
    angles = timesteps.float() / STEPS * math.pi / 2
    return torch.stack([angles.sin(), angles.cos()], 1).to(like)


class UNet(nn.Module):
    """Gives the noise; residuals are taken as ControlNet's are, by `control` (popped from the end, as Forge does)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.input_blocks = nn.ModuleList(
            [Block(nn.Conv2d(channels, WIDTH, 3, padding=1)), Block(Layer(WIDTH, WIDTH)), Block(Downsample(WIDTH)),
             Block(Layer(WIDTH, 2 * WIDTH))]
        )  # fmt: skip
        self.middle_block = Block(Layer(2 * WIDTH, 2 * WIDTH))
        self.output_blocks = nn.ModuleList(
            [Block(Layer(4 * WIDTH, 2 * WIDTH)), Block(Layer(3 * WIDTH, WIDTH), Upsample()),
             Block(Layer(2 * WIDTH, WIDTH)), Block(Layer(2 * WIDTH, WIDTH))]
        )  # fmt: skip
        self.out = nn.Conv2d(WIDTH, channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        control: dict[str, list[Tensor | None]] | None = None,
        **_: Any,
    ) -> Tensor:
        def added(h: Tensor, name: str) -> Tensor:
            found = control[name].pop() if control and control.get(name) else None
            return h if found is None else h + found

        emb, h, skips = timed(timesteps, x), x, []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = added(self.middle_block(h, emb, context), "middle")
        for block in self.output_blocks:
            h = block(torch.cat([h, added(skips.pop(), "output")], 1), emb, context)
        return 0.8 * x + 0.5 * self.out(h)


class Transformer(nn.Module):
    """Gives the flow, noise - x0, and has no skip connections; pictures that the prompt refers to shift it."""

    def __init__(self, channels: int, film: bool, references: Callable[[], list[Tensor]]) -> None:
        super().__init__()
        self.film, self._references = film, references
        self.inner, self.out = Layer(channels, WIDTH), nn.Conv2d(WIDTH, channels, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, control: Any = None, **_: Any) -> Tensor:
        assert control is None and x.ndim == (5 if self.film else 4)
        flat = x.squeeze(2) if self.film else x
        found = 0.6 * flat + self.out(self.inner(flat, timed(timesteps, flat), context))
        for picture in self._references():
            found = found + picture.mean().to(found)
        return found.unsqueeze(2) if self.film else found


# Noise levels --------------------------------------------------------------------------------------------------------


class Discrete:
    """Stable Diffusion's: x = x0 + sigma * noise."""

    shift = None

    def sigmas(self, steps: int) -> Tensor:
        return torch.cat([SIGMAS[torch.linspace(STEPS - 1, 0, steps).round().long()], torch.zeros(1)])

    def timestep(self, sigma: Tensor) -> Tensor:
        return (sigma[:, None] - SIGMAS).abs().argmin(1).float()

    def noisy(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return x0 + sigma * noise

    def scaled(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x / (sigma**2 + 1).sqrt()


class Flow:
    """Rectified flow: x = (1 - sigma) * x0 + sigma * noise; its levels are not known before `set_shift`."""

    shift: float | None = None

    def sigmas(self, steps: int) -> Tensor:
        assert self.shift is not None, "set_shift was not called"
        share = torch.linspace(1, 0, steps + 1)
        return self.shift * share / (1 + (self.shift - 1) * share)

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * STEPS

    def noisy(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return (1 - sigma) * x0 + sigma * noise

    def scaled(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x


def spread(sigma: Tensor, x: Tensor) -> Tensor:
    """Noise levels (n,) as a factor of x (n, ...)."""
    return sigma.view(-1, *[1] * (x.ndim - 1)).to(x)


# Prompts -------------------------------------------------------------------------------------------------------------


def words(text: str, size: tuple[int, int] | None = None) -> Any:
    """Embedding (tokens, D) of a prompt, four tokens for every four words; for SDXL together with the size."""

    def word(text: str) -> Tensor:
        return torch.randn(TOKEN, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))

    tokens = [word(part) for part in text.split()]
    tokens += [torch.full((TOKEN,), 0.1)] * (-len(tokens) % 4 or (4 if not tokens else 0))
    crossattn = torch.stack(tokens)
    return crossattn if size is None else {"crossattn": crossattn, "vector": torch.tensor(size) / 100}


def as_context(cond: Any) -> Tensor:
    """What the models take of conditionings (n, tokens, D)."""
    if not isinstance(cond, dict):
        return cond
    return cond["crossattn"] + cond["vector"].sum(1)[:, None, None]
