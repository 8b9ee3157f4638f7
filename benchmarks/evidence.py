"""Does dinotile keep tiles true? Rows, figures and targets of `benchmarks/semantics.py` in the closed world.

All rows are at the default settings, with calibrated heads but for one row. Several trained adapters are measured, each
of the same design with another seed; and adapters that were given what no source tells: the true classes, or the
features of the sharp picture. They show how far an adapter can come.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.arms import (
    ADAPTER,
    ADAPTER_OTHER,
    ADAPTER_SHUFFLED,
    ALL,
    ALL_OTHER,
    BOTH,
    GUARD,
    GUIDANCE,
    OTHER,
    PLAIN,
    SHUFFLED,
    WAYS,
    ZERO,
    Reader,
    interval,
    ratio_interval,
)
from benchmarks.judging import TRAINED, World, agree, agreement, scene_pairs, table
from benchmarks.world.adapters import ONE_HOT, SHARP, one_hot_field
from benchmarks.world.host import SETTINGS, WEIGHTS
from benchmarks.world.scenes import SIDE, Scene
from lib_dinotile import DinotileError
from lib_dinotile.condition.adapter import Adapter
from lib_dinotile.condition.adapter_file import load_adapter
from lib_dinotile.dino.field import FeatureField
from lib_dinotile.dino.head import load_heads
from lib_dinotile.settings import CALIBRATED, Settings

ADAPTERS = WEIGHTS / "adapters"
FIRST, UNTRAINED, TRAINED_HEADS = "first", "untrained", "trained_heads"


@dataclass(frozen=True)
class Row:
    """One row of the comparison."""

    name: str
    way: str
    """Of benchmarks/arms.py."""
    adapter: str = ""
    """Which adapter: TRAINED, each training; FIRST, only one of them; UNTRAINED; ONE_HOT or SHARP; or none."""
    heads: str = CALIBRATED
    """Which restoration heads: CALIBRATED or TRAINED."""


ROWS = (
    Row(PLAIN, PLAIN),
    Row(GUIDANCE, GUIDANCE),
    Row(GUARD, GUARD),
    Row(BOTH, BOTH),
    Row(OTHER, OTHER),
    Row(SHUFFLED, SHUFFLED),
    Row(ZERO, ZERO),
    Row(TRAINED_HEADS, BOTH, heads=TRAINED),
    Row(ADAPTER, ADAPTER, TRAINED),
    Row(ALL, ALL, TRAINED),
    Row(ADAPTER_OTHER, ADAPTER_OTHER, TRAINED),
    Row(ALL_OTHER, ALL_OTHER, FIRST),  # all its tiles are painted again: slow
    Row(ADAPTER_SHUFFLED, ADAPTER_SHUFFLED, TRAINED),
    Row(UNTRAINED, ADAPTER, UNTRAINED),
    Row(SHARP, ADAPTER, SHARP),
    Row(ONE_HOT, ADAPTER, ONE_HOT),
)
_OF_TRAININGS = frozenset(row.name for row in ROWS if row.adapter == TRAINED)
AT_MOST, AT_LEAST = "at most", "at least"


@dataclass(frozen=True)
class Target:
    """A condition of the claim."""

    name: str
    figure: str
    """Of `summary`."""
    row: str
    """Whose; empty: the figure has no rows."""
    side: str
    limit: float
    quick: float | None = None
    """The limit with few steps, if it is another."""


TARGETS = (
    Target("guidance + guard, of plain", "of_plain", BOTH, AT_MOST, 0.5, 0.65),
    Target("with another image's features, of plain", "of_plain", OTHER, AT_LEAST, 0.95),
    Target("share of that image's textures then", "followed", OTHER, AT_LEAST, 0.5),
    Target("strength 0 equal to plain, bit for bit", "equal_to_plain", ZERO, AT_LEAST, 1.0),
    Target("guard, AUC", "guard_auc", "", AT_LEAST, 0.9),
    Target("adapter, of plain", "of_plain", ADAPTER, AT_MOST, 0.25),
    Target("all, of plain", "of_plain", ALL, AT_MOST, 0.2),
    Target("adapter with another image's features, of plain", "of_plain", ADAPTER_OTHER, AT_LEAST, 0.95),
    Target("all with another image's features, of plain", "of_plain", ALL_OTHER, AT_LEAST, 0.95),
    Target("share of that image's textures then, adapter", "followed", ADAPTER_OTHER, AT_LEAST, 0.5),
    Target("share of that image's textures then, all", "followed", ALL_OTHER, AT_LEAST, 0.5),
    Target("untrained equal to plain, bit for bit", "equal_to_plain", UNTRAINED, AT_LEAST, 1.0),
)


@dataclass(frozen=True)
class Adapters:
    """Trained adapters; none by default."""

    trainings: Mapping[str, Reader] = field(default_factory=dict)
    """By seed."""
    bounds: Mapping[str, Reader] = field(default_factory=dict)
    """ONE_HOT and SHARP, as far as they are there."""

    @classmethod
    def load(cls, folder: Path = ADAPTERS) -> Adapters:
        """DinotileError if there is no training in the folder, or something that is no adapter."""
        found = {file.stem: read_adapter(file) for file in sorted(folder.glob("*.safetensors"))}
        trainings = {name: reader for name, reader in found.items() if name not in (ONE_HOT, SHARP)}
        if not trainings:
            raise DinotileError(f"there is no trained adapter in {folder}: give --adapters another folder")
        return cls(trainings, {name: reader for name, reader in found.items() if name not in trainings})

    def first(self) -> Adapters:
        """One training only."""
        return Adapters(dict(itertools.islice(self.trainings.items(), 1)))

    def of(self, row: Row) -> list[Reader | None]:
        """The adapters that a row is measured with, [None] without one; empty if what it needs is not there."""
        if row.adapter == TRAINED:
            return list(self.trainings.values())
        if row.adapter == FIRST:
            return list(self.first().trainings.values())
        if row.adapter == UNTRAINED and self.trainings:
            with torch.random.fork_rng(devices=[]):
                config = next(iter(self.trainings.values())).adapter.config
                return [Reader(Adapter(config).eval().requires_grad_(False))]
        if row.adapter:
            return [self.bounds[row.adapter]] if row.adapter in self.bounds else []
        return [None]


def read_adapter(file: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Reader:
    """An adapter from a file, with the head that it reads through."""
    adapter = load_adapter(file, device, dtype)
    config = adapter.config
    heads = load_heads(file, config.encoder, config.features, device) if config.restored else {}
    return Reader(adapter, heads.get(config.layer))


def informed(world: World, row: Row, reader: Reader | None, made: Scene) -> Reader | None:
    """The same reader, told of this picture what the row tells it beyond the source."""
    if row.adapter == ONE_HOT:
        return replace(reader, told=FeatureField(one_hot_field(made.class_map), (SIDE, SIDE)))
    if row.adapter == SHARP:
        features = world.encoder(made.sharp[None], reader.adapter.config.layer)[0]
        return replace(reader, told=FeatureField(features, (SIDE, SIDE)))
    return reader


@dataclass
class Evidence:
    """The measurements."""

    seeds: list[str]
    """Of the trainings."""
    pairs: list[tuple[Scene, Scene]]
    """The pictures, and those whose features the controls take."""
    found: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Per row and figure (trainings, images); `same`: whether the picture is the plain one, bit for bit."""
    results: dict[str, list[Tensor]] = field(default_factory=dict)
    """Per row the pictures (3, SIDE, SIDE), of the first training."""


