"""Whether the world is one that a measurement can rely on: `python -m benchmarks.world.gates [--scenes N] [--told N]`.

All on pictures, an atlas and seeds that nothing was trained on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.world.heads import probed, source_features
from benchmarks.world.host import GENERATION, WEIGHTS, WorldHost, painted
from benchmarks.world.judge import NONE, Judge, load_judge
from benchmarks.world.scenes import EVALUATION_ATLAS, NO_LABEL, Scene, scene
from benchmarks.world.spectral import SpectralJudge
from benchmarks.world.windows import load_windows, windows
from lib_dinotile.dino.encoder import load_encoder
from lib_dinotile.settings import Generation

GATES = {
    "told_rate": ("at most", 0.10),
    "probe": ("at least", 0.85),
    "window": ("at most", 0.65),
    "judge_true": ("at least", 0.99),
    "judge_blurred": ("at least", 0.99),
    "spectral_true": ("at least", 0.90),
}
"""Name of the figure -> on which side of what value it has to be."""


def evaluation_scenes(count: int, seed: int) -> Iterator[Scene]:
    """Fresh pictures; another seed, others."""
    return (scene(np.random.default_rng((seed, i, 99)), EVALUATION_ATLAS) for i in range(count))


def holds(figures: dict[str, float]) -> bool:
    """Whether all figures are on the right side of their gates."""
    return all(
        figures[name] <= value if side == "at most" else figures[name] >= value for name, (side, value) in GATES.items()
    )


def cheap_gates(count: int = 40, seed: int = 0, weights: Path = WEIGHTS) -> dict[str, float]:
    """All but `told_rate`: shares of the labelled patches of `count` pictures that are named right."""
    encoder, classifier = load_encoder(str(weights / "encoder")), load_windows(weights)
    judge, spectral = load_judge(weights), SpectralJudge.load(weights)
    right: dict[str, list[np.ndarray]] = {name: [] for name in GATES if name != "told_rate"}
    for made in evaluation_scenes(count, seed):
        known = made.labels != NO_LABEL
        labels = made.labels[known]
        right["probe"].append(probed(source_features(encoder, made), weights)[known] == labels)
        seen, wanted = windows(made)
        right["window"].append((classifier(seen).argmax(1) == wanted).numpy())
        right["judge_true"].append(judge.verdict(made.sharp[None])[0].numpy()[known] == labels)
        right["judge_blurred"].append(judge.verdict(made.blurred[None])[0].numpy().flatten() == NONE)
        right["spectral_true"].append(spectral.verdict(made.sharp)[known] == labels)
    return {name: float(np.concatenate(values).mean()) for name, values in right.items()}


def painting_rates(
    count: int, told: bool, seed: int = 0, generation: Generation = GENERATION, weights: Path = WEIGHTS
) -> dict[str, float]:
    """How the engine alone paints `count` pictures, the model told the class of every pixel, or nothing.

    Shares of the labelled patches: `rate`, judged not to be of the true class; `spectral`, the same by the other judge;
    `none` and `garbage`, judged to be that.
    """
    judge, spectral = load_judge(weights), SpectralJudge.load(weights)
    verdicts: list[np.ndarray] = []
    for i, made in enumerate(evaluation_scenes(count, seed)):
        host = WorldHost(generation, made.class_map if told else None, weights)
        verdicts.append(_verdicts(made, painted(host, made.source, seed * 1000 + i), judge, spectral))
    first, second, labels = np.concatenate(verdicts, axis=1)
    return {
        "rate": float((first != labels).mean()),
        "spectral": float((second != labels).mean()),
        "none": float((first == NONE).mean()),
        "garbage": float((first > NONE).mean()),
    }


def _verdicts(made: Scene, result: torch.Tensor, judge: Judge, spectral: SpectralJudge) -> np.ndarray:
    """(3, n) for the labelled patches: what each judge says, and the truth."""
    known = made.labels != NO_LABEL
    return np.stack([judge.verdict(result[None])[0].numpy(), spectral.verdict(result), made.labels])[:, known]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.world.gates", description=__doc__)
    parser.add_argument("--scenes", type=int, default=40, help="pictures for the gates that paint nothing")
    parser.add_argument("--painted", type=int, default=8, help="pictures to paint, told and not told")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strength", type=float, default=GENERATION.denoise)
    parser.add_argument("--steps", type=int, default=GENERATION.steps)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    generation = Generation(steps=args.steps, denoise=args.strength, cfg=1.0)
    figures = cheap_gates(args.scenes, args.seed, args.weights)
    told = painting_rates(args.painted, True, args.seed, generation, args.weights)
    untold = painting_rates(args.painted, False, args.seed, generation, args.weights)
    figures["told_rate"] = told["rate"]
    print(json.dumps({"valid": holds(figures), "gates": figures, "told": told, "not told": untold}))


if __name__ == "__main__":
    main()
