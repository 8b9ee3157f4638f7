"""Tiles in, painted tiles out: start, sample, decode, finish."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_dinotile.condition.conditioner import Conditions
from lib_dinotile.engine.denoisers import TileBatch
from lib_dinotile.engine.host import Batch, Host
from lib_dinotile.engine.memory import BatchSize, in_full_precision, is_out_of_memory
from lib_dinotile.engine.neighbours import PaintedNeighbours
from lib_dinotile.engine.prompts import TilePrompts
from lib_dinotile.engine.report import Report
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.colour import correct
from lib_dinotile.tiling.noise import NoiseField, TileNoise
from lib_dinotile.tiling.plan import Rect, TilePlan


class NotFiniteError(Exception):
    """The model returned NaN, in full precision, too."""


@dataclass(frozen=True)
class PaintedTile:
    """A tile as it is to be painted, and as it was sampled."""

    change: Tensor
    """(3, H, W), half precision: what it adds to the source's pixels."""
    latents: Tensor
    """(C, h, w), half precision."""

    def to(self, device: torch.device | str) -> PaintedTile:
        """The same on a device."""
        return PaintedTile(self.change.to(device), self.latents.to(device))


@dataclass
class PaintedBatch:
    """The outcome of a batch of tiles."""

    tiles: list[PaintedTile] = field(default_factory=list)
    """As many as were done."""
    notes: Sequence[str] = ()
    error: BaseException | None = None
    """The error that broke it off."""
    kept: bool = False
    """Whether the journal has them already."""
    seconds: float | None = None
    """How long a tile took, where they were not kept."""

    def to(self, device: torch.device | str) -> PaintedBatch:
        """The same on a device."""
        return replace(self, tiles=[tile.to(device) for tile in self.tiles])


@dataclass(frozen=True)
class Attempt:
    """How tiles are painted."""

    noise: NoiseField
    denoise: float | None = None
    """Denoising strength, if not the generation's own."""
    neighbours: Mapping[Rect, PaintedNeighbours | None] = field(default_factory=dict)
    """By tile, the part that is painted already and is to stay."""
    alike: bool = False
    """Whether all of a tile starts from the source, what is to stay, too. So all tiles start alike, in whatever order:
    a model that sees sharp neighbours from the first step on paints a texture with less detail than theirs."""
    precise: bool = False
    """Whether the host computes in full precision."""


