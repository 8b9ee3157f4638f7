"""Pictures of what DINO sees: the source's features as colours, and how well a result agrees with them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.colors import Colormap
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lib_dinotile.condition.guard import Guard
from lib_dinotile.dino.field import FeatureField
from lib_dinotile.dino.regions import Regions
from lib_dinotile.tiling.blend import Blend
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.plan import Rect, TilePlan

COLOURS = "cividis"
"""From dark blue over grey to yellow: made to be read alike with and without colour blindness (Nunez et al. 2018)."""
STEP = 8
"""Pixels of the canvas along a side of a cell of the consistency map."""
REGION_COLOURS = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (213, 94, 0), (86, 180, 233),
    (240, 228, 66), (110, 80, 170), (140, 140, 140), (120, 200, 80), (150, 75, 30), (60, 60, 90),
)  # fmt: skip
"""Of regions by number; the first of them are those of Okabe and Ito, for all kinds of colour vision."""
LEAST, MOST = 0.0, 1.0
"""The ends of the scale of cosines, the same for every map."""
NEAR = sorted(itertools.product(range(-5, 6), repeat=2), key=lambda step: math.hypot(*step))
"""Steps (across, down) to the places around a place, itself and then the nearest first."""


def principal_colours(features: Tensor) -> Tensor:
    """Features (D, h, w) as colours (3, h, w) in [0, 1]: their first three principal components.

    The components' signs, which are arbitrary, are set so that the largest part of each is positive: the same features
    have the same colours in every run. What lies beyond the 2nd and 98th percentile is cut off.
    """
    rows = features.flatten(1).T.cpu().double()
    centred = rows - rows.mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    axes = axes[:, -3:].flip(1)
    axes = axes * torch.sign(axes.gather(0, axes.abs().argmax(0, keepdim=True)))
    parts = centred @ axes
    low, high = (parts.quantile(share, dim=0) for share in (0.02, 0.98))
    colours = ((parts - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    return colours.T.reshape(3, *features.shape[1:]).float()


def semantic_map(image: Image.Image, field: FeatureField, plan: TilePlan) -> Image.Image:
    """The source's features as colours over the picture (RGB), with the tiles' borders.

    image: the upscaled source, or the result, of any size.
    """
    colours = (principal_colours(field.features) * 255).byte().permute(1, 2, 0).numpy()
    overlay = Image.fromarray(colours).resize(image.size, Image.Resampling.BICUBIC)
    picture = Image.blend(image.convert("L").convert("RGB"), overlay, 0.65)
    _draw_tiles(picture, plan)
    return picture


def _draw_tiles(picture: Image.Image, plan: TilePlan, taken: Sequence[tuple[float, float]] = ()) -> None:
    """The tiles' borders and, where there is space, their numbers: beside the places taken, (x, y)."""
    ratio = picture.width / plan.width
    draw, (width, height) = ImageDraw.Draw(picture), plan.tile_size
    # All tiles together are a grid: its lines cross the whole picture.
    for column in plan.columns:
        for x in (column * ratio, min(column + width, plan.width) * ratio - 1):
            draw.line((x, 0, x, picture.height), "white")
    for row in plan.rows:
        for y in (row * ratio, min(row + height, plan.height) * ratio - 1):
            draw.line((0, y, picture.width, y), "white")
    size = max(14, max(picture.size) // 50)
    if min(width, height) * ratio < 2.5 * size:  # too small for their numbers
        return
    for number, tile in enumerate(plan.tiles, 1):
        right, bottom = min(tile.right, plan.width), min(tile.bottom, plan.height)
        x, y = (tile.x + right) / 2 * ratio, (tile.y + bottom) / 2 * ratio
        near = [(x + across * size / 2, y + down * size / 2) for across, down in NEAR]
        clear = (at for at in near if all(max(abs(at[0] - left), abs(at[1] - top)) >= 2 * size for left, top in taken))
        _label(draw, next(clear, near[0]), str(number), size)


def region_map(
    image: Image.Image, regions: Regions, plan: TilePlan | None = None, words: Mapping[str, str] | None = None
) -> Image.Image:
    """The regions as colours with letters over the picture (RGB), with a legend below.

    image: the source or the result, of any size, which the regions are laid over; plan: tiles whose borders are shown;
    words: of regions, by letter, for the legend.
    """
    numbers = Image.fromarray(regions.labels.numpy().astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    labels = np.asarray(numbers)
    grey = np.asarray(image.convert("L"))[..., None]
    pixels = (0.55 * grey + 0.45 * np.array(REGION_COLOURS)[labels]).astype(np.uint8)
    edges = np.zeros_like(labels, bool)
    edges[1:] |= labels[1:] != labels[:-1]
    edges[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    pixels[edges] = 255
    picture, ratio = Image.fromarray(pixels), image.width / regions.canvas[0]
    crops = [regions.best_crop(letter) for letter in regions.letters]
    middles = [((crop.x + crop.width / 2) * ratio, (crop.y + crop.height / 2) * ratio) for crop in crops]
    if plan is not None:
        _draw_tiles(picture, plan, middles)
    draw, size = ImageDraw.Draw(picture), max(16, max(picture.size) // 36)
    for middle, letter, colour in zip(middles, regions.letters, REGION_COLOURS):
        _badge(draw, middle, letter, colour, size)
    return _with_names(picture, regions, words or {})


def _badge(
    draw: ImageDraw.ImageDraw, middle: tuple[float, float], letter: str, colour: tuple[int, int, int], size: int
) -> None:
    """A letter in a disc of its region's colour."""
    (x, y), radius = middle, 0.85 * size
    draw.ellipse(
        (x - radius, y - radius, x + radius, y + radius), fill=colour, outline="white", width=max(2, size // 8)
    )
    draw.text(middle, letter, "white" if sum(colour) < 420 else "black", _font(size), anchor="mm")


def _with_names(picture: Image.Image, regions: Regions, words: Mapping[str, str]) -> Image.Image:
    """The picture over a line for each region: its letter, its share of the picture, its words; in columns."""
    size = max(13, min(22, picture.width // 40))
    column, step = 16 * size, round(2.2 * size)
    columns = max(1, min(picture.width // column, len(regions.letters)))
    rows = -(-len(regions.letters) // columns)
    width = max(picture.width, column)
    whole = Image.new("RGB", (width, picture.height + rows * step + size // 2), "white")
    whole.paste(picture, (0, 0))
    draw = ImageDraw.Draw(whole)
    for number, (letter, share) in enumerate(zip(regions.letters, regions.areas)):
        left, top = number % columns * (width // columns), picture.height + number // columns * step
        middle = left + 1.4 * size, top + 1.3 * size
        _badge(draw, middle, letter, REGION_COLOURS[number], size)
        text = f"{share:.0%}  {words.get(letter, '')[:200]}"
        room = width // columns - 3 * size
        while draw.textlength(text, _font(size)) > room:
            text = text[:-2].rstrip() + "…"
        draw.text((left + 2.8 * size, middle[1]), text, "black", _font(size), anchor="lm")
    return whole


def consistency(guard: Guard, canvas: Canvas, plan: TilePlan, tiles: Sequence[Rect]) -> tuple[Tensor, Tensor]:
    """(cosines (h, w) in [-1, 1], (h, w) true for what is in doubt) of what is painted, as the guard sees it now.

    tiles: those of the plan to look at. One value for STEP x STEP pixels of the canvas; NaN where no tile is.
    """
    step = STEP
    width, height = (-(-side // step) for side in plan.padded)
    total, weights = torch.zeros(height, width), torch.zeros(height, width)
    doubtful = torch.zeros(height, width, dtype=torch.bool)
    blend = Blend(plan)
    for tile in tiles:
        distances = guard.distances([tile], canvas.painted(tile)[None])[0]
        rows, columns = (
            torch.arange(-(-start // step), min(-(-end // step), length))
            for start, end, length in ((tile.y, tile.bottom, height), (tile.x, tile.right, width))
        )
        down, across = (
            (cells * step + step // 2 - start).clamp(max=side - 1)
            for cells, start, side in ((rows, tile.y, tile.height), (columns, tile.x, tile.width))
        )
        picks = down[:, None], across[None]
        weight = blend.weight(tile)[picks].clamp(min=1e-6)
        here = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
        total[here] += guard.to_pixels(tile, 1 - distances)[picks] * weight
        weights[here] += weight
        doubtful[here] |= guard.to_pixels(tile, guard.doubt(tile, distances).float(), "nearest")[picks] > 0
    size = slice(0, -(-plan.height // step)), slice(0, -(-plan.width // step))
    return torch.where(weights > 0, total / weights, torch.nan)[size], doubtful[size]


def consistency_map(image: Image.Image, cosines: Tensor, doubtful: Tensor) -> Image.Image:
    """How well a picture (RGB) agrees with its source, patch by patch, with a legend below.

    cosines, doubtful: (h, w) over the picture, which may have any size; what is in doubt has a red and white border.
    """
    colormap = matplotlib.colormaps[COLOURS]
    values = ((cosines - LEAST) / (MOST - LEAST)).clamp(0, 1)
    colours = (colormap(values.nan_to_num(0).numpy())[..., :3] * 255).astype(np.uint8)
    overlay = Image.fromarray(colours).resize(image.size, Image.Resampling.NEAREST)
    grey = image.convert("L").convert("RGB")
    known = Image.fromarray((cosines.isfinite().numpy() * 255).astype(np.uint8)).resize(image.size)
    picture = Image.composite(Image.blend(grey, overlay, 0.6), grey, known)
    mask = np.asarray(Image.fromarray((doubtful.numpy() * 255).astype(np.uint8)).resize(image.size)) > 127
    pixels = np.asarray(picture).copy()
    pixels[_border(mask, 3)] = (255, 255, 255)
    pixels[_border(mask, 1)] = (200, 0, 0)
    return _with_legend(Image.fromarray(pixels), colormap, bool(mask.any()))


def _border(mask: np.ndarray, width: int) -> np.ndarray:
    """True along the inner edge of what is true, also where the picture ends: else islands would seem to be meant."""
    inner = mask.copy()
    for _ in range(width):
        padded = np.pad(inner, 1)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _with_legend(picture: Image.Image, colormap: Colormap, doubts: bool) -> Image.Image:
    """The picture over a bar with the scale's colours, its numbers, and what they say: in as many lines as it takes."""
    width, margin, font = max(picture.width, 260), 10, _font(11)
    draw = ImageDraw.Draw(picture)
    low, high, border = "shows something else than the source", "shows the same", "red border: in doubt"
    beside = draw.textlength(f"{low}    {high}", font) <= width - 2 * margin
    lines = [(low, high)] if beside else [(low, ""), ("", high)]
    lines += [(border, "")] if doubts else []
    whole = Image.new("RGB", (width, picture.height + 45 + 17 * len(lines)), "white")
    whole.paste(picture, ((width - picture.width) // 2, 0))
    bar = (colormap(np.linspace(0, 1, width - 2 * margin))[:, :3] * 255).astype(np.uint8)
    whole.paste(Image.fromarray(np.repeat(bar[None], 14, axis=0)), (margin, picture.height + 8))
    draw, top = ImageDraw.Draw(whole), picture.height + 24
    for number in range(5):
        value = LEAST + (MOST - LEAST) * number / 4
        text = f"{value:.2f}"
        length = draw.textlength(text, font=font)
        left = margin + (width - 2 * margin) * number / 4 - length / 2
        draw.text((min(max(left, 2), width - length - 2), top), text, "black", font)
    for number, (left_words, right_words) in enumerate(lines, 1):
        draw.text((margin, top + 17 * number), left_words, "black", font)
        draw.text((width - margin, top + 17 * number), right_words, "black", font, anchor="ra")
    return whole


def _label(draw: ImageDraw.ImageDraw, middle: tuple[float, float], text: str, size: int) -> None:
    left, top, right, bottom = draw.textbbox((0, 0), text, font=_font(size))
    x, y = middle[0] - (right - left) / 2, middle[1] - (bottom - top) / 2
    draw.rectangle((x - 3, y - 2, x + right - left + 3, y + bottom - top + 4), fill=(0, 0, 0))
    draw.text((x, y - top), text, "white", _font(size))


@functools.lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's own: Pillow before 10.1 has none that can be made larger."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"), size)
