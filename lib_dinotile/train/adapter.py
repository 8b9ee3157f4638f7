"""Train the mini's adapter, UNet and encoder frozen: a tile's features are cropped from the field of a whole image.

`python -m lib_dinotile.train.adapter` compares a trained one with shuffled and with no features on held-out images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lib_dinotile.condition.adapter import Adapter, AdapterConfig
from lib_dinotile.condition.adapter_file import load_adapter, save_adapter
from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.dino.field import FeatureField
from lib_dinotile.tiling.plan import Rect
from lib_dinotile.train.images import HELD_OUT, Pool, degrade, package_roots, read_photo, sharpen, to_tensor
from lib_dinotile.train.objective import alphas_cumprod, restoration_inputs, restoration_loss, unshuffle
from lib_dinotile.train.textures import texture_atlas

MINI = Path(__file__).parents[1] / "mini"
SIDE = 336
"""Pixels along a "whole image": 24 patches, one a 14 px of the canvas, as 64 patches over a canvas of 900 px."""
TILE = 64


class AdapterImages(torch.utils.data.Dataset):
    """Item i is the same in every run: (degraded, sharp) (3, 336, 336) in -1..1, tokens of the degraded (D, 24, 24)."""

    def __init__(self, pool: Pool, encoder: PatchEncoder, length: int, seed: int = 0) -> None:
        self.pool, self.encoder, self.length, self.seed = pool, encoder, length, seed
        self._made: dict[int, tuple[np.ndarray, np.ndarray, Tensor]] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        if index not in self._made:
            rng = np.random.default_rng((self.seed, index, 336))
            sharp = self.pool.crop(rng, SIDE, tries=2)
            degraded = degrade(rng, sharp)
            with torch.no_grad():
                tokens = self.encoder((to_tensor(degraded)[None] + 1) / 2)[0].half()
            self._made[index] = degraded, np.clip(sharpen(sharp) + 0.5, 0, 255).astype(np.uint8), tokens
        degraded, sharp, tokens = self._made[index]
        return to_tensor(degraded), to_tensor(sharp), tokens.float()


class AdapterTraining(nn.Module):
    """The adapter as one call, for the training loop."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, features: Tensor, latent: tuple[int, int], sigma: Tensor) -> list[Tensor]:
        return self.adapter(self.adapter.prepare(features, latent), sigma)


def new_adapter(unet: UNet2DConditionModel, encoder: PatchEncoder) -> Adapter:
    """An untrained adapter for this UNet and the built-in encoder; narrow, so that it costs a fraction of the UNet."""
    shape = UNetShape.of_diffusers(unet)
    return Adapter(AdapterConfig(base="mini", shape=shape, encoder="mini", features=encoder.width, width=48))


def random_tiles(
    batch: Any, generator: torch.Generator, grid: tuple[int, int], each: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """`each` random tiles of every image: latents of degraded and sharp (k, 12, 32, 32), features (k, D, *grid)."""
    tiles: list[tuple[Tensor, Tensor, Tensor]] = []
    for degraded, sharp, tokens in zip(*batch, strict=True):
        field = FeatureField(tokens, (SIDE, SIDE))
        for _ in range(each):
            x, y = (2 * int(torch.randint((SIDE - TILE) // 2 + 1, (1,), generator=generator)) for _ in range(2))
            tile = Rect(x, y, TILE, TILE)
            at = (..., *tile.slices)
            tiles.append((degraded[at], sharp[at], field.crop([tile], grid)[0]))
    degraded, sharp, features = (torch.stack(list(part)) for part in zip(*tiles, strict=True))
    return unshuffle(degraded), unshuffle(sharp), features


class AdapterLoss:
    """The UNet's loss, seen by the adapter only."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet.float().eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.alphas = alphas_cumprod()
        self.grid = (-(-TILE // 2 // 4),) * 2

    def __call__(self, model: nn.Module, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        degraded, sharp, features = random_tiles(batch, generator, self.grid)
        inputs = restoration_inputs(degraded, sharp, self.alphas, generator)
        return self.value(model, inputs, sharp, features)

    def value(
        self, model: nn.Module | None, inputs: tuple[Tensor, ...], sharp: Tensor, features: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss with `features` (k, D, h, w), or of the UNet alone where `model` is None."""
        x, t, a, s = inputs
        added: dict[str, Any] = {}
        if model is not None:
            residuals = model(features, tuple(x.shape[-2:]), (s / a).flatten())
            added = {
                "down_block_additional_residuals": residuals[:-1],
                "mid_block_additional_residual": residuals[-1],
            }
        seen = x.contiguous(memory_format=torch.channels_last)
        prediction = self.unet(seen, t, encoder_hidden_states=None, **added).sample
        return restoration_loss(prediction, x, a, s, sharp)


def held_out_pool() -> Pool:
    """Held-out photographs, and textures that training has not seen."""
    photos = [image for photo in HELD_OUT if (image := read_photo(photo, package_roots())) is not None]
    textures = [image for group in texture_atlas(2, 384, seed=99) for image in group]
    chances = np.array([0.5 / len(photos)] * len(photos) + [0.5 / len(textures)] * len(textures))
    return Pool(photos + textures, chances / chances.sum(), [])


@torch.no_grad()
def compare(adapter: Adapter, loss: AdapterLoss, encoder: PatchEncoder, images: int = 48) -> dict[str, float]:
    """Mean loss on held-out tiles with the tile's features, with another tile's (`shuffled`), and with none."""
    data, model = AdapterImages(held_out_pool(), encoder, images, seed=123), AdapterTraining(adapter).eval()
    totals = dict.fromkeys(("right", "shuffled", "none"), 0.0)
    batches = torch.utils.data.DataLoader(data, 8)
    for number, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(number)
        degraded, sharp, features = random_tiles(batch, generator, loss.grid, each=4)
        inputs = restoration_inputs(degraded, sharp, loss.alphas, generator)
        shuffled = features.roll(len(features) // 2, 0)
        for name, kind, given in (("right", model, features), ("shuffled", model, shuffled), ("none", None, features)):
            totals[name] += loss.value(kind, inputs, sharp, given)[0].item() / len(batches)
    return {name: round(total, 5) for name, total in totals.items()}


def export_adapter(model: AdapterTraining, folder: Path, step: int) -> None:
    """Half-precision adapter file."""
    save_adapter(model.adapter, folder / "adapter.safetensors", steps=str(step))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lib_dinotile.train.adapter", description=compare.__doc__)
    parser.add_argument("--mini", type=Path, default=MINI)
    folder = parser.parse_args().mini
    loss = AdapterLoss(UNet2DConditionModel.from_pretrained(folder / "unet"))
    adapter, encoder = load_adapter(folder / "adapter.safetensors"), load_encoder(str(folder / "encoder"))
    print(json.dumps(compare(adapter, loss, encoder)))


if __name__ == "__main__":
    main()
