"""How the model sees what is sampled: a batch of tiles for itself, or the whole canvas through all its tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lib_dinotile import DinotileError
from lib_dinotile.engine.host import Batch, Host, See
from lib_dinotile.engine.team import Team
from lib_dinotile.tiling.blend import Blend
from lib_dinotile.tiling.plan import Rect, Tiles

T = TypeVar("T")


class Whole:
    """The latents are those of one batch of tiles."""

    whole = True

    def __init__(self, batch: Batch, pixels: Callable[[], Tensor]) -> None:
        """pixels: gives what the tiles start from, (k, 3, H, W)."""
        self._batch, self.pixels = batch, pixels
        self.limit = len(batch.tiles)
        self.tile_size = batch.tiles[0].width, batch.tiles[0].height
        self.conditioned = batch.condition is not None
        self.prompts = [prompt for prompt in batch.prompts if prompt is not None]

    def __call__(self, x: Tensor, see: See, known: Callable[[], Tensor]) -> Tensor:
        return see(x, self._batch)


class Fused:
    """The latents (1, C, H, W) are those of the canvas; at every step the model's outputs for all tiles are blended.

    MultiDiffusion (arXiv 2302.08113) with weights that fall off towards a tile's border, as Mixture of Diffusers
    (arXiv 2302.02412) has them; here they are those that tiles are painted with. What no tile covers stays.

    A tile that the model gives what is not a number for is left out from then on, or it would spread to all others.
    """

    whole = False
    pixels = None

    def __init__(
        self,
        plan: Tiles,
        wanted: Sequence[Rect],
        factor: int,
        make: Callable[[Sequence[Rect]], Batch],
        size: BatchSize,
        team: Team,
    ) -> None:
        """plan: the tiles in pixels; wanted: those that are sampled; make: gives the batch for some of them."""
        self._factor, self._make, self._size, self._team = factor, make, size, team
        self.lost: set[Rect] = set()
        """Tiles for which the model gave what is not a number."""
        self.limit = size.limit
        self._blend = Blend(plan.shrink(factor), rim=1)
        self._batches = [make(tiles) for tiles in chunks(wanted, size.asked)]
        self._parts: dict[tuple[Rect, ...], Batch] = {}
        """Batches of fewer tiles, where the memory does not hold those; guidance goes on in them from step to step."""
        self.tile_size = plan.tile_size
        self.conditioned = any(batch.condition is not None for batch in self._batches)
        self.prompts = [prompt for batch in self._batches for prompt in batch.prompts if prompt is not None]

    def __call__(self, x: Tensor, see: See, known: Callable[[], Tensor]) -> Tensor:
        output = torch.zeros(x.shape, device=x.device)
        total = torch.zeros(x.shape[-2:], device=x.device)
        for group in chunks(self._batches, self._team.size):
            seen = self._team.share(group, lambda batch: self._see(x, batch, see))
            for batch, outputs in zip(group, seen):
                finite = torch.stack(outputs).isfinite().flatten(1).all(1).tolist()
                self.lost.update(tile for tile, good in zip(batch.tiles, finite) if not good)
                for tile, out in zip(batch.tiles, outputs):
                    if tile in self.lost:
                        continue
                    area = tile.shrink(self._factor)
                    weight = self._blend.weight(area).to(x.device)
                    output[(0, slice(None), *area.slices)] += out.to(output) * weight
                    total[area.slices] += weight
        blended = (output / total.clamp(min=1e-6)).to(x.dtype)
        return blended if (total > 0).all() else torch.where(total > 0, blended, known())

    def _see(self, x: Tensor, batch: Batch, see: See) -> list[Tensor]:
        outputs: list[Tensor] = []

        def look(tiles: Sequence[Rect]) -> None:
            areas = [tile.shrink(self._factor) for tile in tiles]
            key = tuple(tiles)
            if len(tiles) < len(batch.tiles) and key not in self._parts:
                self._parts[key] = self._make(tiles)
            part = self._parts.get(key, batch)
            outputs.extend(see(torch.cat([x[(..., *area.slices)] for area in areas]), part))
            if part.condition is not None:
                part.condition.forget()

        self._size.run(batch.tiles, look)
        return [out.cpu() for out in outputs] if self._team.size > 1 else outputs


class OutOfMemoryError(DinotileError):
    """Not even one tile fits."""


class BatchSize:
    """How many tiles go together: what the user asked for, halved for good whenever the memory does not hold it."""

    def __init__(self, limit: int, free: Callable[[], None], note: Callable[[str], None]) -> None:
        """free: gives memory back; note: tells the user."""
        self.asked = self.limit = limit
        self._free, self._note = free, note

    def run(self, tiles: Sequence[T], work: Callable[[Sequence[T]], None]) -> None:
        """`work` on all the tiles, some at a time; it is called again with fewer of them if it ran out of memory."""
        start = 0
        while start < len(tiles):
            part = tiles[start : start + self.limit]
            try:
                work(part)
                start += len(part)
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    message = "out of memory with a single tile: give a smaller tile size"
                    raise OutOfMemoryError(message, 500) from error
            # Here the error is gone, and with it what its frames kept alive.
            self.limit = len(part) // 2
            self._free()
            self._note(f"out of memory with {len(part)} tiles at once, went on with {self.limit}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the GPU or of the machine, has run out."""
    if isinstance(error, (MemoryError, OutOfMemoryError, torch.cuda.OutOfMemoryError)):
        return True
    words = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


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


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """The items in order, `size` at a time."""
    return [items[i : i + size] for i in range(0, len(items), size)]
