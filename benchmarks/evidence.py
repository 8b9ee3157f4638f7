"""Does dinotile keep tiles true? Figures and targets of `benchmarks/semantics.py` in the closed world.

All arms are at the default settings, with calibrated heads but for one. Several trained adapters are measured, each
of the same design with another seed; and adapters that were given what no source tells: the true classes, or the
features of the sharp picture. They show how far an adapter can come.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor

from benchmarks import arms
from benchmarks.judging import World, scene_pairs
from benchmarks.world import WEIGHTS
from benchmarks.world.gates import AT_LEAST, AT_MOST, check, within
from benchmarks.world.host import one_hot
from benchmarks.world.scenes import PATCH, SIDE, Scene
from lib_dinotile import DinotileError
from lib_dinotile.condition.adapter import Adapter
from lib_dinotile.condition.adapter_file import load_adapter
from lib_dinotile.dino.field import FeatureField
from lib_dinotile.dino.head import load_heads
from lib_dinotile.settings import CALIBRATED

ADAPTERS = WEIGHTS / "adapters"


TARGETS = {
    "guidance + guard, of plain": ("of_plain", arms.BOTH, AT_MOST, 0.5),
    "with another image's features, of plain": ("of_plain", arms.OTHER, AT_LEAST, 0.95),
    "share of that image's textures then": ("followed", arms.OTHER, AT_LEAST, 0.5),
    "strength 0 equal to plain, bit for bit": ("equal_to_plain", arms.ZERO, AT_LEAST, 1.0),
    "guard, AUC": ("guard_auc", "", AT_LEAST, 0.9),
    "adapter, of plain": ("of_plain", arms.ADAPTER, AT_MOST, 0.25),
    "all, of plain": ("of_plain", arms.ALL, AT_MOST, 0.2),
    "adapter with another image's features, of plain": ("of_plain", arms.ADAPTER_OTHER, AT_LEAST, 0.95),
    "all with another image's features, of plain": ("of_plain", arms.ALL_OTHER, AT_LEAST, 0.95),
    "share of that image's textures then, adapter": ("followed", arms.ADAPTER_OTHER, AT_LEAST, 0.5),
    "share of that image's textures then, all": ("followed", arms.ALL_OTHER, AT_LEAST, 0.5),
    "untrained equal to plain, bit for bit": ("equal_to_plain", arms.UNTRAINED, AT_LEAST, 1.0),
    "words by region, of plain": ("of_plain", arms.WORDS, AT_MOST, 0.35),
    "wrong words, of plain": ("of_plain", arms.WORDS_SHUFFLED, AT_LEAST, 1.0),
    "share of the textures told then": ("followed", arms.WORDS_SHUFFLED, AT_LEAST, 0.5),
    "words, guidance + guard, of the better alone": ("of_better", arms.WORDS_BOTH, AT_MOST, 1.0),
    "words, adapter, of the better alone": ("of_better", arms.WORDS_ADAPTER, AT_MOST, 1.0),
    "words, all, of the better alone": ("of_better", arms.WORDS_ALL, AT_MOST, 1.0),
    "one word for all, of plain, where it is wrong": ("of_plain", arms.WORDS_WHOLE, AT_LEAST, 0.95),
}
"""Name of a condition of the claim -> the figure of `summary`, the arm (empty: the figure has none), and on which side
of what value it has to be."""
TOGETHER = {
    arms.WORDS_BOTH: (arms.WORDS, arms.BOTH),
    arms.WORDS_ADAPTER: (arms.WORDS, arms.ADAPTER),
    arms.WORDS_ALL: (arms.WORDS, arms.ALL),
}
"""Arms, and what they put together."""
QUICK_LIMITS = {"guidance + guard, of plain": 0.65}
"""With few steps."""


def read_adapter(file: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> arms.Reader:
    """An adapter from a file, with the head that it reads through."""
    adapter = load_adapter(file, device, dtype)
    config = adapter.config
    heads = load_heads(file, config.encoder, config.features, device) if config.restored else {}
    return arms.Reader(adapter, heads.get(config.layer))


def read_adapters(folder: Path) -> dict[str, arms.Reader]:
    """The trainings by seed, and ONE_HOT and SHARP as far as they are there.

    DinotileError if there is no training in the folder, or something that is no adapter.
    """
    found = {file.stem: read_adapter(file) for file in sorted(folder.glob("*.safetensors"))}
    if not trainings(found):
        raise DinotileError(f"there is no trained adapter in {folder}: give --adapters another folder")
    return found


def trainings(adapters: Mapping[str, arms.Reader]) -> dict[str, arms.Reader]:
    """Those that read the source, and not the truth."""
    return {name: reader for name, reader in adapters.items() if name not in (arms.ONE_HOT, arms.SHARP)}


def readers(arm: arms.Arm, adapters: Mapping[str, arms.Reader]) -> list[arms.Reader | None]:
    """The adapters that an arm is measured with, [None] without one; empty if what it needs is not there."""
    trained: list[arms.Reader | None] = [*trainings(adapters).values()]
    if arm.adapter in (arms.ONE_HOT, arms.SHARP):
        return [adapters[name] for name in adapters if name == arm.adapter]
    if arm.adapter == arms.UNTRAINED:
        with torch.random.fork_rng(devices=[]):
            configs = [reader.adapter.config for reader in trained[:1] if reader]
            return [arms.Reader(Adapter(config).eval().requires_grad_(False)) for config in configs]
    if not arm.adapter:
        return [None]
    return trained[:1] if arm.adapter == arms.FIRST else trained


def informed(world: World, arm: arms.Arm, reader: arms.Reader | None, made: Scene) -> arms.Reader | None:
    """The same reader, told of this picture what the arm tells it beyond the source."""
    if reader and arm.adapter == arms.ONE_HOT:
        cells = slice(PATCH // 4, None, PATCH // 2)  # on a grid of half a patch
        return replace(reader, fields=FeatureField(one_hot(made.class_map[cells, cells]), (SIDE, SIDE)))
    if reader and arm.adapter == arms.SHARP:
        features = world.encoder(made.sharp[None], reader.adapter.config.layer)[0]
        return replace(reader, fields=FeatureField(features, (SIDE, SIDE)))
    return reader


@dataclass
class Evidence:
    """The measurements."""

    seeds: list[str]
    """Of the trainings."""
    pairs: list[tuple[Scene, Scene]]
    """The pictures, and those whose features the controls take."""
    found: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Per arm and figure (trainings, images); `same`: whether the picture is the plain one, bit for bit."""
    results: dict[str, list[Tensor]] = field(default_factory=dict)
    """Per arm the pictures (3, SIDE, SIDE), of the first training."""


