"""Train an adapter, the denoiser and the encoder frozen.

As in use: the encoder sees the whole degraded source, the UNet a tile; a tile's features are cropped from those of the
whole. The objective is ControlNet's (arXiv 2302.05543), the denoiser's own loss, weighted by min-SNR (arXiv
2303.09556). A part of the tiles comes from the degraded picture: there the UNet, helped by the adapter, has to restore.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lib_dinotile.condition.adapter import Adapter, AdapterConfig
from lib_dinotile.condition.conditioner import Conditioner, to_tensor
from lib_dinotile.dino.encoder import PatchEncoder, without_autocast
from lib_dinotile.dino.field import FeatureField, feature_field
from lib_dinotile.dino.head import RestorationHead
from lib_dinotile.engine.flow import upscale
from lib_dinotile.engine.latents import SourceLatents
from lib_dinotile.engine.memory import PieceSize
from lib_dinotile.engine.prediction import coefficients, to_x0
from lib_dinotile.hosts.diffusers import DiffusersHost
from lib_dinotile.hosts.diffusers_prompts import literal
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.noise import NoiseField
from lib_dinotile.tiling.plan import Rect, TilePlan
from lib_dinotile.train.loop import Schedule, fit
from lib_dinotile.train.options import Training
from lib_dinotile.train.pictures import Picture, Prepared

UNIFORM = 0.05
"""Share of the tiles at any noise level, so that it is lost at none."""
MEASURED = 64
"""Held-out tiles that a report measures on."""
SHOWN = 4
"""Held-out pictures of which a report shows a tile."""


def encode_image(host: DiffusersHost, image: Image.Image, tile: int) -> Tensor:
    """The latents (C, h, w) of a whole canvas, RGB, as its tiles get them in use."""
    plan = TilePlan(image.width, image.height, tile, 0, host.factor)
    canvas, whole = Canvas(image, plan), Rect(0, 0, *plan.padded)
    return SourceLatents(host, canvas, whole, PieceSize(plan.tile_size, host.factor), print).crop(whole)


def fitting(host: DiffusersHost, caption: str) -> str:
    """As much of a caption's beginning as the text encoder reads at once, as a prompt in which nothing is syntax."""

    def fits(count: int) -> bool:
        own, empty = host.words(literal(caption[:count])), host.words("")
        return all(one.shape == other.shape for one, other in zip(own, empty))

    least, too_long = 0, len(caption) + 1
    middle = len(caption)
    while too_long - least > 1:
        least, too_long = (middle, too_long) if fits(middle) else (least, middle)
        middle = (least + too_long) // 2
    return literal(caption[:least])


def prepared_tiles(
    host: DiffusersHost, encoder: PatchEncoder, options: Training, tile: int, head: RestorationHead | None = None
) -> Callable[[Picture], dict[str, Tensor]]:
    """Training data of a picture: latents `sharp` and `degraded` (C, h, w), `features` (D, gh, gw) of the whole
    source, as `head` restores them if there is one, and the caption's embeddings `words.0` ..."""

    @torch.no_grad()
    def compute(picture: Picture) -> dict[str, Tensor]:
        size = picture.sharp.size
        enlarged = host.upscale(picture.source, size, "Lanczos")
        source = to_tensor(picture.source).to(encoder.device)
        features = feature_field(encoder, source, size, options.patches, layer=-options.layer).features
        if head is not None:
            features = head(features[None])[0]
        words = {f"words.{n}": kind[0] for n, kind in enumerate(host.words(fitting(host, picture.caption)))}
        with host.precise_codec():
            latents = {"sharp": encode_image(host, picture.sharp, tile), "degraded": encode_image(host, enlarged, tile)}
        return {**latents, "features": features, **words}

    return compute


class Tiles(torch.utils.data.Dataset):
    """Endless random tiles, item i the same in every run: latents `sharp` and `degraded` (C, tile / factor, tile /
    factor), `features` (D, *grid) and the words; every picture once before any comes again."""

    def __init__(self, prepared: Prepared, tile: int, factor: int, grid: tuple[int, int], seed: int) -> None:
        self._prepared, self._side, self._factor, self._grid, self._seed = prepared, tile // factor, factor, grid, seed

    def __len__(self) -> int:
        return 1_000_000_000

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._cut(index, 0)

    def other_features(self, index: int) -> Tensor:
        """The features (D, *grid) of the same place in another picture."""
        return self._cut(index, 1)["features"]

    def _cut(self, index: int, beside: int) -> dict[str, Tensor]:
        turn, place = divmod(index, len(self._prepared))
        order = np.random.default_rng((self._seed, turn, 1)).permutation(len(self._prepared))
        whole = self._prepared[int(order[(place + beside) % len(order)])]
        rows, columns = whole["sharp"].shape[1:]
        rng = np.random.default_rng((self._seed, index, 2))
        cells = Rect(
            int(rng.integers(columns - self._side + 1)), int(rng.integers(rows - self._side + 1)), *(self._side,) * 2
        )
        field = FeatureField(whole.pop("features").float(), (columns * self._factor, rows * self._factor))
        tile = Rect(*(self._factor * value for value in (cells.x, cells.y, cells.width, cells.height)))
        cut = {name: whole.pop(name)[(slice(None), *cells.slices)].float() for name in ("sharp", "degraded")}
        return {**cut, "features": field.crop([tile], self._grid)[0], **whole}


