"""Does the result show what the source shows? python benchmarks/semantics.py [--quick] [--json]

In a closed world, where the truth is known (benchmarks/world): the hallucination rate is the share of 16-px patches
whose texture, named by a judge that nothing else uses, is not the true one. What is blurred or garbage counts as wrong.
With the features of another image, patches count where that shows another texture.
The gates (benchmarks/world/gates.py) are checked first: if one does not hold, the run is invalid and shows no rates.

python benchmarks/semantics.py --model FILE|FOLDER|ID --dino ID --eye ID PHOTOS

On a real checkpoint and a folder of photos, which are shrunk and upscaled again: the likeness of the result's features
to the source's in the eyes of another encoder than the guiding one, and LPIPS to the photo.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.arms import ARMS, GUARD, GUIDANCE, OTHER, PLAIN, ZERO, Arms, interval, ratio_interval, to_pixels
from benchmarks.world import gates
from benchmarks.world.guard_test import guard_auc
from benchmarks.world.host import GENERATION, SETTINGS, WEIGHTS, WorldHost, as_image
from benchmarks.world.judge import GARBAGE, NONE, load_judge
from benchmarks.world.scenes import NO_LABEL, PATCH, SIDE, Scene
from benchmarks.world.spectral import SpectralJudge
from lib_dinotile.dino.encoder import load_encoder
from lib_dinotile.dino.head import load_heads
from lib_dinotile.settings import Generation

CHOSEN = replace(
    SETTINGS,
    patches=SIDE // PATCH,
    guidance=2.0,
    guidance_end=0.6,
    every=1,
    views=2,
    layer=3,
    guard="retry",
    guard_seeds=3,
    guard_weaker=0,
    guard_strictness=1.0,
)
"""Chosen on other images than those that are reported (`--tune`)."""
QUICK = replace(GENERATION, steps=10)
"""Half as many steps: faster, and less time to be steered in."""
TUNE_SEED, REPORT_SEED = 11, 23
AGREEMENT = 0.7
"""Least rank correlation of the two judges. It is not 1: one knows garbage, the other calls it some texture, by chance
the right one; so they differ on whether a blurred patch is worse than garbage."""


class World:
    """The closed world's models."""

    def __init__(self, generation: Generation = GENERATION, weights: Path = WEIGHTS) -> None:
        self.encoder = load_encoder(str(weights / "encoder"))
        self.heads = load_heads(weights / "heads.safetensors", self.encoder.id, self.encoder.width)
        self.generation, self.host = generation, WorldHost(generation, None, weights)
        self.judge, self.spectral = load_judge(weights), SpectralJudge.load(weights)

    def verdicts(self, arm: str, made: Scene, other: Scene, seed: int, settings: Any) -> dict[str, float]:
        """What the judges say of one picture, painted in that way: shares of its labelled patches."""
        arms = Arms(self.host, self.encoder, settings, self.heads)
        began = time.perf_counter()
        result = arms.upscale(arm, as_image(made.source), seed, as_image(other.source))
        seconds, pixels = time.perf_counter() - began, to_pixels(result.image)
        known = made.labels != NO_LABEL
        first, second = self.judge.verdict(pixels[None])[0].numpy(), self.spectral.verdict(pixels)
        strange = known & (other.labels != NO_LABEL) & (other.labels != made.labels)
        # Where both images show the same, features of the other are no control.
        counted = strange if arm == OTHER else known
        return {
            "rate": float((first != made.labels)[counted].mean()),
            "spectral": float((second != made.labels)[counted].mean()),
            "blank": float((first == NONE)[known].mean()),
            "garbage": float((first == GARBAGE)[known].mean()),
            "followed": float((first == other.labels)[strange].mean()),
            "seconds": seconds,
        }


def measure(world: World, arms: Sequence[str], count: int, seed: int, settings: Any, say: bool) -> dict[str, Any]:
    """Per arm and figure the values of `count` images, one seed each."""
    found: dict[str, dict[str, list[float]]] = {arm: {} for arm in arms}
    scenes = list(gates.evaluation_scenes(count, seed))
    for number, made in enumerate(scenes):
        other = scenes[number - 1] if count > 1 else next(gates.evaluation_scenes(1, seed + 1))
        for arm in arms:
            for name, value in world.verdicts(arm, made, other, seed * 1000 + number, settings).items():
                found[arm].setdefault(name, []).append(value)
        if say:
            rates = ", ".join(f"{arm} {found[arm]['rate'][-1]:.2f}" for arm in arms)
            print(f"image {number + 1} of {count}: {rates}", file=sys.stderr)
    return found


