"""The accordion, built by the gradio that is there: a control for each option, which gives and takes its values."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from lib_dinotile import DinotileError, presets
from lib_dinotile.dino.regions import Regions
from lib_dinotile.engine.host import Interrupted
from lib_dinotile.lines import LETTERS
from lib_dinotile.settings import AUTOMATIC, CALIBRATED, NONE, Settings, Txt2Img
from tests.conftest import import_of_webuis
from tests.stand_in import webui

gr = import_of_webuis("gradio")

FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""The WebUI's own, of PNG info."""


@pytest.fixture
def accordion(tmp_path: Path) -> Iterator[types.ModuleType]:
    """The module, with no more of a WebUI than it needs."""

    @contextlib.contextmanager
    def input_accordion(value: bool, label: str, elem_id: str) -> Iterator[gr.Checkbox]:
        with gr.Accordion(label, open=value):
            yield gr.Checkbox(value, elem_id=elem_id)

    with webui():
        paths, shared, ui_common, ui_components = (
            importlib.import_module(f"modules.{name}") for name in ("paths", "shared", "ui_common", "ui_components")
        )
        shared.cmd_opts = types.SimpleNamespace()
        shared.sd_upscalers = [types.SimpleNamespace(name=name) for name in ("None", "Lanczos")]
        paths.models_path = str(tmp_path)
        infotext_utils = importlib.import_module("modules.infotext_utils")
        infotext_utils.parse_generation_parameters = lambda text, skipped: {
            name: json.loads(value) if value.startswith('"') else value for name, value in FIELD.findall(text)
        }
        ui_common.create_refresh_button = lambda *_: gr.Button("refresh")
        ui_components.InputAccordion = input_accordion
        importlib.import_module("modules.call_queue").queue_lock = contextlib.nullcontext()
        yield importlib.import_module("lib_dinotile.webui.accordion")


TABLES = {"txt2img": Txt2Img, "img2img": Settings}


@pytest.mark.parametrize("tab", TABLES)
def test_every_option_has_a_control_with_its_default(accordion, tab: str):
    table = TABLES[tab]
    with gr.Blocks():
        components = accordion.build(tab)
    options = {option.name: option for option in table.table()}
    assert list(components) == list(options)
    for name, component in components.items():
        option = options[name]
        assert component.value == option.default, name
        assert component.elem_id == f"{'txt2img_' if tab == 'txt2img' else ''}dinotile_{name}"
        if name == "enabled":
            continue
        assert (component.label, component.info) == (option.label, option.help)
        if isinstance(component, gr.Slider):
            assert (component.minimum, component.maximum, component.step) == (
                option.minimum if option.zero is None else 0,
                option.maximum,
                option.step,
            )
        if isinstance(component, gr.Dropdown):
            values = [choice[1] if isinstance(choice, (tuple, list)) else choice for choice in component.choices]
            assert option.default in values, name
    values = (True, *(components[name].value for name in list(options)[1:]))
    assert accordion.settings_from(values, {}, table) == table(enabled=True)
    fields = accordion.infotext_fields(components, tab)
    assert fields[0][0] is components["enabled"] and all(component in components.values() for component, _ in fields)


