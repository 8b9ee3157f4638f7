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
from lib_dinotile.dino.checkpoint import KNOWN
from lib_dinotile.dino.regions import Regions
from lib_dinotile.engine.host import Interrupted
from lib_dinotile.lines import LETTERS
from lib_dinotile.settings import AUTOMATIC, CALIBRATED, NONE, Settings, Txt2Img
from lib_dinotile.tiling.plan import TilePlan
from tests.conftest import import_of_webuis
from tests.stand_in import webui
from tests.test_encoder import write_checkpoint

gr = import_of_webuis("gradio")

FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""The WebUI's own, of PNG info."""


@pytest.fixture
def accordion(tmp_path: Path) -> Iterator[types.ModuleType]:
    """The module, with no more of a WebUI than it needs."""

    @contextlib.contextmanager
    def input_accordion(value: bool, label: str, elem_id: str) -> Iterator[gr.Checkbox]:
        with gr.Accordion(label, open=value):
            switch = gr.Checkbox(value, elem_id=elem_id)
            switch.extra = gr.Column
            yield switch

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
    for preset in presets.PRESETS:
        line, *updates = choose(preset.name)
        assert preset.name in line and preset.hint in line
        found = {names[number]: update["value"] for number, update in zip(outputs, updates) if "value" in update}
        assert found == presets.values(preset.name, TABLES[tab])


def of_images(*texts: str | None) -> str:
    """What a page keeps of its images."""
    told = (
        f"a cat\nSteps: 4, DINO Tile tile prompts: {json.dumps(text)}" if text else "a cat\nSteps: 4" for text in texts
    )
    return json.dumps({"infotexts": list(told)})


def wired(page: gr.Blocks) -> list[tuple]:
    """(function or None, inputs, outputs) of all events of a page."""
    if isinstance(page.fns, dict):  # gradio 4
        return [(each.fn, each.inputs, each.outputs) for each in page.fns.values()]
    return [
        (each and each.fn, *([page.blocks[number] for number in one[place]] for place in ("inputs", "outputs")))
        for each, one in zip(page.fns, page.dependencies)
    ]


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_captions_are_those_of_the_last_image_of_the_own_page(accordion, tab: str):
    """The WebUI is one process for all its users."""
    with gr.Blocks() as page:
        accordion.img2img.on_component(gr.State(), elem_id="mode_img2img")
        prompts = accordion.build(tab)["tile_prompts"]
        information = gr.Textbox(visible=False)
        accordion.captions[tab].on_component(information, elem_id=f"generation_info_{tab}")
    ((copy, given),) = [(fn, inputs) for fn, inputs, outputs in wired(page) if outputs == [prompts]]
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


HIGH = "Denoising strength {} is high for an upscale: tiles may show things that are not in the image. Set it to 0.2"


@pytest.mark.parametrize("tab", TABLES)
def test_a_high_denoising_strength_is_warned_of_as_soon_as_dinotile_is_on(accordion, tab: str):
    """In img2img that of the WebUI counts, which begins at 0.75, in txt2img our own."""
    with gr.Blocks() as page:
        accordion.img2img.on_component(gr.State(), elem_id="mode_img2img")
        for _ in range(2):
            accordion.img2img.on_component(gr.Number(0, visible=False))
        components = accordion.build(tab)
        strength, area = gr.Slider(0, 1, 0.75), gr.Radio(["Whole picture", "Only masked"], type="index")
        accordion.img2img.on_component(strength, elem_id="img2img_denoising_strength")
        accordion.img2img.on_component(area, elem_id="img2img_inpaint_full_res")
        accordion.img2img.on_component(gr.Radio(["Just resize"], type="index"), elem_id="resize_mode")
        accordion.img2img.on_component(gr.Gallery(), elem_id="img2img_gallery")
        accordion.img2img.on_component(gr.Textbox(visible=False), elem_id="generation_info_img2img")
    strength = components["denoise"] if tab == "txt2img" else strength
    lines = f"{accordion.PREFIXES[tab]}notices"
    found = [(fn, inputs) for fn, inputs, outputs in wired(page) if outputs and outputs[-1].elem_id == lines]
    assert len(found) == (3 if tab == "txt2img" else 5)  # each of them changes, and a page is opened
    for update, inputs in found:
        assert inputs[:2] == [components["enabled"], strength]
        for on, denoise, warned in ((True, 0.75, True), (True, 0.51, True), (True, 0.5, False), (False, 0.75, False)):
            state, shown = update(on, denoise)
            assert shown["visible"] == warned and (HIGH.format(denoise) in shown["value"]) == warned
            assert state.split()[0] == ("on" if on else "off")
        if tab == "img2img":
            assert inputs[2] == area
            for number, inpainting in enumerate((False, False, True, True, True, False)):  # the tabs, Batch last
                for masked in (0, 1):
                    shown = update(True, 0.3, masked, number)[1]
                    assert ("the result keeps the size of the source" in shown["value"]) == (inpainting and masked)


