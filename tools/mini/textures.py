"""Procedural textures: endless sharp material whose class is known exactly.

Each painter takes a generator and a side in px and returns (side, side, 3) uint8. The same seed, the same texture.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial import cKDTree

Painter = Callable[[np.random.Generator, int], np.ndarray]


def _noise(rng: np.random.Generator, side: int, beta: float, stretch: float = 1.0, angle: float = 0.0) -> np.ndarray:
    """(side, side) noise, mean 0, deviation 1, spectrum 1/f**beta, drawn out `stretch` times along `angle`."""
    fy, fx = np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij")
    along, across = fx * np.cos(angle) + fy * np.sin(angle), fy * np.cos(angle) - fx * np.sin(angle)
    radius = np.hypot(along * stretch, across)
    spectrum = np.fft.rfft2(rng.normal(size=(side, side))) / np.maximum(radius, 1.0 / side) ** beta
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, s=(side, side))
    return field / field.std()


def _mix(
    rng: np.random.Generator, field: np.ndarray, dark: np.ndarray, light: np.ndarray, grain: float = 4.0
) -> np.ndarray:
    """Colours between `dark` and `light` by `field` (0..1), with a little per-pixel grain."""
    pixels = dark + np.clip(field, 0, 1)[..., None] * (light - dark) + rng.normal(0, grain, (*field.shape, 1))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _palette(
    rng: np.random.Generator, base: tuple[int, int, int], spread: float = 25.0
) -> tuple[np.ndarray, np.ndarray]:
    """A dark and a light colour around `base`."""
    colour = np.asarray(base) + rng.normal(0, spread, 3)
    return np.clip(colour * rng.uniform(0.15, 0.45), 0, 255), np.clip(colour * rng.uniform(1.0, 1.5), 0, 255)


def _grid(side: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates turned by `angle`, each (side, side)."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float64)
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def fur(rng: np.random.Generator, side: int) -> np.ndarray:
    """Hairs: white noise drawn out along a smooth flow (line integral convolution, Cabral and Leedom 1993)."""
    angle = rng.uniform(0, np.pi) + _noise(rng, side, 2.2) * rng.uniform(0.2, 0.6)
    y, x = np.mgrid[0:side, 0:side].astype(np.float64)
    seeds = gaussian_filter((rng.random((side, side)) < rng.uniform(0.1, 0.4)).astype(float), rng.uniform(0.5, 0.9))
    total, length = seeds.copy(), int(rng.integers(5, 14))
    for direction in (-1, 1):
        py, px = y.copy(), x.copy()
        for _ in range(length):
            turn = map_coordinates(angle, (py, px), order=1, mode="wrap")
            py, px = py + direction * np.sin(turn), px + direction * np.cos(turn)
            total += map_coordinates(seeds, (py, px), order=1, mode="wrap")
    total = (total - total.mean()) / total.std()
    dark, light = _palette(rng, [(150, 110, 75), (120, 118, 115), (190, 150, 100), (210, 205, 195)][rng.integers(4)])
    return _mix(rng, 0.45 + 0.22 * total + 0.15 * _noise(rng, side, 1.8), dark, light, 3.0)


def cloth(rng: np.random.Generator, side: int) -> np.ndarray:
    """A plain weave: threads over and under by turns."""
    u, v = _grid(side, rng.uniform(0, np.pi))
    pitch = rng.uniform(4, 12)
    u, v = u / pitch + 0.12 * _noise(rng, side, 2.0), v / pitch + 0.12 * _noise(rng, side, 2.0)
    over = (np.floor(u) + np.floor(v)) % 2
    warp, weft = np.abs(np.sin(np.pi * u)), np.abs(np.sin(np.pi * v))
    height = np.where(over > 0, warp**0.6 * (0.55 + 0.45 * weft), weft**0.6 * (0.55 + 0.45 * warp))
    first = _palette(rng, tuple(rng.integers(60, 200, 3)))
    second = _palette(rng, tuple(rng.integers(60, 200, 3))) if rng.random() < 0.5 else first
    a, b = _mix(rng, height, *first), _mix(rng, height, *second)
    return np.where((over > 0)[..., None], a, b)


def leaves(rng: np.random.Generator, side: int) -> np.ndarray:
    """Leaf blades over one another, each with a midrib."""
    big = side * 2
    image = Image.new("RGB", (big, big), (18, 30, 12))
    draw = ImageDraw.Draw(image)
    size = rng.uniform(14, 44)
    count = int(2.2 * big * big / (size * size * 1.3))
    t = np.linspace(0, np.pi, 9)
    hue = rng.normal(0, 18, 3)
    for i in range(count):
        cx, cy, angle = rng.uniform(0, big), rng.uniform(0, big), rng.uniform(0, 2 * np.pi)
        half, width = size * rng.uniform(0.6, 1.3), size * rng.uniform(0.2, 0.42)
        ax, ay = np.cos(angle), np.sin(angle)
        along = np.concatenate([-np.cos(t), np.cos(t)]) * half
        across = np.concatenate([np.sin(t), -np.sin(t)]) * width
        light = 0.35 + 0.75 * i / count * rng.uniform(0.6, 1.2)
        colour = tuple(int(c) for c in np.clip((np.array([80, 130, 45]) + hue + rng.normal(0, 12, 3)) * light, 0, 255))
        draw.polygon(list(zip(cx + along * ax - across * ay, cy + along * ay + across * ax, strict=True)), fill=colour)
        rib = tuple(min(c + 35, 255) for c in colour)
        draw.line((cx - half * ax, cy - half * ay, cx + half * ax, cy + half * ay), fill=rib, width=2)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


def pebbles(rng: np.random.Generator, side: int) -> np.ndarray:
    """Round stones: cells of random seeds (Worley 1996), shaded by the distance to the next cell."""
    pitch = rng.uniform(9, 28)
    seeds = rng.uniform(-pitch, side + pitch, (int((side / pitch + 2) ** 2), 2))
    y, x = np.mgrid[0:side, 0:side]
    points = np.stack([y, x], -1).reshape(-1, 2) + rng.normal(0, 0.2, (side * side, 2))
    distance, cell = cKDTree(seeds).query(points, k=2)
    edge = ((distance[:, 1] - distance[:, 0]) / pitch).reshape(side, side)
    slope = ((seeds[cell[:, 0]] - points) @ np.array([0.7, 0.7])).reshape(side, side) / pitch
    tone = rng.uniform(0.5, 1.0, len(seeds))[cell[:, 0]].reshape(side, side)
    shade = np.clip(edge * 2.5, 0, 1) ** 0.5 * np.clip(tone + 0.5 * slope + 0.05 * _noise(rng, side, 1.0), 0.1, 1.2)
    return _mix(rng, shade, *_palette(rng, (165, 158, 148), 18))


def brick(rng: np.random.Generator, side: int) -> np.ndarray:
    """A running bond of bricks with mortar."""
    u, v = _grid(side, rng.normal(0, 0.1) + rng.integers(2) * np.pi / 2)
    height = rng.uniform(9, 26)
    row = np.floor(v / height)
    column = np.floor(u / (2.4 * height) + 0.5 * (row % 2))
    inset = np.minimum(v / height - row, row + 1 - v / height) * height
    along = (u / (2.4 * height) + 0.5 * (row % 2) - column) * 2.4 * height
    inset = np.minimum(inset, np.minimum(along, 2.4 * height - along)) + 0.3 * _noise(rng, side, 1.2)
    tone = np.modf(np.abs(np.sin(row * 12.9898 + column * 78.233) * 43758.5453))[0]
    stone = _mix(rng, 0.35 + 0.5 * tone + 0.1 * _noise(rng, side, 1.0), *_palette(rng, (170, 88, 62)), 5)
    mortar = _mix(rng, 0.6 + 0.15 * _noise(rng, side, 0.6), *_palette(rng, (170, 165, 155), 10), 5)
    return np.where((inset > rng.uniform(0.8, 2.0))[..., None], stone, mortar)


def bark(rng: np.random.Generator, side: int) -> np.ndarray:
    """Ridges that run one way: folded noise."""
    angle = rng.normal(np.pi / 2, 0.3)
    stretch = rng.uniform(4, 9)
    ridge = 1.0 - np.abs(_noise(rng, side, 1.4, stretch, angle)) / 1.6
    return _mix(rng, 0.75 * ridge + 0.12 * _noise(rng, side, 0.8, 3, angle), *_palette(rng, (140, 112, 88), 15))


def water(rng: np.random.Generator, side: int) -> np.ndarray:
    """Ripples with glints."""
    angle = rng.normal(0, 0.4)
    ripple = _noise(rng, side, rng.uniform(1.6, 2.2), rng.uniform(2, 5), angle)
    glint = np.clip(ripple - rng.uniform(1.0, 1.6), 0, 1)
    return _mix(rng, 0.4 + 0.25 * ripple + 0.8 * glint, *_palette(rng, (90, 150, 175), 20), 2)


def sand(rng: np.random.Generator, side: int) -> np.ndarray:
    """Grains, on wind ripples."""
    grains = gaussian_filter(rng.normal(size=(side, side)), rng.uniform(0.4, 0.9), mode="wrap")
    u, _ = _grid(side, rng.uniform(0, np.pi))
    ripples = np.sin(u / rng.uniform(5, 20) + 1.5 * _noise(rng, side, 2.2))
    field = 0.55 + 0.2 * grains / grains.std() + rng.uniform(0, 0.2) * ripples
    return _mix(rng, field, *_palette(rng, (205, 180, 140), 18))


def strokes(rng: np.random.Generator, side: int) -> np.ndarray:
    """Pen strokes and letters on paper."""
    big = side * 2
    paper, ink = rng.integers(170, 256, 3), rng.integers(0, 110, 3)
    if rng.random() < 0.3:
        paper, ink = ink, paper
    image = Image.new("RGB", (big, big), tuple(int(c) for c in paper))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    letters = np.array(list("abcdefghijklmnopqrstuvwxyzABCDEFGHKMNPRSTWXYZ0123456789.,"))
    fill = tuple(int(c) for c in ink)
    for _ in range(side // 8):
        word = Image.new("L", (90, 14), 0)
        ImageDraw.Draw(word).text((0, 0), "".join(rng.choice(letters, 12)), font=font, fill=255)
        scale = rng.uniform(1.5, 5)
        word = word.resize((int(90 * scale), int(14 * scale)), Image.Resampling.BICUBIC)
        word = word.rotate(rng.normal(0, 5), expand=True, resample=Image.Resampling.BICUBIC)
        image.paste(fill, (int(rng.integers(-60, big)), int(rng.integers(-20, big))), word)
        points = np.cumsum(rng.normal(0, 18, (12, 2)), axis=0) + rng.uniform(0, big, 2)
        draw.line([tuple(p) for p in points], fill=fill, width=int(rng.integers(1, 7)), joint="curve")
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


def edges(rng: np.random.Generator, side: int) -> np.ndarray:
    """Flat and shaded shapes with crisp outlines."""
    big = side * 2
    image = Image.new("RGB", (big, big), tuple(int(c) for c in rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(60, 140))):
        cx, cy, size = rng.uniform(0, big), rng.uniform(0, big), rng.uniform(8, 120)
        fill = tuple(int(c) for c in rng.integers(0, 256, 3))
        kind = rng.integers(3)
        if kind == 0:
            draw.polygon([tuple(p) for p in rng.normal((cx, cy), size, (int(rng.integers(3, 6)), 2))], fill=fill)
        elif kind == 1:
            w, h = size * rng.uniform(0.3, 1, 2)
            draw.ellipse((cx - w, cy - h, cx + w, cy + h), fill=fill, outline=fill[::-1], width=int(rng.integers(0, 5)))
        else:
            end = rng.normal((cx, cy), 2 * size, 2)
            draw.line((cx, cy, *end), fill=fill, width=int(rng.integers(1, 14)))
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BOX)).astype(np.float64)
    return np.clip(pixels * (1 + 0.15 * _noise(rng, side, 2.2)[..., None]), 0, 255).astype(np.uint8)


TEXTURES: dict[str, Painter] = {
    painter.__name__: painter for painter in (fur, cloth, leaves, pebbles, brick, bark, water, sand, strokes, edges)
}
"""Name of the class -> its painter; a label is the position in this table."""


@lru_cache(maxsize=4)
def texture_atlas(variants: int, side: int, seed: int = 0) -> tuple[tuple[np.ndarray, ...], ...]:
    """`variants` textures of each class, in the order of `TEXTURES`."""
    return tuple(
        tuple(painter(np.random.default_rng((seed, label, i)), side) for i in range(variants))
        for label, painter in enumerate(TEXTURES.values())
    )