def table(found: dict[str, Any]) -> None:
    """For people."""
    heads = f"{'':16} {'hallucinated':>12}  {'95 %':13} {'of plain':>8}  {'95 %':13} {'garbage':>7} {'blank':>6}"
    print(f"{heads} {'spectral':>9} {'seconds':>8}")
    base = found[PLAIN]["rate"]
    for arm, values in found.items():
        rate, (low, high) = np.mean(values["rate"]), interval(values["rate"])
        least, most = ratio_interval(values["rate"], base)
        print(
            f"{arm:16} {rate:12.3f}  {low:.3f} - {high:.3f} {rate / np.mean(base):8.2f}  {least:.2f} - {most:.2f}   "
            f"{np.mean(values['garbage']):6.3f} {np.mean(values['blank']):6.3f} {np.mean(values['spectral']):9.3f} "
            f"{np.mean(values['seconds']):8.1f}"
        )
    if OTHER in found:
        followed = {arm: np.mean(values["followed"]) for arm, values in found.items()}
        print(
            f"patches that show what the OTHER image shows there: plain {followed[PLAIN]:.3f}, with its features "
            f"{followed[OTHER]:.3f}"
        )


def agreement(found: dict[str, Any]) -> float:
    """How alike the two judges rank the arms: Kendall's tau of their mean rates, from -1 to 1."""
    first, second = ([np.mean(values[judge]) for values in found.values()] for judge in ("rate", "spectral"))
    return float(kendalltau(first, second).statistic)


def tune(world: World, count: int) -> None:
    """Rates of guidance for some settings, on images that are not reported."""
    for layer, strength, every in itertools.product((1, 2, 3), (0.5, 1.0, 2.0), (1, 2)):
        settings = replace(CHOSEN, layer=layer, guidance=strength, every=every)
        found = measure(world, (GUIDANCE,), count, TUNE_SEED, settings, False)[GUIDANCE]
        print(f"guidance: layer {layer}, strength {strength}, every {every}: {np.mean(found['rate']):.3f}", flush=True)
    for strictness in (-1.0, 0.0, 1.0, 2.0, 4.0):
        settings = replace(CHOSEN, guard_strictness=strictness)
        found = measure(world, (GUARD,), count, TUNE_SEED, settings, False)[GUARD]
        print(f"guard: threshold {strictness}: {np.mean(found['rate']):.3f}", flush=True)


def closed_world(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The figures for the last line, or None if the world is not valid."""
    world = World(QUICK if arguments.quick else GENERATION)
    figures = gates.cheap_gates(6 if arguments.quick else 40, REPORT_SEED)
    told = gates.painting_rates(1 if arguments.quick else 8, True, REPORT_SEED, world.generation)
    figures["told_rate"] = told["rate"]
    for name, value in figures.items():
        side, limit = gates.GATES[name]
        print(f"gate {name:15} {value:.3f}  ({side} {limit})")
    if not gates.holds(figures):
        print("invalid: a gate does not hold, so rates would mean nothing")
        return None
    auc = guard_auc(world.encoder, world.heads, 4 if arguments.quick else 40, REPORT_SEED)
    print(f"guard test: prefers the true texture to a wrong one, AUC {auc:.3f}")
    count = arguments.images or (2 if arguments.quick else 12)
    settings = replace(CHOSEN, guard_seeds=1) if arguments.quick else CHOSEN
    found = measure(world, ARMS, count, REPORT_SEED, settings, not arguments.quick)
    tau = agreement(found)
    print(f"gate {'agreement':15} {tau:.3f}  (at least {AGREEMENT}): the two judges' rankings of the arms")
    if not tau >= AGREEMENT:
        print("invalid: the two judges do not agree on the ranking")
        return None
    table(found)
    same = found[ZERO]["rate"] == found[PLAIN]["rate"]
    print(f"strength 0 {'is' if same else 'IS NOT'} the plain result")
    rates = {arm: round(float(np.mean(values["rate"])), 4) for arm, values in found.items()}
    followed = round(float(np.mean(found[OTHER]["followed"])), 4)
    return {"hallucination_rate": rates, "other_followed": followed, "guard_auc": round(auc, 4), "images": count}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="?", help="with --model: a folder of photos")
    parser.add_argument("--quick", action="store_true", help="few images: a minute on two cores")
    parser.add_argument("--json", action="store_true", help="one last line of JSON")
    parser.add_argument("--images", type=int, help="how many images")
    parser.add_argument("--tune", action="store_true", help="try settings, on images that are not reported")
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
    if arguments.model:
        from benchmarks.photos import photos

        if arguments.photos is None:
            parser.error("--model wants a folder of photos")
        figures = photos(arguments)
    elif arguments.tune:
        tune(World(), arguments.images or 4)
        return 0
    else:
        figures = closed_world(arguments)
    if figures is None:
        return 1
    if arguments.json:
        print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
