"""python -m lib_dinotile calibrate [--dino NAME] [--scale 2] [--images FOLDER] [--out FILE]"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from lib_dinotile import DinotileError
from lib_dinotile.condition.conditioner import automatic_encoder
from lib_dinotile.dino.calibrated import Pictures, Store
from lib_dinotile.dino.calibration import FOLDS, SCALES
from lib_dinotile.dino.encoder import load_encoder
from lib_dinotile.settings import AUTOMATIC
from lib_dinotile.weights import describe, lines


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument(
        "--dino", metavar="NAME", default=AUTOMATIC, help="the encoder: a folder, a Hugging Face id, or mini"
    )
    command.add_argument(
        "--scale",
        type=float,
        choices=SCALES,
        default=2.0,
        help="how many times finer than the source the result is, as the encoder sees them (default: 2)",
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
    chosen = automatic_encoder(None) if arguments.dino == AUTOMATIC else arguments.dino
    pictures = None
    if arguments.images:
        pictures = Pictures(Path(arguments.images))
        if len(pictures) < FOLDS:
            raise DinotileError(f"{arguments.images} has {len(pictures)} pictures, give at least {FOLDS}")
    encoder = load_encoder(chosen)
    with tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}") as bar:

        def progress(text: str, share: float) -> None:
            bar.set_description(text, refresh=False)
            bar.n = round(100 * share)
            bar.refresh()

        store, out = Store(progress=progress), arguments.out and Path(arguments.out)
        if pictures is None and out is None:
            store.heads(encoder, arguments.scale)
        else:
            store.make(encoder, arguments.scale, pictures=pictures, file=out)
        bar.n = 100
    for note in store.notes:
        print(note)
    file = out or store.kept(encoder, arguments.scale)
    if file is not None:
        print("\n".join([str(file), *lines(describe(file))]))
