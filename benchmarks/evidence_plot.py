"""The figures of benchmarks/semantics.py drawn: the rates as bars, and one picture upscaled in several ways."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks import arms
from benchmarks.evidence import Evidence
from benchmarks.judging import LABELLED, World
from benchmarks.world.scenes import FACTOR, NO_LABEL, PATCH, SIDE

GREY, BLUE, VIOLET, ORANGE, GREEN = "#8f99a4", "#3f7dc0", "#7a62b0", "#d07f2e", "#4a9670"
INK, RED = "#22272e", "#d4001a"
GROUPS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("", GREY, {arms.PLAIN: "Plain tiles"}),
    (
        "What everyone has: calibrated heads, no training",
        BLUE,
        {arms.BOTH: "Guidance + guard", arms.GUIDANCE: "Guidance alone", arms.GUARD: "Guard alone"},
    ),
    (
        "With the regions' names: needs somebody who names them",
        BLUE,
        {arms.WORDS: "Words by region", arms.WORDS_BOTH: "Words + guidance + guard"},
    ),
    ("With trained heads: needs a training for the encoder", VIOLET, {arms.TRAINED_HEADS: "Guidance + guard"}),
    (
        "With a trained adapter: needs a training for checkpoint and encoder",
        VIOLET,
        {
            arms.ALL: "Adapter + guidance + guard",
            arms.ADAPTER: "Adapter alone",
            arms.WORDS_ADAPTER: "Adapter + words",
            arms.WORDS_ALL: "Adapter + words + guidance + guard",
        },
    ),
    (
        "Controls, which should not help",
        ORANGE,
        {
            arms.OTHER: "Guidance + guard, another image's features",
            arms.SHUFFLED: "Guidance + guard, patches in disorder",
            arms.ALL_OTHER: "All three, another image's features",
            arms.ADAPTER_OTHER: "Adapter alone, another image's features",
            arms.ADAPTER_SHUFFLED: "Adapter alone, patches in disorder",
            arms.WORDS_SHUFFLED: "Words of other regions",
            arms.WORDS_WHOLE: "One word for all, where it is wrong",
        },
    ),
    (
        "Bounds: told what no source tells",
        GREEN,
        {arms.SHARP: "Adapter on the sharp picture's features", arms.ONE_HOT: "Adapter on the true classes"},
    ),
)
"""Heading, which says what the group needs, colour, and the arms in plain words."""
EQUALS = {arms.ZERO: "strength 0", arms.UNTRAINED: "an untrained adapter"}
"""Arms without a bar where they are the plain result, bit for bit."""
PANELS = {
    arms.PLAIN: "Plain tiles",
    arms.BOTH: "Guidance + guard",
    arms.WORDS: "Words by region",
    arms.ALL: "Adapter, guidance, guard",
}
"""The arms of which a picture is shown: default settings, calibrated heads."""
STYLE = {"font.size": 10.5, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.labelcolor": "#5b636d"}
DPI = 200


def bars(figures: Mapping[str, Any], file: Path) -> None:
    """Draw the rates of `evidence.summary`: a bar for each arm, its 95 % interval, a dot for each training."""
    rates, left = figures["hallucination_rate"], ("figure fraction", "data")
    equal = [label for arm, label in EQUALS.items() if figures["equal_to_plain"].get(arm) == 1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(dpi=DPI)
        axes = figure.add_subplot()
        axes.axvline(rates[arms.PLAIN], color=GREY, linestyle="--", linewidth=1, zorder=0)
        ticks: dict[int, str] = {}
        y = 0
        for heading, colour, labels in GROUPS:
            shown = [arm for arm in labels if arm in rates]
            if heading and shown:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                axes.annotate(heading, (0.01, y), xycoords=left, va="center", weight="bold", color=colour, bbox=box)
                y += 1
            for arm in shown:
                _bar(axes, y, colour, arm, figures)
                ticks[y] = labels[arm]
                y += 1
        axes.set(xlim=(0, 1), ylim=(y - 0.5, -0.5))
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="x", color="#e3e6ea")
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        about = "share of patches judged not to be what is there; shorter is better; "
        about += f"{figures['images']} pictures, {figures['steps']} steps\n"
        about += "default settings, calibrated heads where no trained ones are named; encoder trained "
        about += f"{'with' if figures['encoder'] == LABELLED else 'without'} labels"
        figure.suptitle("Wrong texture", x=0.01, ha="left", weight="bold", fontsize=14)
        axes.annotate(about, (0.01, -0.7), xycoords=left, va="bottom")
        trainings = len(figures["per_training"].get(arms.ADAPTER, ()))
        notes = "lines: 95 % of a bootstrap over pictures"
        notes += f" and trainings; dots: single trainings ({trainings})" if trainings else ""
        notes += f"\n{' and '.join(equal)}: the plain result, bit for bit" if equal else ""
        axes.set_xlabel(notes, loc="left", fontsize=9, linespacing=1.6)
        height, top, bottom = 0.3 * y + 1.7, 0.95, 0.75
        figure.set_size_inches(9, height)
        figure.subplots_adjust(left=0.39, right=0.89, bottom=bottom / height, top=1 - top / height)
        figure.savefig(file)


def _bar(axes: Any, y: int, colour: str, arm: str, figures: Mapping[str, Any]) -> None:
    rate, (low, high) = figures["hallucination_rate"][arm], figures["interval"][arm]
    line = {"ecolor": INK, "elinewidth": 1.4, "capsize": 3, "clip_on": False}
    axes.barh(y, rate, 0.7, color=colour, xerr=[[rate - low], [high - rate]], error_kw=line)
    trainings = list(figures["per_training"].get(arm, {}).values())
    axes.scatter(trainings, [y] * len(trainings), 17, "white", edgecolors=INK, zorder=4, clip_on=False)
    axes.text(1.19, y, f"{100 * rate:.1f} %", ha="right", va="center", weight="bold")


def pictures(world: World, evidence: Evidence, file: Path) -> None:
    """Draw one of the pictures: what came of it, with the patches judged wrong tinted and outlined."""
    chosen = typical(evidence)
    made, _ = evidence.pairs[chosen]
    source = made.source.repeat_interleave(FACTOR, 1).repeat_interleave(FACTOR, 2)
    shown = {label: evidence.results[arm][chosen] for arm, label in PANELS.items() if arm in evidence.results}
    known = made.labels != NO_LABEL
    title = {"fontsize": 9.3, "fontweight": "bold"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 6.4), dpi=DPI, layout="constrained")
        axes = figure.subplots(2, 3).flat
        for each, (label, pixels) in zip(axes, {"Source, enlarged": source, "Truth": made.sharp, **shown}.items()):
            each.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest", extent=(0, SIDE, SIDE, 0))
            each.set_title(label, loc="left", **title)
            if label in shown:
                wrong = known & (world.judge.verdict(pixels) != made.labels)
                each.set_title(f"{wrong.sum() / known.sum():.0%} wrong", loc="right", color=RED, **title)
                fine = np.pad(wrong.repeat(PATCH, 0).repeat(PATCH, 1), 1)
                middles = np.arange(-0.5, SIDE + 1)
                each.contourf(middles, middles, fine, (0.5, 1.5), colors=RED, alpha=0.13)
                each.contour(middles, middles, fine, (0.5,), colors=RED, linewidths=1.6)
        for each in figure.axes:
            each.axis("off")
        figure.savefig(file)


def typical(evidence: Evidence) -> int:
    """The number of the picture whose rates are nearest to the means of all."""
    rates = [evidence.found[arm]["rate"] for arm in PANELS if arm in evidence.found]
    return int(sum(np.abs(each[0] - each.mean()) for each in rates).argmin())
