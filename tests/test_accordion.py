"""The accordion, built by the gradio that is there: a control for each option, which gives and takes its values."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib_dinotile.settings import AUTOMATIC, CALIBRATED, NONE, Settings
from tests.stand_in import stand_in

gr = pytest.importorskip("gradio", reason="no gradio here, beside the WebUIs' packages there is one")


@pytest.fixture
def accordion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[types.ModuleType]:
    """The module, with no more of a WebUI than it needs."""

    @contextlib.contextmanager
    def input_accordion(value: bool, label: str, elem_id: str) -> Iterator[gr.Checkbox]:
        with gr.Accordion(label, open=value):
            yield gr.Checkbox(value, elem_id=elem_id)

    with stand_in("modules"):
        paths, shared, ui_common, ui_components = (
            importlib.import_module(f"modules.{name}") for name in ("paths", "shared", "ui_common", "ui_components")
        )
        shared.cmd_opts = types.SimpleNamespace()
        shared.sd_upscalers = [types.SimpleNamespace(name=name) for name in ("None", "Lanczos")]
        paths.models_path = str(tmp_path)
        ui_common.create_refresh_button = lambda *_: gr.Button("refresh")
        ui_components.InputAccordion = input_accordion
        yield importlib.import_module("lib_dinotile.webui.accordion")
        for name in [name for name in sys.modules if name.startswith(("lib_dinotile.webui", "lib_dinotile.hosts"))]:
            if "modules" in vars(sys.modules[name]) or name.startswith("lib_dinotile.webui"):
                monkeypatch.delitem(sys.modules, name)


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
    assert accordion.upscaler_choices() == ["None", "Lanczos"]


def test_any_number_of_pages_shows_how_far_it_is(accordion):
    """Also at once, where gradio by default lets one wait for the other."""
    with gr.Blocks() as page:
        accordion.build()
    functions = page.fns.values() if isinstance(page.fns, dict) else page.fns
    limits = [getattr(each, "concurrency_limit", None) for each in functions if each.name in ("start", "follow")]
    assert limits == [None] * 4
