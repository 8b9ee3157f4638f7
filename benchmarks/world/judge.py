"""The first judge: a small network that names the texture of each patch of a picture, and nothing else uses.

It learns from an atlas and seeds of its own, and knows smooth patches and bad ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from benchmarks.world.denoiser import CROP, sampled
from benchmarks.world.scenes import JUDGE_ATLAS, NO_LABEL, PATCH, SIDE, Scene, repainted, scene, wrong_classes
from benchmarks.world.textures import CLASSES
from lib_dinotile.train.loop import Schedule, fit

NONE, GARBAGE = CLASSES, CLASSES + 1
"""No texture; noise, mixtures of textures, overshot contrast, what an undertrained denoiser draws."""

GRID = SIDE // PATCH


class Judge(nn.Sequential):
    """(n, 3, H, W) in 0..1 -> logits (n, CLASSES + 2, H / 16, W / 16); sees a patch and 6 px around it."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for before, after, side, stride in (
            (3, 24, 3, 1),
            (24, 48, 3, 2),
            (48, 48, 3, 1),
            (48, 96, 3, 2),
            (96, 128, 3, 2),
            (128, 128, 2, 2),
        ):
            layers += [nn.Conv2d(before, after, side, stride, int(side == 3)), nn.GELU()]
        super().__init__(*layers, nn.Conv2d(128, CLASSES + 2, 1))
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels * 4 - 2)

    @torch.no_grad()
    def verdict(self, pixels: Tensor) -> Tensor:
        """(n, 3, H, W) in 0..1 -> (n, H / 16, W / 16) int64: a class, NONE or GARBAGE."""
        return self(pixels).argmax(1)


def _noise(rng: np.random.Generator) -> np.ndarray:
    """(3, SIDE, SIDE): grey or coloured, white or drawn out to some px, deviation 0.05 to 0.25."""
    field = rng.normal(size=(int(rng.choice((1, 3))), SIDE, SIDE))
    field = gaussian_filter(field, (0, *rng.uniform(0, 1.5, 2))) if rng.random() < 0.6 else field
    return field / field.std() * rng.uniform(0.05, 0.25)


def _bad(rng: np.random.Generator, true: Scene, wrong: Scene) -> np.ndarray:
    """(3, SIDE, SIDE): a picture without a patch of good texture."""
    smooth = true.smooth
    first, second = true.sharp.numpy() - smooth, wrong.sharp.numpy() - smooth
    kind = rng.integers(3)
    if kind == 0:
        return smooth + _noise(rng)
    if kind == 1:
        return smooth + rng.uniform(2.5, 5) * first
    share = rng.uniform(0.4, 0.6)
    return smooth + rng.uniform(0.8, 1.6) * (share * first + (1 - share) * second)


def _fair(rng: np.random.Generator, true: Scene) -> np.ndarray:
    """(3, SIDE, SIDE): the picture with some more or less contrast, and a little noise."""
    detail = true.sharp.numpy() - true.smooth
    return true.smooth + rng.uniform(0.6, 1.4) * detail + rng.uniform(0, 0.03) * rng.normal(size=(3, SIDE, SIDE))


class Verdicts(torch.utils.data.Dataset):
    """Item i is the same in every run: pixels (3, SIDE, SIDE) in 0..1, verdicts (GRID, GRID) int64."""

    def __init__(self, seed: int, drawn: Tensor, length: int = 100_000) -> None:
        """drawn: bad samples (n, 3, SIDE, SIDE)."""
        self.seed, self.drawn, self.length = seed, drawn, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, index, 4))
        if len(self.drawn) and rng.random() < 0.1:
            chosen = self.drawn[rng.integers(len(self.drawn))]
            return chosen[rng.permutation(3)], torch.full((GRID, GRID), GARBAGE)
        true = scene(rng, JUDGE_ATLAS)
        wrong = repainted(rng, true, wrong_classes(rng, true), JUDGE_ATLAS)
        smooth = true.blurred.numpy() + rng.uniform(0, 0.2) * (true.sharp.numpy() - true.smooth)
        smooth = smooth + rng.uniform(0, 0.02) * rng.normal(size=(3, SIDE, SIDE))
        painted = np.stack([_fair(rng, true), smooth, _bad(rng, true, wrong)])
        kind = rng.choice(3, size=(GRID // 4, GRID // 4), p=(0.6, 0.15, 0.25)).repeat(4, 0).repeat(4, 1)
        labels = np.stack([true.labels, np.full_like(true.labels, NONE), np.full_like(true.labels, GARBAGE)])
        labels = np.take_along_axis(labels, kind[None], 0)[0]
        fine = kind.repeat(PATCH, 0).repeat(PATCH, 1)[None, None].repeat(3, 1)
        pixels = np.take_along_axis(painted, fine, 0)[0].clip(0, 1)
        return torch.from_numpy(pixels.astype(np.float32)), torch.from_numpy(labels)


def undertrained_samples(unets: list[Path], count: int, seed: int) -> Tensor:
    """(count, 3, SIDE, SIDE): what UNets exported early in their training draw untold, side by side."""
    pictures, across = [], SIDE // CROP
    for i in range(count):
        unet = UNet2DConditionModel.from_pretrained(unets[i % len(unets)]).float().eval()
        rng = np.random.default_rng((seed, i, 5))
        true = scene(rng, JUDGE_ATLAS)
        crops = true.blurred.unfold(1, CROP, CROP).unfold(2, CROP, CROP).permute(1, 2, 0, 3, 4).flatten(0, 1)
        drawn = sampled(unet, crops, None, torch.Generator().manual_seed(seed + i), steps=10)
        rows = drawn.unflatten(0, (across, across)).permute(2, 0, 3, 1, 4)
        pictures.append(rows.reshape(3, SIDE, SIDE))
    return torch.stack(pictures) if pictures else torch.empty(0, 3, SIDE, SIDE)


def judge_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the verdicts."""
    pixels, labels = batch
    logits = model(pixels.contiguous(memory_format=torch.channels_last)).float()
    right = (logits.argmax(1) == labels)[labels != NO_LABEL].float().mean().item()
    return F.cross_entropy(logits, labels, ignore_index=NO_LABEL), {"right": right}


def export_judge(model: Judge, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, folder / "judge.safetensors")


def load_judge(folder: Path) -> Judge:
    """The judge exported to a folder."""
    judge = Judge()
    judge.load_state_dict({k: v.float() for k, v in load_file(folder / "judge.safetensors").items()})
    return judge.eval().requires_grad_(False)


def train_judge(schedule: Schedule, export: Path, early: list[Path]) -> None:
    """early: folders of UNets exported early in the denoiser's training, for bad samples."""
    drawn = undertrained_samples(early, 12 if early else 0, schedule.seed)
    data = Verdicts(schedule.seed, drawn)
    fit(Judge(), data, judge_loss, schedule, lambda averaged, _: export_judge(averaged, export))
