"""The closed world's models for benchmarks/semantics.py, and its judges' verdicts on a result."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau
from torch import Tensor

from benchmarks.arms import OTHER, PLAIN, Arms, Reader, interval, ratio_interval, to_pixels
from benchmarks.world import gates
from benchmarks.world.heads import calibrated_heads
from benchmarks.world.host import GENERATION, SETTINGS, WEIGHTS, WorldHost, as_image
from benchmarks.world.judges import GARBAGE, NONE, Judge, SpectralJudge
from benchmarks.world.scenes import NO_LABEL, Scene
from lib_dinotile.condition.heads import FixedHeads, Heads
from lib_dinotile.dino.encoder import load_encoder
from lib_dinotile.dino.head import load_heads
from lib_dinotile.settings import CALIBRATED, Generation, Settings

QUICK = replace(GENERATION, steps=10)
"""Half as many steps: faster, and less time to be steered in."""
TUNE_SEED, REPORT_SEED = 11, 23
LABELLED = "encoder"
"""The encoder that the adapters, trained heads and the probe are for."""
TRAINED = "trained"
AGREEMENT = 0.7
"""Least rank correlation of the two judges. It is not 1: one knows garbage, the other calls it some texture, by chance
the right one; so they differ on whether a blurred patch is worse than garbage."""


class World:
    """The closed world's models."""

    def __init__(self, generation: Generation = GENERATION, encoder: str = LABELLED, weights: Path = WEIGHTS) -> None:
        """encoder: its folder in `weights`. DinotileError if it is not there, or not calibrated."""
        self.encoder = load_encoder(str(weights / encoder))
        self.heads: dict[str, Heads] = {CALIBRATED: calibrated_heads(self.encoder, weights)}
        if encoder == LABELLED:
            trained = load_heads(weights / "heads.safetensors", self.encoder.id, self.encoder.width)
            self.heads[TRAINED] = FixedHeads(trained, TRAINED)
        self.generation, self.host = generation, WorldHost(generation, None, weights)
        self.judge, self.spectral = Judge.load(weights), SpectralJudge.load(weights)

    def arms(self, settings: Settings = SETTINGS, heads: str = CALIBRATED, reader: Reader | None = None) -> Arms:
        """The ways of upscaling here; reader: the adapter of those that have one."""
        return Arms(self.host, self.encoder, settings, self.heads[heads], reader)

    def painted(self, arms: Arms, arm: str, made: Scene, other: Scene, seed: int) -> tuple[Tensor, float]:
        """A picture upscaled in that way, (3, SIDE, SIDE) in 0..1, and the seconds that it took."""
        began = time.perf_counter()
        result = arms.upscale(arm, as_image(made.source), seed, as_image(other.source))
        return to_pixels(result.image), time.perf_counter() - began

    def judged(self, pixels: Tensor, made: Scene, other: Scene, control: bool) -> dict[str, float]:
        """The judges' verdicts on a result, as shares of its labelled patches.

        control: it was made with the features of the other image; where both show the same, that is no control, and
        those patches do not count.
        """
        known = made.labels != NO_LABEL
        first, second = self.judge.verdict(pixels), self.spectral.verdict(pixels)
        strange = known & (other.labels != NO_LABEL) & (other.labels != made.labels)
        counted = strange if control else known
        return {
            "rate": float((first != made.labels)[counted].mean()),
            "spectral": float((second != made.labels)[counted].mean()),
            "blank": float((first == NONE)[known].mean()),
            "garbage": float((first == GARBAGE)[known].mean()),
            "followed": float((first == other.labels)[strange].mean()),
        }


def scene_pairs(count: int, seed: int) -> list[tuple[Scene, Scene]]:
    """Fresh pictures, each with another whose features the controls take."""
    scenes = list(gates.evaluation_scenes(count, seed))
    if count == 1:
        return [(scenes[0], next(gates.evaluation_scenes(1, seed + 1)))]
    return [(made, scenes[number - 1]) for number, made in enumerate(scenes)]


def table(found: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """For people."""
    wide = max(16, *map(len, found))
    heads = f"{'':{wide}} {'hallucinated':>12}  {'95 %':13} {'of plain':>8}  {'95 %':13} {'garbage':>7} {'blank':>6}"
    print(f"{heads} {'spectral':>9} {'seconds':>8}")
    base = found[PLAIN]["rate"]
    for arm, values in found.items():
        rate, (low, high) = np.mean(values["rate"]), interval(values["rate"])
        least, most = ratio_interval(values["rate"], base)
        print(
            f"{arm:{wide}} {rate:12.3f}  {low:.3f} - {high:.3f} {rate / np.mean(base):8.2f}  {least:.2f} - {most:.2f} "
            f"  {np.mean(values['garbage']):6.3f} {np.mean(values['blank']):6.3f} {np.mean(values['spectral']):9.3f} "
            f"{np.mean(values['seconds']):8.1f}"
        )
    for arm in (arm for arm in found if arm == PLAIN or arm.endswith(OTHER)):
        print(f"{arm}: {np.mean(found[arm]['followed']):.3f} of the patches show what the OTHER image shows there")


def agreement(found: Mapping[str, Mapping[str, Any]]) -> float:
    """How alike the two judges rank the arms: Kendall's tau of their mean rates, from -1 to 1."""
    first, second = ([np.mean(values[judge]) for values in found.values()] for judge in ("rate", "spectral"))
    return float(kendalltau(first, second).statistic)


def agree(found: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the judges rank the arms alike; says it."""
    tau = agreement(found)
    print(f"gate {'agreement':15} {tau:.3f}  (at least {AGREEMENT}): the two judges' rankings of the arms")
    if not tau >= AGREEMENT:
        print("invalid: the two judges do not agree on the ranking")
    return tau >= AGREEMENT
