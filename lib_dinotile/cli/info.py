"""python -m lib_dinotile info FILE [--json]"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lib_dinotile.condition.description import describe, lines


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    command.add_argument("FILE", help="an adapter, or restoration heads")
    command.add_argument("--json", action="store_true", help="as one line of JSON, for programs")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the description of a file of weights."""
    description = describe(Path(arguments.FILE))
    print(json.dumps(description) if arguments.json else "\n".join(lines(description)))
