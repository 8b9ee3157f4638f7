"""Second attempts when a model runs out of memory or returns NaN: fewer tiles, smaller pieces, full precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lib_dinotile import DinotileError, Handling
from lib_dinotile.engine.host import Host
from lib_dinotile.tiling.plan import Grid, Rect, Size, fewest

T = TypeVar("T")

PIECE, LEAST, OVERLAP = 640, 256, 64
"""A piece that is encoded or decoded has at most so many pixels a side, or as many as a tile if that is more;
if the memory does not hold it, half as many again and again, but no fewer than the second. Neighbours share some."""


class OutOfMemoryError(DinotileError):
    """Not even one tile fits."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the GPU or of the machine, has run out."""
    if isinstance(error, (MemoryError, OutOfMemoryError, torch.cuda.OutOfMemoryError)):
        return True
    words = ("out of memory", "not enough memory", "not enough gpu", "can't allocate memory", "alloc_failed")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


class BatchSize:
    """How many tiles go together: what the user asked for, halved for good whenever the memory does not hold it."""

    def __init__(self, limit: int, free: Callable[[], None], note: Callable[[str], None]) -> None:
        """free: gives memory back; note: tells the user."""
        self.asked = self.limit = limit
        self._free, self._note = free, note
        self._ran_out = False

    def parts(self, tiles: Sequence[T], done: Sequence[object]) -> Iterator[Sequence[T]]:
        """The tiles, some at a time: those after the ones that are done. Use each part within `halved`."""
        while len(done) < len(tiles):
            if self._ran_out:  # here the error is gone, and with it what its frames kept alive
                self._ran_out = False
                self._free()
            yield tiles[len(done) : len(done) + self.limit]

    def halved(self, count: int) -> Handling:
        """If the memory does not hold so many tiles, fewer of them are tried next."""

        def halve(error: Exception) -> bool:
            if not is_out_of_memory(error):
                return False
            if count == 1:
                message = "out of memory with a single tile: give a smaller tile size, or guidance strength 0"
                raise OutOfMemoryError(message, 500) from error
            self.limit, self._ran_out = count // 2, True
            self._note(f"out of memory with {count} tiles at once, went on with {self.limit}")
            return True

        return Handling(halve)


class PieceSize:
    """How large a piece of the canvas the VAE is given, halved for good whenever the memory does not hold it."""

    def __init__(self, tile: Size, factor: int) -> None:
        """tile: what fits at least, in pixels; factor: pixels per latent cell."""
        self._largest, self._factor = max(PIECE, *tile), factor

    def cut(self, area: Rect) -> Grid:
        """The fewest pieces that cover the area, which lies on the latent grid."""
        limit, factor = self._largest // self._factor * self._factor, self._factor
        (columns, width), (rows, height) = (fewest(side, limit, OVERLAP, factor) for side in (area.width, area.height))
        return Grid([area.x + x for x in columns], [area.y + y for y in rows], Size(width, height))

    def halve(self, area: Rect) -> bool:
        """A piece was too large: whether smaller ones can be tried."""
        side = max(area.width, area.height)
        half = max(LEAST, math.ceil((side + OVERLAP) / 2 / self._factor) * self._factor)
        if half >= side:
            return False
        self._largest = min(self._largest, half)
        return True


def in_full_precision(host: Host, work: Callable[[], T]) -> T | None:
    """`work` while the host computes in float32; None if there is not the memory for that."""
    try:
        with host.full_precision():
            return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    host.free_memory()
    return None


def mended(host: Host, first: Tensor, again: Callable[[], Tensor]) -> tuple[Tensor, bool]:
    """`first`, or where it is not finite what `again` returns in full precision; and whether that is finite."""
    if is_finite(first):
        return first, True
    second = in_full_precision(host, again)
    return (first, False) if second is None else (second, is_finite(second))


def is_finite(values: Tensor) -> bool:
    """Whether none is NaN or infinite. A sum tells it, much faster than a look at each."""
    return bool(values.sum(dtype=torch.float32).isfinite())
