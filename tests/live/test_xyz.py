"""The WebUI's X/Y/Z plot over DINO Tile's options."""

from __future__ import annotations

import itertools
import re

import pytest
from adapters import Adapters
from client import SLACK, WebUI, difference, fields
from conftest import TILES
from PIL import Image
from plots import SCRIPT, Plot, run


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
    args = plot.args(x=("Adapter", [adapters.random, "None"]), y=("Tile order", ["linear"]))
    reply = run(webui, small, {**TILES, "strength": 0.5}, args)
    with_adapter, without = (fields(image.info["parameters"]) for image in reply.images[1:])
    assert with_adapter["DINO Tile strength"] == "0.5" and with_adapter["DINO Tile order"] == "linear"
    assert "DINO Tile adapter" not in without and "DINO Tile strength" not in without


def test_an_axis_turns_dino_tile_on(webui: WebUI, plot: Plot, small: Image.Image):
    grid, cell = run(webui, small, {**TILES, "enabled": False}, plot.args(x=("Scale", [1.5]))).images
    assert grid.size == cell.size == (96, 72)


def test_progress_grows_over_all_cells(webui: WebUI, plot: Plot, small: Image.Image):
    args = plot.args(x=("Tile order", ["chess", "linear"]), y=("Tile overlap", [0, 16]))
    job = webui.start(small, {**TILES, "batch": 1}, steps=20, script_name=SCRIPT, script_args=args)
    shares = [look.share for look in job.looks() if look.tiles is not None]
    assert len(job.reply().images) == 5
    assert all(later >= earlier - SLACK for earlier, later in itertools.pairwise(shares))
    assert shares[len(shares) // 4] < 0.5 < shares[len(shares) * 3 // 4] <= 1


@pytest.mark.parametrize(
    "options, axes, line",
    [
        (
            {},
            {"x": ("Tile size", [64, 96]), "y": ("Tile overlap", [16, 48])},
            "overlap: 48 is not allowed with tile 64",
        ),
        ({"end": 0.4}, {"z": ("Adapter start", [0, 0.5])}, "start: 0.5 is not allowed with end 0.4"),
        ({"overlap": 40}, {"y": ("Tile size", [96, 64])}, "overlap: 40 is not allowed with tile 64"),
        ({}, {"x": ("Tile prompt", ["a cat", "<lora:cat:1>"])}, "prompts of tiles and regions cannot load networks"),
        ({}, {"x": ("DINO encoder", ["mini", "facebook/dinov2-base"])}, "adapter '.*' reads encoder 'mini', not"),
    ],
)
def test_values_that_do_not_go_together_are_refused_before_the_first_cell(
    webui: WebUI, plot: Plot, small: Image.Image, adapters: Adapters, options, axes, line: str
):
    everything = {**TILES, "adapter": adapters.random, **options}
    refusal = webui.refusal(small, everything, script_name=SCRIPT, script_args=plot.args(**axes))
    assert re.match(line, refusal), refusal


def test_what_one_axis_sets_right_is_not_held_against_another(webui: WebUI, plot: Plot, small: Image.Image):
    args = plot.args(x=("Tile size", [64]), y=("Tile overlap", [16, 32]))
    assert len(run(webui, small, {**TILES, "overlap": 48}, args).images) == 3


@pytest.mark.parametrize("label", ["Tile order", "Tile size", "Scale", "Adapter", "Tile prompt"])
def test_an_axis_without_values_is_refused_before_the_first_cell(
    webui: WebUI, plot: Plot, small: Image.Image, label: str
):
    refusal = webui.refusal(small, TILES, script_name=SCRIPT, script_args=plot.args(x=(label, [])))
    assert refusal == f"{label}: this axis has no values, give some"


@pytest.mark.parametrize(
    "label, values, line",
    [
        ("Tile size", [96, 100], "Tile size: '?100'? is not allowed, give 0 .automatic. or a whole number"),
        ("Scale", [2, 9], "Scale: '?9.0'? is not allowed, give a number from 1 to 8"),
        (
            "Tile order",
            ["chess", "spiral"],
            "Tile order: 'spiral' is not allowed, give one of chess, linear, fused, none",
        ),
        ("Adapter", ["None", "nope"], "Adapter: 'nope' is not"),
        ("Upscaler", ["Lanczos", "Magic"], "Upscaler: 'Magic' is not"),
        ("DINO encoder", ["Automatic", "nope"], "DINO encoder: 'nope' is not"),
    ],
)
def test_a_wrong_value_is_refused_before_the_first_cell(
    webui: WebUI, plot: Plot, small: Image.Image, label: str, values, line: str
):
    refusal = webui.refusal(small, TILES, script_name=SCRIPT, script_args=plot.args(x=(label, values)))
    assert re.match(line, refusal), refusal
