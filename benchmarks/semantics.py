"""Does the result show what the source shows? python benchmarks/semantics.py [--quick] [--json] [--plot FILE]

In a closed world, where the truth is known (benchmarks/world): the hallucination rate is the share of 16-px patches
whose texture, named by a judge that nothing else uses, is not the true one. What is blurred or garbage counts as wrong.
With the features of another image, patches count where that shows another texture.
The gates (benchmarks/world/gates.py) are checked first: if one does not hold, the run is invalid and shows no rates.

Settings are the defaults, but for scale, tiles and patches, which the world dictates; restoration heads are calibrated,
by the program's own code and without labels. Arms and controls: benchmarks/arms.py; targets: benchmarks/evidence.py.

python benchmarks/semantics.py --adapter [--json] [--plot FILE] [--pictures FILE]

Also with trained adapters (benchmarks/world/weights/adapters), each by itself and on average, with controls and bounds.
With --quick only one of them.

python benchmarks/semantics.py --model FILE|FOLDER|ID --dino ID --eye ID [--adapter --adapters FILE] PHOTOS

On a real checkpoint and a folder of photos, which are shrunk and upscaled again: the likeness of the result's features
to the source's in the eyes of another encoder than the guiding one, and LPIPS to the photo.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import evidence
from benchmarks.judging import LABELLED, QUICK, REPORT_SEED, World
from benchmarks.world import gates
from benchmarks.world.guard import guard_auc
from benchmarks.world.host import GENERATION
from lib_dinotile import DinotileError
from lib_dinotile.settings import CALIBRATED


def closed_world(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures for the last line. DinotileError if the world is not valid."""
    quick = arguments.quick
    adapters = evidence.read_adapters(arguments.adapters) if arguments.adapter else {}
    if quick:
        adapters = dict(itertools.islice(evidence.trainings(adapters).items(), 1))
    world = World(QUICK if quick else GENERATION, arguments.encoder)
    figures = gates.cheap_gates(world, 6 if quick else 40, REPORT_SEED)
    gates.check({**figures, "told_rate": gates.told_rate(world, 1 if quick else 8, REPORT_SEED)})
    auc = guard_auc(world.encoder, world.heads[CALIBRATED], 4 if quick else 40, REPORT_SEED)
    found, figures = evidence.prove(world, adapters, arguments.images or (2 if quick else 12), REPORT_SEED, auc, quick)
    if arguments.plot or arguments.pictures:
        from benchmarks import evidence_plot  # matplotlib takes long to load

        if arguments.plot:
            evidence_plot.bars(figures, arguments.plot)
        if arguments.pictures:
            evidence_plot.pictures(world, found, arguments.pictures)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="?", help="with --model: a folder of photos")
    parser.add_argument("--quick", action="store_true", help="few images and steps")
    parser.add_argument("--json", action="store_true", help="one last line of JSON")
    parser.add_argument("--images", type=int, help="how many images")
    parser.add_argument("--adapter", action="store_true", help="measure the trained adapters; with --quick one of them")
    parser.add_argument(
        "--adapters", type=Path, default=evidence.ADAPTERS, help="with --adapter: their folder; with --model a file"
    )
    parser.add_argument("--encoder", default=LABELLED, help="its folder in benchmarks/world/weights")
    parser.add_argument("--plot", type=Path, help="file for a plot of the rates")
    parser.add_argument("--pictures", type=Path, help="file for a picture, upscaled in several ways")
    parser.add_argument("--model", help="a checkpoint to measure on photos, as for dinotile's command line")
    parser.add_argument("--dino", default="facebook/dinov2-small", help="with --model: the guiding encoder")
    parser.add_argument("--eye", default="facebook/dinov2-base", help="with --model: the encoder that judges")
    parser.add_argument("--config", default="", help="with --model: as for dinotile's command line")
    parser.add_argument("--denoise", type=float, default=0.35, help="with --model: denoising strength")
    parser.add_argument("--scale", type=float, default=2.0, help="with --model: how much photos are shrunk")
    parser.add_argument("--tile", type=int, default=512, help="with --model: tile size")
    parser.add_argument("--steps", type=int, default=20, help="with --model: sampling steps")
    parser.add_argument("--lpips", choices=("alex", "vgg", "none"), default="alex", help="with --model: its network")
    arguments = parser.parse_args()
    if arguments.adapter and arguments.encoder != LABELLED:
        parser.error(f"--adapter: the adapters are trained for --encoder {LABELLED}")
    if arguments.model and arguments.photos is None:
        parser.error("--model wants a folder of photos")
    if arguments.model:
        from benchmarks.semantics_photos import photos

        figures = photos(arguments)
    else:
        figures = closed_world(arguments)
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    try:
        with torch.no_grad():
            main()
    except DinotileError as error:
        sys.exit(str(error))
