"""The world's scenes as pictures to train on, for the program's own training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.world.host import as_image
from benchmarks.world.scenes import TRAIN_ATLAS, scene
from lib_dinotile.train.pictures import Picture


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
