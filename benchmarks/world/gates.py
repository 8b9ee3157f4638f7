"""Whether the world is one that a measurement can rely on: `python -m benchmarks.world.gates [--seed N]`.

All on pictures, an atlas and seeds that nothing was trained on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import numpy as np

from benchmarks.world.heads import probed, source_features
from benchmarks.world.host import GENERATION, WEIGHTS, WorldHost, painted
from benchmarks.world.judges import NONE, Judge, SpectralJudge, WindowClassifier, windows
from benchmarks.world.scenes import EVALUATION_ATLAS, NO_LABEL, Scene, scene
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


def cheap_gates(count: int = 40, seed: int = 0) -> dict[str, float]:
    """All but `told_rate`: shares of the labelled patches of `count` pictures that are named right."""
    encoder, classifier = load_encoder(str(WEIGHTS / "encoder")), WindowClassifier.load(WEIGHTS)
    judge, spectral = Judge.load(WEIGHTS), SpectralJudge.load(WEIGHTS)
    right: dict[str, list[np.ndarray]] = {name: [] for name in GATES if name != "told_rate"}
    for made in evaluation_scenes(count, seed):
        known = made.labels != NO_LABEL
        labels = made.labels[known]
        right["probe"].append(probed(source_features(encoder, made), WEIGHTS)[known] == labels)
        seen, wanted = windows(made)
        right["window"].append((classifier(seen).argmax(1) == wanted).numpy())
        right["judge_true"].append(judge.verdict(made.sharp)[known] == labels)
        right["judge_blurred"].append(judge.verdict(made.blurred).flatten() == NONE)
        right["spectral_true"].append(spectral.verdict(made.sharp)[known] == labels)
    return {name: float(np.concatenate(values).mean()) for name, values in right.items()}


def painting_rates(count: int, told: bool, seed: int = 0, generation: Generation = GENERATION) -> dict[str, float]:
    """How the engine alone paints `count` pictures, the model told the class of every pixel, or nothing.

    Shares of the labelled patches: `rate`, judged not to be of the true class; `spectral`, the same by the other judge;
    `none` and `garbage`, judged to be that.
    """
    judges, verdicts = (Judge.load(WEIGHTS), SpectralJudge.load(WEIGHTS)), []
    for i, made in enumerate(evaluation_scenes(count, seed)):
        result = painted(WorldHost(generation, made.class_map if told else None), made.source, seed * 1000 + i)
        found = np.stack([*(judge.verdict(result) for judge in judges), made.labels])
        verdicts.append(found[:, made.labels != NO_LABEL])
    first, second, labels = np.concatenate(verdicts, axis=1)
    shares = {"rate": first != labels, "spectral": second != labels, "none": first == NONE, "garbage": first > NONE}
    return {name: float(share.mean()) for name, share in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.world.gates", description=__doc__)
    parser.add_argument("--scenes", type=int, default=40, help="pictures for the gates that paint nothing")
    parser.add_argument("--painted", type=int, default=8, help="pictures to paint, told and not told")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    figures = cheap_gates(args.scenes, args.seed)
    told, untold = (painting_rates(args.painted, each, args.seed) for each in (True, False))
    figures["told_rate"] = told["rate"]
    print(json.dumps({"valid": holds(figures), "gates": figures, "told": told, "not told": untold}))


if __name__ == "__main__":
    main()
