"""Regions of a picture: patches of the source that DINO sees alike, named by letters.

Spherical k-means (Dhillon & Modha 2001) of the patch tokens, as the encoder sees them, without a restoration head. It
begins with one cluster and splits the widest along its first principal axis (Boley 1998), so that it needs no random
numbers: the same features give the same regions everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_dinotile.dino.field import FeatureField
from lib_dinotile.lines import LETTERS
from lib_dinotile.tiling.plan import Rect

MOST = len(LETTERS)
"""Regions of a picture."""
FINEST = 64
"""Cells along the longer side, at most: finer features are averaged."""
COMPONENTS = 32
"""Principal components of the tokens that are clustered. More tell no more of the world's textures, and take longer."""
GAIN = 0.15
"""One more region has to lessen the mean distance to the clusters' centres by this share, or it is not made."""
CLOSE = 0.04
"""Mean cosine distance to the centres that is as near as need be: what is left are the borders."""
SPECK = 0.005
"""Share of the picture below which a connected part is joined to what is around it."""
PURE = 0.8
"""Share that a region has of the square that shows it best."""


@dataclass(frozen=True)
class Regions:
    """Regions of a source, laid over the canvas. The largest has number 0 and letter A."""

    labels: Tensor
    """(gh, gw), int64 on the CPU: the number of the region of each cell; cells divide the canvas evenly."""
    canvas: tuple[int, int]
    """(width, height) in pixels."""

    @property
    def letters(self) -> str:
        """One for each region."""
        return LETTERS[: int(self.labels.max()) + 1]

    @cached_property
    def _field(self) -> FeatureField:
        return FeatureField(F.one_hot(self.labels).movedim(-1, 0).float(), self.canvas)

    def shares(self, tiles: Sequence[Rect], grid: tuple[int, int] = (1, 1)) -> Tensor:
        """(k, regions, h, w), float32 on the CPU: how much of each cell of a grid over each of k rectangles a region
        covers. They sum to one over the regions."""
        return self._field.crop(tiles, grid)

    @property
    def areas(self) -> list[float]:
        """Share of the picture that each region covers."""
        return self._field.features.mean((1, 2)).tolist()

    def at(self, x: float, y: float) -> str:
        """The letter at a place on the canvas; one beyond it counts as its border."""
        (width, height), (gh, gw) = self.canvas, self.labels.shape
        column, row = (int(place * cells // side) for place, cells, side in ((x, gw, width), (y, gh, height)))
        return LETTERS[int(self.labels[min(max(row, 0), gh - 1), min(max(column, 0), gw - 1)])]

    def box(self, letter: str) -> Rect:
        """The smallest rectangle on the canvas with all of a region."""
        inside = self.labels == LETTERS.index(letter)
        rows, columns = (inside.any(dim).nonzero().flatten() for dim in (1, 0))
        return self._rect(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)

    def best_crop(self, letter: str) -> Rect:
        """The largest square on the canvas of which a region is PURE; of those the purest, and then the upper left."""
        inside = self._field.features[LETTERS.index(letter)][None]
        low, high = 1, min(self.labels.shape)
        while low < high:  # a larger pure square nearly always has smaller ones in it
            side = (low + high + 1) // 2
            low, high = (side, high) if float(F.avg_pool2d(inside, side, 1).max()) >= PURE else (low, side - 1)
        pure = F.avg_pool2d(inside, low, 1)[0]
        row, column = divmod(int(pure.argmax()), pure.shape[1])
        return self._rect(column, row, column + low, row + low)

    def _rect(self, left: int, top: int, right: int, bottom: int) -> Rect:
        """Of cells, in pixels."""
        (width, height), (gh, gw) = self.canvas, self.labels.shape
        x, y = left * width // gw, top * height // gh
        return Rect(x, y, -(-right * width // gw) - x, -(-bottom * height // gh) - y)


def find_regions(field: FeatureField, count: int | None = None) -> Regions:
    """The regions of a source with these patch features.

    count: how many, from 2 to MOST, if not as many as there seem to be. Fewer are found where the picture has less to
    tell apart.
    """
    longest = max(field.features.shape[1:])
    grid = [max(1, round(side * min(1.0, FINEST / longest))) for side in field.features.shape[1:]]
    whole = FeatureField(field.features.cpu().float(), field.canvas)
    features = whole.crop([Rect(0, 0, *field.canvas)], (grid[0], grid[1]))[0]
    with torch.inference_mode(False), torch.no_grad():
        return Regions(_numbered(_tidied(_clusters(_rows(features.clone()), count).reshape(grid))), field.canvas)


def _rows(features: Tensor) -> Tensor:
    """Features (D, h, w) as what is clustered, (h * w, COMPONENTS) float64 of length one: averaged with the neighbours,
    without what all have in common."""
    padded = F.pad(features[None], (1, 1, 1, 1), mode="replicate")
    rows = F.normalize(F.avg_pool2d(padded, 3, 1)[0].flatten(1).T, dim=1)
    rows = rows - rows.mean(0)
    _, axes = torch.linalg.eigh(rows.T @ rows)
    return F.normalize((rows @ axes[:, -COMPONENTS:]).double(), dim=1)


def _clusters(rows: Tensor, count: int | None) -> Tensor:
    """(n,) int64: the cluster of each row; cosine distance."""
    labels, centres = rows.new_zeros(len(rows), dtype=torch.long), F.normalize(rows.mean(0, keepdim=True), dim=1)
    distance = math.inf
    for number in range(2, (count or MOST) + 1):
        if len(centres.unique(dim=0)) < number - 1 or number > len(rows):
            break
        found, moved = _lloyd(rows, _split(rows, labels, centres))
        closer = float((1 - (rows * moved[found]).sum(1)).mean())
        if count is None and number > 2 and closer > (1 - GAIN) * distance:
            break
        labels, centres, distance = found, moved, closer
        if count is None and closer < CLOSE:
            break
    return labels


def _split(rows: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """The centres with those of two halves in place of the cluster that spreads widest."""
    spread = rows.new_zeros(len(centres)).index_add_(0, labels, 1 - (rows * centres[labels]).sum(1))
    widest = int(spread.argmax())
    own = rows[labels == widest]
    off = own - own.mean(0)
    _, axes = torch.linalg.eigh(off.T @ off)
    upper = off @ axes[:, -1] >= 0
    halves = [own[half].mean(0) for half in (upper, ~upper) if half.any()]
    return torch.cat([centres[:widest], centres[widest + 1 :], F.normalize(torch.stack(halves), dim=1)])


def _lloyd(rows: Tensor, centres: Tensor, rounds: int = 50) -> tuple[Tensor, Tensor]:
    """(labels, centres) once no row changes its cluster any more; clusters that lost all rows stay where they are."""
    labels = (rows @ centres.T).argmax(1)
    for _ in range(rounds):
        sums = torch.zeros_like(centres).index_add_(0, labels, rows)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centres)
        found = (rows @ centres.T).argmax(1)
        if torch.equal(found, labels):
            break
        labels = found
    return labels, centres


def _tidied(labels: Tensor) -> Tensor:
    """Labels (h, w) by the majority of each cell's neighbours, and without specks."""
    masks = F.one_hot(labels).movedim(-1, 0).float()
    labels = (_around(masks) + masks).argmax(0)  # a cell counts twice
    parts = _connected(labels)
    sizes = torch.bincount(parts.flatten(), minlength=parts.numel())
    known = sizes[parts] >= min(SPECK * parts.numel(), int(sizes.max()))
    while not known.all():
        masks = F.one_hot(labels).movedim(-1, 0) * known
        votes = F.avg_pool2d(masks.float(), (3, 1), 1, (1, 0)) + F.avg_pool2d(masks.float(), (1, 3), 1, (0, 1))
        reached = ~known & (votes.amax(0) > 0)
        labels, known = torch.where(reached, votes.argmax(0), labels), known | reached
    return labels


def _around(masks: Tensor) -> Tensor:
    """How many of the nine cells around and at each cell (n, h, w) are true."""
    return F.avg_pool2d(masks, 3, 1, 1, divisor_override=1)


def _connected(labels: Tensor) -> Tensor:
    """Connected parts of cells (h, w) that have one label: the largest index of any cell of the part."""
    parts = torch.arange(labels.numel(), dtype=torch.float64).reshape(labels.shape)
    masks = F.one_hot(labels).movedim(-1, 0).double()
    while True:
        spread = (masks * (parts + 1))[:, None]
        along = torch.maximum(F.max_pool2d(spread, (1, 3), 1, (0, 1)), F.max_pool2d(spread, (3, 1), 1, (1, 0)))[:, 0]
        found = (along * masks).sum(0) - 1
        if torch.equal(found, parts):
            return parts.long()
        parts = found


def _numbered(labels: Tensor) -> Tensor:
    """Labels 0, 1, ... with the largest first; of equal ones that which begins further up, and left."""
    flat = labels.flatten()
    firsts = {int(label): int((flat == label).nonzero()[0]) for label in flat.unique()}
    order = sorted(firsts, key=lambda label: (-int((flat == label).sum()), firsts[label]))
    return torch.tensor([order.index(int(label)) for label in flat]).reshape(labels.shape)
