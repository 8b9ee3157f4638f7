"""The mini's patch encoder: a small DINOv2 that tells from a blurred picture what a patch shows.

Trained from scratch by masked image modelling (SimMIM, arXiv 2111.09886): a linear head predicts the pixels that the
SHARP image has in each patch, normalised per patch (MAE, arXiv 2111.06377), from the degraded image with a part of
the patches masked. On mosaics of procedural textures a second linear head names each patch's texture.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from lib_dinotile.condition.conditioner import MINI
from tools.mini.images import Pool, degrade, jitter, to_tensor
from tools.mini.textures import TEXTURES, texture_atlas

PATCH = 14
SIDE = 224
ENCODER_CONFIG: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "patch_size": PATCH,
    "image_size": SIDE,
}
"""1.9 M parameters."""

_MEAN = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
_STD = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
NO_LABEL = -1


def normalise(images: Tensor) -> Tensor:
    """(n, 3, H, W) in -1..1 to what DINOv2 reads: ImageNet's mean and deviation."""
    return ((images + 1) / 2 - _MEAN.to(images)) / _STD.to(images)


def mosaic(
    rng: np.random.Generator, atlas: tuple[tuple[np.ndarray, ...], ...], side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Two to five textures side by side: (side, side, 3) uint8 and per patch the label (side/14, side/14) int64.

    Cells of random seeds, their borders made uneven; every cell's colour is changed at random, so that colour tells
    little. A patch with less than 70 % of one texture has NO_LABEL.
    """
    count = int(rng.integers(2, 6))
    y, x = np.mgrid[0:side, 0:side] / side
    seeds = rng.random((count, 2))
    wobble = 0.03 * np.sin(rng.uniform(8, 25) * x + rng.uniform(0, 6)) + 0.03 * np.sin(rng.uniform(8, 25) * y)
    cell = np.argmin([np.hypot(y - sy + wobble, x - sx - wobble) for sy, sx in seeds], axis=0)
    labels = rng.integers(len(atlas), size=count)
    image = np.empty((side, side, 3), np.uint8)
    for i, label in enumerate(labels):
        texture = atlas[label][rng.integers(len(atlas[label]))]
        taken = min(round(side * rng.uniform(0.8, 1.6)), *texture.shape[:2])
        top, left = rng.integers(texture.shape[0] - taken + 1), rng.integers(texture.shape[1] - taken + 1)
        square = Image.fromarray(np.ascontiguousarray(texture[top : top + taken, left : left + taken]))
        square = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))
        square = jitter(rng, np.roll(square, rng.integers(3), axis=2)[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))])
        image[cell == i] = square[cell == i]
    n = side // PATCH
    blocks = labels[cell].reshape(n, PATCH, n, PATCH).transpose(0, 2, 1, 3).reshape(n, n, -1)
    shares = np.stack([(blocks == label).mean(axis=2) for label in range(len(atlas))])
    return image, np.where(shares.max(axis=0) >= 0.7, shares.argmax(axis=0), NO_LABEL)


class EncoderImages(torch.utils.data.Dataset):
    """Item i is the same in every run: (degraded, sharp) each (3, side, side) in -1..1, labels (side/14, side/14)."""

    def __init__(self, pool: Pool, length: int, seed: int = 0, mosaics: float = 0.5, factor: float | None = None,
                 variants: int = 6, atlas_seed: int = 1) -> None:  # fmt: skip
        """factor: of the degradation, None for any; mosaics: their share, the rest are crops of the pool."""
        self.pool, self.length, self.seed, self.mosaics, self.factor = pool, length, seed, mosaics, factor
        self.atlas = texture_atlas(variants, 384, atlas_seed)
        self._made: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        if index not in self._made:
            self._made[index] = self._make(index)
        degraded, sharp, labels = self._made[index]
        return to_tensor(degraded), to_tensor(sharp), torch.from_numpy(labels)

    def _make(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng((self.seed, index, 14))
        if rng.random() < self.mosaics:
            sharp, labels = mosaic(rng, self.atlas, SIDE)
        else:
            sharp, labels = self.pool.crop(rng, SIDE, tries=1), np.full((SIDE // PATCH,) * 2, NO_LABEL)
        keep = self.factor is None and rng.random() < 0.2  # sources are sharp at times
        return sharp if keep else degrade(rng, sharp, self.factor), sharp, labels


class EncoderTraining(nn.Module):
    """The encoder and the two heads it is trained with."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Dinov2Model(Dinov2Config(**ENCODER_CONFIG))
        self.pixels = nn.Linear(ENCODER_CONFIG["hidden_size"], 3 * PATCH * PATCH)
        self.texture = nn.Linear(ENCODER_CONFIG["hidden_size"], len(TEXTURES))

    def forward(self, images: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """images (n, 3, H, W) in -1..1, masked (n, L) bool -> predicted patches (n, L, 588), logits (n, L, T)."""
        tokens = self.encoder(normalise(images), bool_masked_pos=masked).last_hidden_state[:, 1:]
        return self.pixels(tokens), self.texture(tokens)


def patches(images: Tensor) -> Tensor:
    """(n, 3, H, W) -> (n, L, 588), rows first."""
    return F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)


def encoder_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Masked patches count fully, seen ones half; plus cross-entropy of the textures of the mosaics.

    Images are cut to a random square of 6..16 patches, so that the position embeddings are interpolated as in use.
    """
    degraded, sharp, labels = batch
    count = int(torch.randint(6, SIDE // PATCH + 1, (1,), generator=generator))
    if torch.rand(1, generator=generator) < 0.5:
        count = SIDE // PATCH
    top, left = (int(torch.randint(SIDE // PATCH - count + 1, (1,), generator=generator)) for _ in range(2))
    rows, columns = slice(top * PATCH, (top + count) * PATCH), slice(left * PATCH, (left + count) * PATCH)
    degraded, sharp = degraded[..., rows, columns], sharp[..., rows, columns]
    labels = labels[:, top : top + count, left : left + count].flatten(1)
    masked = torch.rand(labels.shape, generator=generator) < 0.5 * torch.rand(len(labels), 1, generator=generator)
    guess, logits = model(degraded.contiguous(), masked)
    target = patches(sharp.contiguous())
    target = (target - target.mean(-1, keepdim=True)) / (target.std(-1, keepdim=True) + 0.05)
    error = (guess.float() - target).square().mean(-1) * torch.where(masked, 1.0, 0.5)
    known = labels.flatten() != NO_LABEL
    texture = logits.float().sum() * 0
    right = 0.0
    if known.any():
        chosen = logits.flatten(0, 1)[known].float()
        texture = F.cross_entropy(chosen, labels.flatten()[known])
        right = (chosen.argmax(-1) == labels.flatten()[known]).float().mean().item()
    return error.mean() + 0.5 * texture, {"pixels": error.mean().item(), "texture": texture.item(), "right": right}


def export_encoder(model: EncoderTraining, folder: Path) -> None:
    """Half-precision Dinov2Model folder, without the heads."""
    copy.deepcopy(model.encoder).half().save_pretrained(folder / "encoder")


@torch.no_grad()
def probe(encoder: Dinov2Model, images: int = 60, factor: float = 3.0) -> dict[str, float]:
    """Accuracy of a linear probe that names the textures of mosaics it never saw, blurred `factor` times.

    `tokens`: from the encoder's tokens; `pixels`: from the raw pixels of the patch. Chance is 1 / len(TEXTURES).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    no_photos = Pool([], np.empty(0), [])
    data = EncoderImages(no_photos, images, seed=77, mosaics=1.0, factor=factor, variants=4, atlas_seed=99)
    tokens, raw, labels = [], [], []
    for i in range(images):
        degraded, _, label = data[i]
        seen = encoder(normalise(degraded[None])).last_hidden_state[0, 1:]
        known = label.flatten() != NO_LABEL
        tokens.append(seen[known].numpy())
        raw.append(patches(degraded[None])[0][known].numpy())
        labels.append(label.flatten()[known].numpy())
    cut = images * 2 // 3
    result = {}
    for name, values in (("tokens", tokens), ("pixels", raw)):
        scale = StandardScaler().fit(np.concatenate(values[:cut]))
        model = LogisticRegression(max_iter=1000, C=0.05)
        model.fit(scale.transform(np.concatenate(values[:cut])), np.concatenate(labels[:cut]))
        right = model.score(scale.transform(np.concatenate(values[cut:])), np.concatenate(labels[cut:]))
        result[name] = round(float(right), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.mini.encoder", description=probe.__doc__)
    parser.add_argument("--encoder", type=Path, default=MINI / "encoder")
    encoder = Dinov2Model.from_pretrained(parser.parse_args().encoder, use_safetensors=True).float().eval()
    print(json.dumps(probe(encoder)))


if __name__ == "__main__":
    main()