def test_a_preview_warns_below_its_line_and_looks_refused_where_it_is(accordion):
    preview = importlib.import_module("lib_dinotile.webui.preview")
    warned = preview.PreviewResult("a line", Image.new("RGB", (8, 8)), None, {}, preview.notices(0.75, True))
    said = preview.answer(lambda: warned)[0]["value"]
    assert said.startswith("<p>a line</p><div class='warning'>") and said.count("class='warning'") == 2
    assert HIGH.format(0.75) in said and "Only masked" in said

    def refuse():
        raise DinotileError("a & b")

    assert preview.answer(refuse)[0]["value"] == "<div class='error'>a &amp; b</div>"


@pytest.mark.parametrize(
    "settings, tried, said",
    [
        ({}, False, "about 3 min, up to 5 min if the guard repaints tiles"),
        ({"guard_budget": 1.0}, False, "about 3 min, up to 6 min if the guard repaints tiles"),
        ({"guard_budget": 0.0}, False, "about 3 min"),
        ({"guard": "report"}, False, "about 3 min"),
        ({"guard": "off"}, True, "about 3 min; guidance takes extra time, known after the first run"),
        ({"guard": "off", "guidance": 0.0}, True, "about 3 min"),
    ],
)
def test_the_time_is_that_without_and_with_all_that_the_guard_may_repaint(accordion, settings, tried, said):
    speed, preview = (importlib.import_module(f"lib_dinotile.webui.{name}") for name in ("speed", "preview"))
    assert preview.duration(speed.Estimate(180.0, tried), Settings(**settings)) == said
    assert preview.duration(None, Settings(**settings)) == "time not known yet"


def test_a_run_says_more_of_the_speed_than_a_tile_that_was_tried_out(accordion, monkeypatch):
    speed = importlib.import_module("lib_dinotile.webui.speed")
    model = types.SimpleNamespace(sd_checkpoint_info=types.SimpleNamespace(filename="a.safetensors"))
    monkeypatch.setattr(speed, "_seconds", lambda model, tile, steps: 1.0 + 0.5 * steps)
    found = speed.guess(model, 2_000_000, (1000, 1000), 20)
    assert found == speed.Estimate(22.0, True)
    speed.learn_speed(model, 100.0, 1e6, 20)  # with guidance
    assert speed.guess(model, 2_000_000, (1000, 1000), 20) == speed.Estimate(200.0, False)


GRID, FIRST, SECOND = (Image.new("RGB", (8, 8), (shade,) * 3) for shade in (0, 100, 200))


@pytest.mark.parametrize(
    "results, first, number, said",
    [
        ([FIRST, SECOND], 0, -1, FIRST),
        ([FIRST, SECOND], 0, 1, SECOND),
        ([GRID, FIRST, SECOND], 1, -1, FIRST),
        ([GRID, FIRST, SECOND], 1, 2, SECOND),
        ([GRID, FIRST, SECOND], 1, 0, FIRST),
        ([GRID], 1, -1, GRID),
        ([FIRST], None, 7, FIRST),
        ([], 0, -1, "there is no result to compare yet: generate one"),
        (None, None, -1, "there is no result to compare yet: generate one"),
    ],
)
def test_the_image_that_is_open_is_compared_and_never_the_grid(accordion, results, first, number, said):
    comparison = importlib.import_module("lib_dinotile.webui.comparison")
    results = None if results is None else [(image, None) for image in results]
    information = None if first is None else json.dumps({"index_of_first_image": first})
    if isinstance(said, str):
        with pytest.raises(DinotileError, match=f"^{said}$"):
            comparison.chosen(results, information, number)
    else:
        assert comparison.chosen(results, information, number).tobytes() == said.tobytes()


def test_an_encoder_that_is_neither_installed_nor_published_is_said_to_be_missing(accordion):
    """As one that an adapter was trained with, on another machine."""
    first_minute = importlib.import_module("lib_dinotile.webui.first_minute")
    for name in ("mine", "someone/mine"):
        line, button, _ = first_minute.offered(first_minute.current(name, NONE), name)
        assert button == "" and "mine" in line and "config.json" in line, line
    line, button, name = first_minute.offered(first_minute.current(KNOWN[0], NONE), KNOWN[0])
    assert line.endswith("it is downloaded at the first run.") and button.startswith("Download ") and name == KNOWN[0]


