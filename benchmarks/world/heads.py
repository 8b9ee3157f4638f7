"""The restoration heads of the world's encoders, the probe that reads classes from its features, and their pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.world.host import SETTINGS, WEIGHTS, as_image
from benchmarks.world.scenes import PATCH, SIDE, TRAIN_ATLAS, Scene, scene
from lib_dinotile import DinotileError
from lib_dinotile.condition.guard import GUARD_LAYER
from lib_dinotile.condition.heads import Heads, heads_for
from lib_dinotile.dino.calibrated import Store
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.dino.field import FeatureField, feature_field
from lib_dinotile.dino.tile_features import CONTEXT, TileFeatures
from lib_dinotile.tiling.plan import Rect
from lib_dinotile.train.pictures import Picture

CALIBRATION_PICTURES, CALIBRATION_SEED = 48, 41

TILE = 64
"""Side of what is judged at once, in px."""
TILES = [Rect(x, y, TILE, TILE) for y in range(0, SIDE, TILE) for x in range(0, SIDE, TILE)]


@dataclass(frozen=True)
class KnownPicture(Picture):
    """A picture whose truth is known."""

    truth: np.ndarray | None = None
    """(SIDE, SIDE) int64: the class of each pixel."""


class Scenes:
    """So many scenes of a seed; `Pictures` of lib_dinotile.train."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed

    def __len__(self) -> int:
        return self._count

    def key(self, index: int) -> Any:
        return ["scene", self._seed, index]

    def __getitem__(self, index: int) -> KnownPicture:
        made = scene(np.random.default_rng((self._seed, index, 15)), TRAIN_ATLAS)
        return KnownPicture(as_image(made.sharp), as_image(made.source), truth=made.class_map)


def source_features(encoder: PatchEncoder, made: Scene, layer: int = -1) -> Tensor:
    """(D, 16, 16) of the source as dinotile sees it: the whole at once, one patch for each of the canvas."""
    return feature_field(encoder, made.source, (SIDE, SIDE), patches=SIDE // PATCH, layer=layer).features


def in_windows(
    encoder: PatchEncoder, result: Tensor, blurred: Tensor, layer: int = -1, context: int = CONTEXT
) -> Tensor:
    """(D, 16, 16) of a result (3, SIDE, SIDE): each tile as the guard sees it, in a window of the blurred canvas.

    context: patches around a tile, at least.
    """
    field = FeatureField(result.new_zeros(1, SIDE // PATCH, SIDE // PATCH), (SIDE, SIDE))
    tile_features = TileFeatures(encoder, field, (SIDE, SIDE), layer, context=context)
    pixels = torch.stack([result[(slice(None), *tile.slices)] for tile in TILES])
    windows = tile_features.windows(lambda area: blurred[(slice(None), *area.slices)], TILES, pixels)
    features = result.new_empty(encoder.width, SIDE // PATCH, SIDE // PATCH)
    for tile, seen in zip(TILES, tile_features.features(windows, tile_features.grid(tile_features.window(TILES[0])))):
        features[(slice(None), *tile.shrink(PATCH).slices)] = seen[(slice(None), *tile_features.own(tile))]
    return features


def calibrated_heads(encoder: PatchEncoder, weights: Path = WEIGHTS) -> Heads:
    """As the product takes them by default; DinotileError if they are not there: it would calibrate on photographs."""
    store = Store(weights / "calibrated")
    if store.find(encoder, SETTINGS.scale, (GUARD_LAYER, -SETTINGS.layer)) is None:
        raise DinotileError(
            f"{encoder.id} is not calibrated: python -m benchmarks.world.train calibrated --encoder {encoder.id}"
        )
    return heads_for(SETTINGS, encoder, {}, None, store)


def calibrate_heads(export: Path, encoder: str) -> None:
    """By the product's own calibration, on the sharp pictures alone; no labels are used."""
    scenes = Scenes(CALIBRATION_PICTURES, CALIBRATION_SEED)
    pictures = [scenes[number].sharp for number in range(len(scenes))]
    store = Store(export / "calibrated")
    store.make(load_encoder(str(export / encoder)), SETTINGS.scale, (GUARD_LAYER, -SETTINGS.layer), pictures)
    print(*store.notes, sep="\n")


def probed(features: Tensor, weights: Path) -> np.ndarray:
    """Features of the last layer (D, h, w) -> the class that the probe names, (h, w) int64."""
    probe = load_file(weights / "probe.safetensors")
    return (
        torch.einsum("kd,dhw->khw", probe["weight"].float(), features)
        .add_(probe["bias"].float()[:, None, None])
        .argmax(0)
        .numpy()
    )
