"""Train the built-in model: `python -m lib_dinotile.train.mini {unet,encoder,adapter} --out DIR --steps N`.

Each part goes to lib_dinotile/mini in half precision at every checkpoint (`--export` names another folder).
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from lib_dinotile.train.encoder import EncoderImages, EncoderTraining, encoder_loss, export_encoder
from lib_dinotile.train.images import Pool, RestorePairs
from lib_dinotile.train.loop import Schedule, fit

MINI = Path(__file__).parents[1] / "mini"

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
"""No attention, no text: 3.2 M parameters. Latents are RGB in -1..1, pixel-unshuffled by 2."""

SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 1e-6,
    "beta_end": 6e-4,
    "prediction_type": "v_prediction",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": True,
}
"""Far less noise than Stable Diffusion's: its betas at strength 0.35 give a deviation of 0.98, which in the pixels of
a source drowns all that it shows; here it is 0.1 (13 of 255 grey levels). At strength 1 it is 0.48: the model
restores a source and can't paint without one."""

HIGHEST_STEP = 650
"""Timesteps trained on most: img2img at denoising strengths up to 0.65."""


def unshuffle(pixels: Tensor) -> Tensor:
    """(n, 3, H, W) -> latents (n, 12, H/2, W/2)."""
    return F.pixel_unshuffle(pixels, 2)


def flip(pairs: Tensor, generator: torch.Generator) -> Tensor:
    """One of the eight symmetries of the square, the same for the whole batch."""
    turns, mirror = torch.randint(4, (1,), generator=generator).item(), torch.rand(1, generator=generator).item() < 0.5
    pairs = torch.rot90(pairs, turns, (-2, -1))
    return pairs.flip(-1) if mirror else pairs


def restoration_inputs(
    degraded: Tensor, sharp: Tensor, alphas: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the denoiser sees on its way from a blurred source to the sharp picture.

    degraded, sharp: latents (n, 12, h, w); alphas: cumulated, (1000,). Half of the batch starts at the degraded
    picture, the rest anywhere between it and the sharp one, a quarter at the sharp one itself: a sampler that has
    taken a few steps is in between. Returns x_t, t (n,), a_t and s_t (n, 1, 1, 1).
    """
    n = len(sharp)
    kind = torch.rand(n, generator=generator)
    share = torch.rand(n, generator=generator)
    share = torch.where(kind < 0.5, 1.0, torch.where(kind < 0.8, share, 0.0))[:, None, None, None]
    start = sharp + share * (degraded - sharp)
    t = (torch.rand(n, generator=generator) ** 1.2 * HIGHEST_STEP).long()
    high = torch.randint(HIGHEST_STEP, len(alphas), (n,), generator=generator)
    t = torch.where(torch.rand(n, generator=generator) < 0.05, high, t)
    alpha = alphas[t][:, None, None, None]
    a, s = alpha.sqrt(), (1 - alpha).sqrt()
    return a * start + s * torch.randn(sharp.shape, generator=generator), t, a, s


def restoration_loss(
    prediction: Tensor, x: Tensor, a: Tensor, s: Tensor, sharp: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Distance of the v-prediction's x0 from the sharp latents.

    Squared error weighted by min(1 / s^2, 100) (on v, this is uniform weight but for the lowest noise), and the
    absolute error of pixels and of their differences, which keeps edges crisp.
    """
    x0 = a * x - s * prediction.float()
    weight = (1 / s**2).clamp(max=100.0) / 50.0
    squared = (weight * (x0 - sharp) ** 2).mean()
    error = F.pixel_shuffle(x0 - sharp, 2)
    absolute = error.abs().mean()
    slope = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return squared + 0.5 * absolute + 0.25 * slope, {"squared": squared.item(), "absolute": absolute.item()}


def alphas_cumprod() -> Tensor:
    """(1000,) of the mini's schedule."""
    return DDIMScheduler(**SCHEDULER_CONFIG).alphas_cumprod


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
    copy.deepcopy(model).half().save_pretrained(folder / "unet")
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lib_dinotile.train.mini", description=__doc__)
    parser.add_argument("part", choices=("unet", "encoder", "adapter"))
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the log")
    parser.add_argument("--export", type=Path, default=MINI, help="folder that gets the weights")
    parser.add_argument("--root", type=Path, action="append", default=[], help="where else unpacked packages lie")
    parser.add_argument("--steps", type=int, default=8000, help="length of the cosine schedule")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long at the latest")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=6e-4, help="highest learning rate")
    parser.add_argument("--bank", type=int, default=24000, help="different crops to make before they come again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    args = parser.parse_args(arguments)
    schedule = Schedule(args.out, args.steps, args.minutes, args.batch, args.rate, seed=args.seed,
                        precision=args.precision, resume=args.resume)  # fmt: skip
    pool = Pool.load(args.root)
    for name in pool.missing:
        print(f"not installed, trained without: {name}")
    train = {"unet": train_unet, "encoder": train_encoder}[args.part]
    train(schedule, pool, args.export, args.bank)


if __name__ == "__main__":
    main()
