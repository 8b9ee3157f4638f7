"""The accordion, built by the gradio that is there: a control for each option, which gives and takes its values."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib_dinotile.settings import AUTOMATIC, CALIBRATED, NONE, Settings
from tests.stand_in import webui

gr = pytest.importorskip("gradio", reason="no gradio here, beside the WebUIs' packages there is one")

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
        yield importlib.import_module("lib_dinotile.webui.accordion")


def test_every_option_has_a_control_with_its_default(accordion):
    with gr.Blocks():
        components = accordion.build()
    options = {option.name: option for option in Settings.table()}
    assert list(components) == list(options)
    for name, component in components.items():
        option = options[name]
        assert component.value == option.default, name
        assert component.elem_id == f"dinotile_{name}"
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
    assert accordion.settings_from((True, *(components[name].value for name in list(options)[1:])), {}) == Settings(
        enabled=True
    )
    fields = accordion.infotext_fields(components)
    assert fields[0][0] is components["enabled"] and all(component in components.values() for component, _ in fields)


def test_lists_begin_with_what_is_always_there(accordion):
    assert accordion.adapter_choices() == [NONE]
    assert accordion.head_choices() == [AUTOMATIC, NONE, CALIBRATED]
    assert accordion.encoder_choices()[:2] == [AUTOMATIC, "mini"]
    assert accordion.CHOICES["upscaler"]() == ["None", "Lanczos", "Nearest"]


def of_images(*texts: str | None) -> str:
    """What a page keeps of its images."""
    told = (
        f"a cat\nSteps: 4, DINO Tile tile prompts: {json.dumps(text)}" if text else "a cat\nSteps: 4" for text in texts
    )
    return json.dumps({"infotexts": list(told)})


def test_captions_are_those_of_the_last_image_of_the_own_page(accordion):
    """The WebUI is one process for all its users."""
    with gr.Blocks() as page:
        accordion.img2img.on_component(gr.State(), elem_id="mode_img2img")
        prompts = accordion.build()["tile_prompts"]
        information = gr.Textbox(visible=False)
        accordion.img2img.on_component(information, elem_id="generation_info_img2img")
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


def test_any_number_of_pages_shows_how_far_it_is(accordion):
    """Also at once, where gradio by default lets one wait for the other."""
    with gr.Blocks() as page:
        accordion.build()
    functions = page.fns.values() if isinstance(page.fns, dict) else page.fns
    limits = [getattr(each, "concurrency_limit", None) for each in functions if each.name in ("start", "follow")]
    assert limits == [None] * 4
