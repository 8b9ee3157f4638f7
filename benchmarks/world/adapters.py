"""Adapters for the world's denoiser, trained by the program's own training: some seeds, and two that see the truth.

The truth: `onehot` reads the class of each cell, `sharp` what the encoder sees in the sharp picture. What these gain is
the most that better features could.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor

from benchmarks.world.heads import Scenes
from benchmarks.world.host import CROP, WorldHost
from benchmarks.world.scenes import PATCH, SIDE
from benchmarks.world.textures import CLASSES
from lib_dinotile.condition.adapter import Adapter
from lib_dinotile.condition.adapter_file import save_adapter
from lib_dinotile.condition.conditioner import to_tensor
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.engine.team import Team
from lib_dinotile.train.adapter import make_schedule, prepared_tiles, train_adapter
from lib_dinotile.train.options import Training
from lib_dinotile.train.pictures import Picture, Prepared

OPTIONS = Training(
    patches=SIDE // PATCH,
    denoise_low=0.5,
    denoise_high=0.9,
    restoration=0.8,
    drop_condition=0.05,
    width=64,
    steps=1000,
    batch=8,
    accumulate=1,
    rate=2e-3,
    warmup=50,
    report_every=100,
    save_every=2.0,
)
"""The rest as by default."""
SCENES, HELD_OUT = 400, 32
ONE_HOT, SHARP = "onehot", "sharp"
"""Adapters that see the truth."""
READS = ("source", ONE_HOT, SHARP)


class Truth(PatchEncoder):
    """Stands for the encoder where the one-hot class is the feature: only its name and width are asked for."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.id, self.width, self.depth, self.fingerprint = ONE_HOT, CLASSES, 1, ""


def one_hot_field(class_map: np.ndarray) -> Tensor:
    """(SIDE, SIDE) int64 -> (CLASSES, n, n) on a grid of half a patch."""
    middle = PATCH // 4
    cells = torch.from_numpy(class_map[middle :: PATCH // 2, middle :: PATCH // 2].copy())
    return F.one_hot(cells, CLASSES).permute(2, 0, 1).float()


def train_world_adapter(
    out: Path, export: Path, seed: int, reads: str = "source", steps: int | None = None, resume: bool = False
) -> None:
    """Train one adapter and write it to `export`/adapters. reads: `source`, or one of the truths."""
    options = replace(OPTIONS, seed=seed, **({"steps": steps} if steps else {}))
    host, seen = WorldHost(weights=export), load_encoder(str(export / "encoder"))
    plain = prepared_tiles(host, seen, options, CROP)
    pictures = Scenes(SCENES, 77), Scenes(HELD_OUT, 78)
    encoder, compute = _reading(reads, seen, plain, pictures)
    recipe = ["world", reads, seen.fingerprint, options.patches, options.layer]
    prepared = tuple(Prepared(each, compute, out / "cache", recipe) for each in pictures)
    for each in prepared:
        each.prepare(Team(), "scenes")
    target = export / "adapters"
    target.mkdir(exist_ok=True)
    name = str(seed) if reads == "source" else reads

    def save(adapter: Adapter, figures: dict[str, str]) -> None:
        save_adapter(adapter, target / f"{name}.safetensors", **{**figures, "seed": str(seed), "reads": reads})

    set_seed(seed)
    train_adapter(host, encoder, options, make_schedule(options, out / name, resume), prepared, CROP, save, samples=0)


def _reading(
    reads: str, encoder: PatchEncoder, plain: Callable[[Picture], dict[str, Tensor]], pictures: tuple[Scenes, Scenes]
) -> tuple[PatchEncoder, Callable[[Picture], dict[str, Tensor]]]:
    """(encoder, what is computed of a picture) with the features that the adapter is to read."""
    if reads == SHARP:

        def of_sharp(picture: Picture) -> dict[str, Tensor]:
            with torch.no_grad():
                return {**plain(picture), "features": encoder(to_tensor(picture.sharp)[None])[0]}

        return encoder, of_sharp
    if reads == ONE_HOT:

        def of_truth(picture: Picture) -> dict[str, Tensor]:
            return {**plain(picture), "features": one_hot_field(picture.truth)}

        return Truth(), of_truth
    return encoder, plain
