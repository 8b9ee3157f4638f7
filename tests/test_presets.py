"""Presets: values for options, one set at a time, and the recipes of the README."""

import re

import pytest

from lib_dinotile import DinotileError
from lib_dinotile import __main__ as cli
from lib_dinotile.cli import upscale
from lib_dinotile.cli.common import parse_tables
from lib_dinotile.options import Options
from lib_dinotile.presets import NAMES, PRESETS, find, values
from lib_dinotile.settings import Generation, Settings, Txt2Img
from tests.test_readme import README

TABLES = (Settings, Txt2Img, Generation)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
@pytest.mark.parametrize("table", TABLES)
def test_a_preset_is_allowed_and_sets_what_other_presets_set_to_its_default(table, preset):
    set_by_any = {name for each in PRESETS for name in each.values}
    found = values(preset.name, table)
    own = {**preset.values, **preset.alone}
    assert set(found) == {row.name for row in table.table()} & (set_by_any | preset.alone.keys())
    for name, value in found.items():
        row = table.option(name)
        assert value == row.check(own.get(name, row.default)), name
    assert own.keys() <= {row.name for each in TABLES for row in each.table()}
    table.parse(found)


@pytest.mark.parametrize("table", [Settings, Txt2Img])
def test_a_request_names_a_preset_and_what_it_gives_besides_comes_first(table):
    anime = table.parse({"preset": "Anime"})
    assert (anime.flat, anime.guard, anime.tile) == (0.9, "blend back", 0)
    assert table.parse({"guard": "off", "preset": "anime", "scale": 3}) == table(
        flat=0.9, guard="off", scale=3.0, **({"denoise": 0.25} if table is Txt2Img else {})
    )


@pytest.mark.parametrize("name", ["foto", "", 3, None, ["Photo"]])
def test_an_unknown_preset_is_refused_with_the_other_faults(name):
    with pytest.raises(DinotileError) as error:
        Settings.parse({"preset": name, "tile": 100})
    preset, tile = str(error.value).split("; ")
    assert preset == f"preset: {str(name)!r} is not allowed, give one of {', '.join(NAMES)}"
    assert tile.startswith("tile: 100 is not allowed")


def test_the_command_line_takes_a_preset_for_both_its_tables():
    parser = cli.Parser()
    upscale.add_arguments(parser)

    def parsed(*arguments: str) -> list[Options]:
        return parse_tables((Settings, Generation), parser.parse_args(["IN", "OUT", *arguments]))

    assert parsed() == [Settings(), Generation()]
    assert parsed("--preset", "anime", "--flat", "0.5") == [
        Settings(flat=0.5, guard="blend back"),
        Generation(denoise=0.25),
    ]
    assert parsed("--preset", "low vram", "--denoise", "0.4") == [Settings(tile=512, batch=1), Generation(denoise=0.4)]
    with pytest.raises(DinotileError, match=r"^preset: 'foto' is not allowed, give one of Photo, "):
        parsed("--preset", "foto")


def test_an_adapter_stays_but_with_the_preset_that_has_none():
    for preset in PRESETS:
        assert ("adapter" in values(preset.name, Settings)) == (preset.name == "Plain tiles")
    assert not Settings.parse({"preset": "Plain tiles"}).looks
    assert Settings.parse({"preset": "Plain tiles", "adapter": "mine"}).adapter == "mine"


def test_the_recipes_of_the_readme_are_the_presets():
    table = re.findall(
        r"^\| \*\*(.+?)\*\* \| (.*?) \| (.*?) \|$", README.split("## Presets\n")[1].split("\n## ")[0], re.M
    )
    assert [(name, hint) for name, _, hint in table] == [(preset.name, preset.hint) for preset in PRESETS]
    for name, told, _ in table:
        found = dict(re.findall(r"\*(.+?)\* ([^,]+)", told))
        rows = {row.name: row for row in Txt2Img.table()}
        chosen = {**find(name).values, **find(name).alone}
        own = {option: value for option, value in chosen.items() if option != "denoise"}
        assert found == {rows[option].label: str(value).strip("*") for option, value in own.items()}, name
