"""Axes for the WebUI's X/Y/Z plot script, one for each option that changes the image."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modules import scripts

from lib_dinotile import DinotileError
from lib_dinotile.condition.adapter_file import check_encoder, read_config
from lib_dinotile.condition.conditioner import installed_weights
from lib_dinotile.options import Option
from lib_dinotile.settings import AUTOMATIC, Settings, Txt2Img
from lib_dinotile.webui import folders
from lib_dinotile.webui.accordion import CHOICES, TITLE, called, settings_from
from lib_dinotile.webui.txt2img import options_for, takeover

ATTRIBUTE = "dinotile_axes"
"""Where the values of a plot's cell wait on its processing object."""
PLOTTED = "dinotile_plotted"
"""Where all values of all axes wait on the plot's, until they are checked together."""
COSTS = {"encoder": 0.4, "adapter": 0.3, "upscaler": 0.2, "target": 0.2, "scale": 0.2, "longest": 0.2} | dict.fromkeys(
    ("guidance", "guard", "head"), 0.1
)
"""The plot changes what costs more less often. Only one encoder, one adapter and one upscaled image are kept, and no
encoder while nothing looks."""


def _apply(option: Option) -> Callable[[Any, Any, Any], None]:
    def apply(p: Any, value: Any, values: Any) -> None:
        # A new dict: the plot copies processing objects, but not what they hold.
        setattr(p, ATTRIBUTE, {**getattr(p, ATTRIBUTE, {}), option.name: option.parse(str(value))})

    return apply


def _confirm(option: Option) -> Callable[[Any, list[Any]], None]:
    def confirm(p: Any, values: list[Any]) -> None:
        if not values:
            raise DinotileError(f"{option.label}: this axis has no values, give some")
        installed = CHOICES[option.name]() if option.name in CHOICES else None
        parsed = [option.labelled.parse(str(value)) for value in values]
        for value in parsed:
            if installed is not None and value not in installed:
                raise DinotileError(f"{option.label}: {value!r} is not installed, give one of {', '.join(installed)}")
        setattr(p, PLOTTED, {**getattr(p, PLOTTED, {}), option.name: parsed})

    return confirm


def _check(p: Any) -> None:
    """DinotileError if some values do not go together, or not with what is set besides; once for a plot."""
    plotted = p.__dict__.pop(PLOTTED, None)
    if not plotted:
        return
    script = next(script for script in p.scripts.alwayson_scripts if script.title() == TITLE)
    args = tuple(p.script_args[script.args_from : script.args_to])
    adapters = installed_weights(folders.adapters())
    for values in itertools.product(*plotted.values()):
        try:
            settings = settings_from(args, dict(zip(plotted, values)), options_for(p))
            takeover(p, settings)
            if settings.adapter in adapters and settings.encoder != AUTOMATIC:
                check_encoder(read_config(adapters[settings.adapter]), settings.adapter, settings.encoder)
        except DinotileError as error:
            raise DinotileError(called(args, options_for(p))(str(error))) from error


def _label(option: Option) -> Callable[[Any, Any, Any], str]:
    def label(p: Any, axis: Any, value: Any) -> str:
        # The plot asks for its labels when it knows all axes and has made no cell.
        _check(p)
        return f"{option.label}: {round(value, 8) if isinstance(value, float) else value}"

    return label


def axes(p: Any) -> Mapping[str, Any]:
    """The options that the plot sets for this cell."""
    return getattr(p, ATTRIBUTE, {})


def register() -> None:
    """Add the axes to the X/Y/Z plot script of both tabs, once."""
    for data in scripts.scripts_data:
        if Path(data.path).name != "xyz_grid.py":
            continue
        module = data.module
        present = {axis.label for axis in module.axis_options}
        tabs = {
            module.AxisOptionTxt2Img: {option.name: option for option in Txt2Img.table()},
            module.AxisOptionImg2Img: {option.name: option for option in Settings.table()},
        }
        for kind, options in tabs.items():
            others = next(table for tab, table in tabs.items() if tab is not kind)
            for option in options.values():
                label = f"[{TITLE}] {option.label}"
                alike = option.name in others and option.choices == others[option.name].choices
                if not option.infotext or label in present or (alike and kind is module.AxisOptionTxt2Img):
                    continue
                choices = CHOICES.get(option.name) or (option.choices and functools.partial(list, option.choices))
                axis = (module.AxisOption if alike else kind)(
                    label,
                    str if choices else option.type,
                    _apply(option),
                    format_value=_label(option),
                    confirm=_confirm(option),
                    cost=COSTS.get(option.name, 0.0),
                    choices=choices or None,
                )
                module.axis_options.append(axis)