class AdapterTraining(nn.Module):
    """The adapter as one call, for the training loop."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, features: Tensor, latent: tuple[int, int], sigma: Tensor) -> list[Tensor]:
        return self.adapter(self.adapter.prepare(features, latent), sigma)


class AdapterLoss:
    """The denoiser's loss, through the frozen UNet of a host."""

    def __init__(self, host: DiffusersHost, options: Training) -> None:
        self._host, self._options = host, options
        self._alphas = host.alphas.to(host.device)
        self._nothing = [kind.to(host.device) for kind in host.words("")]

    def __call__(self, model: nn.Module, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        o, count = self._options, len(batch["sharp"])
        dropped = torch.rand(count, generator=generator) < o.drop_condition
        silent = torch.rand(count, generator=generator) < o.drop_prompt
        features = batch["features"] * ~dropped.to(batch["features"].device)[:, None, None, None]
        words = [
            torch.where(silent.to(given.device).view(-1, *(1,) * (given.ndim - 1)), nothing.to(given), given)
            for given, nothing in zip(self._words(batch), self._nothing)
        ]
        return self.value(model, self.noised(batch, generator), batch, features, words), {}

    @staticmethod
    def _words(batch: Mapping[str, Tensor]) -> list[Tensor]:
        return [batch[name] for name in sorted(batch) if name.startswith("words.")]

    def noised(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noisy latents and their timesteps (k,), as img2img at the strengths that are asked for meets them.

        A sampler that has begun at the degraded picture, at timestep T, is at t still up to t / T of the way there.
        """
        o, sharp = self._options, batch["sharp"]
        count, highest = len(sharp), len(self._alphas)
        draw = torch.rand(5, count, generator=generator)
        begin = highest * (o.denoise_low + (o.denoise_high - o.denoise_low) * draw[0])
        t = torch.where(draw[1] < UNIFORM, highest * draw[2], begin * draw[2]).long().clamp(max=highest - 1)
        share = torch.where(draw[3] < o.restoration, draw[4] * (t / begin).clamp(max=1), 0.0)
        noise = torch.randn(sharp.shape, generator=generator).to(sharp)
        t, share = t.to(sharp.device), share.to(sharp)[:, None, None, None]
        a, s = coefficients(self._alphas, t)
        return a * torch.lerp(sharp, batch["degraded"], share) + s * noise, t

    def value(
        self,
        model: nn.Module | None,
        noised: tuple[Tensor, Tensor],
        batch: Mapping[str, Tensor],
        features: Tensor,
        words: Sequence[Tensor],
    ) -> Tensor:
        """min(SNR, gamma) * squared error of the predicted x0; `model` None: of the UNet alone.

        On what a UNet predicts, noise or velocity, that is min-SNR's weight.
        """
        x, t = noised
        a, s = coefficients(self._alphas, t)
        residuals = None if model is None else model(features, tuple(x.shape[-2:]), (s / a).flatten())
        # A checkpoint in half precision computes in that, as in use: autocast would take some layers to float32.
        with contextlib.nullcontext() if self._host.dtype == torch.float32 else without_autocast(x.device):
            prediction = self._host.predict(x, t, words, residuals)
        error = to_x0(x, prediction, a, s, self._host.prediction) - batch["sharp"]
        return ((a / s).square().clamp(max=self._options.gamma) * error.square()).mean()

    @torch.no_grad()
    def compare(self, model: nn.Module, tiles: Tiles, count: int = MEASURED) -> dict[str, float]:
        """Mean loss on `count` tiles with their features (`right`), with those of others (`shuffled`), with none; and
        `gap`, by how much others' are worse than their own: the one number that says that an adapter learns."""
        totals, size = dict.fromkeys(("right", "shuffled", "none"), 0.0), max(2, self._options.batch)
        batches = -(-count // size)
        for number in range(batches):
            items = [tiles[number * size + i] for i in range(size)]
            batch = {name: torch.stack([item[name] for item in items]).to(self._host.device) for name in items[0]}
            noised, words = self.noised(batch, torch.Generator().manual_seed(number)), self._words(batch)
            others = [tiles.other_features(number * size + i) for i in range(size)]
            others = torch.stack(others).to(self._host.device)
            for name, kind, features in (
                ("right", model, batch["features"]),
                ("shuffled", model, others),
                ("none", None, others),
            ):
                totals[name] += self.value(kind, noised, batch, features, words).item() / batches
        return {**totals, "gap": totals["shuffled"] - totals["right"]}


def new_adapter(host: DiffusersHost, encoder: PatchEncoder, options: Training, restored: bool = False) -> Adapter:
    """An untrained adapter for a host's UNet; restored: reads features as the head in its file gives them."""
    config = AdapterConfig(
        base=host.base,
        shape=host.shape,
        encoder=encoder.id,
        features=encoder.width,
        layer=-options.layer,
        width=options.width,
        blocks=options.blocks,
        restored=restored,
    )
    return Adapter(config)


class Samples:
    """The tile in the middle of some held-out pictures, as the program paints it."""

    def __init__(self, host: DiffusersHost, encoder: PatchEncoder, options: Training, tile: int, seed: int = 0) -> None:
        self._host, self._encoder, self._seed, self._tile = host, encoder, seed, tile
        self._settings = Settings(
            tile=tile, overlap=0, batch=1, patches=options.patches, guidance=0.0, guard="off", adapter="trained"
        )
        self._plain: dict[int, np.ndarray] = {}

    def strip(self, number: int, picture: Picture, adapter: Adapter, head: RestorationHead | None) -> np.ndarray:
        """(tile, 4 * tile, 3) uint8: the enlarged source, painted without the adapter and with it, the truth."""
        size = width, height = picture.sharp.size
        plan = TilePlan(width, height, self._tile, 0, self._host.factor)
        tile = plan.tiles[len(plan) // 2]
        box = (tile.x, tile.y, min(tile.right, width), min(tile.bottom, height))
        mask = Image.new("L", size, 0)
        mask.paste(255, box)
        settings = replace(self._settings, tile_prompt=fitting(self._host, picture.caption), tile_prompt_mode="replace")

        def painted(conditioner: Conditioner | None) -> np.ndarray:
            noise = NoiseField(self._seed, self._host.channels)
            made = upscale(self._host, picture.source, settings, noise, conditioner, size=size, mask=mask)
            return np.asarray(made.image.crop(box))

        if number not in self._plain:
            self._plain[number] = painted(None)
        adapted = painted(Conditioner(settings, self._encoder, adapter, adapter_head=head))
        enlarged = self._host.upscale(picture.source, size, "Lanczos")
        shown = [np.asarray(enlarged.crop(box)), self._plain[number], adapted, np.asarray(picture.sharp.crop(box))]
        return np.concatenate(shown, 1)


def train_adapter(
    host: DiffusersHost,
    encoder: PatchEncoder,
    options: Training,
    schedule: Schedule,
    pictures: tuple[Prepared, Prepared],
    tile: int,
    on_save: Callable[[Adapter, dict[str, str]], None],
    head: RestorationHead | None = None,
    samples: int = SHOWN,
) -> None:
    """Train on the first of `pictures`, measure on the second; calls `on_save(adapter, how it was made)`, the adapter
    with averaged weights, at every checkpoint."""
    host.unet.requires_grad_(False)
    if options.checkpointing:
        host.unet.enable_gradient_checkpointing()
        host.unet.train()  # without it diffusers does not checkpoint; Stable Diffusion's UNets have no dropout
    adapter, loss = new_adapter(host, encoder, options, head is not None), AdapterLoss(host, options)
    model, grid = AdapterTraining(adapter), adapter.grid((tile // host.factor,) * 2)
    trained_on, held_out = (
        Tiles(prepared, tile, host.factor, grid, options.seed + number) for number, prepared in enumerate(pictures)
    )
    shown, measured = Samples(host, encoder, options, tile), dict[str, float]()

    def report(averaged: nn.Module, step: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        measured.clear()
        measured.update(loss.compare(averaged, held_out))
        strips = {
            f"source, plain, adapter, truth/{number}": shown.strip(
                number, pictures[1].picture(number), averaged.adapter, head
            )
            for number in range(min(samples, len(pictures[1])))
        }
        return measured, strips

    def save(averaged: nn.Module, step: int) -> None:
        figures = {f"held out, {name}": f"{value:.5f}" for name, value in measured.items()}
        on_save(averaged.adapter, {"steps": str(step), **figures})

    fit(model, trained_on, loss, schedule, save, report)


def tile_size(options: Training, base: str) -> int:
    """Side of the tiles in pixels."""
    return options.tile or {"mini": 64, "sdxl": 1024}.get(base, 512)


def make_schedule(options: Training, out: Path, resume: bool, recipe: Mapping[str, Any] | None = None) -> Schedule:
    """As the options say; out: folder for checkpoints and logs; recipe as in `Schedule`."""
    return Schedule(
        out,
        steps=options.steps,
        batch=options.batch,
        accumulate=options.accumulate,
        rate=options.rate,
        warmup=min(options.warmup, options.steps // 10),
        decay=options.decay,
        save_every=60 * options.save_every,
        report_every=options.report_every,
        seed=options.seed,
        precision=options.precision,
        resume=resume,
        recipe=recipe or {},
    )
