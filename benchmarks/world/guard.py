"""Does the guard's score prefer the true texture to a wrong one of the same colours and shapes? No generator needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.world.host import SETTINGS
from benchmarks.world.scenes import FACTOR, NO_LABEL, PATCH, SIDE, Scene, repainted, scene, wrong_classes
from lib_dinotile.condition.guard import GUARD_LAYER
from lib_dinotile.condition.heads import Heads
from lib_dinotile.dino.encoder import PatchEncoder
from lib_dinotile.dino.field import FeatureField, feature_field
from lib_dinotile.dino.tile_features import TileFeatures
from lib_dinotile.tiling.plan import TilePlan


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


def pairs(count: int, seed: int) -> Iterator[tuple[Scene, Scene]]:
    """Fresh ones: the truth, and the same with the texture of another class in every region."""
    for number in range(count):
        rng = np.random.default_rng((seed, number, 98))
        true = scene(rng)
        yield true, repainted(rng, true, wrong_classes(rng, true))


@torch.no_grad()
def guard_auc(encoder: PatchEncoder, heads: Heads, count: int, seed: int) -> float:
    """As the guard looks by default: layer, each tile in its window of the blurred canvas, through the head, cosine."""
    sizes = (SIDE // FACTOR, SIDE // FACTOR), (SIDE, SIDE)
    head = heads.of(*sizes, (GUARD_LAYER,))[GUARD_LAYER]
    cosines: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for pair in pairs(count, seed):
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
