"""The table of options: what is allowed, and one line for what is not."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_dinotile import DinotileError
from lib_dinotile.settings import DEFAULTS, REGIONS, VERSION, Generation, Settings, Txt2Img

TILE = "0 (automatic) or a whole number from 64 to 2048, a multiple of 8"


def test_defaults_are_allowed():
    for table in (Settings, Generation):
        for option in table.table():
            assert option.check(option.default) == option.default
    assert Settings.parse({}) == Settings()


def test_every_option_says_what_it_is():
    for table in (Settings, Generation):
        for option in table.table():
            assert option.label and option.help.endswith((".", ";")) and option.allowed
            assert (option.minimum is None) == (option.type not in (int, float))


def test_infotext_keys_are_unique_and_name_the_extension():
    keys = [option.infotext for option in Settings.table() if option.infotext]
    assert len(set(keys)) == len(keys)
    assert VERSION not in keys and all(key.startswith(f"{VERSION} ") for key in keys)


@pytest.mark.parametrize(
    "values, line",
    [
        ({"scal": 2}, "'scal' is not an option of DINO Tile: did you mean 'scale'?"),
        ({"scale": 9}, "scale: 9 is not allowed, give a number from 1 to 8"),
        ({"scale": "2"}, "scale: '2' is not allowed, give a number from 1 to 8"),
        ({"scale": True}, "scale: True is not allowed, give a number from 1 to 8"),
        ({"scale": None}, "scale: None is not allowed, give a number from 1 to 8"),
        ({"scale": math.nan}, "scale: nan is not allowed, give a number from 1 to 8"),
        (
            {"tile": 500},
            f"tile: 500 is not allowed, give {TILE}",
        ),
        (
            {"tile": 512.5},
            f"tile: 512.5 is not allowed, give {TILE}",
        ),
        ({"order": "spiral"}, "order: 'spiral' is not allowed, give one of chess, linear, fused, none"),
        ({"adapter": 3}, "adapter: 3 is not allowed, give text"),
        ({"enabled": 1}, "enabled: 1 is not allowed, give true or false"),
        ({"tile": 64, "overlap": 40}, "overlap: 40 is not allowed with tile 64, give at most 32"),
        ({"regions": 13}, f"regions: 13 is not allowed, give one of {', '.join(REGIONS)}"),
        ({"regions": 2.0000001}, f"regions: 2.0000001 is not allowed, give one of {', '.join(REGIONS)}"),
        ({"regions": True}, f"regions: True is not allowed, give one of {', '.join(REGIONS)}"),
        ({"region_prompts": "fur"}, "region_prompts: 'fur' is not a line like \"A: tabby fur\""),
        ({"region_prompts": "M: fur"}, "region_prompts: 'M: fur' is not a line like \"A: tabby fur\""),
        ({"region_prompts": "A: fur\na: wall"}, "region_prompts: region A has two lines, give it one"),
        ({"regions": 3, "region_prompts": "D: fur"}, "region_prompts: there is no region D where regions is 3"),
        ({"start": 0.5, "end": 0.25}, "start: 0.5 is not allowed with end 0.25, give at most 0.25"),
    ],
)
def test_what_is_not_allowed_is_refused_with_one_line(values, line):
    with pytest.raises(DinotileError) as error:
        Settings.parse(values)
    assert str(error.value) == line
    assert error.value.status_code == 422 and error.value.detail == line


@pytest.mark.parametrize(
    "values, lines",
    [
        ({"tile": 100, "overlap": 7}, ("tile: 100 is not", "overlap: 7 is not")),
        (
            {"scal": 2, "tile": 100, "x": 1, "y": 2},
            ("'scal' is not an option", "tile: 100", "'x' is not", "'y' is not"),
        ),
        ({"tile": 64, "overlap": 64, "start": 0.5, "end": 0.2}, ("overlap: 64 is not allowed with tile 64", "start:")),
        (
            {"guidance": 9, "start": 0.5, "end": 0.2, "tile_prompts": "fur"},
            ("guidance: 9", "tile_prompts: 'f", "start:"),
        ),
        ({"tile_prompts": "x", "region_prompts": "x"}, ("tile_prompts: 'x'", "region_prompts: 'x'")),
    ],
)
def test_all_faults_are_named_at_once(values, lines):
    with pytest.raises(DinotileError) as error:
        Settings.parse(values)
    told = str(error.value)
    assert told.isprintable() and all(re.search(rf"(^|; ){re.escape(line)}", told) for line in lines), told
    assert told.count("the options are enabled") == ("x" in values)


def test_a_fault_is_not_held_against_another_option():
    with pytest.raises(DinotileError) as error:
        Settings.parse({"guidance_start": 0.9, "guidance_end": 3})  # its default is 0.7
    assert str(error.value) == "guidance_end: 3 is not allowed, give a number from 0 to 1"


def test_the_ui_is_answered_with_its_labels():
    values = {"tile": 100, "overlap": 40, "start": 0.5, "end": 0.2, "region_prompts": "D: fur", "regions": "3"}
    with pytest.raises(DinotileError) as error:
        Settings.parse(values, labels=True)
    label = {option.name: option.label for option in Settings.table()}
    tile, regions, first = str(error.value).split("; ")
    assert tile == f"{label['tile']}: 100 is not allowed, give {TILE}"
    assert first == f"{label['start']}: 0.5 is not allowed with {label['end']} 0.2, give at most 0.2", first
    assert regions == f"{label['region_prompts']}: there is no region D where {label['regions']} is 3"


def test_regions_are_how_many_and_their_words_are_lines():
    assert Settings().region_count is None and Settings.parse({"regions": 4}).region_count == 4
    assert Settings.parse({"regions": 4.0}) == Settings.parse({"regions": "4"})
    named = Settings(region_prompts="B: stone; a: b:c; soft\nC:\n")
    assert named.region_words == {"B": "stone", "A": "b:c; soft"}
    assert Settings.parse({"regions": 0, "region_prompts": "A: fur"}).region_words == {}
    assert Settings(region_prompts="A: a; b: wall; it is").region_words == {"A": "a", "B": "wall; it is"}


def test_a_whole_float_is_an_int():
    assert Settings.parse({"tile": 512.0}).tile == 512 and type(Settings.parse({"tile": 512.0}).tile) is int
    assert type(Settings.parse({"scale": 2}).scale) is float


@given(
    st.dictionaries(
        st.sampled_from([option.name for option in Settings.table()]) | st.text(),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()),
    )
)
def test_any_dict_gives_settings_or_one_line(values):
    try:
        parsed = Settings.parse(values)
    except DinotileError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert Settings.parse({name: getattr(parsed, name) for name in values}) == parsed


def another(option):
    """A value that is allowed, and not the default."""
    if option.type is bool:
        return not option.default
    if option.type is str:
        text = "A: fur" if option.name == "region_prompts" else "1: a cat"
        return next((choice for choice in option.choices or () if choice != option.default), text)
    step = option.step or 1
    near = option.default + step, option.default - step
    return next(value for value in (*near, option.maximum) if option.minimum <= value <= option.maximum)


@pytest.mark.parametrize("table", [Settings, Generation])
def test_text_reads_back(table):
    for option in table.table():
        edges = () if option.type is bool else option.choices or (option.minimum, option.maximum)
        for value in (option.default, another(option), *edges):
            assert value is None or option.parse(str(value)) == value
    with pytest.raises(DinotileError):
        Settings.option("tile").parse("many")


def test_png_info_has_what_differs_from_the_defaults_and_had_a_part_in_the_image():
    assert Settings(enabled=True).infotext == {"DINO Tile": DEFAULTS}
    plain, adapted = Settings(scale=3.0, strength=0.5).infotext, Settings(adapter="fur", strength=0.5).infotext
    assert plain == {"DINO Tile": DEFAULTS, "DINO Tile scale": 3.0}
    assert adapted == {"DINO Tile": DEFAULTS, "DINO Tile adapter": "fur", "DINO Tile strength": 0.5}
    assert next(iter(plain)) == "DINO Tile"  # is read by people, too
    assert Txt2Img(enabled=True).infotext == {"DINO Tile": DEFAULTS, "DINO Tile denoise": 0.3}
    values = {option.name: another(option) for option in Settings.table()}
    values |= {"target": "scale", "seams": "bands", "guard": "retry", "captions": "CLIP", "tile_prompts": "1: fur"}
    everything = Settings.parse({**values, "start": 0.0, "regions": "3", "guidance_start": 0.1, "guard_seeds": 3})
    keys = {option.infotext for option in Settings.table() if option.infotext}
    lacking = {"DINO Tile target", "DINO Tile longest side", "DINO Tile start", "DINO Tile guard"}
    assert set(everything.infotext) == {"DINO Tile"} | (keys - lacking)


def test_defaults_are_those_of_their_version():
    """Images leave them out. If one has to change, raise DEFAULTS, and read images of version 1 by these."""
    first = {
        "target": "scale",
        "scale": 2.0,
        "longest": 2048,
        "upscaler": "Lanczos",
        "tile": 0,
        "overlap": 64,
        "order": "chess",
        "seams": "none",
        "seam_denoise": 0.25,
        "seam_width": 64,
        "colour": "wavelet",
        "flat": 0.0,
        "tile_prompt": "",
        "tile_prompt_mode": "follow",
        "captions": "None",
        "tile_prompts": "",
        "regions": "automatic",
        "region_prompts": "",
        "region_share": 0.1,
        "adapter": "None",
        "strength": 1.0,
        "start": 0.0,
        "end": 1.0,
        "guidance": 1.0,
        "guidance_start": 0.0,
        "guidance_end": 0.7,
        "every": 1,
        "views": 1,
        "distance": "patches",
        "layer": 2,
        "decoder": "Automatic",
        "guard": "retry",
        "guard_seeds": 2,
        "guard_weaker": 1,
        "guard_budget": 0.5,
        "guard_strictness": 6.0,
        "head": "Automatic",
        "encoder": "Automatic",
        "patches": 64,
        "windows": 1,
        "denoise": 0.3,
        "steps": 0,
    }
    assert DEFAULTS == 1
    now = {option.name: option.default for option in Txt2Img.table()}
    assert {name: now[name] for name in first} == first
