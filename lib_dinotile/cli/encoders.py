"""python -m lib_dinotile encoders [--json]"""

from __future__ import annotations

import argparse
import dataclasses
import json

from lib_dinotile.dino.calibrated import Store
from lib_dinotile.dino.locks import models_folder
from lib_dinotile.dino.state import states


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    command.add_argument("--json", action="store_true", help="as one line of JSON, for programs")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """A table of the encoders, and where they are kept."""
    folder = models_folder("encoders")
    found = states(folder, Store())
    if arguments.json:
        print(json.dumps([dataclasses.asdict(state) for state in found]))
        return
    rows = [("encoder", "installed", "calibrated", "")]
    for state in found:
        scales = ", ".join(f"{scale:g}x" for scale in state.calibrated)
        rows.append((state.name, _yes(state.installed), scales or "no", "Automatic" if state.automatic else ""))
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    for row in rows:
        print("".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip())
    print(f"kept in {folder}")


def _yes(value: bool) -> str:
    return "yes" if value else "no"
