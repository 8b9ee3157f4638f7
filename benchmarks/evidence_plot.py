"""The figures of benchmarks/semantics.py drawn: the rates as bars, and one picture upscaled in several ways."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

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
    ZERO,
)
from benchmarks.evidence import TRAINED_HEADS, UNTRAINED, Evidence
from benchmarks.judging import LABELLED, World
from benchmarks.world.adapters import ONE_HOT, SHARP
from benchmarks.world.scenes import FACTOR, NO_LABEL, PATCH, SIDE

GREY, BLUE, VIOLET, ORANGE, GREEN, INK = "#8f99a4", "#3f7dc0", "#7a62b0", "#d07f2e", "#4a9670", "#22272e"
GROUPS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("", GREY, {PLAIN: "Plain tiles"}),
    (
        "What everyone has: calibrated heads, no training",
        BLUE,
        {BOTH: "Guidance + guard", GUIDANCE: "Guidance alone", GUARD: "Guard alone"},
    ),
    ("With trained heads: needs a training for the encoder", VIOLET, {TRAINED_HEADS: "Guidance + guard"}),
    (
        "With a trained adapter: needs a training for checkpoint and encoder",
        VIOLET,
        {ALL: "Adapter + guidance + guard", ADAPTER: "Adapter alone"},
    ),
    (
        "Controls, which should not help",
        ORANGE,
        {
            OTHER: "Guidance + guard, another image's features",
            SHUFFLED: "Guidance + guard, patches in disorder",
            ALL_OTHER: "All three, another image's features",
            ADAPTER_OTHER: "Adapter alone, another image's features",
            ADAPTER_SHUFFLED: "Adapter alone, patches in disorder",
        },
    ),
    (
        "Bounds: told what no source tells",
        GREEN,
        {SHARP: "Adapter on the sharp picture's features", ONE_HOT: "Adapter on the true classes"},
    ),
)
"""Heading, which says what the group needs, colour, and the rows in plain words."""
EQUALS = {ZERO: "strength 0", UNTRAINED: "an untrained adapter"}
"""Rows without a bar where they are the plain result, bit for bit."""

_WRONG = "#d4001a"
_STYLE = {"font.size": 10.5, "font.family": "DejaVu Sans", "text.color": INK}
_LEFT = 0.39
"""Where the bars begin, in widths of the plot."""

WIDTH, DPI = 9.0, 200
"""Of the pictures, in inches of 100 px as a page shows them; twice as fine in the file."""


def bars(figures: Mapping[str, Any], file: Path) -> None:
    """Draw the rates of `evidence.summary`: a bar for each arm, its 95 % interval, a dot for each training."""
    rates = figures["hallucination_rate"]
    equal = [label for arm, label in EQUALS.items() if figures["equal_to_plain"].get(arm) == 1]
    lines: list[tuple[str, str, str]] = []  # heading or label, colour, arm ("" for a heading)
    for heading, colour, arms in GROUPS:
        shown = {arm: label for arm, label in arms.items() if arm in rates}
        if heading and shown:
            lines.append((heading, colour, ""))
        lines += [(label, colour, arm) for arm, label in shown.items()]
    with matplotlib.rc_context(_STYLE):
        top, bottom = 0.9, 0.78  # inches
        high = 0.3 * len(lines) + top + bottom
        figure = Figure(figsize=(WIDTH, high), dpi=DPI, facecolor="white")
        axes = figure.add_axes((_LEFT, bottom / high, 0.5, 1 - (top + bottom) / high))
        for y, (label, colour, arm) in enumerate(lines):
            if arm:
                _bar(axes, y, label, colour, arm, figures)
            else:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                place = 1 - (top + 0.3 * (y + 0.6)) / high
                figure.text(0.012, place, label, weight="bold", va="center", color=colour, bbox=box)
        axes.axvline(rates[PLAIN], color=GREY, linestyle=(0, (3, 3)), linewidth=1, zorder=0)
        axes.set(xlim=(0, 1), ylim=(len(lines) - 0.5, -0.5), yticks=())
        axes.set_xticks(np.linspace(0, 1, 6), [f"{share:.0%}" for share in np.linspace(0, 1, 6)], color=INK)
        axes.grid(axis="x", color="#e3e6ea")
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.text(0.012, 1 - 0.26 / high, "Wrong texture", weight="bold", fontsize=14, va="center")
        subtitle = "share of patches judged not to be what is there; shorter is better; "
        subtitle += f"{figures['images']} pictures, {figures['steps']} steps"
        figure.text(0.197, 1 - 0.275 / high, subtitle, va="center")
        how = "default settings, calibrated heads where no trained ones are named; encoder trained "
        how += f"{'with' if figures['encoder'] == LABELLED else 'without'} labels"
        figure.text(0.012, 1 - 0.58 / high, how, va="center")
        trainings = len(figures["per_training"].get(ADAPTER, ()))
        legend = "lines: 95 % of a bootstrap over pictures" + (" and trainings" if trainings else "")
        legend += f"; dots: single trainings ({trainings})" if trainings else ""
        notes = [legend, f"{' and '.join(equal)}: the plain result, bit for bit" if equal else ""]
        for place, note in zip((0.38, 0.15), notes):
            figure.text(_LEFT, place / high, note, va="center", fontsize=9, color="#5b636d")
        figure.savefig(file)


PANELS = {
    PLAIN: "Plain tiles",
    BOTH: "Guidance + guard",
    ALL: "Adapter, guidance, guard",
    OTHER: "Another image's features",
}
"""The rows of which a picture is shown: default settings, calibrated heads."""


def _bar(axes: Any, y: int, label: str, colour: str, arm: str, figures: Mapping[str, Any]) -> None:
    rate, (low, high) = figures["hallucination_rate"][arm], figures["interval"][arm]
    beside = axes.get_yaxis_transform()  # x in widths of the plot, y in data
    line = {"ecolor": INK, "elinewidth": 1.4, "capsize": 3, "clip_on": False}
    axes.barh(y, rate, 0.7, color=colour, linewidth=0, xerr=[[rate - low], [high - rate]], error_kw=line)
    trainings = list(figures["per_training"].get(arm, {}).values())
    axes.scatter(trainings, [y] * len(trainings), 17, "white", edgecolors=INK, linewidths=1, zorder=4, clip_on=False)
    axes.text(-0.015, y, label, transform=beside, ha="right", va="center")
    axes.text(1.19, y, f"{100 * rate:.1f} %", transform=beside, ha="right", va="center", weight="bold")


def pictures(world: World, evidence: Evidence, file: Path) -> None:
    """Draw one of the pictures: what came of it, with the patches judged wrong in red."""
    chosen = typical(evidence)
    made, _ = evidence.pairs[chosen]
    source = made.source.repeat_interleave(FACTOR, 1).repeat_interleave(FACTOR, 2)
    shown = {label: evidence.results[arm][chosen] for arm, label in PANELS.items() if arm in evidence.results}
    known = made.labels != NO_LABEL
    title = {"fontsize": 9.3, "fontweight": "bold", "pad": 5}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.06, 6.5), dpi=DPI, facecolor="white")
        axes = figure.subplots(2, 3, gridspec_kw={"wspace": 0.03, "hspace": 0.1}).flat
        figure.subplots_adjust(0.01, 0.01, 0.99, 0.96)
        for each, (label, pixels) in zip(axes, {"Source, enlarged": source, "Truth": made.sharp, **shown}.items()):
            each.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest", extent=(0, SIDE, SIDE, 0))
            each.set_title(label, loc="left", **title)
            if label in shown:
                wrong = known & (world.judge.verdict(pixels) != made.labels)
                each.set_title(f"{wrong.sum() / known.sum():.0%} wrong", loc="right", color=_WRONG, **title)
                outline(each, wrong)
        for each in figure.axes:
            each.axis("off")
        figure.savefig(file)


def outline(axes: Any, wrong: np.ndarray) -> None:
    """Tint the patches that are `wrong` (h, w), and draw a line around where they lie together."""
    fine = np.pad(wrong.repeat(PATCH, 0).repeat(PATCH, 1), 1)
    middles = np.arange(-0.5, SIDE + 1)
    axes.contourf(middles, middles, fine, (0.5, 1.5), colors=_WRONG, alpha=0.13)
    axes.contour(middles, middles, fine, (0.5,), colors=_WRONG, linewidths=1.6)


def typical(evidence: Evidence) -> int:
    """The number of the picture whose rates are nearest to the means of all."""
    rates = [evidence.found[arm]["rate"] for arm in PANELS if arm in evidence.found]
    return int(sum(np.abs(each[0] - each.mean()) for each in rates).argmin())
