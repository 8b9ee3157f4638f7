"""Low-resolution sources as they come in practice, from sharp pictures: Real-ESRGAN's chain of degradations.

Section 3 of arXiv 2107.10833; ranges and probabilities are those of its published training options
(options/train_realesrgan_x4plus.yml), kernels those of basicsr/data/degradations.py. Two things differ: Pillow's
filters smooth before they shrink, where torch's don't, and pixels are rounded to 8 bits after every step.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

Range = tuple[float, float]

FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
"""Area, bilinear, bicubic; one is drawn for every resize."""

KERNELS = ("iso", "aniso", "generalised iso", "generalised aniso", "plateau iso", "plateau aniso")
KERNEL_CHANCES = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
KERNEL_SIZES = (7, 22)
"""Taps of a kernel, odd, from and below."""
GENERALISED_BETA: Range = (0.5, 4.0)
PLATEAU_BETA: Range = (1.0, 2.0)

SINC_CHANCE, FINAL_SINC_CHANCE = 0.1, 0.8
GAUSSIAN_CHANCE, GREY_CHANCE = 0.5, 0.4
JPEG_QUALITY: Range = (30.0, 95.0)
BLOCK = 236
"""Pixels along what is filtered at once."""
PHOTONS = 256
"""Counts that white stands for in Poisson noise."""


@dataclass(frozen=True)
class Order:
    """Ranges that one round of blur, resize, noise and JPEG draws from, at severity 1."""

    blur_chance: float
    blur: Range
    """Standard deviation of the kernels, in pixels."""
    resize: Range
    """Size after the resize: in the last round over the target's, before over the sharp picture's."""
    up_down: tuple[float, float]
    """Chances that the resize enlarges, and that it shrinks."""
    noise: Range
    """Standard deviation of Gaussian noise, in levels of 255."""
    poisson: Range
    """Times the noise of `PHOTONS` counts."""


ORDERS = (
    Order(1.0, (0.2, 3.0), (0.15, 1.5), (0.2, 0.7), (1.0, 30.0), (0.05, 3.0)),
    Order(0.8, (0.2, 1.5), (0.3, 1.2), (0.3, 0.4), (1.0, 25.0), (0.05, 2.5)),
)
ONCE = Order(1.0, ORDERS[0].blur, ORDERS[1].resize, ORDERS[1].up_down, ORDERS[0].noise, ORDERS[0].poisson)
"""The only round, where there is one: the classical chain, whose resize is the last one's."""


def target_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(width, height) of the source of a sharp picture: 1 / scale of its size, rounded, at least 1 px."""
    return max(round(size[0] / scale), 1), max(round(size[1] / scale), 1)


def clean_shrink(sharp: Image.Image, scale: float) -> Image.Image:
    """The source at its best: `sharp` shrunk with Lanczos, nothing else."""
    return sharp.resize(target_size(sharp.size, scale), Image.Resampling.LANCZOS)


def degrade(
    rng: np.random.Generator, sharp: Image.Image, scale: float, severity: float = 0.5, orders: int = 2
) -> Image.Image:
    """A low-resolution source (RGB) of a sharp picture (RGB), 1 / scale of its size; the same for the same `rng`.

    scale: at least 1; severity in 0..1 scales every range: 1 is Real-ESRGAN's own, 0 `clean_shrink`; orders: rounds of
    blur, resize, noise and JPEG, 1 or 2. ValueError for any other.
    """
    if not scale >= 1.0:
        raise ValueError(f"scale {scale} is less than 1")
    if not 0.0 <= severity <= 1.0:
        raise ValueError(f"severity {severity} is not between 0 and 1")
    if orders not in (1, 2):
        raise ValueError(f"orders {orders} is neither 1 nor 2")
    if severity == 0.0:
        return clean_shrink(sharp, scale)
    target, image = target_size(sharp.size, scale), sharp
    if orders == 2:
        image = _round(rng, image, ORDERS[0], sharp.size, severity)
        image = jpeg(rng, image, severity)
    image = _round(rng, image, ORDERS[1] if orders == 2 else ONCE, target, severity)
    coded_first = rng.random() < 0.5
    if coded_first:
        image = jpeg(rng, image, severity)
    image = image.resize(target, _filter(rng))
    if rng.random() < FINAL_SINC_CHANCE * severity:
        image = convolve(image, sinc_kernel(_taps(rng), rng.uniform(math.pi / 3, math.pi)))
    return image if coded_first else jpeg(rng, image, severity)


def _round(
    rng: np.random.Generator, image: Image.Image, order: Order, size: tuple[int, int], severity: float
) -> Image.Image:
    """Blur, resize to about `size`, noise."""
    if rng.random() < order.blur_chance:
        image = convolve(image, random_kernel(rng, order.blur, severity))
    factor, chance = 1.0, rng.random()
    if chance < order.up_down[0]:
        factor = rng.uniform(1.0, 1.0 + (order.resize[1] - 1.0) * severity)
    elif chance < sum(order.up_down):
        factor = rng.uniform(1.0 - (1.0 - order.resize[0]) * severity, 1.0)
    image = image.resize(target_size(size, 1.0 / factor), _filter(rng))
    return add_noise(rng, image, order, severity)


def _filter(rng: np.random.Generator) -> Image.Resampling:
    return FILTERS[rng.integers(len(FILTERS))]


def _taps(rng: np.random.Generator) -> int:
    return int(rng.integers(*KERNEL_SIZES)) // 2 * 2 + 1


def random_kernel(rng: np.random.Generator, sigmas: Range, severity: float) -> np.ndarray:
    """A blur kernel (k, k), k odd, that sums to one: mostly Gaussian, seldom a sinc filter.

    sigmas: range of the standard deviation in pixels, at severity 1.
    """
    taps = _taps(rng)
    if rng.random() < SINC_CHANCE * severity:
        return sinc_kernel(taps, rng.uniform(math.pi / (3 if taps < 13 else 5), math.pi))
    kind = KERNELS[rng.choice(len(KERNELS), p=KERNEL_CHANCES)]
    wide, high = rng.uniform(*sigmas, 2) * severity
    turn = rng.uniform(-math.pi, math.pi)
    if kind.endswith("aniso"):
        return gaussian_kernel(taps, wide, high, turn, *_shape(rng, kind))
    return gaussian_kernel(taps, wide, wide, 0.0, *_shape(rng, kind))


def _shape(rng: np.random.Generator, kind: str) -> tuple[float, bool]:
    """(beta, whether it has a plateau); on either side of the Gaussian's 1 with the same chance."""
    if not kind.startswith(("generalised", "plateau")):
        return 1.0, False
    plateau = kind.startswith("plateau")
    low, high = PLATEAU_BETA if plateau else GENERALISED_BETA
    return (rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high)), plateau


