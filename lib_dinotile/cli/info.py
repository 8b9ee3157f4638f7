"""python -m lib_dinotile info FILE [--json]"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lib_dinotile.condition.description import describe, lines


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("FILE", help="an adapter, or restoration heads")
    command.add_argument("--json", action="store_true", help="as one line of JSON, for programs")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """What a file of weights says of itself."""
    told = describe(Path(arguments.FILE))
    print(json.dumps(told) if arguments.json else "\n".join(lines(told)))
