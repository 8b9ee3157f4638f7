"""Train the world's models: `python -m benchmarks.world.train PART --out DIR [--steps N] [--minutes M] [--resume]`.

Every part goes to benchmarks/world/weights in half precision at each checkpoint (`--export` names another folder).
`heads`, `calibrated`, `probe` and `adapter` need the encoder that lies there, `adapter` also the denoiser.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from accelerate.utils import set_seed

from benchmarks.world.adapters import READS, train_world_adapter
from benchmarks.world.denoiser import train_denoiser
from benchmarks.world.encoder import train_encoder
from benchmarks.world.heads import calibrate_heads, train_heads, train_probe
from benchmarks.world.host import WEIGHTS
from benchmarks.world.judge import train_judge
from benchmarks.world.spectral import fit_spectral
from benchmarks.world.windows import train_windows
from lib_dinotile.train.loop import Schedule

STEPS = {"denoiser": 8000, "encoder": 2100, "heads": 400, "judge": 450, "windows": 4000}
BATCH = {"denoiser": 8, "encoder": 16, "heads": 16, "judge": 4, "windows": 4}
RATE = {"denoiser": 1e-3, "encoder": 8e-4, "heads": 2e-3, "judge": 1e-3, "windows": 1e-3}
LOOPED = {
    "denoiser": train_denoiser,
    "encoder": train_encoder,
    "heads": train_heads,
    "judge": train_judge,
    "windows": train_windows,
}
"""Trained by `lib_dinotile.train.loop.fit`, with checkpoints."""
AT_ONCE = {"probe": train_probe, "spectral": fit_spectral}
"""A matter of minutes."""
PARTS = ("denoiser", "encoder", "heads", "calibrated", "probe", "judge", "spectral", "windows", "adapter")


def train(part: str, args: argparse.Namespace) -> None:
    """One part, as the command line asks."""
    if part == "adapter":
        return train_world_adapter(args.out, args.export, args.seed, args.reads, args.steps, args.resume)
    if part in AT_ONCE:
        return AT_ONCE[part](args.export)
    if part == "calibrated":
        return calibrate_heads(args.export, args.encoder)
    schedule = Schedule(
        args.out / part if args.part == "all" else args.out,
        steps=args.steps or STEPS[part],
        schedule_steps=args.schedule_steps,
        minutes=args.minutes,
        batch=args.batch or BATCH[part],
        rate=args.rate or RATE[part],
        seed=args.seed,
        precision=args.precision,
        resume=args.resume,
    )
    set_seed(args.seed)  # the new model's parameters
    run = partial(train_judge, early=args.early) if part == "judge" else LOOPED[part]
    return run(schedule, args.export)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.world.train", description=__doc__)
    parser.add_argument("part", choices=(*PARTS, "all"))
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the log")
    parser.add_argument("--export", type=Path, default=WEIGHTS, help="folder that gets the weights")
    parser.add_argument("--steps", type=int, help="train up to this step")
    parser.add_argument("--schedule-steps", type=int, help="where the cosine of the rate ends (default: --steps)")
    parser.add_argument(
        "--early", type=Path, action="append", default=[], help="judge: folder of a UNet exported early in its training"
    )
    parser.add_argument(
        "--reads", choices=READS, default=READS[0], help="adapter: what it reads; the last two are the truth"
    )
    parser.add_argument("--encoder", default="encoder", help="calibrated: the encoder's folder in --export")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop each after this long at the latest")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rate", type=float, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    args = parser.parse_args()
    for part in PARTS if args.part == "all" else (args.part,):
        train(part, args)


if __name__ == "__main__":
    main()