def collect(
    world: World,
    rows: Sequence[Row],
    count: int,
    seed: int,
    adapters: Adapters = Adapters(),
    settings: Settings = SETTINGS,
    say: bool = False,
) -> Evidence:
    """Paint and judge `count` pictures in all the ways that there are heads and adapters for, PLAIN first if at all."""
    evidence = Evidence(list(adapters.trainings), scene_pairs(count, seed))
    readers = {row: adapters.of(row) for row in rows if row.heads in world.heads}
    values: dict[str, dict[str, list[list[float]]]] = {}
    for number, (made, other) in enumerate(evidence.pairs):
        for row, each in ((row, each) for row, each in readers.items() if each):
            for place, reader in enumerate(each):
                arms = world.arms(settings, row.heads, informed(world, row, reader, made))
                pixels, seconds = world.painted(arms, row.way, made, other, seed * 1000 + number)
                if place == 0:
                    evidence.results.setdefault(row.name, []).append(pixels)
                same = PLAIN in evidence.results and torch.equal(pixels, evidence.results[PLAIN][number])
                figures = world.judged(pixels, made, other, WAYS[row.way].other)
                for name, value in {**figures, "seconds": seconds, "same": float(same)}.items():
                    lists = values.setdefault(row.name, {}).setdefault(name, [[] for _ in each])
                    lists[place].append(value)
            if say:
                rate = np.mean([found[-1] for found in values[row.name]["rate"]])
                print(f"image {number + 1} of {count}: {row.name} {rate:.2f}", file=sys.stderr, flush=True)
    evidence.found = {arm: {name: np.array(lists) for name, lists in each.items()} for arm, each in values.items()}
    return evidence