class TilePainter:
    """Paints tiles of one pass over a canvas, with everything that they are conditioned by."""

    def __init__(
        self,
        host: Host,
        canvas: Canvas,
        plan: TilePlan,
        settings: Settings,
        conditions: Conditions,
        prompts: TilePrompts,
        source: Callable[[Rect], Tensor],
        size: BatchSize,
        report: Report,
    ) -> None:
        """source: gives what a tile starts from, as latents (C, h, w)."""
        self._host, self._canvas, self._plan, self._settings = host, canvas, plan, settings
        self._conditions, self._prompts, self.source = conditions, prompts, source
        self._size, self._report = size, report

    def paint(self, tiles: Sequence[Rect], attempt: Attempt) -> PaintedBatch:
        """The tiles painted, some at a time; those that are done if an error breaks it off, and the error.

        Where neighbours have painted already a tile holds on to that; all the rest is painted on the source. So it fits
        to what is there, and yet no pixel is denoised twice.
        """
        host, size = self._host, self._size
        done: list[PaintedTile] = []
        known, began = len(self._report.notes), time.perf_counter()

        def painted(error: BaseException | None = None) -> PaintedBatch:
            seconds = (time.perf_counter() - began) / max(1, len(done))
            return PaintedBatch(done, self._report.notes[known:], error, seconds=seconds)

        try:
            for part in size.parts(tiles, done):
                with size.halved(len(part)):
                    neighbours = [attempt.neighbours.get(tile) for tile in part]
                    latents, mask = self.start(part, neighbours), self.mask(part, neighbours)
                    begin = self.start(part, [None] * len(part)) if attempt.alike and any(neighbours) else None
                    tiled = TileBatch(self.batch(part), partial(self._pixels, part, neighbours), begin)
                    noise = TileNoise(attempt.noise, [tile.shrink(host.factor) for tile in part])
                    sampled = host.sample(latents, tiled, noise, self._plan.size, attempt.denoise, mask)
                    done += self._finished(part, neighbours, sampled, attempt)
        except (Exception, KeyboardInterrupt) as error:
            return painted(error)
        return painted()

    def _finished(
        self, tiles: Sequence[Rect], neighbours: Sequence[PaintedNeighbours | None], sampled: Tensor, attempt: Attempt
    ) -> list[PaintedTile]:
        """Sampled latents (k, C, h, w) decoded and finished; what is not finite is painted again in float32, once."""
        pixels = self._host.decode(sampled)
        # One look at the device for all of them. A sum tells whether any is NaN, much faster than a look at each.
        sums = torch.stack([each.flatten(1).sum(1, dtype=torch.float32) for each in (pixels, sampled)])
        done = []
        for tile, one, image, latents, good in zip(tiles, neighbours, pixels, sampled, sums.isfinite().all(0).tolist()):
            if good:
                done.append(PaintedTile(self._finish(tile, one, image), latents.half()))
            elif attempt.precise:
                raise NotFiniteError
            else:
                done.append(self._again(tile, one, attempt))
        return done

    def _again(self, tile: Rect, neighbours: PaintedNeighbours | None, attempt: Attempt) -> PaintedTile:
        """A tile painted in full precision, or as the source if that is of no use."""
        again = in_full_precision(self._host, lambda: self.paint([tile], replace(attempt, precise=True)))
        if again and again.tiles:
            self.tell_nan(tile, mended=True)
            return again.tiles[0]
        if again and again.error and not isinstance(again.error, NotFiniteError) and not is_out_of_memory(again.error):
            raise_first([again])
        self._host.free_memory()
        self.tell_nan(tile, mended=False)
        return PaintedTile(self._finish(tile, neighbours, self._canvas.source(tile)), self.source(tile).half())

    def tell_nan(self, tile: Rect, mended: bool) -> None:
        """Notes that the model returned NaN for a tile, or a part of the picture."""
        known = self._report.of(tile)
        name = f"tile {known.number}" if known else f"the part of the picture at {tile.x}, {tile.y}"
        outcome = "was done again in full precision" if mended else "shows the enlarged source"
        self._report.note(f"{name} {outcome}: the model returned NaN")

    def batch(self, tiles: Sequence[Rect]) -> Batch:
        """The tiles with all that they are conditioned by."""
        factor, adapted, guidance = self._host.factor, self._conditions.adapted, self._conditions.guidance
        guide = None
        if guidance:
            named = [self._prompts.named(tile) for tile in tiles]
            guide = guidance.of(self._canvas, tiles, self.source, self._report.note, named)
        latent = tiles[0].height // factor, tiles[0].width // factor
        prompts, condition = [self._prompts.of(tile) for tile in tiles], adapted and adapted(tiles, latent)
        return Batch(tiles, prompts, condition, guide, lambda: torch.stack(list(map(self._canvas.source, tiles))))

    def start(self, tiles: Sequence[Rect], neighbours: Sequence[PaintedNeighbours | None]) -> Tensor:
        """Latents (k, C, h, w) that tiles start from: the source's, and where they hold on to neighbours, theirs."""
        latents = torch.stack([self.source(tile) for tile in tiles])
        for latent, one in zip(latents, neighbours):
            if one is not None:
                latent.copy_(torch.where(one.held, one.latents.to(latent), latent))
        return latents

    def _pixels(self, tiles: Sequence[Rect], neighbours: Sequence[PaintedNeighbours | None]) -> Tensor:
        """The same as pixels (k, 3, H, W)."""
        found = []
        for tile, one in zip(tiles, neighbours):
            pixels = self._canvas.source(tile)
            found.append(self._canvas.crop(tile, pixels if one is None else pixels + one.change * one.hold))
        return torch.stack(found)

    def mask(self, tiles: Sequence[Rect], neighbours: Sequence[PaintedNeighbours | None]) -> Tensor | None:
        """(k, 1, h, w): 1 for latent cells that may change, all those that show any of the mask and are not held."""
        masks = [self._canvas.mask(tile) for tile in tiles]
        if masks[0] is None and not any(neighbours):
            return None
        factor, device = self._host.factor, self._canvas.device
        free = torch.stack(
            [
                torch.ones(1, tile.height // factor, tile.width // factor, device=device)
                if mask is None
                else F.max_pool2d(mask, factor).ceil()
                for tile, mask in zip(tiles, masks)
            ]
        )
        return torch.stack([cells if one is None else cells * ~one.held for cells, one in zip(free, neighbours)])

    def _finish(self, tile: Rect, neighbours: PaintedNeighbours | None, pixels: Tensor) -> Tensor:
        """The change (3, H, W), half precision, from the source to pixels in the source's colours.

        What was painted already comes as it is.
        """
        source, own = self._canvas.source(tile), None if neighbours is None else neighbours.hold[0] < 1
        change = correct(pixels.clamp(0, 1), source, self._settings.colour, own).sub_(source)
        return (change if neighbours is None else torch.lerp(change, neighbours.change, neighbours.hold)).half()

    def holding(self, tile: Rect, pixels: Tensor, hold: Tensor) -> PaintedNeighbours:
        """A part of a tile with these pixels (3, H, W) that is to stay, as if neighbours had painted it.

        hold (1, H, W) in [0, 1]: 1 for what is to stay.
        """
        latents = self._host.encode(pixels[None])[0]
        latents = torch.where(latents.isfinite(), latents, self.source(tile).to(latents))
        return PaintedNeighbours(
            pixels - self._canvas.source(tile), hold, latents, F.max_pool2d(1 - hold, self._host.factor) < 0.5
        )


def raise_first(painted: Sequence[PaintedBatch]) -> None:
    """Raises the first error of some batches; none of them holds it any more, so that it can be forgotten."""
    errors = [one.error for one in painted if one.error is not None]
    for one in painted:
        one.error = None
    try:
        if errors:
            raise errors[0]
    finally:
        del errors
