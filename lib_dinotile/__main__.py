"""python -m lib_dinotile upscale IN OUT, and other commands"""

from __future__ import annotations

import argparse
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from PIL import Image

from lib_dinotile import DinotileError, __version__, one_line, printable

try:
    from lib_dinotile.cli import analyze, calibrate, encoders, info, train, upscale
    from lib_dinotile.images import MAX_PIXELS, register_plugins
except KeyboardInterrupt:  # for these imports take seconds
    sys.exit(130)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 broken off, 2 bad input, 130 cancelled."""
    parser = Parser(prog="dinotile", description="Upscales images tile by tile, true to what they show.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module, text in (
        (upscale, "upscale an image or a folder of images"),
        (analyze, "show what DINO sees in an image, and how well a result agrees with it"),
        (train, "train an adapter or a restoration head"),
        (calibrate, "make an encoder's restoration heads"),
        (encoders, "show which encoders there are, and which are calibrated"),
        (info, "show what a file of weights says of itself"),
    ):
        name = module.__name__.split(".")[-1]
        command = commands.add_parser(name, help=text, description=module.run.__doc__, allow_abbrev=False)
        command.add_argument("--debug", action="store_true", help="show where in the program an error comes from")
        module.add_arguments(command)
    parsed = parser.parse_args(arguments)
    try:
        _prepare()
        parsed.run(parsed)
    except (Exception, KeyboardInterrupt) as error:
        if parsed.debug:
            traceback.print_exc()
        return _tell(error)
    return 0


def _prepare() -> None:
    """Set up what images are read with, and what is printed with."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name must not be what a run breaks off at
            stream.reconfigure(errors="backslashreplace")
    register_plugins()
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # the files are the user's own: more than Pillow reads unasked
    warnings.filterwarnings("ignore", module="PIL")
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # what is to be said of a file, one line says


def _tell(error: BaseException) -> int:
    """Says in one line what a run broke off at; gives the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("dinotile: cancelled", file=sys.stderr)
        return 130
    if isinstance(error, DinotileError):
        print(f"dinotile: {error}", file=sys.stderr)
        if isinstance(error.__cause__, KeyboardInterrupt):
            return 130
        return 2 if error.status_code < 500 else 1
    print(f"dinotile: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
