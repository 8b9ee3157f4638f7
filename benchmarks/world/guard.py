"""Does the guard's score prefer the true texture to a wrong one of the same colours and shapes? No generator needed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.arms import auc
from benchmarks.world.heads import in_windows, source_features
from benchmarks.world.scenes import EVALUATION_ATLAS, FACTOR, NO_LABEL, SIDE, Scene, repainted, scene, wrong_classes
from lib_dinotile.condition.guard import GUARD_LAYER
from lib_dinotile.condition.heads import Heads
from lib_dinotile.dino.encoder import PatchEncoder


def pairs(count: int, seed: int) -> Iterator[tuple[Scene, Scene, np.ndarray]]:
    """Fresh ones: the truth, the same with the texture of another class in every region, and the patches that have a
    label in both, (16, 16) bool."""
    for i in range(count):
        rng = np.random.default_rng((seed, i, 98))
        true = scene(rng, EVALUATION_ATLAS)
        wrong = repainted(rng, true, wrong_classes(rng, true), EVALUATION_ATLAS)
        yield true, wrong, (true.labels != NO_LABEL) & (wrong.labels != NO_LABEL)


@torch.no_grad()
def guard_auc(encoder: PatchEncoder, heads: Heads, count: int, seed: int) -> float:
    """As the guard looks by default: layer, each tile in its window of the blurred canvas, through the head, cosine."""
    sizes = (SIDE // FACTOR, SIDE // FACTOR), (SIDE, SIDE)
    head, found = heads.of(*sizes, (GUARD_LAYER,))[GUARD_LAYER], ([], [])
    for *pictures, known in pairs(count, seed):
        wanted = head(source_features(encoder, pictures[0], GUARD_LAYER)[None])[0]
        for picture, values in zip(pictures, found):
            seen = in_windows(encoder, picture.sharp, picture.blurred, GUARD_LAYER)
            values.append(F.cosine_similarity(seen, wanted, dim=0).numpy()[known])
    return auc(*found)
