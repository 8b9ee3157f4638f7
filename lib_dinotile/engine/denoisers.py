"""Denoising through tiles: one batch of them by itself, or the whole canvas through all its tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lib_dinotile.engine.host import Batch, Denoise, TiledDenoiser
from lib_dinotile.engine.memory import BatchSize
from lib_dinotile.engine.team import Team
from lib_dinotile.tiling.blend import Blend
from lib_dinotile.tiling.plan import Rect, Tiles

T = TypeVar("T")


class TileBatch(TiledDenoiser):
    """The latents are those of one batch of tiles."""

    is_batch = True

    def __init__(self, batch: Batch, pixels: Callable[[], Tensor], begin: Tensor | None = None) -> None:
        """pixels: gives what the tiles start from, (k, 3, H, W)."""
        self._batch, self.pixels, self.begin = batch, pixels, begin
        self.limit = len(batch.tiles)
        self.tile_size = batch.tiles[0].width, batch.tiles[0].height
        self.conditioned = batch.condition is not None
        self.prompts = batch.prompts

    def __call__(self, x: Tensor, model: Denoise, known: Callable[[], Tensor]) -> Tensor:
        return model(x, self._batch)


class MultiDiffusion(TiledDenoiser):
    """The latents (1, C, H, W) are those of the canvas; at every step the model's outputs for all tiles are blended.

    MultiDiffusion (arXiv 2302.08113) with weights that fall off towards a tile's border, as Mixture of Diffusers
    (arXiv 2302.02412) has them; here they are those that tiles are painted with. What no tile covers stays.

    A tile that the model returns NaN for is left out from then on, or it would spread to all others.
    """

    is_batch = False
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
        """Tiles that the model returned NaN for."""
        self.limit = size.limit
        self._blend = Blend(plan.shrink(factor), rim=1)
        self._batches = [make(tiles) for tiles in chunks(wanted, size.asked)]
        self._parts: dict[tuple[Rect, ...], Batch] = {}
        """Batches of fewer tiles, where the memory does not hold those; guidance goes on in them from step to step."""
        self.tile_size = plan.tile_size
        self.conditioned = any(batch.condition is not None for batch in self._batches)
        self.prompts = [prompts for batch in self._batches for prompts in batch.prompts]

    def __call__(self, x: Tensor, model: Denoise, known: Callable[[], Tensor]) -> Tensor:
        output = torch.zeros(x.shape, device=x.device)
        total = torch.zeros(x.shape[-2:], device=x.device)
        for group in chunks(self._batches, self._team.size):
            found = self._team.share(group, partial(self._outputs, x, model))
            for batch, outputs in zip(group, found):
                finite = torch.stack(outputs).isfinite().flatten(1).all(1).tolist()
                self.lost.update(tile for tile, good in zip(batch.tiles, finite) if not good)
                for tile, out in zip(batch.tiles, outputs):
                    if tile in self.lost:
                        continue
                    area = tile.shrink(self._factor)
                    weight = self._blend.weight(area).to(x.device)
                    area.of(output[0]).add_(out.to(output) * weight)
                    area.of(total).add_(weight)
        blended = (output / total.clamp(min=1e-6)).to(x.dtype)
        return blended if (total > 0).all() else torch.where(total > 0, blended, known())

    def _outputs(self, x: Tensor, model: Denoise, batch: Batch) -> list[Tensor]:
        """The model's outputs (C, h, w) for the tiles of a batch."""
        outputs: list[Tensor] = []
        for tiles in self._size.parts(batch.tiles, outputs):
            with self._size.halved(len(tiles)):
                part = batch if len(tiles) == len(batch.tiles) else self._part(tuple(tiles))
                outputs += model(torch.cat([tile.shrink(self._factor).of(x) for tile in tiles]), part)
                if part.condition is not None:
                    part.condition.forget()
        return outputs

    def _part(self, tiles: tuple[Rect, ...]) -> Batch:
        if tiles not in self._parts:
            self._parts[tiles] = self._make(tiles)
        return self._parts[tiles]


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """The items in order, `size` at a time."""
    return [items[i : i + size] for i in range(0, len(items), size)]
