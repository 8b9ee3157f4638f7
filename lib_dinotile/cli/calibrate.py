"""python -m lib_dinotile calibrate [--dino NAME] [--scale 2] [--images FOLDER] [--out FILE]"""

from __future__ import annotations

import argparse
from pathlib import Path

from lib_dinotile import DinotileError
from lib_dinotile.cli.common import quiet_transformers
from lib_dinotile.cli.files import check_given
from lib_dinotile.condition.description import HEADS, describe, lines
from lib_dinotile.dino.calibrated import Pictures, Store
from lib_dinotile.dino.calibration import FOLDS, SCALES
from lib_dinotile.dino.checkpoint import automatic_encoder
from lib_dinotile.dino.encoder import load_encoder
from lib_dinotile.dino.locks import models_folder
from lib_dinotile.images import unread
from lib_dinotile.settings import AUTOMATIC
from lib_dinotile.weights import check_out


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    command.add_argument(
        "--dino",
        metavar="NAME",
        default=AUTOMATIC,
        help="the encoder: a folder, a Hugging Face id, or mini (default: what Automatic stands for)",
    )
    command.add_argument(
        "--scale",
        type=float,
        choices=SCALES,
        default=2.0,
        help="the scale to calibrate for (default: 2)",
    )
    command.add_argument(
        "--images", metavar="FOLDER", help="sharp pictures of your own; without it those that come with dinotile"
    )
    command.add_argument(
        "--out", metavar="FILE", help="the .safetensors file to write; without it where dinotile looks"
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Calibrates an encoder now, unless that was done; says how much nearer to sharp pictures it comes."""
    from tqdm import tqdm

    check_given(images=arguments.images, out=arguments.out)
    quiet_transformers()
    folder = models_folder("encoders")
    chosen = automatic_encoder(folder) if arguments.dino == AUTOMATIC else arguments.dino
    pictures = _pictures(Path(arguments.images)) if arguments.images else None
    out = _writable(Path(arguments.out)) if arguments.out else None
    with tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}", disable=None) as bar:

        def progress(text: str, share: float) -> None:
            bar.set_description(text, refresh=False)
            bar.n = round(100 * share)
            bar.refresh()

        store = Store(progress=progress)
        encoder = load_encoder(chosen, folder, progress=progress)
        if pictures is None and out is None:
            store.heads(encoder, arguments.scale)
        else:
            store.make(encoder, arguments.scale, pictures=pictures, file=out)
    file = out or store.kept(encoder, arguments.scale)
    if file is None:
        raise DinotileError("; ".join(store.notes), 500)
    print("\n".join([*store.notes, str(file), *lines(describe(file))]))


def _pictures(folder: Path) -> Pictures:
    if not folder.is_dir():
        raise DinotileError(f"images: {folder} is not a folder")
    if others := unread(folder.iterdir()):
        print(f"left out: {others}")
    pictures = Pictures(folder)
    if len(pictures) < FOLDS:
        raise DinotileError(f"images: {folder} has {len(pictures)} pictures, give at least {FOLDS}")
    return pictures


def _writable(out: Path) -> Path:
    """DinotileError, before any work is done, if heads cannot be written there."""
    check_out(out)
    if out.exists():
        kind = describe(out)["kind"]
        if kind != HEADS:
            raise DinotileError(f"out: {out} exists already and is {kind}: give another name")
    return out