@pytest.mark.parametrize(
    "given, on",
    [
        ({}, False),
        ({"scale": 3}, True),
        ({"enabled": True}, True),
        ({"enabled": False, "scale": 3}, False),
        ({"enabled": False}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("tab", TABLES)
def test_a_dict_that_says_anything_switches_it_on(accordion, tab: str, given: dict, on: bool):
    settings = accordion.settings_from((given, None, 3), {}, TABLES[tab])
    assert settings == TABLES[tab](**{**given, "enabled": on})


def test_lists_begin_with_what_is_always_there(accordion):
    assert accordion.adapter_choices() == [NONE]
    assert accordion.head_choices() == [AUTOMATIC, NONE, CALIBRATED]
    assert accordion.encoder_choices()[:2] == [AUTOMATIC, "mini"]
    assert accordion.CHOICES["upscaler"]() == ["None", "Lanczos", "Nearest"]


@pytest.mark.parametrize("tab", TABLES)
def test_a_preset_sets_its_controls_and_says_what_to_set_besides(accordion, tab: str):
    with gr.Blocks() as page:
        components = accordion.build(tab)
    names = {component._id: name for name, component in components.items()}
    if isinstance(page.fns, dict):  # gradio 4
        wired = [
            (each.fn, [output._id for output in each.outputs]) for each in page.fns.values() if each.name == "choose"
        ]
    else:
        wired = [(each.fn, one["outputs"]) for each, one in zip(page.fns, page.dependencies) if each.name == "choose"]
    ((choose, (_, *outputs)),) = wired
    assert [names[number] for number in outputs] == list(presets.values("Photo", TABLES[tab]))
    for preset in presets.PRESETS:
        line, *updates = choose(preset.name)
        assert preset.name in line and preset.hint in line
        found = {names[number]: update["value"] for number, update in zip(outputs, updates)}
        assert found == presets.values(preset.name, TABLES[tab])


def of_images(*texts: str | None) -> str:
    """What a page keeps of its images."""
    told = (
        f"a cat\nSteps: 4, DINO Tile tile prompts: {json.dumps(text)}" if text else "a cat\nSteps: 4" for text in texts
    )
    return json.dumps({"infotexts": list(told)})


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_captions_are_those_of_the_last_image_of_the_own_page(accordion, tab: str):
    """The WebUI is one process for all its users."""
    with gr.Blocks() as page:
        accordion.img2img.on_component(gr.State(), elem_id="mode_img2img")
        prompts = accordion.build(tab)["tile_prompts"]
        information = gr.Textbox(visible=False)
        accordion.captions[tab].on_component(information, elem_id=f"generation_info_{tab}")
    if isinstance(page.fns, dict):  # gradio 4
        found = [(each.fn, each.inputs) for each in page.fns.values() if each.outputs == [prompts]]
    else:
        wired = zip(page.fns, page.dependencies)
        found = [
            (each.fn, [page.blocks[number] for number in one["inputs"]])
            for each, one in wired
            if one["outputs"] == [prompts._id]
        ]
    ((copy, given),) = found
    assert given == [information]
    mine, yours = of_images("1: a dog", '1: a cat\n2: "soft", grey fur'), of_images("1: a letter: secret")
    assert copy(mine) == '1: a cat\n2: "soft", grey fur'
    assert copy(yours) == "1: a letter: secret"
    assert copy(of_images("1: a dog", None)) == ""
    for nothing in (None, "", "{}"):
        assert copy(nothing) == gr.update()


def test_the_folder_of_a_preview_is_made(accordion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, picture = tmp_path / "temporary", Image.new("RGB", (8, 8))
    preview = importlib.import_module("lib_dinotile.webui.preview")
    monkeypatch.setattr(preview.ui_tempdir, "on_tmpdir_changed", folder.mkdir, raising=False)
    line, shown, *_ = preview.answer(lambda: preview.PreviewResult("a line", picture, None, {}))
    assert line["value"] == "<p>a line</p>" and shown["value"] is picture and folder.is_dir()


HALVES = Regions(torch.tensor([[0, 0, 1], [0, 0, 1]]), (90, 60))
"""A, the left two thirds of the canvas, and B."""


def test_fields_are_those_of_the_regions_with_their_words(accordion):
    naming = importlib.import_module("lib_dinotile.webui.regions")
    with gr.Blocks():
        assert len(naming.Naming("x_").outputs) == len(naming.Naming.updates(HALVES, {})) == 3 + len(LETTERS)
    _, shown, column, *fields = naming.Naming.updates(HALVES, {"B": "wall"})
    assert column["visible"] and [field["visible"] for field in fields] == [True, True] + [False] * 10
    assert [(field["label"], field["value"]) for field in fields[:2]] == [
        ("A, 67% of the picture", ""),
        ("B, 33% of the picture", "wall"),
    ]
    assert torch.equal(shown.regions.labels, HALVES.labels)
    hidden = naming.Naming.updates(None, {})
    assert hidden[1] is None and not any(update["visible"] for update in hidden[2:])


@pytest.mark.parametrize("scale", [1, 50])
def test_a_click_says_in_which_region_a_place_is(accordion, scale: int):
    """Also where the canvas is so large that its map is smaller."""
    naming = importlib.import_module("lib_dinotile.webui.regions")
    shown = naming.KeptRegions.of(Regions(HALVES.labels, (90 * scale, 60 * scale)))
    ratio = min(scale, 2048 / 90)

    def at(x: float, y: float) -> str:
        return naming.where(shown, types.SimpleNamespace(index=(x * ratio, y * ratio)))

    assert "region <b>A</b>" in at(10, 50) and "region <b>B</b>" in at(80, 10)
    assert at(10, 61) == at(91, 10) == ""  # the legend
    assert naming.where(None, types.SimpleNamespace(index=(1, 1))) == ""


def test_an_interrogator_is_asked_once_for_each_region_without_words(accordion, monkeypatch: pytest.MonkeyPatch):
    naming, asked = importlib.import_module("lib_dinotile.webui.regions"), []

    def caption(images):
        asked.extend(images)
        return ["a wall"] * len(images)

    monkeypatch.setattr(naming, "interrogators", lambda: {"Stub": caption})
    source = Image.new("RGB", (45, 30), "red")
    source.paste("blue", (30, 0, 45, 30))
    assert naming.ask("Stub", source, HALVES, {"A": "fur"}) == {"A": "fur", "B": "a wall"}
    assert [image.getcolors() for image in asked] == [[(15 * 15, (0, 0, 255))]]


def test_what_was_interrupted_before_does_not_stop_an_interrogator_but_what_is_now_does(accordion, monkeypatch):
    naming = importlib.import_module("lib_dinotile.webui.regions")
    state = types.SimpleNamespace(interrupted=True, skipped=True, stopping_generation=True, textinfo="before")
    monkeypatch.setattr(naming, "shared", types.SimpleNamespace(state=state))

    def caption(images):
        assert not (state.interrupted or state.skipped or state.stopping_generation)
        state.textinfo = "DINO Tile: ..."
        if len(images) > 1:
            raise Interrupted
        return ["a wall"]

    monkeypatch.setattr(naming, "interrogators", lambda: {"Stub": caption})
    before, source = dict(vars(state)), Image.new("RGB", (45, 30))
    assert naming.ask("Stub", source, HALVES, {"A": "fur"}) == {"A": "fur", "B": "a wall"}
    assert vars(state) == before
    with pytest.raises(DinotileError, match=r"^captions: Stub was stopped$"):
        naming.ask("Stub", source, HALVES, {})
    assert vars(state) == before
    assert naming.lines({"B": "a wall", "A": "fur", "C": ""}) == "A: fur\nB: a wall"


def test_any_number_of_pages_shows_how_far_it_is(accordion):
    """Also at once, where gradio by default lets one wait for the other."""
    with gr.Blocks() as page:
        accordion.build("img2img")
    functions = page.fns.values() if isinstance(page.fns, dict) else page.fns
    limits = [getattr(each, "concurrency_limit", None) for each in functions if each.name in ("start", "follow")]
    assert limits == [None] * 4


def fields_of(accordion: types.ModuleType, tab: str) -> tuple[dict, list]:
    """Controls by option, and which of them is pasted what."""
    with gr.Blocks():
        components = accordion.build(tab)
    return components, accordion.infotext_fields(components, tab)


def pasted(components: dict, fields: list, info: dict) -> dict:
    """Values by option that PNG info sets."""
    names = {id(component): name for name, component in components.items()}
    found = {names[id(each)]: key(info) if callable(key) else info.get(key) for each, key in fields}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("made", TABLES)
@pytest.mark.parametrize("tab", TABLES)
def test_png_info_of_either_tab_sets_both_and_switches_its_own_on(accordion, made: str, tab: str):
    settings = TABLES[made](enabled=True, scale=3.0, guard="report", colour="AdaIN")
    if made == "txt2img":
        settings = dataclasses.replace(settings, denoise=0.45, steps=12)
    found = pasted(*fields_of(accordion, tab), settings.infotext)
    assert found["enabled"] == (made == tab)
    assert (found["scale"], found["guard"], found["colour"]) == (3.0, "report", "AdaIN")
    if tab == made == "txt2img":
        assert (found["denoise"], found["steps"]) == (0.45, 12)
    if made == tab:
        assert TABLES[tab].parse(found) == settings
    assert not pasted(*fields_of(accordion, tab), {"Steps": 20}).pop("enabled")


OLD = {
    "img2img": (
        "DINO Tile target: scale, DINO Tile scale: 3.0, DINO Tile upscaler: Lanczos, DINO Tile tile size: 512, "
        "DINO Tile overlap: 64, DINO Tile order: chess, DINO Tile seams: bands, DINO Tile seam denoise: 0.25, "
        "DINO Tile seam width: 64, DINO Tile colour: AdaIN, DINO Tile flat: 0.0, DINO Tile adapter: None, "
        "DINO Tile guidance: 1.0, DINO Tile guidance start: 0.0, DINO Tile guidance end: 0.7, "
        "DINO Tile guidance every: 1, DINO Tile guidance views: 1, DINO Tile guidance distance: patches, "
        "DINO Tile guidance layer: 2, DINO Tile guidance decoder: approximate, DINO Tile guard: report, "
        "DINO Tile guard threshold: 6.0, DINO Tile head: calibrated, DINO Tile encoder: facebook/dinov2-small, "
        "DINO Tile patches: 64, DINO Tile windows: 1"
    ),
    "txt2img": (
        "DINO Tile target: longest side, DINO Tile longest side: 1024, DINO Tile upscaler: Lanczos, "
        "DINO Tile tile size: 0, DINO Tile overlap: 64, DINO Tile order: chess, DINO Tile seams: none, "
        "DINO Tile colour: wavelet, DINO Tile flat: 0.0, DINO Tile adapter: None, DINO Tile guidance: 0.0, "
        "DINO Tile guard: off, DINO Tile denoise: 0.3, DINO Tile steps: 0"
    ),
}
"""PNG info of images from before its version, with all options that had a part in them."""
MADE = {
    "img2img": Settings(
        scale=3.0,
        tile=512,
        seams="bands",
        colour="AdaIN",
        guard="report",
        decoder="approximate",
        head="calibrated",
        encoder="facebook/dinov2-small",
    ),
    "txt2img": Txt2Img(target="longest side", longest=1024, guidance=0.0, guard="off"),
}
"""What they were made with."""


@pytest.mark.parametrize("tab", TABLES)
def test_images_without_a_version_are_read_as_ever(accordion, tab: str):
    info = dict(FIELD.findall(OLD[tab]))
    for place in TABLES:
        found = pasted(*fields_of(accordion, place), info)
        assert found.pop("enabled") == (place == tab)
        if place == tab:
            read = TABLES[tab].parse({name: str(value) for name, value in found.items()}, texts=True)
            assert read == MADE[tab]
            assert set(MADE[tab].infotext) - {"DINO Tile"} < set(info)  # an image says less of it now


@pytest.mark.parametrize("tab", TABLES)
def test_an_image_with_defaults_that_are_not_known_sets_nothing_and_says_why(accordion, monkeypatch, tab: str):
    told, info = [], {**TABLES[tab](scale=3.0).infotext, "DINO Tile": "2"}
    monkeypatch.setattr(accordion.gr, "Warning", told.append)
    for _, key in fields_of(accordion, tab)[1]:
        with pytest.raises(DinotileError, match=r"made with version 2 of DINO Tile's defaults.*update it") as error:
            key(info)
    assert told == [str(error.value)]  # the WebUI logs what they raise


def test_a_size_that_txt2img_has_not_becomes_its_default(accordion):
    info = Settings(enabled=True, target="img2img size").infotext
    assert pasted(*fields_of(accordion, "txt2img"), info)["target"] == "scale"


def test_buttons_of_the_webui_carry_the_same_controls_from_tab_to_tab(accordion):
    """It pairs the fields with the names of the tab that it comes from, one by one."""
    of = {tab: fields_of(accordion, tab) for tab in TABLES}
    names = [key for _, key in of["txt2img"][1] if isinstance(key, str)]
    paired = {
        tab: [each.elem_id.partition("dinotile_")[2] for each, key in fields if isinstance(key, str) and key in names]
        for tab, (_, fields) in of.items()
    }
    assert paired["txt2img"] == paired["img2img"] and len(names) > 10