@pytest.mark.parametrize("sizing, given", [(0, (640, 480)), (1, (70, 50))])
def test_a_preview_counts_size_and_steps_as_the_webui_does(accordion, monkeypatch, sizing: int, given: tuple):
    preview = importlib.import_module("lib_dinotile.webui.preview")
    hosts, samplers = (importlib.import_module(f"lib_dinotile.hosts.{name}") for name in ("webui", "samplers"))
    hosts.ui.sRound = lambda side: int(side) // 10 * 10
    samplers.sd_samplers_common.setup_img2img_steps = lambda job: (40, job.steps - int(10 * job.denoising_strength))
    asked = []

    class Shown:
        workload, plan = (1, 4096), types.SimpleNamespace(tile_size=(64, 64))

        def __init__(self, *arguments):
            asked.append(arguments[3])

        def semantic_map(self, source):
            return source

    for name, value in {
        "Preview": Shown, "checkpoint": lambda: None, "flat": lambda image: image, "describe": lambda *_: "a line",
        "guess": lambda model, pixels, tile, steps: asked.append(steps),
    }.items():  # fmt: skip
        monkeypatch.setattr(preview, name, value)
    img2img = {"width": 640, "height": 480, "scale": 1.5, "steps": 12, "denoise": 0.3}
    preview.show({"img2img_image": Image.new("RGB", (50, 35))}, 0, sizing, img2img, {"regions": 0})
    assert asked == [given, 10]


def test_a_preview_says_what_its_tiles_are(accordion):
    preview = importlib.import_module("lib_dinotile.webui.preview")
    for (width, height), said in (((1200, 448), "3 tiles of 512 x 448"), ((500, 200), "1 tile of 504 x 200")):
        plan = TilePlan(width, height, tile=512, overlap=64)
        shown = types.SimpleNamespace(plan=plan, settings=Settings(), workload=(len(plan), 1))
        assert preview.describe(shown, None).startswith(f"{width} x {height} pixels: {said}, time not known yet. ")


def test_whole_numbers_are_rounded_where_their_field_is_left(accordion):
    """What comes out of it is in the live tests; gradio itself minds the ends of the others."""
    for tab, table in TABLES.items():
        with gr.Blocks() as page:
            components = accordion.build(tab)
        for option in table.table():
            control = components[option.name]
            rounded = (None, [control], [control]) in wired(page)
            assert rounded == (option.type is int and option.choices is None), option.name


def test_the_list_of_encoders_says_what_is_installed_and_how_large_a_download_is(accordion, tmp_path: Path):
    """Its values, and so PNG info, the user's defaults and what the API takes, are plain names."""
    first_minute = importlib.import_module("lib_dinotile.webui.first_minute")
    write_checkpoint(tmp_path / "dinotile" / "encoders" / "dinov2-base")
    names = accordion.encoder_choices()
    assert names[:3] == [AUTOMATIC, "mini", "facebook/dinov2-base"] and len(names) == 2 + len(KNOWN)
    with gr.Blocks():
        built = accordion.build("img2img")["encoder"].choices  # the WebUI looks there for the user's default
    assert [choice[0] if isinstance(choice, (tuple, list)) else choice for choice in built] == names
    shown = first_minute.listed()
    if isinstance(built[0], str):  # gradio 3 shows values as they are
        assert shown["choices"] == names and shown["info"].startswith(Settings.option("encoder").help)
        assert " Installed: mini, dinov2-base. Downloads: small 86 to 115 MB, base 343 to 346 MB, " in shown["info"]
    else:
        assert [value for _, value in shown["choices"]] == names
        words = [word for word, _ in shown["choices"]]
        assert words[:3] == [AUTOMATIC, "mini (built in)", "dinov2-base (installed)"]
        assert "dinov2-small (download, 88 MB)" in words and "dinov2-large (download, 1218 MB)" in words


HALVES = Regions(torch.tensor([[0, 0, 1], [0, 0, 1]]), (90, 60))
"""A, the left two thirds of the canvas, and B."""


def test_fields_are_those_of_the_regions(accordion):
    naming = importlib.import_module("lib_dinotile.webui.regions")
    with gr.Blocks():
        assert len(naming.Naming("x_").outputs) == len(naming.Naming.updates(HALVES)) == 3 + len(LETTERS)
    _, shown, column, *fields = naming.Naming.updates(HALVES)
    assert column["visible"] and [field["visible"] for field in fields] == [True, True] + [False] * 10
    assert [field["label"] for field in fields[:2]] == ["A, 67% of the picture", "B, 33% of the picture"]
    assert not any("value" in field for field in fields)  # or what is typed meanwhile would be lost
    assert torch.equal(shown.regions.labels, HALVES.labels)
    hidden = naming.Naming.updates(None)
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
    (_, switch), *others = fields_of(accordion, tab)[1]
    with pytest.raises(DinotileError, match=r"made with version 2 of DINO Tile's defaults.*update it") as error:
        switch(info)
    assert told == [str(error.value)]
    assert others and not [key for _, key in others if key(info) is not None]  # the WebUI logs what a field raises


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
