"""Train the built-in model: `python -m tools.mini.mini {unet,encoder} --out DIR --steps N`.

Each part goes to lib_dinotile/mini in half precision at every checkpoint (`--export` names another folder). `photos`
writes the photographs as files into DIR, for `python -m lib_dinotile train`, which makes the adapter.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from lib_dinotile.condition.conditioner import MINI
from lib_dinotile.train.loop import CheckpointError, Schedule, fit
from tools.mini.encoder import EncoderImages, EncoderTraining, encoder_loss, export_encoder
from tools.mini.images import PHOTOS, Pool, RestorePairs, package_roots, read_photo
from tools.mini.objective import (
    SCHEDULER_CONFIG,
    alphas_cumprod,
    flip,
    restoration_inputs,
    restoration_loss,
    unshuffle,
)

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 12,
    "out_channels": 12,
    "down_block_types": ("DownBlock2D",) * 3,
    "up_block_types": ("UpBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
    "block_out_channels": (48, 80, 128),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 8,
}
"""No attention, no text: 2.62 M parameters. Latents are RGB in -1..1, pixel-unshuffled by 2."""


class UNetLoss:
    """The loss of the UNet alone, without conditions."""

    def __init__(self) -> None:
        self.alphas = alphas_cumprod()

    def __call__(self, model: nn.Module, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        degraded, sharp = flip(torch.stack(list(batch)), generator)
        degraded, sharp = unshuffle(degraded), unshuffle(sharp)
        x, t, a, s = restoration_inputs(degraded, sharp, self.alphas, generator)
        prediction = model(x.contiguous(memory_format=torch.channels_last), t, encoder_hidden_states=None).sample
        return restoration_loss(prediction, x, a, s, sharp)


def export_unet(model: UNet2DConditionModel, folder: Path) -> None:
    """Half-precision UNet and the scheduler, as diffusers folders."""
    half = copy.deepcopy(model).half().to(memory_format=torch.contiguous_format)  # older safetensors save no other
    half.save_pretrained(folder / "unet")
    DDIMScheduler(**SCHEDULER_CONFIG).save_pretrained(folder / "scheduler")


def train_unet(schedule: Schedule, pool: Pool, export: Path, bank: int) -> None:
    """The denoiser."""
    model = UNet2DConditionModel(**UNET_CONFIG)
    data = RestorePairs(pool, bank, seed=schedule.seed)
    fit(model, data, UNetLoss(), schedule, lambda averaged, _: export_unet(averaged, export))


def train_encoder(schedule: Schedule, pool: Pool, export: Path, bank: int) -> None:
    """The patch encoder."""
    data = EncoderImages(pool, bank, schedule.seed)
    fit(EncoderTraining(), data, encoder_loss, schedule, lambda averaged, _: export_encoder(averaged, export))


def write_photos(folder: Path, roots: Sequence[Path]) -> None:
    """The photographs that are installed, as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, photo in enumerate(PHOTOS):
        image = read_photo(photo, package_roots(roots))
        if image is None:
            print(f"not installed: {photo.path} ({photo.package})")
        else:
            Image.fromarray(image).save(folder / f"photo-{number:03d}-{Path(photo.path).stem}.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.mini.mini", description=__doc__)
    parser.add_argument("part", choices=("unet", "encoder", "photos"))
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints and the log, or for the photographs"
    )
    parser.add_argument("--export", type=Path, default=MINI, help="folder that gets the weights")
    parser.add_argument("--root", type=Path, action="append", default=[], help="where else unpacked packages lie")
    parser.add_argument("--steps", type=int, default=5000, help="train up to this step")
    parser.add_argument(
        "--schedule-steps", type=int, help="where the cosine of the learning rate ends (default: --steps)"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long at the latest")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=6e-4, help="highest learning rate")
    parser.add_argument("--bank", type=int, default=24000, help="different crops to make before they come again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--log-every", type=int, default=20, help="steps per line of the log")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    args = parser.parse_args(arguments)
    if args.part == "photos":
        return write_photos(args.out, args.root)
    schedule = Schedule(
        args.out,
        steps=args.steps,
        schedule_steps=args.schedule_steps,
        minutes=args.minutes,
        batch=args.batch,
        rate=args.rate,
        log_every=args.log_every,
        seed=args.seed,
        precision=args.precision,
        resume=args.resume,
    )
    set_seed(args.seed)  # the new model's parameters
    pool = Pool.load(args.root)
    for name in pool.missing:
        print(f"not installed, trained without: {name}")
    train = {"unet": train_unet, "encoder": train_encoder}[args.part]
    try:
        train(schedule, pool, args.export, args.bank)
    except CheckpointError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
