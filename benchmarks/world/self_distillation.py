"""The world's encoder trained without labels: self-distillation of masked and blurred patches.

DINO (arXiv 2104.14294) on the class token and iBOT (2111.07832) on the patch tokens, with Sinkhorn-Knopp as in DINOv2
(2304.07193). The teacher sees sharp pictures; the student sees windows of them in which patches are masked, blurred as
the source is, faint, or noisy, and has to say of each patch what the teacher says. A teacher that has learned nothing
sees no texture, so the student begins by naming the nearest of a codebook of histograms of oriented gradients: the
descriptor of MaskFeat (2112.09133), in a vocabulary as BEiT's (2106.08254).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.35
MOMENTUM = (0.98, 0.999)
"""Of the teacher, at the first and the last step."""
WARMUP = (0.5, 0.56)
"""Shares of the steps: up to the first the targets are from the codebook, from the second on the teacher's."""
DEGRADED = (0.1, 0.2)
"""Shares of the steps: up to the first the student sees small sharp windows only, from the second on all else, too."""
ORIENTATIONS, CELL = 9, 8
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
        """Pixels (n, 3, H, W) in 0..1, masked patches (n, L) bool -> tokens (n, 1 + L, D) and cosines of both heads."""
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


@dataclass(frozen=True)
class View:
    """What the student sees of a batch of pictures: a window."""

    pixels: Tensor
    """(n, 3, H, W) in 0..1."""

    masked: Tensor
    """(n, L) bool."""

    sharp: Tensor
    """The same window of the sharp pictures."""

    rows: slice
    columns: slice
    """The nearest of the teacher's patches."""


class SelfDistillation(nn.Module):
    """The student and the teacher; both are in a checkpoint."""

    def __init__(self, steps: int, codebook: Tensor) -> None:
        """codebook: (PROTOTYPES, F) histograms."""
        super().__init__()
        self.steps = steps
        self.register_buffer("codebook", codebook)
        self.student = Branch()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def progress(self, stage: tuple[float, float]) -> float:
        """0 before a stage of the training, which is given in shares of the steps, 1 after it."""
        first, last = stage
        return min(max((self.step.item() / self.steps - first) / (last - first), 0.0), 1.0)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the teacher towards the student, as it is after the last step."""
        first, last = MOMENTUM
        momentum = last - (last - first) * (1 + math.cos(math.pi * self.progress((0.0, 1.0)))) / 2
        for mine, other in zip(self.teacher.parameters(), self.student.parameters()):
            mine.lerp_(other, 1 - momentum)
        self.step += 1

    @torch.no_grad()
    def targets(self, pixels: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
        """What the teacher says of pictures (n, PROTOTYPES), of their patches (n, h, w, PROTOTYPES); how varied it is.

        Patches are centred for each place in the picture: else a prototype could come to mean a place.
        """
        side = pixels.shape[-1] // PATCH
        tokens, classes, patches = self.teacher(pixels, torch.zeros(len(pixels), side**2, dtype=torch.bool))
        whole, parts = _standardised(classes).softmax(-1), sinkhorn(_standardised(patches).flatten(0, 1))
        figures = {
            "rank": effective_rank(tokens[:, 1:].flatten(0, 1)),
            "deviation": tokens[:, 1:].flatten(0, 1).float().std(0).mean().item(),
            "sure": _entropy(parts).mean().exp().item(),
        }
        return whole, parts.unflatten(0, (len(pixels), side, side)), figures

    def forward(self, whole: Tensor, views: Sequence[View]) -> tuple[Tensor, dict[str, float]]:
        """The teacher's pictures and the student's views of them -> loss, figures."""
        share = self.progress(WARMUP)
        self.follow()
        if share > 0:
            class_target, patch_target, figures = self.targets(whole)
        else:
            figures = {}
        losses = dict.fromkeys(("class", "patch", "code"), torch.zeros(()))
        for view in views:
            _, classes, patches = self.student(view.pixels, view.masked)
            if share > 0:
                wanted = patch_target[:, view.rows, view.columns].flatten(1, 2)
                losses["class"] = losses["class"] + _cross_entropy(classes, class_target) / len(views)
                losses["patch"] = losses["patch"] + _cross_entropy(patches, wanted) / len(views)
            if share < 1:
                codes = torch.cdist(histograms(view.sharp), self.codebook).argmin(-1)
                wanted = F.one_hot(codes, PROTOTYPES).float()
                losses["code"] = losses["code"] + _cross_entropy(patches, wanted) / len(views)
        distilled = losses["patch"] + CLASS_WEIGHT * losses["class"]
        figures |= {name: loss.item() for name, loss in losses.items()}
        return share * distilled + (1 - share) * losses["code"], figures


def _standardised(cosines: Tensor) -> Tensor:
    """Of a batch (n, ..., k): what is common to all n is taken off, and the rest brought to the teacher's sharpness."""
    centred = cosines - cosines.mean(0, keepdim=True)
    return centred / (centred.std() * TEACHER_TEMPERATURE)