def summary(evidence: Evidence) -> dict[str, Any]:
    """The figures, for JSON and for the plot."""
    found = evidence.found
    base = found[PLAIN]["rate"]

    def means(figure: str) -> dict[str, float]:
        return {arm: _short(values[figure].mean()) for arm, values in found.items()}

    return {
        "hallucination_rate": means("rate"),
        "interval": {arm: _short(*interval(values["rate"])) for arm, values in found.items()},
        "of_plain": {arm: _short(values["rate"].mean() / base.mean()) for arm, values in found.items()},
        "of_plain_interval": {arm: _short(*ratio_interval(values["rate"], base)) for arm, values in found.items()},
        "per_training": {
            arm: dict(zip(evidence.seeds, map(_short, values["rate"].mean(1))))
            for arm, values in found.items()
            if arm in _OF_TRAININGS
        },
        "spectral": means("spectral"),
        "garbage": means("garbage"),
        "blank": means("blank"),
        "followed": means("followed"),
        "equal_to_plain": means("same"),
        "agreement": _short(agreement(found)),
        "images": len(evidence.pairs),
    }


def _short(*values: float) -> Any:
    rounded = [round(float(value), 4) for value in values]
    return rounded[0] if len(rounded) == 1 else rounded


def targets(figures: Mapping[str, Any], quick: bool = False) -> dict[str, dict[str, Any]]:
    """By name, of those whose rows were measured: the figure, its limit, and whether it is met."""
    found = {}
    for target in TARGETS:
        if target.row and target.row not in figures[target.figure]:
            continue
        value = figures[target.figure][target.row] if target.row else figures[target.figure]
        limit = target.quick if quick and target.quick else target.limit
        met = value <= limit if target.side == AT_MOST else value >= limit
        found[target.name] = {"is": value, target.side: limit, "met": bool(met)}
    return found


def prove(
    world: World, adapters: Adapters, count: int, seed: int, guard_auc: float, quick: bool = False
) -> tuple[Evidence, dict[str, Any]] | None:
    """Measure, print and give all that there is to say; None if the judges do not agree."""
    evidence = collect(world, ROWS, count, seed, adapters, say=not quick)
    if not agree(evidence.found):
        return None
    table(evidence.found)
    named = {"settings": "defaults", "heads": CALIBRATED, "encoder": world.encoder.id, "steps": world.generation.steps}
    figures = {**named, **summary(evidence), "guard_auc": _short(guard_auc)}
    figures["targets"] = targets(figures, quick)
    for arm, rates in figures["per_training"].items():
        print(f"{arm}, by training: " + ", ".join(f"{seed} {rate:.3f}" for seed, rate in rates.items()))
    for name, found in figures["targets"].items():
        value, (side, limit), met = found["is"], list(found.items())[1], found["met"]
        print(f"target {name}: {value:.3f} ({side} {limit}): {'met' if met else 'NOT MET'}")
    return evidence, figures
