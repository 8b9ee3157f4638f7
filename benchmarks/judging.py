"""The closed world's models for benchmarks/semantics.py, and its judges' verdicts on a result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks import arms
from benchmarks.world import WEIGHTS
from benchmarks.world.host import GENERATION, SETTINGS, WorldHost
from benchmarks.world.judges import GARBAGE, NONE, Judge, SpectralJudge
from benchmarks.world.scenes import NO_LABEL, SIDE, TRAIN_ATLAS, Scene, as_image, evaluation_scenes, scene
from benchmarks.world.textures import CLASSES, TEXTURES
from lib_dinotile.condition.conditioner import Conditioner, to_tensor
from lib_dinotile.condition.guard import GUARD_LAYER
from lib_dinotile.condition.heads import FixedHeads, Heads, heads_for
from lib_dinotile.dino.calibrated import Store
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.dino.head import load_heads
from lib_dinotile.lines import LETTERS
from lib_dinotile.settings import CALIBRATED, Generation

QUICK = replace(GENERATION, steps=10)
"""Half as many steps: faster, and less time to be steered in."""
TUNE_SEED, REPORT_SEED = 11, 23
CALIBRATION_PICTURES, CALIBRATION_SEED = 48, 41
LABELLED = "encoder"
"""The encoder that the adapters, trained heads and the probe are for."""


def calibrated_heads(encoder: PatchEncoder, folder: Path = WEIGHTS / "calibrated") -> Heads:
    """dinotile's default ones. If they are not in the folder they are made, in a minute, by dinotile's own calibration,
    but on sharp pictures of the world instead of photographs."""
    store, layers = Store(folder), (GUARD_LAYER, -SETTINGS.layer)
    if store.find(encoder, SETTINGS.scale, layers) is None:
        seeds = ((CALIBRATION_SEED, number, 15) for number in range(CALIBRATION_PICTURES))
        pictures = [as_image(scene(np.random.default_rng(seed), TRAIN_ATLAS).sharp) for seed in seeds]
        store.make(encoder, SETTINGS.scale, layers, pictures)
    return heads_for(SETTINGS, encoder, {}, None, store)


class World:
    """The closed world's models."""

    def __init__(self, generation: Generation = GENERATION, encoder: str = LABELLED) -> None:
        """encoder: its folder in `WEIGHTS`. DinotileError if it is not there."""
        self.generation, self.encoder = generation, load_encoder(str(WEIGHTS / encoder))
        self.heads: dict[str, Heads] = {CALIBRATED: calibrated_heads(self.encoder)}
        if encoder == LABELLED:
            trained = load_heads(WEIGHTS / "heads.safetensors", self.encoder.id, self.encoder.width)
            self.heads[arms.TRAINED] = FixedHeads(trained, arms.TRAINED)
        self.upscaler = arms.Upscaler(WorldHost(generation), self.encoder, SETTINGS, self.heads)
        self.judge, self.spectral = Judge(), SpectralJudge()

    def painted(
        self,
        arm: arms.Arm,
        made: Scene,
        other: Scene,
        seed: int,
        reader: arms.Reader | None = None,
        told: Scene | None = None,
    ) -> Tensor:
        """A picture upscaled in that way, (3, SIDE, SIDE) in 0..1; told: what its regions are called, see `told`."""
        names = [] if told is None else [list(TEXTURES)[label] for label in told.classes]
        words = "\n".join(f"{letter}: {name}" for letter, name in zip(LETTERS, names))
        result = self.upscaler.upscale(arm, as_image(made.source), seed, as_image(other.source), reader, words)
        return to_tensor(result.image)

    def told(self, made: Scene, how: str) -> Scene:
        """The picture as its regions, found in the source, would be if they were what they are called.

        how: one of the arms' ways to name them.
        """
        found = Conditioner(SETTINGS, self.encoder).regions(as_image(made.source), (SIDE, SIDE)).labels
        regions = np.kron(found.numpy(), np.ones([SIDE // side for side in found.shape], np.int64))
        counts = [np.bincount(made.class_map[regions == each], minlength=CLASSES) for each in range(regions.max() + 1)]
        classes = np.array([count.argmax() for count in counts])
        if how == arms.WHOLE:
            classes[:] = sum(counts).argmax()
        if how == arms.MISNAMED:
            known = np.unique(classes)
            others = np.roll(known, 1) if len(known) > 1 else (known + 1) % CLASSES
            classes = others[np.searchsorted(known, classes)]
        return replace(made, classes=classes, regions=regions)

    def judged(self, pixels: Tensor, made: Scene, other: Scene, control: bool) -> dict[str, float]:
        """The judges' verdicts on a result, as shares of its labelled patches.

        control: it was made with the features of the other image, or with the names of what that shows; where both show
        the same, that is no control, and those patches do not count.
        """
        known = made.labels != NO_LABEL
        first, second = self.judge.verdict(pixels), self.spectral.verdict(pixels)
        strange = known & (other.labels != NO_LABEL) & (other.labels != made.labels)
        counted = strange if control else known
        return {
            "rate": float((first != made.labels)[counted].mean()),
            "all": float((first != made.labels)[known].mean()),
            "spectral": float((second != made.labels)[counted].mean()),
            "blank": float((first == NONE)[known].mean()),
            "garbage": float((first == GARBAGE)[known].mean()),
            "followed": float((first == other.labels)[strange].mean()),
        }


def scene_pairs(count: int, seed: int) -> list[tuple[Scene, Scene]]:
    """Fresh pictures, each with another whose features the controls take."""
    scenes = list(evaluation_scenes(count, seed))
    others = [*evaluation_scenes(1, seed + 1)] if count == 1 else [scenes[-1], *scenes[:-1]]
    return list(zip(scenes, others))
