"""Does a score prefer the true texture to a wrong one of the same colours and shapes? No generator needed.

`python -m benchmarks.world.guard`: for each way to score a patch the area under the ROC curve, patch by patch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.arms import auc
from benchmarks.world.heads import LAYERS, TILES, calibrated_heads, in_windows, source_features
from benchmarks.world.host import WEIGHTS
from benchmarks.world.scenes import (
    EVALUATION_ATLAS,
    FACTOR,
    NO_LABEL,
    PATCH,
    SIDE,
    Scene,
    repainted,
    scene,
    wrong_classes,
)
from lib_dinotile import DinotileError
from lib_dinotile.condition.guard import GUARD_LAYER
from lib_dinotile.condition.heads import ByLayer, Heads
from lib_dinotile.dino.calibration import LAYERS as CALIBRATED_LAYERS
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.dino.head import load_heads
from lib_dinotile.settings import CALIBRATED

CONTEXTS = (0, 1, 2, 4)
"""Patches of the blurred canvas around a tile, at least, that are seen with it."""
Scores = Mapping[str, list[np.ndarray]]


def pairs(count: int, seed: int) -> Iterator[tuple[Scene, Scene, np.ndarray]]:
    """Fresh ones: the truth, the same with the texture of another class in every region, and the patches that have a
    label in both, (16, 16) bool."""
    for i in range(count):
        rng = np.random.default_rng((seed, i, 98))
        true = scene(rng, EVALUATION_ATLAS)
        wrong = repainted(rng, true, wrong_classes(rng, true), EVALUATION_ATLAS)
        yield true, wrong, (true.labels != NO_LABEL) & (wrong.labels != NO_LABEL)


def seen_alone(encoder: PatchEncoder, result: Tensor, layer: int) -> Tensor:
    """(D, 16, 16): every tile of the result by itself."""
    features = result.new_empty(encoder.width, SIDE // PATCH, SIDE // PATCH)
    for tile in TILES:
        seen = encoder(result[(slice(None), *tile.slices)][None], layer)[0]
        features[(slice(None), *tile.shrink(PATCH).slices)] = seen
    return features


def scores(features: Tensor, wanted: Tensor) -> dict[str, np.ndarray]:
    """Features of a result and of its source (D, h, w) -> cosines (h, w), plain and without the source's mean."""
    mean = wanted.mean((1, 2), keepdim=True)
    return {
        "cosine": F.cosine_similarity(features, wanted, dim=0).numpy(),
        "centred": F.cosine_similarity(features - mean, wanted - mean, dim=0).numpy(),
    }


def of_world(heads: Heads, layers: tuple[int, ...]) -> ByLayer:
    """The heads of some layers for the world's sources and canvases."""
    return heads.of((SIDE // FACTOR, SIDE // FACTOR), (SIDE, SIDE), layers)


@torch.no_grad()
def guard_auc(encoder: PatchEncoder, heads: Heads, count: int, seed: int) -> float:
    """As the guard looks by default: layer, each tile in its window of the blurred canvas, through the head, cosine."""
    head, found = of_world(heads, (GUARD_LAYER,))[GUARD_LAYER], ([], [])
    for *pictures, known in pairs(count, seed):
        wanted = head(source_features(encoder, pictures[0], GUARD_LAYER)[None])[0]
        for picture, values in zip(pictures, found):
            seen = in_windows(encoder, picture.sharp, picture.blurred, GUARD_LAYER)
            values.append(scores(seen, wanted)["cosine"][known])
    return auc(*found)


def measure(encoder: PatchEncoder, heads: Mapping[str, ByLayer], count: int, seed: int) -> dict[str, float]:
    """AUC by `layer / how the result is seen / which heads / score`. heads: by what to call them; `none` goes without.

    `relative` scores have that of the plain upscaled picture, seen the same way, taken off.
    """
    good: Scores = defaultdict(list)
    bad: Scores = defaultdict(list)
    for true, wrong, known in pairs(count, seed):
        pictures = (true.sharp, wrong.sharp, true.blurred)
        for layer in LAYERS:
            source = source_features(encoder, true, layer)
            targets = {name: each[layer](source[None])[0] for name, each in heads.items() if layer in each}
            ways = {
                "alone": [seen_alone(encoder, x, layer) for x in pictures],
                "whole": [encoder(x[None], layer)[0] for x in pictures],
            }
            for context in CONTEXTS:
                ways[f"context {context}"] = [in_windows(encoder, x, true.blurred, layer, context) for x in pictures]
            for way, seen in ways.items():
                for target, wanted in {**targets, "none": source}.items():
                    found = [scores(features, wanted) for features in seen]
                    for score in found[0]:
                        first, second, plain = (each[score][known] for each in found)
                        name = f"layer {layer} / {way} / {target} / {score}"
                        good[name].append(first)
                        bad[name].append(second)
                        good[f"{name}, relative"].append(first - plain)
                        bad[f"{name}, relative"].append(second - plain)
    return {name: auc(good[name], bad[name]) for name in good}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.world.guard", description=__doc__)
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoder", default="encoder", help="its folder in benchmarks/world/weights")
    args = parser.parse_args()
    encoder = load_encoder(str(WEIGHTS / args.encoder))
    heads = {CALIBRATED: of_world(calibrated_heads(encoder), CALIBRATED_LAYERS)}
    with contextlib.suppress(DinotileError):  # trained heads are for one of the encoders
        heads["trained"] = load_heads(WEIGHTS / "heads.safetensors", encoder.id, encoder.width)
    with torch.no_grad():
        found = measure(encoder, heads, args.scenes, args.seed)
    for name, value in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{value:.3f}  {name}")
    print(json.dumps({"auc": found}))


if __name__ == "__main__":
    main()
