"""The world's patch encoder: a small DINOv2 that says what a patch shows, by its texture or by what marks tell."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from benchmarks.world.scenes import NO_LABEL, PATCH, SIDE, TRAIN_ATLAS, repainted, scene, wrong_classes
from benchmarks.world.textures import CLASSES
from lib_dinotile.train.loop import Schedule, fit

GRID = SIDE // PATCH

ENCODER_CONFIG: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "patch_size": PATCH,
    "image_size": SIDE,
}
"""2.4 M parameters."""

MEAN = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)


class Paintings(torch.utils.data.Dataset):
    """Item i is the same in every run: pixels (3 kinds, 3, SIDE, SIDE) in 0..1, labels (3 kinds, GRID, GRID) int64.

    Kinds: blurred, sharp, sharp with the textures of other classes in some regions (labelled as what they are).
    """

    def __init__(self, seed: int, length: int = 6000) -> None:
        self.seed, self.length = seed, length
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index not in self._made:
            self._made[index] = self._make(index)
        pixels, labels = self._made[index]
        return pixels.float() / 255, labels

    def _make(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, index, 3))
        true = scene(rng, TRAIN_ATLAS, mark_area=float(np.exp(rng.uniform(np.log(1500), np.log(6000)))))
        own, other = true.classes, wrong_classes(rng, true)
        wrong = repainted(rng, true, np.where(rng.random(len(own)) < 0.5, own, other), TRAIN_ATLAS)
        pixels = torch.stack([true.blurred, true.sharp, wrong.sharp])
        labels = torch.from_numpy(np.stack([true.labels, true.labels, wrong.labels]))
        return (pixels * 255).round().to(torch.uint8), labels


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator)


def mixed(pixels: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What an upscaler has half way: some parts are painted, rightly or not, and some are still blurred.

    Takes `Paintings` items, a batch; gives pixels (n, 3, SIDE, SIDE) and labels (n, GRID, GRID). About a third is all
    blurred, a third all painted. In some the texture is faint or too strong, and some are noisy.
    """
    n = len(pixels)
    painted = _random(generator, n, 1, 1)
    painted = ((painted - 0.35) / 0.3).clamp(0, 1)  # share of what is painted
    wrong = _random(generator, n, 1, 1) * (_random(generator, n, 1, 1) < 0.4)
    side = int(torch.randint(2, 6, (1,), generator=generator))
    cells = -(-GRID // side) + 1
    kind = torch.where(_random(generator, n, cells, cells) < painted, 1, 0)
    kind = torch.where((_random(generator, n, cells, cells) < wrong) & (kind == 1), 2, kind)
    kind = kind.repeat_interleave(side, 1).repeat_interleave(side, 2)
    shift = int(torch.randint(side, (1,), generator=generator))
    kind = kind[:, shift : shift + GRID, shift : shift + GRID]
    labels = labels.gather(1, kind[:, None])[:, 0]
    fine = kind.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None, None].expand(-1, -1, 3, -1, -1)
    seen = pixels.gather(1, fine)[:, 0]
    contrast = torch.where(_random(generator, n, 1, 1, 1) < 0.3, 0.3 + _random(generator, n, 1, 1, 1), 1.0)
    seen = torch.lerp(pixels[:, 0], seen, contrast)
    noise = 0.04 * _random(generator, n, 1, 1, 1) * (_random(generator, n, 1, 1, 1) < 0.3)
    seen = seen + noise * torch.randn(seen.shape, generator=generator)
    return seen[:, torch.randperm(3, generator=generator)].clamp(0, 1), labels


class EncoderTraining(nn.Module):
    """The encoder and the linear head that it is trained with."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Dinov2Model(Dinov2Config(**ENCODER_CONFIG, attn_implementation="eager"))  # faster on a CPU
        self.classes = nn.Linear(ENCODER_CONFIG["hidden_size"], CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, 3, H, W) in 0..1 -> logits (n, L, CLASSES)."""
        return self.classes(self.encoder((pixels - MEAN) / STD).last_hidden_state[:, 1:])


def encoder_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of what each patch shows, in whole pictures and, half of the time, in windows of 64 px and more."""
    pixels, labels = mixed(*batch, generator)
    count = GRID if _random(generator, 1) < 0.5 else int(torch.randint(4, GRID, (1,), generator=generator))
    top, left = (int(torch.randint(GRID - count + 1, (1,), generator=generator)) for _ in range(2))
    rows, columns = slice(top, top + count), slice(left, left + count)
    labels = labels[:, rows, columns].flatten()
    pixels = pixels[..., top * PATCH : (top + count) * PATCH, left * PATCH : (left + count) * PATCH]
    logits = model(pixels.contiguous()).flatten(0, 1).float()
    loss = F.cross_entropy(logits, labels, ignore_index=NO_LABEL)
    right = (logits.argmax(-1) == labels)[labels != NO_LABEL].float().mean().item()
    return loss, {"right": right, "side": count}


def export_encoder(model: EncoderTraining, folder: Path) -> None:
    """Half-precision Dinov2Model folder, without the head."""
    copy.deepcopy(model.encoder).half().save_pretrained(folder / "encoder")


def train_encoder(schedule: Schedule, export: Path) -> None:
    """Train it and write it at every checkpoint."""
    data = Paintings(schedule.seed)
    fit(EncoderTraining(), data, encoder_loss, schedule, lambda averaged, _: export_encoder(averaged, export))