def collect(
    world: World,
    names: Iterable[str],
    count: int,
    seed: int,
    adapters: Mapping[str, arms.Reader] = {},
    say: bool = False,
) -> Evidence:
    """Paint and judge `count` pictures in the arms that there are heads and adapters for, PLAIN first if at all."""
    evidence = Evidence(list(trainings(adapters)), scene_pairs(count, seed))
    chosen = {name: readers(arms.ARMS[name], adapters) for name in names if arms.ARMS[name].heads in world.heads}
    judged: dict[str, list[list[dict[str, float]]]] = {
        name: [[] for _ in each] for name, each in chosen.items() if each
    }
    for number, (made, other) in enumerate(evidence.pairs):
        for name, rows in judged.items():
            arm = arms.ARMS[name]
            told = world.told(made, arm.words) if arm.words else None
            for reader, figures in zip(chosen[name], rows):
                given = informed(world, arm, reader, made)
                pixels = world.painted(arm, made, other, seed * 1000 + number, given, told)
                if figures is rows[0]:
                    evidence.results.setdefault(name, []).append(pixels)
                same = arms.PLAIN in evidence.results and torch.equal(pixels, evidence.results[arms.PLAIN][number])
                figures.append(
                    {
                        **world.judged(pixels, made, told if told and arm.control else other, arm.control),
                        "same": float(same),
                    }
                )
            if say:
                rate = np.mean([figures[-1]["rate"] for figures in rows])
                print(f"image {number + 1} of {count}: {name} {rate:.2f}", file=sys.stderr, flush=True)
    for name, rows in judged.items():
        found = {figure: [[each[figure] for each in figures] for figures in rows] for figure in rows[0][0]}
        evidence.found[name] = {figure: np.array(values) for figure, values in found.items()}
    return evidence


