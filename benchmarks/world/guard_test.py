"""Does a score prefer the true texture to a wrong one of the same colours and shapes? No generator needed.

`python -m benchmarks.world.guard_test`: for each way to score a patch the area under the ROC curve, patch by patch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.world.heads import LAYERS, TILE, calibrated_heads, in_windows, source_features
from benchmarks.world.host import WEIGHTS
from benchmarks.world.scenes import EVALUATION_ATLAS, FACTOR, NO_LABEL, SIDE, Scene, repainted, scene, wrong_classes
from lib_dinotile import DinotileError
from lib_dinotile.condition.guard import GUARD_LAYER
from lib_dinotile.condition.heads import ByLayer, Heads
from lib_dinotile.dino.calibration import LAYERS as CALIBRATED_LAYERS
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.dino.head import load_heads
from lib_dinotile.settings import CALIBRATED

CONTEXTS = (0, 1, 2, 4)
"""Patches of the blurred canvas around a tile, at least, that are seen with it."""


@dataclass(frozen=True)
class Pair:
    """The truth and a picture that has, in every region, the texture of another class, of one source."""

    true: Scene
    wrong: Scene

    @property
    def known(self) -> np.ndarray:
        """(16, 16) bool: patches that have a label."""
        return (self.true.labels != NO_LABEL) & (self.wrong.labels != NO_LABEL)


def pairs(count: int, seed: int) -> Iterator[Pair]:
    """Fresh pairs; the same seed, the same."""
    for i in range(count):
        rng = np.random.default_rng((seed, i, 98))
        true = scene(rng, EVALUATION_ATLAS)
        yield Pair(true, repainted(rng, true, wrong_classes(rng, true), EVALUATION_ATLAS))


def auc(good: np.ndarray, bad: np.ndarray) -> float:
    """The probability that a value of `good` is above one of `bad` (Mann and Whitney)."""
    ranks = np.concatenate([good, bad]).argsort().argsort()
    return float((ranks[: len(good)].mean() - (len(good) - 1) / 2) / len(bad))


def tiles(pixels: Tensor) -> Tensor:
    """(3, SIDE, SIDE) -> (n, 3, TILE, TILE), rows first."""
    return pixels.unfold(1, TILE, TILE).unfold(2, TILE, TILE).permute(1, 2, 0, 3, 4).flatten(0, 1)


def _joined(features: Tensor) -> Tensor:
    """Features of tiles (n, D, h, w) -> those of the picture (D, H, W)."""
    across = SIDE // TILE
    return features.unflatten(0, (across, across)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def seen_alone(encoder: PatchEncoder, result: Tensor, layer: int) -> Tensor:
    """(D, 16, 16): every tile of the result by itself."""
    return _joined(encoder(tiles(result), layer))


def seen_whole(encoder: PatchEncoder, result: Tensor, layer: int) -> Tensor:
    """(D, 16, 16): the finished result as a whole."""
    return encoder(result[None], layer)[0]


def scores(features: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Features of a result and of its source (D, h, w) -> cosines (h, w), plain and without the source's mean."""
    mean = wanted.mean((1, 2), keepdim=True)
    return {
        "cosine": F.cosine_similarity(features, wanted, dim=0),
        "centred": F.cosine_similarity(features - mean, wanted - mean, dim=0),
    }


def of_world(heads: Heads, layers: Sequence[int]) -> ByLayer:
    """The heads of some layers for the world's sources and canvases."""
    return heads.of((SIDE // FACTOR, SIDE // FACTOR), (SIDE, SIDE), layers)


@torch.no_grad()
def guard_auc(encoder: PatchEncoder, heads: Heads, count: int, seed: int) -> float:
    """As the guard looks by default: layer, each tile in its window of the blurred canvas, through the head, cosine."""
    good, bad = [], []
    head = of_world(heads, [GUARD_LAYER])[GUARD_LAYER]
    for pair in pairs(count, seed):
        wanted = head(source_features(encoder, pair.true, GUARD_LAYER)[None])[0]
        for picture, values in ((pair.true, good), (pair.wrong, bad)):
            seen = in_windows(encoder, picture.sharp, pair.true.blurred, GUARD_LAYER)
            values.append(F.cosine_similarity(seen, wanted, dim=0).numpy()[pair.known])
    return auc(np.concatenate(good), np.concatenate(bad))


def measure(encoder: PatchEncoder, heads: Mapping[str, ByLayer], count: int, seed: int) -> dict[str, float]:
    """AUC by `layer / how the result is seen / which heads / score`. heads: by what to call them; `none` goes without.

    `relative` scores have that of the plain upscaled picture, seen the same way, taken off.
    """
    good: dict[str, list[np.ndarray]] = defaultdict(list)
    bad: dict[str, list[np.ndarray]] = defaultdict(list)
    for pair in pairs(count, seed):
        blurred = pair.true.blurred
        for layer in LAYERS:
            source = source_features(encoder, pair.true, layer)
            targets = {name: each[layer](source[None])[0] for name, each in heads.items() if layer in each}
            targets["none"] = source
            first, second = pair.true.sharp, pair.wrong.sharp
            ways = {
                "alone": [seen_alone(encoder, x, layer) for x in (first, second, blurred)],
                "whole": [seen_whole(encoder, x, layer) for x in (first, second, blurred)],
            }
            for context in CONTEXTS:
                seen = [in_windows(encoder, x, blurred, layer, context) for x in (first, second, blurred)]
                ways[f"context {context}"] = seen
            for way, seen in ways.items():
                for target, wanted in targets.items():
                    found = [scores(features, wanted) for features in seen]
                    for score in found[0]:
                        values = [each[score].numpy()[pair.known] for each in found]
                        name = f"layer {layer} / {way} / {target} / {score}"
                        good[name].append(values[0])
                        bad[name].append(values[1])
                        good[f"{name}, relative"].append(values[0] - values[2])
                        bad[f"{name}, relative"].append(values[1] - values[2])
    return {name: auc(np.concatenate(good[name]), np.concatenate(bad[name])) for name in good}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.world.guard_test", description=__doc__)
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--encoder", default="encoder", help="its folder in --weights")
    args = parser.parse_args()
    encoder = load_encoder(str(args.weights / args.encoder))
    heads = {CALIBRATED: of_world(calibrated_heads(encoder, args.weights), CALIBRATED_LAYERS)}
    with contextlib.suppress(DinotileError):  # trained heads are for one of the encoders
        heads["trained"] = load_heads(args.weights / "heads.safetensors", encoder.id, encoder.width)
    with torch.no_grad():
        found = measure(encoder, heads, args.scenes, args.seed)
    for name, value in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{value:.3f}  {name}")
    print(json.dumps({"auc": found}))


if __name__ == "__main__":
    main()