def _cross_entropy(cosines: Tensor, target: Tensor) -> Tensor:
    return -(target * (cosines / STUDENT_TEMPERATURE).log_softmax(-1)).sum(-1).mean()


def _between(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _integers(generator: torch.Generator, low: int, high: int, count: int = 1) -> Any:
    """A number from `low` to `high`, or a list of some."""
    found = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return found[0] if count == 1 else found


def _window(first: Sequence[int], side: int) -> tuple[Any, ...]:
    """The part of pictures (n, 3, H, W) that begins at pixel (y, x) and is `side` patches large."""
    return (..., *(slice(start, start + side * PATCH) for start in first))


def histograms(pixels: Tensor) -> Tensor:
    """Histograms of oriented gradients (n, L, ORIENTATIONS * cells of a patch) of (n, 3, H, W), of length 1 each."""
    grey = F.pad(pixels.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across, down = (
        (grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2])[:, 0],
        (grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1])[:, 0],
    )
    which = (torch.atan2(down, across) % math.pi * (ORIENTATIONS / math.pi)).long().clamp(max=ORIENTATIONS - 1)
    strength = F.one_hot(which, ORIENTATIONS).permute(0, 3, 1, 2) * torch.hypot(across, down)[:, None]
    cells = F.pixel_unshuffle(F.avg_pool2d(strength, CELL), PATCH // CELL)
    return F.normalize(cells.flatten(2).transpose(1, 2), dim=-1)


def recoloured(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """(n, 3, H, W), each with another hue, saturation, contrast and light: what tells patches apart is their shapes."""
    n = len(pixels)
    grey = pixels.mean(1, keepdim=True)
    angle = _between(generator, -math.pi, math.pi, n, 1, 1)
    offset = torch.arange(3) * (2 * math.pi / 3)
    turn = 2 / 3 * torch.cos(angle + offset[:, None] - offset)  # of the plane of colours about the grey axis
    colour = torch.einsum("nij,njhw->nihw", turn * _between(generator, 0.0, 1.4, n, 1, 1), pixels - grey)
    contrast = _between(generator, 0.75, 1.25, n, 1, 1, 1)
    light = F.interpolate(_between(generator, -0.25, 0.25, n, 3, 3, 3), pixels.shape[2:], mode="bicubic")
    return 0.5 + contrast * (grey - 0.5) + colour + light


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
    n, degraded = len(pixels), getattr(model, "module", model).progress(DEGRADED)
    repainted = torch.rand(n, generator=generator) < 0.2
    sharp = torch.where(repainted[:, None, None, None], pixels[:, 2], pixels[:, 1])
    blurred = torch.where(repainted[:, None, None, None], pixels[:, 2], pixels[:, 0])  # it is not of the repainted ones
    unlabelled = torch.zeros(n, 3, GRID, GRID, dtype=torch.int64)
    seen = mixed(torch.stack([blurred, sharp, sharp], 1), unlabelled, generator)[0]
    seen = torch.where(torch.rand(n, 1, 1, 1, generator=generator) < 0.5, blurred, seen)
    plain = torch.rand(n, generator=generator) >= degraded
    seen = torch.where(plain[:, None, None, None], sharp, seen)
    if torch.rand((), generator=generator) < 0.5 * degraded:
        count = GRID
    else:
        count = _integers(generator, 6, 12 if degraded else 8)
    whole = _window(_integers(generator, 0, (GRID - count) * PATCH, 2), count)
    sharp, seen, views = sharp[whole], seen[whole], []
    for side in (_integers(generator, count // 2 + 1, count - 1), _integers(generator, 4, count // 2 + 1)):
        top, left = _integers(generator, 0, (count - side) * PATCH, 2)
        row, column = round(top / PATCH), round(left / PATCH)
        part = _window((top, left), side)
        pixels, masked = recoloured(seen[part], generator).contiguous(), blocks(n, side, generator) & ~plain[:, None]
        views.append(View(pixels, masked, sharp[part], slice(row, row + side), slice(column, column + side)))
    return model(recoloured(sharp, generator).contiguous(), views)


def export_teacher(model: SelfDistillation, folder: Path) -> None:
    """Half-precision Dinov2Model folder: the teacher, as in DINO."""
    copy.deepcopy(model.teacher.encoder).half().save_pretrained(folder / FOLDER)


def histogram_codebook(data: Paintings, pictures: int = 40) -> Tensor:
    """(PROTOTYPES, F): centres that k-means finds among the patches of sharp pictures."""
    from sklearn.cluster import KMeans

    found = histograms(torch.stack([data[i][0][1] for i in range(pictures)])).flatten(0, 1)
    return torch.from_numpy(KMeans(PROTOTYPES, n_init=1, random_state=0).fit(found.numpy()).cluster_centers_)


def train_unlabelled_encoder(schedule: Schedule, export: Path) -> None:
    """Train it and write it at every checkpoint."""
    data = Paintings(schedule.seed, length=1200)
    model = SelfDistillation(schedule.schedule_steps or schedule.steps, histogram_codebook(data))
    schedule = replace(schedule, warmup=60)
    fit(model, data, distillation_loss, schedule, lambda averaged, _: export_teacher(averaged, export))
