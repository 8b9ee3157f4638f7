"""The feature field: DINOv2 features of the source, laid over the canvas.

Positions are those of cells' centres throughout (what torch calls `align_corners=False`): of a grid of `n` cells over
`length` pixels, cell `i` is centred on pixel position `(i + 0.5) * length / n`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_dinotile.dino.encoder import Facet, PatchEncoder, bicubic
from lib_dinotile.tiling.blend import Blend
from lib_dinotile.tiling.plan import Rect, TilePlan


@dataclass(frozen=True)
class FeatureField:
    """Features over the whole canvas, to be cropped to any rectangle on any grid."""

    features: Tensor
    """(D, gh, gw); its cells divide the canvas evenly."""
    canvas: tuple[int, int]
    """(width, height) in pixels."""

    def crop(self, tiles: Sequence[Rect], grid: tuple[int, int]) -> Tensor:
        """(k, D, h, w): the features at the cells of a grid (h, w) over each of k rectangles on the canvas.

        Bilinear between the field's cells; where the grid asked for is coarser than the field, that surface's average
        around each cell's centre, so that nothing is missed between two centres. (Averaging the surface reproduces
        linear fields exactly; the sampled triangle of torch's and Pillow's antialiased resizing does not.) A rectangle
        may reach beyond the canvas: there the field goes on as it is at the border.
        """
        if not tiles:
            return self.features.new_empty(0, self.features.shape[0], *grid)
        return torch.stack([self._crop(tile, grid) for tile in tiles])

    def _crop(self, tile: Rect, grid: tuple[int, int]) -> Tensor:
        (width, height), (h, w) = self.canvas, grid
        across = _sample(self.features, 2, tile.x, tile.width, w, width)
        return _sample(across, 1, tile.y, tile.height, h, height)


def _sample(field: Tensor, dim: int, start: int, length: int, count: int, canvas: int) -> Tensor:
    """`field` along `dim`, at `count` cells over the pixels [start, start + length) of a canvas of that many pixels."""
    cells = field.shape[dim]
    # Whole numbers up to the one division: what two tiles share, they get to the bit, and the field itself unchanged.
    centres = (torch.arange(count) * 2 + 1) * length + 2 * count * start
    position = (centres * cells).double() / (2 * count * canvas) - 0.5
    ratio = length * cells / (count * canvas)
    # A cell of the field is one cell wide already; a box of this width makes it `ratio` wide (variances add up).
    box = math.sqrt(max(0.0, ratio**2 - 1))
    shape = [-1 if d == dim else 1 for d in range(3)]
    sampled = torch.zeros(())
    for offset in range(-math.ceil(box / 2), math.ceil(box / 2) + 2):
        index = position.floor() + offset
        taken = field.index_select(dim, index.clamp(0, cells - 1).long().to(field.device))
        # Not every device has float64: only what is float32 goes there.
        weight = _tent(position - index, box).to(field.dtype).to(field.device)
        sampled = sampled + taken * weight.view(shape)
    return sampled


def _tent(distance: Tensor, box: float) -> Tensor:
    """The weight of a cell in linear interpolation at that distance (in cells), averaged over a box of that width."""
    if box < 1e-6:
        return (1 - distance.abs()).clamp(min=0)

    def integral(x: Tensor) -> Tensor:
        x = x.clamp(-1, 1)
        return x - x * x.abs() / 2

    return (integral(distance + box / 2) - integral(distance - box / 2)) / box


def patch_grid(width: int, height: int, patches: int) -> tuple[int, int]:
    """(h, w) of the grid whose longer side has `patches` patches, the other in proportion, but one at least."""
    longest = max(width, height)
    return max(1, round(height * patches / longest)), max(1, round(width * patches / longest))


def feature_field(
    encoder: PatchEncoder,
    source: Tensor,
    canvas: tuple[int, int],
    patches: int = 64,
    windows: int = 1,
    layer: int = -1,
) -> FeatureField:
    """The features of the whole source, laid over the canvas.

    `source` (3, H, W) in [0, 1] is resized so that its longest side is `patches` patches, and seen at once, since what
    a patch is shows only in its surroundings. With `windows` = n > 1 it is resized to n times that, and seen through
    overlapping windows of `patches` x `patches`, blended as the tiles of the canvas are.

    `canvas` is (width, height) in pixels. ValueError if `patches` or `windows` is less than one. The result has no
    gradient, and can take part in one even if this is called under inference mode.
    """
    return feature_fields(encoder, source, canvas, patches, windows, [(layer, "tokens")])[0]


def feature_fields(
    encoder: PatchEncoder,
    source: Tensor,
    canvas: tuple[int, int],
    patches: int,
    windows: int,
    wanted: Sequence[tuple[int, Facet]],
) -> list[FeatureField]:
    """`feature_field` for some layers and facets, for the work of one."""
    if patches < 1 or windows < 1:
        raise ValueError(f"{windows} windows of {patches} patches show nothing")
    with torch.inference_mode(False), torch.no_grad():
        gh, gw = patch_grid(source.shape[2], source.shape[1], patches * windows)
        pixels = _resize(source.clone().float(), gh * encoder.patch, gw * encoder.patch)[None]
        # On the patch grid a window is a tile. A quarter shared takes no more windows than an eighth, up to n = 4.
        plan = TilePlan(gw, gh, tile=patches, overlap=patches // 4, factor=1)
        if len(plan) == 1:
            return [FeatureField(seen[0], canvas) for seen in encoder.several(pixels, wanted)]
        blend, features = Blend(plan), [torch.zeros(0)] * len(wanted)
        for window in plan.tiles:
            rows, columns = (slice(s.start * encoder.patch, s.stop * encoder.patch) for s in window.slices)
            for number, seen in enumerate(encoder.several(pixels[:, :, rows, columns], wanted)):
                if not features[number].numel():
                    features[number] = seen.new_zeros(seen.shape[1], gh, gw)
                features[number][(..., *window.slices)] += seen[0] * blend.weight(window).to(seen)
    return [FeatureField(each, canvas) for each in features]


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """(3, H, W) -> (3, height, width), bicubic with antialiasing, kept in [0, 1]."""
    return bicubic(image[None], (height, width), antialias=True)[0].clamp(0, 1)
