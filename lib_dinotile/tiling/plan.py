"""Where the tiles lie and in which order they are painted: pure geometry."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

ORDERS = ("chess", "linear", "fused", "none")

STEP = 64
"""Sides of tiles that a plan chooses by itself are multiples of this: what every UNet divides evenly."""


class Size(NamedTuple):
    """Of an image or a tile, in pixels."""

    width: int
    height: int


EMPTY = Size(0, 0)


@dataclass(frozen=True)
class Rect:
    """A rectangle in whole pixels; `x`, `y` is the upper left corner."""

    x: int
    y: int
    width: int
    height: int

    @property
    def right(self) -> int:
        return self.x + self.width

    @property
    def bottom(self) -> int:
        return self.y + self.height

    @property
    def slices(self) -> tuple[slice, slice]:
        """(rows, columns), to index the last two dimensions of an array."""
        return slice(self.y, self.bottom), slice(self.x, self.right)

    def of(self, field: Tensor) -> Tensor:
        """This part (..., height, width) of a field (..., H, W): a view, to be read or written."""
        return field[(..., *self.slices)]

    def shrink(self, factor: int) -> Rect:
        """The same rectangle on a grid of `factor` pixels per cell; ValueError if it does not lie on that grid."""
        if any(v % factor for v in (self.x, self.y, self.width, self.height)):
            raise ValueError(f"{self} does not lie on a grid of {factor} pixels")
        return Rect(self.x // factor, self.y // factor, self.width // factor, self.height // factor)

    def meets(self, other: Rect) -> bool:
        """Whether they have a pixel in common."""
        return self.x < other.right and other.x < self.right and self.y < other.bottom and other.y < self.bottom

    def intersection(self, other: Rect) -> Rect:
        """The rectangle that both cover. ValueError if there is none."""
        left, top = max(self.x, other.x), max(self.y, other.y)
        width, height = min(self.right, other.right) - left, min(self.bottom, other.bottom) - top
        if width <= 0 or height <= 0:
            raise ValueError(f"{self} and {other} have nothing in common")
        return Rect(left, top, width, height)

    def within(self, other: Rect) -> Rect:
        """The same rectangle, counted from the corner of the other."""
        return Rect(self.x - other.x, self.y - other.y, self.width, self.height)


def ceil_to(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def spread(length: int, tile: int, overlap: int, factor: int) -> list[int]:
    """Start positions of the fewest tiles of size `tile` that cover `length` and overlap by at least `overlap`.

    The tiles are spread evenly instead of pushing only the last one inward: the number of tiles is the same, and no
    overlap is wider than it need be. All values are multiples of `factor`.
    """
    if length <= tile:
        return [0]
    cells, tile_cells, count = length // factor, tile // factor, _count(length, tile, overlap, factor)
    # Rounding down an even spread never makes a step longer than tile - overlap: steps are at most
    # ceil(room / (count - 1)), and room <= (count - 1) * (tile - overlap) in whole cells.
    return [i * (cells - tile_cells) // (count - 1) * factor for i in range(count)]


def _count(length: int, tile: int, overlap: int, factor: int) -> int:
    """The fewest tiles of that size that cover `length` and overlap by at least `overlap`."""
    cells, tile_cells, overlap_cells = length // factor, tile // factor, -(-overlap // factor)
    return math.ceil((cells - overlap_cells) / (tile_cells - overlap_cells)) if length > tile else 1


def fewest(length: int, limit: int, overlap: int, factor: int) -> tuple[list[int], int]:
    """Start positions of the fewest tiles of at most `limit` that cover `length`, and their size, as small as can be.

    Neighbours overlap by at least `overlap`. All values are multiples of `factor`.
    """
    if length <= limit:
        return [0], length
    count = math.ceil((length - overlap) / (limit - overlap))
    side = ceil_to(math.ceil((length + (count - 1) * overlap) / count), factor)
    return spread(length, side, overlap, factor), side


def _colours(starts: Sequence[int], tile: int) -> int:
    """The smallest n such that of the tiles i, i + n, i + 2n, ... no two overlap."""
    return next(n for n in range(1, len(starts) + 1) if all(b - a >= tile for a, b in zip(starts, starts[n:])))


class Tiles:
    """Tiles of one size, as a grid: one at every crossing of `columns` and `rows`."""

    order: str

    @property
    @abstractmethod
    def columns(self) -> Sequence[int]:
        """Left edges of the tiles."""

    @property
    @abstractmethod
    def rows(self) -> Sequence[int]:
        """Upper edges of the tiles."""

    @property
    @abstractmethod
    def tile_size(self) -> Size:
        """Of every tile."""

    @property
    def tiles(self) -> list[Rect]:
        """All tiles, row by row."""
        (width, height), columns = self.tile_size, self.columns
        return [Rect(x, y, width, height) for y in self.rows for x in columns]

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    @property
    def waves(self) -> list[list[Rect]]:
        """The tiles in the order to paint them. Tiles of one wave do not overlap; a later wave sees earlier ones.

        `linear` is one tile a wave, row by row; `fused` has all in one, for they are never painted singly.
        """
        if self.order == "linear":
            return [[tile] for tile in self.tiles]
        return [self.tiles] if self.order == "fused" else self.apart

    @property
    def apart(self) -> list[list[Rect]]:
        """The tiles in as few groups as can be of which no two overlap."""
        rows, columns, (width, height) = self.rows, self.columns, self.tile_size
        down, across = _colours(rows, height), _colours(columns, width)
        return [
            [Rect(x, y, width, height) for y in rows[j::down] for x in columns[i::across]]
            for j, i in itertools.product(range(down), range(across))
        ]

    def touching(self, area: Rect) -> list[Rect]:
        """The tiles that cover any of it, row by row."""
        width, height = self.tile_size
        columns = [x for x in self.columns if area.x - width < x < area.right]
        return [Rect(x, y, width, height) for y in self.rows if area.y - height < y < area.bottom for x in columns]

    def shrink(self, factor: int) -> Grid:
        """The same tiles on a grid of `factor` pixels per cell, which they must lie on."""
        width, height = self.tile_size
        columns, rows = ([start // factor for start in starts] for starts in (self.columns, self.rows))
        return Grid(columns, rows, Size(width // factor, height // factor), self.order)


@dataclass(frozen=True)
class Grid(Tiles):
    """Tiles at given places."""

    columns: Sequence[int] = ()
    rows: Sequence[int] = ()
    tile_size: Size = EMPTY
    order: str = "chess"


@dataclass(frozen=True)
class TilePlan(Tiles):
    """Tiles of one size that cover a canvas.

    The canvas may have any size. It is worked on as `padded`: the size rounded up to `factor`, so that every tile
    lies on the latent grid; what is painted beyond the canvas is cut off.

    Invariants, checked on construction by how the plan is made: every tile has the same size, a multiple of `factor`;
    tiles lie inside `padded` and cover it; neighbours overlap by at least `overlap`.
    """

    width: int
    """Canvas width in pixels, at least 1."""
    height: int
    """Canvas height in pixels, at least 1."""
    tile: int
    """Side of a tile in pixels, at most. A canvas that is smaller in one direction gets smaller tiles there."""
    overlap: int = 0
    """Pixels that neighbours share at least; at most half a tile, so that a tile meets only its neighbours."""
    factor: int = 8
    """Pixels per latent cell."""
    order: str = "chess"
    """`chess`: waves of tiles that do not overlap (up to four, nine where border tiles crowd; one without overlap);
    `linear`: one tile a wave, row by row; `fused`: all at once; `none`: none of them."""
    least: int | None = None
    """Smallest side of a tile in pixels; None: all of `tile`. Between the two, in steps of `STEP`, width and height are
    those with which the fewest pixels are painted; the larger ones where that makes no difference."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1 or self.factor < 1:
            raise ValueError(f"a canvas of {self.width}x{self.height} on a grid of {self.factor} cannot be tiled")
        if self.tile < self.factor:
            raise ValueError(f"tile {self.tile} is smaller than one latent cell ({self.factor} pixels)")
        if not 0 <= self.overlap <= self.tile // 2:
            raise ValueError(f"overlap {self.overlap} is not between 0 and half the tile ({self.tile // 2})")
        if self.least is not None and not self.factor <= self.least <= self.tile:
            raise ValueError(f"the smallest tile {self.least} is not between {self.factor} and {self.tile}")
        if self.order not in ORDERS:
            raise ValueError(f"order {self.order!r} is none of {', '.join(ORDERS)}")

    @property
    def size(self) -> Size:
        """The canvas's."""
        return Size(self.width, self.height)

    @property
    def padded(self) -> Size:
        """The canvas's, rounded up to the latent grid."""
        return Size(ceil_to(self.width, self.factor), ceil_to(self.height, self.factor))

    @property
    def whole(self) -> Rect:
        """All of the padded canvas."""
        return Rect(0, 0, *self.padded)

    @property
    def tile_size(self) -> Size:
        return Size(self._side(self.padded.width), self._side(self.padded.height))

    def _side(self, length: int) -> int:
        """Side of a tile along an axis of the padded canvas. Each axis is by itself: what is painted is the widths of a
        row of tiles summed up, times the heights of a column."""
        largest, step = self.tile // self.factor * self.factor, math.lcm(STEP, self.factor)
        if self.least is None or length <= largest:
            return min(largest, length)
        # A tile has to hold twice the overlap.
        least = ceil_to(max(self.least, 2 * ceil_to(self.overlap, self.factor)), step)
        sides = [largest, *range(least, largest, step)]
        return min(sides, key=lambda side: (side * _count(length, side, self._overlap(side), self.factor), -side))

    @property
    def columns(self) -> list[int]:
        """Left edges of the tiles."""
        return self._starts(self.padded.width)

    @property
    def rows(self) -> list[int]:
        """Upper edges of the tiles."""
        return self._starts(self.padded.height)

    def _starts(self, length: int) -> list[int]:
        side = self._side(length)
        return spread(length, side, self._overlap(side), self.factor)

    def _overlap(self, side: int) -> int:
        # On the latent grid, and always less than a tile: one of a single cell cannot overlap another.
        return min(ceil_to(self.overlap, self.factor), side // self.factor // 2 * self.factor)
