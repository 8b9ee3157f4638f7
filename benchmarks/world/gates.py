"""Is the world one that a measurement can rely on, and does the guard prefer the true textures in it?

On pictures, an atlas and seeds that nothing was trained on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.judging import LABELLED, World
from benchmarks.world import WEIGHTS
from benchmarks.world.host import SETTINGS, WorldHost
from benchmarks.world.judges import NONE, WindowClassifier, read_tensors, windows
from benchmarks.world.scenes import FACTOR, NO_LABEL, PATCH, SIDE, Scene, as_image, evaluation_scenes, repainted_scenes
from lib_dinotile import DinotileError
from lib_dinotile.condition.conditioner import to_tensor
from lib_dinotile.condition.guard import GUARD_LAYER
from lib_dinotile.condition.heads import Heads
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.dino.field import FeatureField, feature_field
from lib_dinotile.dino.tile_features import TileFeatures
from lib_dinotile.engine.flow import upscale
from lib_dinotile.tiling.noise import NoiseField
from lib_dinotile.tiling.plan import TilePlan

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


def source_features(encoder: PatchEncoder, made: Scene, layer: int = -1) -> Tensor:
    """(D, 16, 16) of the source as dinotile sees it: the whole at once, one patch for each of the canvas."""
    return feature_field(encoder, made.source, (SIDE, SIDE), patches=SIDE // PATCH, layer=layer).features


def in_windows(encoder: PatchEncoder, made: Scene, layer: int) -> Tensor:
    """(D, 16, 16) of the sharp picture: each tile as the guard sees it, in a window of the blurred one."""
    field = FeatureField(torch.zeros(1, SIDE // PATCH, SIDE // PATCH), (SIDE, SIDE))
    tile_features = TileFeatures(encoder, field, (SIDE, SIDE), layer)
    tiles = TilePlan(SIDE, SIDE, SETTINGS.tile, SETTINGS.overlap, FACTOR).tiles
    pixels = torch.stack([made.sharp[(slice(None), *tile.slices)] for tile in tiles])
    windows = tile_features.windows(lambda area: made.blurred[(slice(None), *area.slices)], tiles, pixels)
    features = torch.empty(encoder.width, SIDE // PATCH, SIDE // PATCH)
    for tile, seen in zip(tiles, tile_features.features(windows, tile_features.grid(tile_features.window(tiles[0])))):
        features[(slice(None), *tile.shrink(PATCH).slices)] = seen[(slice(None), *tile_features.own(tile))]
    return features


@torch.no_grad()
def guard_auc(encoder: PatchEncoder, heads: Heads, count: int, seed: int) -> float:
    """Does the guard's score prefer the true texture to a wrong one of the same colours and shapes?

    As the guard looks by default: layer, each tile in its window of the blurred canvas, through the head, cosine.
    """
    sizes = (SIDE // FACTOR, SIDE // FACTOR), (SIDE, SIDE)
    head = heads.of(*sizes, (GUARD_LAYER,))[GUARD_LAYER]
    cosines: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for pair in repainted_scenes(count, seed):
        known = np.logical_and(*(made.labels != NO_LABEL for made in pair))
        wanted = head(source_features(encoder, pair[0], GUARD_LAYER)[None])[0]
        for made, values in zip(pair, cosines):
            seen = in_windows(encoder, made, GUARD_LAYER)
            values.append(F.cosine_similarity(seen, wanted, dim=0).numpy()[known])
    return auc(*cosines)


def auc(good: Sequence[np.ndarray], bad: Sequence[np.ndarray]) -> float:
    """Area under the ROC curve: the probability that a value of `good` is above one of `bad`."""
    from sklearn.metrics import roc_auc_score

    right, wrong = np.concatenate(good), np.concatenate(bad)
    return float(roc_auc_score(np.r_[np.ones(len(right)), np.zeros(len(wrong))], np.r_[right, wrong]))