def summary(evidence: Evidence) -> dict[str, Any]:
    """The figures, for JSON and for the plot."""
    found = evidence.found
    base = found[arms.PLAIN]["rate"]

    def means(figure: str) -> dict[str, float]:
        return {arm: _short(values[figure].mean()) for arm, values in found.items()}

    return {
        "hallucination_rate": means("rate"),
        "interval": {arm: _short(*arms.interval(values["rate"])) for arm, values in found.items()},
        "of_plain": {arm: _short(values["rate"].mean() / base.mean()) for arm, values in found.items()},
        "of_plain_interval": {arm: _short(*arms.ratio_interval(values["rate"], base)) for arm, values in found.items()},
        "of_better": {
            arm: _short(found[arm]["rate"].mean() / min(found[part]["rate"].mean() for part in parts))
            for arm, parts in TOGETHER.items()
            if arm in found
        },
        "per_training": {
            arm: dict(zip(evidence.seeds, map(_short, values["rate"].mean(1))))
            for arm, values in found.items()
            if arms.ARMS[arm].adapter == arms.TRAINED
        },
        "spectral": means("spectral"),
        "garbage": means("garbage"),
        "blank": means("blank"),
        "followed": means("followed"),
        "wrong_of_all": means("all"),
        "equal_to_plain": means("same"),
        "agreement": agreement(found),
        "images": len(evidence.pairs),
    }


def agreement(found: Mapping[str, Mapping[str, Any]]) -> float:
    """How alike the two judges rank the arms: Kendall's tau of their mean rates, from -1 to 1."""
    first, second = ([np.mean(values[judge]) for values in found.values()] for judge in ("rate", "spectral"))
    return _short(kendalltau(first, second).statistic)


def _short(*values: float) -> Any:
    rounded = [round(float(value), 4) for value in values]
    return rounded[0] if len(rounded) == 1 else rounded


def targets(figures: Mapping[str, Any], quick: bool = False) -> dict[str, dict[str, Any]]:
    """By name, of those whose arms were measured: the figure, its limit, and whether it is met."""
    found = {}
    for name, (figure, arm, side, limit) in TARGETS.items():
        value = figures[figure].get(arm) if arm else figures[figure]
        limit = QUICK_LIMITS.get(name, limit) if quick else limit
        if value is not None:
            found[name] = {"is": value, side: limit, "met": within(value, side, limit)}
    return found


def table(figures: Mapping[str, Any]) -> None:
    """Print the figures of `summary` that there are by arm."""
    names = [name for name, each in figures.items() if isinstance(each, dict) and arms.PLAIN in each]
    print(" " * 19 + "".join(f"{name:>20}" for name in names))
    for arm in figures["hallucination_rate"]:
        print(f"{arm:19}" + "".join(f"{figures[name][arm]!s:>20}" for name in names))
    for arm, rates in figures["per_training"].items():
        print(f"{arm}, by training: " + ", ".join(f"{seed} {rate:.3f}" for seed, rate in rates.items()))


def prove(
    world: World, adapters: Mapping[str, arms.Reader], count: int, seed: int, guard_auc: float, quick: bool = False
) -> tuple[Evidence, dict[str, Any]]:
    """Measure, print and give all that there is to say. DinotileError if the judges do not agree."""
    evidence = collect(world, arms.ARMS, count, seed, adapters, say=not quick)
    named = {"settings": "defaults", "heads": CALIBRATED, "encoder": world.encoder.id, "steps": world.generation.steps}
    figures = {**named, **summary(evidence), "guard_auc": _short(guard_auc)}
    check({"agreement": figures["agreement"]})
    table(figures)
    figures["targets"] = targets(figures, quick)
    for name, found in figures["targets"].items():
        value, (side, limit), met = found["is"], list(found.items())[1], found["met"]
        print(f"target {name}: {value:.3f} ({side} {limit}): {'met' if met else 'NOT MET'}")
    return evidence, figures
