"""Axes for the WebUI's X/Y/Z plot script, one for each option of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modules import scripts

from lib_dinotile import DinotileError
from lib_dinotile.options import Option
from lib_dinotile.settings import Settings
from lib_dinotile.ui.accordion import CHOICES, TITLE

ATTRIBUTE = "dinotile_axes"
"""Where the values of a plot's cell wait on its processing object."""


def _apply(option: Option) -> Callable[[Any, Any, Any], None]:
    def apply(p: Any, value: Any, values: Any) -> None:
        # A new dict: the plot copies processing objects, but not what they hold.
        setattr(p, ATTRIBUTE, {**getattr(p, ATTRIBUTE, {}), option.name: option.parse(str(value))})

    return apply


def _confirm(option: Option) -> Callable[[Any, list[Any]], None]:
    def confirm(p: Any, values: list[Any]) -> None:
        installed = CHOICES[option.name]() if option.name in CHOICES else None
        for value in values:
            parsed = option.parse(str(value))
            if installed is not None and parsed not in installed:
                raise DinotileError(f"{option.name}: {parsed!r} is not installed, give one of {', '.join(installed)}")

    return confirm


def axes(p: Any) -> Mapping[str, Any]:
    """The options that the plot sets for this cell."""
    return getattr(p, ATTRIBUTE, {})


def register() -> None:
    """Add the axes to the X/Y/Z plot script, once."""
    for data in scripts.scripts_data:
        if Path(data.path).name != "xyz_grid.py":
            continue
        module = data.module
        present = {axis.label for axis in module.axis_options}
        for option in Settings.table():
            label = f"[{TITLE}] {option.label}"
            if not option.xyz or label in present:
                continue
            choices = CHOICES.get(option.name) or (option.choices and (lambda o=option: list(o.choices)))
            axis = module.AxisOptionImg2Img(
                label,
                str if choices else option.type,
                _apply(option),
                confirm=_confirm(option),
                choices=choices or None,
            )
            module.axis_options.append(axis)
