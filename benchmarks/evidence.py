"""Does a trained adapter keep tiles true? `benchmarks/semantics.py --adapter`, in the closed world.

Several trainings are measured, each of the same design with another seed; and adapters that were given what no source
tells: the true classes, or the features of the sharp picture. They show how far an adapter can come.
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
    GUARD,
    GUIDANCE,
    PLAIN,
    WAYS,
    Reader,
    interval,
    ratio_interval,
)
from benchmarks.judging import CHOSEN, TUNE_SEED, World, agree, agreement, scene_pairs, table
from benchmarks.world.adapters import ONE_HOT, SHARP, one_hot_field
from benchmarks.world.host import WEIGHTS
from benchmarks.world.scenes import SIDE, Scene
from lib_dinotile import DinotileError
from lib_dinotile.condition.adapter import Adapter
from lib_dinotile.condition.adapter_file import load_adapter
from lib_dinotile.dino.field import FeatureField
from lib_dinotile.dino.head import load_heads

ADAPTERS = WEIGHTS / "adapters"
TRAINED, FIRST, UNTRAINED = "trained", "first", "untrained"


@dataclass(frozen=True)
class Row:
    """One arm of the comparison."""

    name: str
    way: str
    """Of benchmarks/arms.py."""
    adapter: str = ""
    """Which adapter: TRAINED, each training; FIRST, only one of them; UNTRAINED; ONE_HOT or SHARP; or none."""
    guidance: float | None = None
    """Guidance strength, if not the one that is best without an adapter. Chosen on other images (`--tune`)."""


ROWS = (
    Row(PLAIN, PLAIN),
    Row(GUARD, GUARD),
    Row(GUIDANCE, GUIDANCE),
    Row(ADAPTER, ADAPTER, TRAINED),
    Row(ALL, ALL, TRAINED, 0.5),
    Row(ADAPTER_OTHER, ADAPTER_OTHER, TRAINED),
    Row(ALL_OTHER, ALL_OTHER, FIRST, 0.5),  # all its patches are painted again and again: slow
    Row(ADAPTER_SHUFFLED, ADAPTER_SHUFFLED, TRAINED),
    Row(UNTRAINED, ADAPTER, UNTRAINED),
    Row(SHARP, ADAPTER, SHARP),
    Row(ONE_HOT, ADAPTER, ONE_HOT),
)
_OF_TRAININGS = frozenset(row.name for row in ROWS if row.adapter == TRAINED)
QUICK_ROWS = tuple(row for row in ROWS if row.name in (PLAIN, ADAPTER, ALL))

TARGETS = {
    "adapter of plain": ("at most", 0.25),
    "all of plain": ("at most", 0.20),
    "adapter with another image's features, of plain": ("at least", 0.95),
    "all with another image's features, of plain": ("at least", 0.95),
    "share of that image's textures then, adapter": ("at least", 0.5),
    "share of that image's textures then, all": ("at least", 0.5),
    "untrained equal to plain, bit for bit": ("at least", 1.0),
}
"""What has to hold for the claim: a figure, on which side of what value it has to be."""


@dataclass(frozen=True)
class Adapters:
    """What was trained."""

    trainings: Mapping[str, Reader]
    """By seed."""
    bounds: Mapping[str, Reader]
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
        """With one training only."""
        return replace(self, trainings=dict(itertools.islice(self.trainings.items(), 1)))

    def of(self, row: Row) -> list[Reader | None]:
        """What a row is measured with, one after the other; nothing if that is not there."""
        if row.adapter == TRAINED:
            return list(self.trainings.values())
        if row.adapter == FIRST:
            return list(self.first().trainings.values())
        if row.adapter == UNTRAINED:
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
    """What was measured."""

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
    adapters: Adapters,
    rows: Sequence[Row],
    count: int,
    seed: int,
    settings: Any = CHOSEN,
    say: bool = False,
) -> Evidence:
    """Paint and judge `count` pictures in all ways; PLAIN has to be the first of the rows."""
    evidence = Evidence(list(adapters.trainings), scene_pairs(count, seed))
    models = {row: adapters.of(row) for row in rows}
    values: dict[str, dict[str, list[list[float]]]] = {}
    for number, (made, other) in enumerate(evidence.pairs):
        for row, trained in models.items():
            for place, reader in enumerate(trained):
                guidance = settings.guidance if row.guidance is None else row.guidance
                arms = world.arms(replace(settings, guidance=guidance), informed(world, row, reader, made))
                pixels, seconds = world.painted(arms, row.way, made, other, seed * 1000 + number)
                if place == 0:
                    evidence.results.setdefault(row.name, []).append(pixels)
                plain = evidence.results[PLAIN][number]
                figures = world.judged(pixels, made, other, WAYS[row.way].other)
                figures |= {"seconds": seconds, "same": float(torch.equal(pixels, plain))}
                for name, value in figures.items():
                    lists = values.setdefault(row.name, {}).setdefault(name, [[] for _ in trained])
                    lists[place].append(value)
            if say and trained:
                rate = np.mean([each[-1] for each in values[row.name]["rate"]])
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
        "untrained_equal": bool(UNTRAINED in found and found[UNTRAINED]["same"].all()),
        "agreement": _short(agreement(found)),
        "images": len(evidence.pairs),
    }


def _short(*values: float) -> Any:
    rounded = [round(float(value), 4) for value in values]
    return rounded[0] if len(rounded) == 1 else rounded


def targets(figures: Mapping[str, Any]) -> dict[str, tuple[float, bool]]:
    """By name as in TARGETS: the figure, and whether it is met."""
    ratio, followed = figures["of_plain"], figures["followed"]
    values = (
        ratio[ADAPTER],
        ratio[ALL],
        ratio[ADAPTER_OTHER],
        ratio[ALL_OTHER],
        followed[ADAPTER_OTHER],
        followed[ALL_OTHER],
        float(figures["untrained_equal"]),
    )
    return {
        name: (value, value <= limit if side == "at most" else value >= limit)
        for (name, (side, limit)), value in zip(TARGETS.items(), values)
    }


def report(evidence: Evidence, figures: Mapping[str, Any]) -> None:
    """What `table` does not say, for people."""
    for arm, rates in figures["per_training"].items():
        print(f"{arm}, by training: " + ", ".join(f"{seed} {rate:.3f}" for seed, rate in rates.items()))
    for arm in (PLAIN, ADAPTER_OTHER, ALL_OTHER):
        print(f"{arm}: {figures['followed'][arm]:.3f} of the patches show what the OTHER image shows there")
    for name, (value, met) in targets(figures).items():
        side, limit = TARGETS[name]
        print(f"target {name}: {value:.3f} ({side} {limit}): {'met' if met else 'NOT MET'}")


def prove(world: World, adapters: Adapters, count: int, seed: int) -> tuple[Evidence, dict[str, Any]] | None:
    """Measure, print and give all that there is to say; None if the judges do not agree."""
    evidence = collect(world, adapters, ROWS, count, seed, say=True)
    figures = summary(evidence)
    if not agree(evidence.found):
        return None
    table(evidence.found)
    report(evidence, figures)
    figures["targets"] = {name: {"is": _short(value), "met": met} for name, (value, met) in targets(figures).items()}
    return evidence, figures


def tune(world: World, adapters: Adapters, count: int) -> None:
    """Rates for some strengths of adapter and guidance, on images that are not reported; of the first training."""
    trials = [(row, strength, 0.0) for row in ROWS if row.name == ADAPTER for strength in (0.7, 1.0, 1.3, 1.6, 2.0)]
    trials += [
        (row, strength, guidance)
        for row in ROWS
        if row.name == ALL
        for strength, guidance in itertools.product((1.0, 1.3), (0.5, 1.0, 2.0))
    ]
    for row, strength, guidance in trials:
        settings, tried = replace(CHOSEN, strength=strength), replace(row, guidance=guidance)
        found = collect(world, adapters.first(), (ROWS[0], tried), count, TUNE_SEED, settings).found[row.name]
        shares = ", ".join(f"{name} {found[name].mean():.3f}" for name in ("rate", "garbage", "blank"))
        print(f"{row.name}: strength {strength}, guidance {guidance}: {shares}", flush=True)
