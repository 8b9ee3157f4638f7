"""The world's encoder trained without labels: self-distillation of masked and blurred patches.

DINO (arXiv 2104.14294) on the class token and iBOT (2111.07832) on the patch tokens, with Sinkhorn-Knopp as in DINOv2
(2304.07193). The teacher sees whole sharp pictures; the student sees windows of them in which patches are masked,
blurred as the source is, faint, or noisy, and has to say of each patch what the teacher says.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from benchmarks.world.encoder import ENCODER_CONFIG, GRID, MEAN, STD, Paintings, mixed
from benchmarks.world.scenes import PATCH
from lib_dinotile.train.loop import Schedule, fit

FOLDER = "encoder-unlabelled"
PROTOTYPES = 64
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.05
MOMENTUM = (0.98, 0.999)
"""Of the teacher, at the first and the last step."""
CENTRE_MOMENTUM = 0.95
CLASS_WEIGHT = 0.3
"""Of the loss on the class token; that on the patches has 1."""


class Head(nn.Sequential):
    """Tokens (..., D) -> cosines with the prototypes (..., PROTOTYPES)."""

    def __init__(self, width: int, hidden: int = 256, bottleneck: int = 64) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, bottleneck))
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, bottleneck))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(F.normalize(super().forward(tokens).float(), dim=-1), F.normalize(self.prototypes, dim=-1))


class Branch(nn.Module):
    """An encoder and its two heads; the student and the teacher are one each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Dinov2Model(Dinov2Config(**ENCODER_CONFIG, attn_implementation="eager"))  # faster on a CPU
        self.class_head, self.patch_head = (Head(ENCODER_CONFIG["hidden_size"]) for _ in range(2))

    def forward(self, pixels: Tensor, masked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (n, 3, H, W) in 0..1, masked patches (n, L) bool -> tokens (n, 1 + L, D) and both heads' cosines."""
        tokens = self.encoder((pixels - MEAN) / STD, bool_masked_pos=masked).last_hidden_state
        return tokens, self.class_head(tokens[:, 0]), self.patch_head(tokens[:, 1:])


def sinkhorn(logits: Tensor, iterations: int = 3) -> Tensor:
    """(n, k) -> assignments (n, k) whose rows sum to 1 and whose columns are used about equally (arXiv 2006.09882)."""
    shares = (logits - logits.max()).exp()
    for _ in range(iterations):
        shares = shares / shares.sum(0, keepdim=True).clamp(min=1e-12) / shares.shape[1]
        shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-12)
    return shares


def _entropy(shares: Tensor) -> Tensor:
    return -(shares * shares.clamp(min=1e-12).log()).sum(-1)


def effective_rank(tokens: Tensor) -> float:
    """Exponential of the entropy of the covariance's spectrum, of tokens (n, D): 1 where they have collapsed."""
    spectrum = torch.linalg.eigvalsh(torch.cov(tokens.float().T)).clamp(min=0)
    return _entropy(spectrum / spectrum.sum()).exp().item()


