"""Does guidance harm pictures that plain tiles paint well? python benchmarks/harmless.py [--json] [PHOTO ...]

Each photo is halved and enlarged again with the built-in model, in plain tiles and with guidance, and held against the
photo itself: mean squared gradient over the photo's, PSNR, and how much stronger what guidance changes is at the
frequencies of the patch grid than around them. Without photos: the held-out photographs of tools/mini/images.py
(`--root` says where else packages lie). All settings that are not named are the defaults.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.photographs import LANCZOS, UNGUIDED, add_arguments, enlarged, given
from lib_dinotile.settings import Generation, Settings

PLAIN, GUIDANCE, DEFAULTS = "plain", "guidance", "guidance and guard"
WAYS = {PLAIN: UNGUIDED, GUIDANCE: {"guard": "off"}, DEFAULTS: {}}
FARTHER, LOSS = 0.05, 0.1
"""The most that the share of the photo's gradients may be farther from 1 than in plain tiles, and dB of PSNR lost."""


def gradients(image: np.ndarray) -> float:
    """Mean squared difference of neighbours, in levels of 255."""
    values = image.astype(np.float64)
    return float(np.square(np.diff(values, axis=0)).mean() + np.square(np.diff(values, axis=1)).mean())


def grid_ratio(change: np.ndarray, patch: float) -> float:
    """Amplitude of a change (H, W) at the frequencies of a grid of `patch` pixels, over the median of those around."""
    found = []
    for axis in (0, 1):
        length = change.shape[axis]
        spectrum = np.abs(np.fft.rfft(change - change.mean(), axis=axis)).mean(1 - axis)
        for harmonic in (1, 2, 3):
            place = round(harmonic * length / patch)
            near = np.arange(max(1, place - 6), min(len(spectrum), place + 7))
            if place + 1 < len(spectrum):
                around = spectrum[near[np.abs(near - place) > 1]]
                found.append(spectrum[place - 1 : place + 2].max() / max(np.median(around), 1e-9))
    return float(max(found)) if found else 0.0


def measure(photo: Image.Image, images: Mapping[str, Image.Image]) -> list[dict[str, Any]]:
    """The figures of one photo (RGB), made larger in each of `WAYS`, PLAIN first."""
    truth, plain = np.asarray(photo), np.asarray(images[PLAIN])
    rows: list[dict[str, Any]] = []
    for way, image in images.items():
        pixels = np.asarray(image)
        change = (pixels.astype(np.float64) - plain).mean(2)
        row: dict[str, Any] = {
            "way": way,
            "gradients": gradients(pixels) / gradients(truth),
            "psnr": float(peak_signal_noise_ratio(truth, pixels)),
            "grid": 0.0 if way == PLAIN else grid_ratio(change, max(photo.size) / (max(photo.size) // 14)),
            "change": float(np.abs(change).mean()),
        }
        rows.append(row)
        farther = abs(row["gradients"] - 1) - abs(rows[0]["gradients"] - 1)
        row["harmless"] = farther <= FARTHER and rows[0]["psnr"] - row["psnr"] <= LOSS
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, largest=448)
    parser.add_argument("--json", action="store_true", help="one last line of JSON")
    parser.add_argument("--out", type=Path, help="folder for the images")
    parser.add_argument("--denoise", type=float, nargs="+", default=[0.35, 0.5])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="options that are not the default")
    arguments = parser.parse_args()
    changed = dict(pair.split("=", 1) for pair in arguments.set)
    settings = Settings.parse({name: Settings.option(name).parse(value) for name, value in changed.items()})
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    figures = []
    for name, photo in given(arguments).items():
        source = photo.resize((photo.width // 2, photo.height // 2), LANCZOS)
        for denoise in arguments.denoise:
            images = {
                way: enlarged(source, replace(settings, **changes), Generation(denoise=denoise))
                for way, changes in WAYS.items()
            }
            for row in measure(photo, images):
                shown = "  ".join(f"{key} {value:.3f}" for key, value in row.items() if isinstance(value, float))
                harmless = "harmless" if row["harmless"] else "NOT harmless"
                print(f"{name:14} {denoise:.2f} {row['way']:18} {shown}  {harmless}", flush=True)
                figures.append({"photo": name, "denoise": denoise, **row})
            for way, image in images.items() if arguments.out else ():
                image.save(arguments.out / f"{name}-{denoise:g}-{way.replace(' ', '-')}.png")
    print(f"harmless: {sum(row['harmless'] for row in figures)} of {len(figures)}")
    if arguments.json:
        print(json.dumps({"settings": changed or "defaults", "figures": figures}))
    return 0 if all(row["harmless"] for row in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
