"""Is the world one that a measurement can rely on? On pictures, an atlas and seeds that nothing was trained on."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch

from benchmarks.judging import LABELLED, World
from benchmarks.world import WEIGHTS
from benchmarks.world.guard import source_features
from benchmarks.world.host import SETTINGS, WorldHost
from benchmarks.world.judges import NONE, WindowClassifier, read_tensors, windows
from benchmarks.world.scenes import NO_LABEL, as_image, evaluation_scenes
from lib_dinotile import DinotileError
from lib_dinotile.condition.conditioner import to_tensor
from lib_dinotile.dino.encoder import load_encoder
from lib_dinotile.engine.flow import upscale
from lib_dinotile.tiling.noise import NoiseField

AT_MOST, AT_LEAST = "at most", "at least"
GATES = {
    "probe": (AT_LEAST, 0.85),
    "window": (AT_MOST, 0.65),
    "judge_true": (AT_LEAST, 0.99),
    "judge_blurred": (AT_LEAST, 0.99),
    "spectral_true": (AT_LEAST, 0.90),
    "told_rate": (AT_MOST, 0.10),
    "agreement": (AT_LEAST, 0.7),
}
"""Name of the figure -> on which side of what value it has to be.

agreement: rank correlation of the two judges over the arms. It is not 1: one knows garbage, the other calls it some
texture, by chance the right one; so they differ on whether a blurred patch is worse than garbage."""


def within(value: float, side: str, limit: float) -> bool:
    return value <= limit if side == AT_MOST else value >= limit


def check(figures: dict[str, float]) -> None:
    """Print the figures. DinotileError if one is on the wrong side of its gate."""
    for name, value in figures.items():
        side, limit = GATES[name]
        print(f"gate {name:15} {value:.3f}  ({side} {limit})")
    if not all(within(value, *GATES[name]) for name, value in figures.items()):
        raise DinotileError("invalid: a gate does not hold, so rates would mean nothing")


def cheap_gates(world: World, count: int, seed: int) -> dict[str, float]:
    """Shares of the labelled patches of `count` pictures that are named right."""
    encoder, classifier = load_encoder(str(WEIGHTS / LABELLED)), WindowClassifier()
    probe = read_tensors("probe")
    right: dict[str, list[np.ndarray]] = defaultdict(list)
    for made in evaluation_scenes(count, seed):
        known = made.labels != NO_LABEL
        labels = made.labels[known]
        scores = torch.einsum("kd,dhw->khw", probe["weight"], source_features(encoder, made))
        right["probe"].append((scores + probe["bias"][:, None, None]).argmax(0).numpy()[known] == labels)
        seen, wanted = windows(made)
        right["window"].append((classifier(seen).argmax(1) == wanted).numpy())
        right["judge_true"].append(world.judge.verdict(made.sharp)[known] == labels)
        right["judge_blurred"].append(world.judge.verdict(made.blurred).flatten() == NONE)
        right["spectral_true"].append(world.spectral.verdict(made.sharp)[known] == labels)
    return {name: float(np.concatenate(values).mean()) for name, values in right.items()}


def told_rate(world: World, count: int, seed: int) -> float:
    """Share of the labelled patches judged wrong where the model is told the class of each pixel, and no DINO looks."""
    wrong = []
    for number, made in enumerate(evaluation_scenes(count, seed)):
        host = WorldHost(world.generation, made.class_map)
        result = upscale(host, as_image(made.source), SETTINGS, NoiseField(seed * 1000 + number, host.channels))
        wrong.append((world.judge.verdict(to_tensor(result.image)) != made.labels)[made.labels != NO_LABEL])
    return float(np.concatenate(wrong).mean())
