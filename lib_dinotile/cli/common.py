"""Functions that the commands share."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib_dinotile import DinotileError, presets
from lib_dinotile.condition.conditioner import MINI
from lib_dinotile.options import Options
from lib_dinotile.settings import AUTOMATIC, CALIBRATED, NONE, Settings

WEBUI = ("enabled", "captions")
"""Options that are left out: there is nothing else to be enabled here, and there are no interrogators."""


def quiet_transformers() -> None:
    """transformers warns of what is optional, and shows bars of its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def add_options(parser: argparse.ArgumentParser, table: type[Options], names: Sequence[str] | None = None) -> None:
    for option in table.table():
        if option.name in WEBUI or (names is not None and option.name not in names):
            continue
        default = f" (default: {option.default})" if option.default != "" else ""
        flags = [f"--{option.flag or option.name.replace('_', '-')}"]
        allowed = f" {option.allowed[0].upper()}{option.allowed[1:]}" if option.allowed != "text" else ""
        text = f"{option.help}{allowed}{default}".replace("%", "%%")
        parser.add_argument(*flags, dest=option.name, metavar=option.type.__name__.upper(), help=text)


def parse_options(table: type[Options], arguments: argparse.Namespace) -> Any:
    """The options of a table; DinotileError for all that is wrong among them."""
    (parsed,) = parse_tables((table,), arguments)
    return parsed


def parse_tables(
    tables: Sequence[type[Options]], arguments: argparse.Namespace, defaults: Mapping[str, str] | None = None
) -> list[Any]:
    """The options of several tables; DinotileError for all that is wrong in any of them.

    defaults: values, by option, where neither the preset nor the user gives one.
    """
    parsed, faults, preset = [], [], getattr(arguments, "preset", None)
    for table in tables:
        names = [option.name for option in table.table()]
        values = {name: text for name, text in (defaults or {}).items() if name in names}
        given = {name: getattr(arguments, name, None) for name in names}
        try:
            if preset is not None:
                values |= {name: str(value) for name, value in presets.values(preset, table).items()}
        except DinotileError as error:
            faults.append(str(error))
        try:
            parsed.append(table.parse({**values, **{k: v for k, v in given.items() if v is not None}}, texts=True))
        except DinotileError as error:
            faults.append(str(error))
    if faults:
        raise DinotileError("; ".join(dict.fromkeys(faults)))  # a wrong preset once
    return parsed


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """While open, C libraries' messages about damaged files to the process's stderr are dropped: one line of ours
    says it."""
    if sys.stderr is None:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def adapter_files(settings: Settings) -> dict[str, Path]:
    """The adapters by name: the built-in one, and a file of the user's, whose name that of the file is."""
    known = {"mini": MINI / "adapter.safetensors"}
    if settings.adapter not in (NONE, *known):
        if not os.path.isfile(settings.adapter):
            raise DinotileError(f"adapter: there is no file {settings.adapter}")
        known[settings.adapter] = Path(settings.adapter)
    return known


def head_files(settings: Settings) -> dict[str, Path]:
    """The restoration head: on the command line its name is that of its file."""
    if settings.head in (NONE, AUTOMATIC, CALIBRATED):
        return {}
    if not os.path.isfile(settings.head):
        raise DinotileError(f"head: there is no file {settings.head}")
    return {settings.head: Path(settings.head)}
