"""What can be read from an encoder's tokens: `python -m benchmarks.world.linear_probe [--encoder FOLDER ...]`.

Shares of the labelled patches that a logistic regression names right, from the source's tokens (as `probe` of the
gates) and from those of the sharp picture, each with a regression of its own, on pictures and an atlas that neither
the encoders nor the regressions were trained on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.world.gates import evaluation_scenes
from benchmarks.world.heads import LAYERS, fit_probe, probe_scenes
from benchmarks.world.host import WEIGHTS
from benchmarks.world.scenes import NO_LABEL, Scene
from benchmarks.world.self_distillation import FOLDER
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder

KINDS = {"source": "blurred", "sharp": "sharp"}
"""Name of the figure -> the pixels of a scene that are looked at; the source as dinotile sees it, upscaled."""


def _tokens(encoder: PatchEncoder, scenes: Sequence[Scene], kind: str) -> dict[int, list[Tensor]]:
    """For each layer the features (D, 16, 16) of all pictures."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in LAYERS}
    with torch.inference_mode():
        for made in scenes:
            seen = encoder.several(getattr(made, KINDS[kind])[None], [(layer, "tokens") for layer in LAYERS])
            for layer, features in zip(LAYERS, seen):
                found[layer].append(features[0])
    return found


def probe_figures(encoder: PatchEncoder, scenes: int, held_out: int, seed: int) -> dict[str, dict[int, float]]:
    """Kind -> layer -> share named right."""
    learned, tested = list(probe_scenes(scenes)), list(evaluation_scenes(held_out, seed))
    labels = np.stack([made.labels for made in tested])
    known, figures = labels != NO_LABEL, {}
    for kind in KINDS:
        fitted, wanted = _tokens(encoder, learned, kind), _tokens(encoder, tested, kind)
        figures[kind] = {}
        for layer in LAYERS:
            probe = fit_probe(fitted[layer], [made.labels for made in learned])
            rows = torch.stack(wanted[layer]).permute(0, 2, 3, 1).numpy()[known]
            figures[kind][layer] = round(float(probe.score(rows, labels[known])), 3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.world.linear_probe", description=__doc__)
    parser.add_argument("--encoder", type=Path, nargs="+", default=[WEIGHTS / name for name in ("encoder", FOLDER)])
    parser.add_argument("--scenes", type=int, default=150, help="pictures to fit the regressions on")
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--seed", type=int, default=23, help="of the held-out pictures")
    args = parser.parse_args()
    for folder in args.encoder:
        figures = probe_figures(load_encoder(str(folder)), args.scenes, args.held_out, args.seed)
        print(json.dumps({"encoder": folder.name, "right": figures}), flush=True)


if __name__ == "__main__":
    main()
