"""Train what reads the world's encoder: `python -m benchmarks.world.train PART --out DIR`.

It goes to benchmarks/world/weights in half precision (`--export` names another folder), where the encoder lies, for
`adapter` also the denoiser. How these, the first judge and the classifier of windows were trained is in the history:
`git show 8020a0b:benchmarks/world/train.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from accelerate.utils import set_seed

from benchmarks.world.adapters import READS, train_world_adapter
from benchmarks.world.heads import calibrate_heads, train_heads, train_probe
from benchmarks.world.host import WEIGHTS
from benchmarks.world.judges import fit_spectral
from lib_dinotile.train.loop import Schedule


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.world.train", description=__doc__)
    parser.add_argument("part", choices=("heads", "calibrated", "probe", "spectral", "adapter"))
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the log")
    parser.add_argument("--export", type=Path, default=WEIGHTS, help="folder that gets the weights")
    parser.add_argument("--steps", type=int, help="heads, adapter: train up to this step")
    parser.add_argument("--reads", choices=READS, default=READS[0], help="adapter: the last two are the truth")
    parser.add_argument("--encoder", default="encoder", help="calibrated: the encoder's folder in --export")
    parser.add_argument("--seed", type=int, default=0, help="heads, adapter")
    parser.add_argument("--resume", action="store_true", help="heads, adapter: go on from the checkpoint in --out")
    args = parser.parse_args()
    if args.part == "adapter":
        train_world_adapter(args.out, args.export, args.seed, args.reads, args.steps, args.resume)
    elif args.part == "calibrated":
        calibrate_heads(args.export, args.encoder)
    elif args.part == "heads":
        set_seed(args.seed)
        steps = args.steps or 400
        schedule = Schedule(args.out, steps=steps, batch=16, rate=2e-3, seed=args.seed, resume=args.resume)
        train_heads(schedule, args.export)
    else:
        {"probe": train_probe, "spectral": fit_spectral}[args.part](args.export)


if __name__ == "__main__":
    main()