class SelfDistillation(nn.Module):
    """Student, teacher, and the teacher's centres; all of it is in a checkpoint."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.student = Branch()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("class_centre", torch.zeros(PROTOTYPES))
        self.register_buffer("patch_centre", torch.zeros(GRID * GRID, PROTOTYPES))

    @torch.no_grad()
    def follow(self) -> None:
        """Move the teacher towards the student, as it is after the last step."""
        first, last = MOMENTUM
        momentum = last - (last - first) * (1 + math.cos(math.pi * min(self.step.item() / self.steps, 1))) / 2
        for mine, other in zip(self.teacher.parameters(), self.student.parameters()):
            mine.lerp_(other, 1 - momentum)
        self.step += 1

    @torch.no_grad()
    def targets(self, pixels: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
        """What the teacher says of whole pictures: (n, PROTOTYPES), (n, GRID, GRID, PROTOTYPES), and how varied it is.

        Patches are centred for each place in the picture: else a prototype could come to mean a place.
        """
        tokens, classes, patches = self.teacher(pixels, torch.zeros(len(pixels), GRID * GRID, dtype=torch.bool))
        whole = ((classes - self.class_centre) / TEACHER_TEMPERATURE).softmax(-1)
        parts = sinkhorn(((patches - self.patch_centre) / TEACHER_TEMPERATURE).flatten(0, 1))
        self.class_centre.lerp_(classes.float().mean(0), 1 - CENTRE_MOMENTUM)
        self.patch_centre.lerp_(patches.float().mean(0), 1 - CENTRE_MOMENTUM)
        figures = {
            "rank": effective_rank(tokens[:, 1:].flatten(0, 1)),
            "deviation": tokens[:, 1:].flatten(0, 1).float().std(0).mean().item(),
            "sure": _entropy(parts).mean().exp().item(),
        }
        return whole, parts.unflatten(0, (len(pixels), GRID, GRID)), figures

    def forward(
        self, whole: Tensor, views: list[tuple[Tensor, Tensor, tuple[slice, slice]]]
    ) -> tuple[Tensor, dict[str, float]]:
        """The teacher's pictures, the student's (pixels, masked patches, where in the picture, in patches)."""
        self.follow()
        class_target, patch_target, figures = self.targets(whole)
        class_loss = patch_loss = 0.0
        for pixels, masked, (rows, columns) in views:
            _, classes, patches = self.student(pixels, masked)
            wanted = patch_target[:, rows, columns].flatten(1, 2)
            class_loss = class_loss + _cross_entropy(classes, class_target) / len(views)
            patch_loss = patch_loss + _cross_entropy(patches, wanted) / len(views)
        figures |= {"class": class_loss.item(), "patch": patch_loss.item()}
        return patch_loss + CLASS_WEIGHT * class_loss, figures


def _cross_entropy(cosines: Tensor, target: Tensor) -> Tensor:
    return -(target * (cosines / STUDENT_TEMPERATURE).log_softmax(-1)).sum(-1).mean()


def _between(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def recoloured(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """(n, 3, H, W), each with another hue, saturation, contrast and tint: what tells patches apart is their shapes."""
    n = len(pixels)
    grey = pixels.mean(1, keepdim=True)
    angle = _between(generator, -math.pi, math.pi, n, 1, 1)
    offset = torch.arange(3) * (2 * math.pi / 3)
    turn = 2 / 3 * torch.cos(angle + offset[:, None] - offset)  # of the plane of colours about the grey axis
    colour = torch.einsum("nij,njhw->nihw", turn * _between(generator, 0.0, 1.4, n, 1, 1), pixels - grey)
    contrast = _between(generator, 0.75, 1.25, n, 1, 1, 1)
    tint = _between(generator, -0.1, 0.1, n, 3, 1, 1) + _between(generator, -0.15, 0.15, n, 1, 1, 1)
    return 0.5 + contrast * (grey - 0.5) + colour + tint


def blocks(n: int, side: int, generator: torch.Generator) -> Tensor:
    """Masked patches (n, side * side) bool: none in half of the pictures, else a rectangle of a sixteenth to a half."""
    size = _between(generator, side / 4, 0.7 * side, n, 2)
    first = torch.rand(n, 2, generator=generator) * (side - size)
    at = torch.arange(side) + 0.5
    rows, columns = ((at > first[:, i, None]) & (at < (first + size)[:, i, None]) for i in range(2))
    some = torch.rand(n, 1, 1, generator=generator) < 0.5
    return (rows[:, :, None] & columns[:, None] & some).flatten(1)


def distillation_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """What `fit` descends. Of a batch of `Paintings` only the pixels are used."""
    pixels, _ = batch
    n = len(pixels)
    repainted = torch.rand(n, generator=generator) < 0.3
    sharp = torch.where(repainted[:, None, None, None], pixels[:, 2], pixels[:, 1])
    blurred = torch.where(repainted[:, None, None, None], pixels[:, 2], pixels[:, 0])  # it is not of the repainted ones
    unlabelled = torch.zeros(n, 3, GRID, GRID, dtype=torch.int64)
    views = []
    for low, high in ((10, GRID - 1), (4, 9)):
        side = int(torch.randint(low, high + 1, (1,), generator=generator))
        seen = mixed(torch.stack([blurred, sharp, sharp], 1), unlabelled, generator)[0]
        top, left = (int(torch.randint((GRID - side) * PATCH + 1, (1,), generator=generator)) for _ in range(2))
        seen = seen[..., top : top + side * PATCH, left : left + side * PATCH]
        row, column = round(top / PATCH), round(left / PATCH)
        place = slice(row, row + side), slice(column, column + side)
        views.append((recoloured(seen, generator).contiguous(), blocks(n, side, generator), place))
    return model(recoloured(sharp, generator), views)


def export_teacher(model: SelfDistillation, folder: Path) -> None:
    """Half-precision Dinov2Model folder: the teacher, as in DINO."""
    copy.deepcopy(model.teacher.encoder).half().save_pretrained(folder / FOLDER)


def train_unlabelled_encoder(schedule: Schedule, export: Path) -> None:
    """Train it and write it at every checkpoint."""
    model = SelfDistillation(schedule.schedule_steps or schedule.steps)
    data = Paintings(schedule.seed, length=1600)
    schedule = replace(schedule, warmup=60)
    fit(model, data, distillation_loss, schedule, lambda averaged, _: export_teacher(averaged, export))
