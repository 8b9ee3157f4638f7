"""Does the result show what the source shows? python benchmarks/semantics.py [--quick] [--json] [--plot FILE]

In a closed world, where the truth is known (benchmarks/world): the hallucination rate is the share of 16-px patches
whose texture, named by a judge that nothing else uses, is not the true one. What is blurred or garbage counts as wrong.
With the features of another image, patches count where that shows another texture.
The gates (benchmarks/world/gates.py) are checked first: if one does not hold, the run is invalid and shows no rates.

Settings are the defaults, but for scale, tiles and patches, which the world dictates; restoration heads are calibrated,
by the program's own code and without labels. Arms and controls: benchmarks/arms.py; targets: benchmarks/evidence.py.

python benchmarks/semantics.py --adapter [--json] [--plot FILE] [--pictures FILE]

Also with the trained adapters of benchmarks/world, each by itself and on average, controls and bounds; --quick: one.

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

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import arms, evidence
from benchmarks.judging import LABELLED, QUICK, REPORT_SEED, World
from benchmarks.world import gates
from benchmarks.world.host import GENERATION
from lib_dinotile import DinotileError
from lib_dinotile.condition.adapter_file import check_encoder, check_fit
from lib_dinotile.condition.conditioner import to_tensor
from lib_dinotile.condition.heads import heads_for
from lib_dinotile.dino.calibrated import Store
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.dino.field import feature_field
from lib_dinotile.hosts.diffusers import load_host
from lib_dinotile.images import endings, read_image
from lib_dinotile.settings import CALIBRATED, Generation, Settings


def closed_world(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures for the last line. DinotileError if the world is not valid."""
    quick = arguments.quick
    adapters = evidence.read_adapters(arguments.adapters) if arguments.adapter else {}
    if quick:
        adapters = dict(itertools.islice(evidence.trainings(adapters).items(), 1))
    world = World(QUICK if quick else GENERATION, arguments.encoder)
    world.upscaler.host.cell = arguments.cell  # type: ignore[attr-defined]  # the world's own
    figures = gates.cheap_gates(world, 6 if quick else 40, REPORT_SEED)
    gates.check({**figures, "told_rate": gates.told_rate(world, 1 if quick else 8, REPORT_SEED)})
    auc = gates.guard_auc(world.encoder, world.heads[CALIBRATED], 4 if quick else 40, REPORT_SEED)
    found, figures = evidence.prove(world, adapters, arguments.images or (2 if quick else 12), REPORT_SEED, auc, quick)
    if arguments.plot or arguments.pictures:
        from benchmarks import evidence_plot  # matplotlib takes long to load

        if arguments.plot:
            evidence_plot.bars(figures, arguments.plot)
        if arguments.pictures:
            evidence_plot.pictures(world, found, arguments.pictures)
    return figures


def likeness(eye: PatchEncoder, result: Image.Image, source: Image.Image) -> float:
    """Mean cosine of the patches of a result and of its source, in the eyes of an encoder."""
    first, second = (feature_field(eye, to_tensor(image), (1, 1)).features for image in (result, source))
    return float(F.cosine_similarity(first, second, dim=0).mean())


def perceptual(network: str) -> Any:
    """LPIPS (arXiv 1801.03924) between two pictures (3, H, W) in [0, 1]; DinotileError if it cannot be had."""
    try:
        import lpips

        model = lpips.LPIPS(net=network, verbose=False)
    except Exception as error:  # not installed, or its network's weights cannot be downloaded
        line = str(error).splitlines()[0]
        raise DinotileError(f"lpips: cannot be loaded ({line}): pip install '.[bench]', or --lpips none") from error
    return lambda first, second: float(model(first[None] * 2 - 1, second[None] * 2 - 1))


def photos(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures for the last line. DinotileError if something that is asked for cannot be had."""
    files = sorted(file for file in arguments.photos.iterdir() if file.suffix.lower() in endings())[: arguments.images]
    if not files:
        raise DinotileError(f"{arguments.photos} has no images")
    if arguments.dino == arguments.eye:
        raise DinotileError("--eye must be another encoder than --dino")
    host = load_host(
        Generation(model=arguments.model, config=arguments.config, denoise=arguments.denoise, steps=arguments.steps)
    )
    distance = None if arguments.lpips == "none" else perceptual(arguments.lpips)
    encoder, eye = (load_encoder(name, device=host.device) for name in (arguments.dino, arguments.eye))
    reader = None
    if arguments.adapter:
        name, reader = arguments.adapters.stem, evidence.read_adapter(arguments.adapters, host.device, host.dtype)
        check_fit(reader.adapter.config, name, host.base, host.shape)
        check_encoder(reader.adapter.config, name, encoder.id, encoder.width, encoder.depth)
    settings = Settings(scale=arguments.scale, tile=arguments.tile, overlap=min(64, arguments.tile // 2))
    heads = {CALIBRATED: heads_for(settings, encoder, {}, None, Store())}
    upscaler = arms.Upscaler(host, encoder, settings, heads)
    adapters = ("", arms.TRAINED if reader else "")
    chosen = {name: arm for name, arm in arms.ARMS.items() if arm.heads in heads and arm.adapter in adapters}
    sources, truths = [], []
    for file in files:
        truth = read_image(file)
        size = [max(1, round(side / arguments.scale)) for side in truth.size]
        sources.append(truth.resize(size, Image.Resampling.LANCZOS))
        truths.append(truth.resize([round(side * arguments.scale) for side in size], Image.Resampling.LANCZOS))
    found: dict[str, dict[str, list[float]]] = {"likeness": {}, "lpips": {}}
    for number, (source, truth) in enumerate(zip(sources, truths)):
        for name, arm in chosen.items():
            result = upscaler.upscale(arm, source, number, sources[number - 1], reader if arm.adapter else None).image
            found["likeness"].setdefault(name, []).append(likeness(eye, result, source))
            if distance is not None:
                found["lpips"].setdefault(name, []).append(distance(to_tensor(result), to_tensor(truth)))
    for figure, values in found.items():
        for name, each in values.items():
            low, high = arms.interval(each)
            print(f"{figure} {name:20} {np.mean(each):.4f} ({low:.4f} to {high:.4f}, {len(files)} photos, 95 %)")
    for name in (arms.BOTH, arms.ADAPTER, arms.ALL):
        if name in chosen and len(files) > 1:
            gains = np.subtract(found["likeness"][name], found["likeness"][arms.PLAIN]).tolist()
            low, high = arms.interval(gains)
            print(f"{name} over plain: likeness {np.mean(gains):+.4f} ({low:+.4f} to {high:+.4f})")
    return {
        figure: {name: round(float(np.mean(each)), 4) for name, each in values.items()}
        for figure, values in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="?", help="with --model: a folder of photos")
    parser.add_argument("--quick", action="store_true", help="few images and steps")
    parser.add_argument("--json", action="store_true", help="one last line of JSON")
    parser.add_argument("--images", type=int, help="how many images")
    parser.add_argument("--adapter", action="store_true", help="measure the trained adapters; with --quick one of them")
    parser.add_argument("--adapters", type=Path, default=evidence.ADAPTERS, help="their folder; with --model a file")
    parser.add_argument("--encoder", default=LABELLED, help="its folder in benchmarks/world/weights")
    parser.add_argument("--cell", type=int, default=1, help="guidance sees a colour per square of so many pixels")
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
    figures = photos(arguments) if arguments.model else closed_world(arguments)
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    try:
        with torch.no_grad():
            main()
    except DinotileError as error:
        sys.exit(str(error))
