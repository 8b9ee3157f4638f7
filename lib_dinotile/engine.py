"""The flow: upscale, look at the source, then tile by tile encode, sample, decode and blend. One for all hosts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image

from lib_dinotile import DinotileError
from lib_dinotile.condition.conditioner import Conditioner
from lib_dinotile.hosts.base import Host, Interrupted, check_upscaler
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.blend import Blend
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.noise import NoiseField, TileNoise
from lib_dinotile.tiling.plan import TilePlan

MAX_SIDE = 65536
"""Longest side of a canvas, in pixels."""


@dataclass(frozen=True)
class Result:
    """A canvas with what was painted on it."""

    image: Image.Image
    """RGB, exactly the size asked for. Where no tile was painted it shows the upscaled source."""
    plan: TilePlan
    painted: int
    """Tiles painted; fewer than the plan has if the run was stopped."""

    @property
    def complete(self) -> bool:
        return self.painted == len(self.plan)


class UnfinishedError(DinotileError):
    """A run that broke off with an error; `result` keeps the tiles painted until then."""

    def __init__(self, error: BaseException, result: Result, kept: str = "") -> None:
        """kept: where the tiles painted can be found, once they are saved."""
        what = str(error).strip().split("\n")[0] or type(error).__name__
        super().__init__(f"stopped after {result.painted} of {len(result.plan)} tiles{kept}: {what}", 500)
        self.result = result


def canvas_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(width, height) of the result for a source of this size, to the nearest pixel."""
    width, height = (max(1, round(side * scale)) for side in size)
    if max(width, height) > MAX_SIDE:
        raise DinotileError(f"scale: {scale:g} makes this image {width}x{height}, give a scale for at most {MAX_SIDE}")
    return width, height


def make_plan(host: Host, size: tuple[int, int], settings: Settings) -> TilePlan:
    """The tiles for a canvas of (width, height) on this host."""
    return TilePlan(*size, settings.tile, settings.overlap, host.factor, settings.order)


@torch.no_grad()
def upscale(
    host: Host,
    source: Image.Image,
    settings: Settings,
    noise: NoiseField,
    conditioner: Conditioner | None = None,
) -> Result:
    """The source (RGB) made larger by `settings.scale` and painted tile by tile.

    DinotileError, before any work is done, for settings that this host cannot meet; UnfinishedError, with what is
    painted, for whatever breaks the run off later. If the user stops the host the result is not `complete`.
    """
    check_upscaler(host, settings.upscaler)
    size = canvas_size(source.size, settings.scale)
    plan = make_plan(host, size, settings)
    features = conditioner.features(source, size) if conditioner else None

    canvas, blend, painted = Canvas(host.upscale(source, size, settings.upscaler), plan), Blend(plan), 0
    try:
        host.progress(painted, len(plan), canvas)
        for tiles in plan.batches(settings.batch):
            if host.interrupted():
                break
            latents = host.encode(torch.stack([canvas.crop(tile) for tile in tiles]))
            areas = [tile.shrink(host.factor) for tile in tiles]
            condition = conditioner.condition(features, tiles, tuple(latents.shape[-2:])) if features else None
            latents = host.sample(latents, tiles, TileNoise(noise, areas), condition)
            for tile, pixels in zip(tiles, host.decode(latents)):
                canvas.paint(tile, pixels, blend.weight(tile))
            painted += len(tiles)
            host.progress(painted, len(plan), canvas)
    except Interrupted:
        pass
    except (Exception, KeyboardInterrupt) as error:
        raise UnfinishedError(error, Result(canvas.image(), plan, painted)) from error
    return Result(canvas.image(), plan, painted)
