"""Look at the mini on photographs it never saw: `python -m tools.mini.evaluate --out DIR`.

Two tasks. "known": a held-out photograph is shrunk by 2 and restored; figures against the original (PSNR in dB, SSIM,
sharpness = mean gradient over the original's). "photo": the photograph itself, twice as large; there is no truth, only
sharpness against Lanczos and colour shift (difference of the channels' means, of 255), and a picture to look at.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lib_dinotile.condition.conditioner import MINI
from tools.mini.images import HELD_OUT, package_roots, read_photo, to_tensor
from tools.mini.objective import unshuffle


@torch.no_grad()
def restore(unet: UNet2DConditionModel, scheduler: DDIMScheduler, canvas: np.ndarray, strength: float = 0.35,
            steps: int = 20, seed: int = 0) -> np.ndarray:  # fmt: skip
    """Plain img2img (DDIM) of the whole canvas (H, W, 3) uint8 in one piece, without conditions."""
    height, width = canvas.shape[:2]
    pixels = F.pad(to_tensor(canvas)[None], (0, -width % 8, 0, -height % 8), mode="replicate")
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[steps - min(int(steps * strength), steps) :]
    noise = torch.randn(unshuffle(pixels).shape, generator=torch.Generator().manual_seed(seed))
    x = scheduler.add_noise(unshuffle(pixels), noise, timesteps[:1]).contiguous(memory_format=torch.channels_last)
    for t in timesteps:
        with torch.autocast("cpu", torch.bfloat16):
            v = unet(x, t, encoder_hidden_states=None).sample.float()
        x = scheduler.step(v, t, x).prev_sample
    restored = (F.pixel_shuffle(x, 2)[0, :, :height, :width].clamp(-1, 1) + 1) * 127.5
    return restored.round().byte().permute(1, 2, 0).numpy()


def sharpness(image: np.ndarray) -> float:
    """Mean absolute difference of neighbours' green, in grey levels."""
    green = image[..., 1].astype(np.float64)
    return float(np.abs(np.diff(green, axis=0)).mean() + np.abs(np.diff(green, axis=1)).mean())


def figures(image: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    return {
        "psnr": round(float(peak_signal_noise_ratio(truth, image)), 2),
        "ssim": round(float(structural_similarity(truth, image, channel_axis=2)), 4),
        "sharpness": round(sharpness(image) / sharpness(truth), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.mini.evaluate", description=__doc__)
    parser.add_argument("--mini", type=Path, default=MINI)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--root", type=Path, action="append", default=[], help="where else unpacked packages lie")
    parser.add_argument("--strength", type=float, nargs="+", default=[0.35])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    unet = UNet2DConditionModel.from_pretrained(args.mini / "unet", use_safetensors=True)
    unet = unet.float().eval().to(memory_format=torch.channels_last)
    scheduler = DDIMScheduler.from_pretrained(args.mini / "scheduler")
    for photo in HELD_OUT:
        name = Path(photo.path).stem
        truth = read_photo(photo, package_roots(args.root))
        if truth is None:
            raise SystemExit(f"{photo.path} is not installed: it comes with {photo.package}")
        truth = truth[: truth.shape[0] // 2 * 2, : truth.shape[1] // 2 * 2]
        image = Image.fromarray(truth)
        half = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
        known = np.asarray(half.resize(image.size, Image.Resampling.LANCZOS))
        canvas = np.asarray(image.resize((image.width * 2, image.height * 2), Image.Resampling.LANCZOS))
        Image.fromarray(known).save(args.out / f"{name}_known_lanczos.png")
        Image.fromarray(canvas).save(args.out / f"{name}_photo_lanczos.png")
        print(json.dumps({"photo": name, "what": "lanczos", **figures(known, truth)}))
        for strength in args.strength:
            restored = restore(unet, scheduler, known, strength)
            large = restore(unet, scheduler, canvas, strength)
            Image.fromarray(restored).save(args.out / f"{name}_known_{strength}.png")
            Image.fromarray(large).save(args.out / f"{name}_photo_{strength}.png")
            line = {"photo": name, "what": f"mini {strength}", **figures(restored, truth)}
            line["photo_sharpness"] = round(sharpness(large) / sharpness(canvas), 3)
            line["shift"] = (large.mean((0, 1)) - canvas.mean((0, 1))).round(2).tolist()
            print(json.dumps(line))


if __name__ == "__main__":
    main()
