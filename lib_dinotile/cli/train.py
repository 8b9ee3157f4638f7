"""python -m lib_dinotile train --images FOLDER --out FILE"""

from __future__ import annotations

import argparse
from pathlib import Path

from lib_dinotile import DinotileError
from lib_dinotile.cli.common import add_options, parse_options, quiet_transformers
from lib_dinotile.cli.files import check_given
from lib_dinotile.train.options import Training


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    command.add_argument(
        "--images", required=True, metavar="FOLDER", help="photos, with captions in .txt files or none"
    )
    command.add_argument("--out", required=True, metavar="FILE", help="the .safetensors file to write")
    command.add_argument(
        "--head",
        action="store_true",
        help="train only the restoration head; an adapter trained into the same FILE then uses it",
    )
    command.add_argument("--resume", action="store_true", help="go on from the checkpoint beside FILE")
    add_options(command, Training)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Trains an adapter, or restoration heads."""
    check_given(images=arguments.images, out=arguments.out)
    try:
        from lib_dinotile.train.command import train
    except ModuleNotFoundError as error:
        raise DinotileError(f"training needs {error.name}: pip install '.[train]'") from error

    quiet_transformers()
    train(
        parse_options(Training, arguments),
        Path(arguments.images),
        Path(arguments.out),
        arguments.head,
        arguments.resume,
    )
