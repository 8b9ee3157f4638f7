"""The WebUI's X/Y/Z plot over DINO Tile's options."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from adapters import Adapters
from client import Reply, WebUI, difference, fields
from conftest import TILES
from PIL import Image

SCRIPT = "x/y/z plot"


class Plot:
    """Makes the argument list of the plot script, as the WebUI describes it."""

    def __init__(self, webui: WebUI) -> None:
        scripts = webui.get("sdapi/v1/script-info").json()
        self._args = next(s["args"] for s in scripts if s["name"] == SCRIPT and s["is_img2img"])

    def args(self, **axes: tuple[str, list[Any]]) -> list[Any]:
        """axes: x, y, z -> (label of the option, values)."""
        values, dropdown = {}, set()
        for letter in "XYZ":
            label, wanted = axes.get(letter.lower(), ("Nothing", []))
            label = label if label == "Nothing" else f"[DINO Tile] {label}"
            choices = next(arg["choices"] for arg in self._args if arg["label"] == f"{letter} type")
            values[f"{letter} type"] = choices.index(label)
            values[f"{letter} values"] = ", ".join(str(value) for value in wanted)
            dropdown.add(f"{letter} values")
        values |= {"Draw legend": False, "Include Sub Images": True}
        row, seen = [], set()
        for arg in self._args:
            label = arg["label"]
            if label in dropdown and label in seen:  # of two of that name the second is the list of choices
                row.append([value for value in values[label].split(", ") if value])
            else:
                row.append(values.get(label, arg["value"]))
            seen.add(label)
        return row


@pytest.fixture(scope="module")
def plot(webui: WebUI) -> Plot:
    return Plot(webui)


def run(webui: WebUI, source: Image.Image, options: dict[str, Any], args: list[Any]) -> Reply:
    return webui.img2img(source, options, script_name=SCRIPT, script_args=args)


def test_every_cell_is_what_a_run_with_its_values_gives(
    webui: WebUI, plot: Plot, small: Image.Image, adapters: Adapters
):
    options = {**TILES, "adapter": adapters.random}
    reply = run(webui, small, options, plot.args(x=("Tile size", [64, 96]), y=("Adapter strength", [0, 1])))
    grid, *cells = reply.images
    assert grid.size == (2 * 128, 2 * 96) and len(cells) == 4
    expected = [(tile, strength) for strength in (0.0, 1.0) for tile in (64, 96)]
    for (tile, strength), cell in zip(expected, cells):
        alone = webui.img2img(small, {**options, "tile": tile, "strength": strength})
        assert difference(cell, alone.image) <= 1, (tile, strength)


def test_png_info_of_a_cell_says_only_what_had_a_part_in_it(
    webui: WebUI, plot: Plot, small: Image.Image, adapters: Adapters
):
    args = plot.args(x=("Adapter", [adapters.random, "None"]), y=("Order", ["linear"]))
    reply = run(webui, small, TILES, args)
    with_adapter, without = (fields(image.info["parameters"]) for image in reply.images[1:])
    assert with_adapter["DINO Tile strength"] == "1.0" and with_adapter["DINO Tile order"] == "linear"
    assert without["DINO Tile adapter"] == "None" and "DINO Tile strength" not in without


def test_an_axis_turns_dino_tile_on(webui: WebUI, plot: Plot, small: Image.Image):
    grid, cell = run(webui, small, {**TILES, "enabled": False}, plot.args(x=("Scale", [1.5]))).images
    assert grid.size == cell.size == (96, 72)


def test_progress_grows_over_all_cells(webui: WebUI, plot: Plot, small: Image.Image):
    args = plot.args(x=("Order", ["chess", "linear"]), y=("Overlap", [0, 16]))
    job = webui.start(small, {**TILES, "batch": 1}, steps=20, script_name=SCRIPT, script_args=args)
    shares = [look.share for look in job.looks() if look.tiles is not None]
    assert len(job.reply().images) == 5
    assert all(later >= earlier - 0.1 for earlier, later in itertools.pairwise(shares))
    assert shares[len(shares) // 4] < 0.5 < shares[len(shares) * 3 // 4] <= 1


@pytest.mark.parametrize(
    "label, values, line",
    [
        ("Tile size", [96, 100], "tile: '?100'? is not allowed, give a whole number"),
        ("Scale", [2, 9], "scale: '?9.0'? is not allowed, give a number from 1 to 8"),
        ("Order", ["chess", "spiral"], "order: 'spiral' is not allowed, give one of chess, linear, fused, none"),
        ("Adapter", ["None", "nope"], "adapter: 'nope' is not"),
        ("Upscaler", ["Lanczos", "Magic"], "upscaler: 'Magic' is not"),
        ("DINO encoder", ["Automatic", "nope"], "encoder: 'nope' is not"),
    ],
)
def test_a_wrong_value_is_refused_before_the_first_cell(
    webui: WebUI, plot: Plot, small: Image.Image, label: str, values, line: str
):
    refusal = webui.refusal(small, TILES, script_name=SCRIPT, script_args=plot.args(x=(label, values)))
    assert re.match(line, refusal), refusal
