"""Train what reads the world's encoder: `python -m benchmarks.world.train PART --out DIR`.

It goes to benchmarks/world/weights in half precision (`--export` names another folder), where encoder and denoiser lie.
How all others were trained is in the history, see README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.world.adapters import READS, train_world_adapter
from benchmarks.world.heads import calibrate_heads
from benchmarks.world.host import WEIGHTS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.world.train", description=__doc__)
    parser.add_argument("part", choices=("calibrated", "adapter"))
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the log")
    parser.add_argument("--export", type=Path, default=WEIGHTS, help="folder that gets the weights")
    parser.add_argument("--steps", type=int, help="adapter: train up to this step")
    parser.add_argument("--reads", choices=READS, default=READS[0], help="adapter: the last two are the truth")
    parser.add_argument("--encoder", default="encoder", help="calibrated: the encoder's folder in --export")
    parser.add_argument("--seed", type=int, default=0, help="adapter")
    parser.add_argument("--resume", action="store_true", help="adapter: go on from the checkpoint in --out")
    args = parser.parse_args()
    if args.part == "adapter":
        train_world_adapter(args.out, args.export, args.seed, args.reads, args.steps, args.resume)
    else:
        calibrate_heads(args.export, args.encoder)


if __name__ == "__main__":
    main()