def gaussian_kernel(
    taps: int, wide: float, high: float, turn: float = 0.0, beta: float = 1.0, plateau: bool = False
) -> np.ndarray:
    """exp(-q^beta / 2), or 1 / (1 + q^beta) with a plateau; q: the squared distance in standard deviations.

    (taps, taps), sums to one. wide, high: standard deviations in pixels, > 0; turn: angle of `wide`, in radians.
    """
    y, x = np.mgrid[:taps, :taps] - taps // 2
    along, across = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    q = ((along / wide) ** 2 + (across / high) ** 2) ** beta
    kernel = 1.0 / (1.0 + q) if plateau else np.exp(-0.5 * q)
    return kernel / kernel.sum()


def sinc_kernel(taps: int, cutoff: float) -> np.ndarray:
    """The circular low-pass filter, (taps, taps), sums to one: rings as sharpening and strong JPEG do (section 3.3).

    cutoff: in radians a pixel, up to pi.
    """
    y, x = np.mgrid[:taps, :taps] - taps // 2
    distance = np.hypot(x, y)
    distance[taps // 2, taps // 2] = 1.0
    bessel = torch.special.bessel_j1(torch.from_numpy(cutoff * distance)).numpy()
    kernel = cutoff * bessel / (2 * math.pi * distance)
    kernel[taps // 2, taps // 2] = cutoff**2 / (4 * math.pi)
    return kernel / kernel.sum()


def convolve(image: Image.Image, kernel: np.ndarray) -> Image.Image:
    """The picture filtered with a kernel (k, k), k odd; mirrored at its borders.

    By Fourier transforms of blocks, each with as much of its surroundings as the kernel sees (overlap-save): the time
    is the same for any kernel, and a block stays in the processor's cache.
    """
    margin, pixels = len(kernel) // 2, np.asarray(image, np.float32)
    padded = np.pad(pixels.transpose(2, 0, 1), ((0, 0), (margin, margin), (margin, margin)), "symmetric")
    height, width = pixels.shape[:2]
    size = [min(side, BLOCK) + 2 * margin for side in (height, width)]
    response = torch.fft.rfft2(torch.from_numpy(kernel.astype(np.float32)), size)
    filtered = np.empty_like(padded, shape=(3, height, width))
    for top in range(0, height, BLOCK):
        for left in range(0, width, BLOCK):
            seen = padded[:, top : top + BLOCK + 2 * margin, left : left + BLOCK + 2 * margin]
            found = torch.fft.irfft2(torch.fft.rfft2(torch.from_numpy(seen), size) * response, size).numpy()
            inside = found[:, 2 * margin : seen.shape[1], 2 * margin : seen.shape[2]]
            filtered[:, top : top + BLOCK, left : left + BLOCK] = inside
    return _to_image(filtered.transpose(1, 2, 0))


def add_noise(rng: np.random.Generator, image: Image.Image, order: Order, severity: float) -> Image.Image:
    """Gaussian or Poisson noise, of every colour or grey; as strong as the square of the severity.

    A linear scale makes half of the pictures at severity 0.5 grainier than photographs that people keep.
    Poisson noise is drawn from the normal distribution of its variance, which is ten times faster and differs from it
    in the darkest levels only.
    """
    pixels, severity = np.asarray(image, np.float32), severity**2
    gaussian, grey = rng.random() < GAUSSIAN_CHANCE, rng.random() < GREY_CHANCE
    noise = rng.standard_normal((*pixels.shape[:2], 1 if grey else 3), np.float32)
    if gaussian:
        noise *= rng.uniform(*order.noise) * severity
    else:
        light = np.asarray(image.convert("L"), np.float32)[..., None] if grey else pixels
        noise *= np.sqrt(light * np.float32(255 / PHOTONS)) * np.float32(rng.uniform(*order.poisson) * severity)
    return _to_image(pixels + noise)


def jpeg(rng: np.random.Generator, image: Image.Image, severity: float) -> Image.Image:
    """Coded as JPEG with 4:2:0 colours, at a random quality, and read again."""
    coded = io.BytesIO()
    image.save(coded, "JPEG", quality=round(100 - (100 - rng.uniform(*JPEG_QUALITY)) * severity))
    with Image.open(coded) as file:
        return file.convert("RGB")


def _to_image(pixels: np.ndarray) -> Image.Image:
    """(H, W, 3) in levels of 255, of any range; overwritten."""
    pixels += 0.5
    return Image.fromarray(np.ascontiguousarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8)))
