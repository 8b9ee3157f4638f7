"""How much a small window of the source tells: a network that names a patch from `WINDOW` px around it, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.world.scenes import NO_LABEL, PATCH, TRAIN_ATLAS, Scene, scene
from benchmarks.world.textures import CLASSES
from lib_dinotile.train.loop import Schedule, fit

WINDOW = 32
"""Side of a window in px of the canvas: 8 px of the source."""


class WindowClassifier(nn.Sequential):
    """(n, 3, WINDOW, WINDOW) in 0..1 -> logits (n, CLASSES)."""

    def __init__(self) -> None:
        super().__init__(
            nn.AvgPool2d(2),  # a blurred picture has nothing finer
            nn.Conv2d(3, 48, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(48, 64, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(64, 96, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(96, 128, 3, 2, 1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(128 * 16, 128),
            nn.GELU(),
            nn.Linear(128, CLASSES),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward((pixels - pixels.mean((2, 3), keepdim=True)) * 8)


def windows(made: Scene) -> tuple[Tensor, Tensor]:
    """The blurred picture around all patches that have a label, (n, 3, WINDOW, WINDOW), and those (n,)."""
    margin = (WINDOW - PATCH) // 2
    pixels = F.pad(made.blurred[None], (margin,) * 4, mode="reflect")[0]
    all_windows = pixels.unfold(1, WINDOW, PATCH).unfold(2, WINDOW, PATCH).permute(1, 2, 0, 3, 4).flatten(0, 1)
    labels = torch.from_numpy(made.labels).flatten()
    return all_windows[labels != NO_LABEL], labels[labels != NO_LABEL]


class Windows(torch.utils.data.Dataset):
    """Item i is the same in every run: 64 windows of one picture and their labels."""

    def __init__(self, seed: int, length: int = 3000) -> None:
        self.seed, self.length = seed, length
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index not in self._made:
            seen, labels = windows(scene(np.random.default_rng((self.seed, index, 7)), TRAIN_ATLAS))
            chosen = torch.from_numpy(np.random.default_rng((self.seed, index, 8)).integers(len(seen), size=64))
            self._made[index] = (seen[chosen] * 255).round().to(torch.uint8), labels[chosen]
        seen, labels = self._made[index]
        return seen.float() / 255, labels


def window_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy."""
    seen, labels = batch
    seen = seen[:, :, torch.randperm(3, generator=generator)].flatten(0, 1)
    logits = model(seen.contiguous(memory_format=torch.channels_last)).float()
    right = (logits.argmax(1) == labels.flatten()).float().mean().item()
    return F.cross_entropy(logits, labels.flatten()), {"right": right}


def export_windows(model: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, folder / "windows.safetensors")


def load_windows(folder: Path) -> WindowClassifier:
    """The classifier exported to a folder."""
    model = WindowClassifier()
    model.load_state_dict({k: v.float() for k, v in load_file(folder / "windows.safetensors").items()})
    return model.eval().requires_grad_(False)


def train_windows(schedule: Schedule, export: Path) -> None:
    data = Windows(schedule.seed)
    fit(WindowClassifier(), data, window_loss, schedule, lambda averaged, _: export_windows(averaged, export))
