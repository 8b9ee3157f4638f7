"""One canvas being painted: its passes, and in them wave after wave of tiles."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from lib_dinotile.condition.conditioner import Conditions
from lib_dinotile.engine.denoisers import MultiDiffusion, chunks
from lib_dinotile.engine.host import Host, Interrupted
from lib_dinotile.engine.journal import Journal
from lib_dinotile.engine.latents import SourceLatents, decode
from lib_dinotile.engine.memory import BatchSize, PieceSize, in_full_precision, mended
from lib_dinotile.engine.neighbours import Neighbours
from lib_dinotile.engine.painter import Attempt, PaintedBatch, PaintedTile, TilePainter, raise_first
from lib_dinotile.engine.passes import Pass, passes
from lib_dinotile.engine.progress import Meter, Progress
from lib_dinotile.engine.prompts import TilePrompts
from lib_dinotile.engine.report import FLAT, PAINTED, UNMASKED, Report, TileReport
from lib_dinotile.engine.retry import Budget, RetryPolicy, counted, reserve
from lib_dinotile.engine.team import Team
from lib_dinotile.settings import OFF, Settings
from lib_dinotile.tiling.blend import RIM, Blend
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.colour import correct
from lib_dinotile.tiling.flat import detail
from lib_dinotile.tiling.noise import NoiseField, TileNoise
from lib_dinotile.tiling.plan import Rect, TilePlan, Tiles


class Run:
    """Paints the canvas: passes, waves, journal and progress. What it says is kept in `report`."""

    def __init__(
        self,
        host: Host,
        settings: Settings,
        noise: NoiseField,
        canvas: Canvas,
        plan: TilePlan,
        conditions: Conditions,
        journal: Journal | None,
        team: Team,
    ) -> None:
        self.canvas, self._host, self._settings, self._noise, self._plan = canvas, host, settings, noise, plan
        self._conditions, self._journal, self._team = conditions, journal, team
        self.resumable = journal is not None
        self.report = Report([TileReport(number, tile) for number, tile in enumerate(plan.tiles, 1)])
        self.report.notes += conditions.notes
        self._size = BatchSize(settings.batch, host.free_memory, self.report.note)
        self._piece = PieceSize(plan.tile_size, host.factor)
        self._guard = conditions.guard if settings.guard != OFF else None
        self._budget = Budget(settings.guard_budget)
        if self._guard:
            self.report.threshold = 1 - self._guard.limit
        for tile in self.report.tiles:
            tile.state = self._left_out(tile.area) or tile.state
        self._passes = [
            Pass(number, *entry, host.steps(entry[-1])) for number, entry in enumerate(self._grids(plan, settings))
        ]
        for each in self._passes:
            if note := host.steps_note(each.denoise):
                self.report.note(note if each.denoise is None else f"seam fix: {note}")
        self.later = ""
        """What is at work on a canvas whose tiles are all painted: the guard or the seam fix."""
        self.done, self.total = 0, sum(len(each.tiles) for each in self._passes)
        self._meter = Meter([each.work for each in self._passes], reserve(settings) if self._guard else 0.0)
        self._ahead = 0.0

    def _grids(self, plan: TilePlan, settings: Settings) -> Iterator[tuple[Tiles, Blend, list[Rect], float | None]]:
        """The passes, one on top of the other: grid, weights, tiles, and denoising strength."""
        for grid, blend, denoise in passes(plan, settings):
            chosen = [tile for tile in grid.tiles if not self._left_out(tile)]
            yield grid, blend.to(self.canvas.device), chosen, denoise

    @property
    def painted(self) -> list[Rect]:
        """The tiles of the plan that are painted."""
        return [tile.area for tile in self.report.tiles if tile.state == PAINTED]

    def _left_out(self, tile: Rect) -> str | None:
        """Why this tile is not painted, if it is not."""
        if not self.canvas.shows_mask(tile):
            return UNMASKED
        if self.canvas.filled:  # flat or not, it is not to stay
            return None
        if self._settings.flat and detail(self.canvas.source(tile).cpu()) < self._settings.flat:
            return FLAT
        return None

    def paint(self) -> None:
        """All passes, one on top of the other."""
        regions = self._conditions.regions
        prompts = TilePrompts(self._host, self.canvas, self._plan, self._settings, self.report, regions)
        self._progress(0.0)
        for now in self._passes:
            if now.number:
                self.canvas.flatten()
            if self._host.interrupted():
                raise Interrupted
            if not now.tiles:
                continue
            fused = now.plan.order == "fused"
            source = SourceLatents(self._host, self.canvas, self._plan.whole, self._piece, self.report.note).crop
            if fused:
                source = partial(_cut, source(self._plan.whole), self._host.factor)
            painter = TilePainter(
                self._host,
                self.canvas,
                self._plan,
                self._settings,
                self._conditions,
                prompts,
                source,
                self._size,
                self.report,
            )
            if self._settings.colour != "none":
                self.canvas.keep_levels(now.plan, now.blend, now.tiles)
            good: list[Rect] = []
            covered = self.done >= len(self._passes[0].tiles) > 0
            self.later = "the seam fix" if covered else ""
            try:
                (self._fused if fused else self._waves)(now, painter, good)
            except Interrupted:
                self._check(now, painter, good, stopped=True)
                raise
            self.later = "the guard"
            try:
                self._check(now, painter, good, stopped=False)
            finally:
                self.canvas.level()
        self._progress(1.0, f"painted {counted(self.done, 'tile')}")

    def _progress(self, ahead: float, text: str = "") -> None:
        """ahead: share of the whole run that is done once the next tiles are sampled."""
        before, self._ahead = self._ahead, max(self._ahead, ahead)
        text = text or f"painting tiles: {self.done} of {self.total}"
        self._host.progress(Progress(before, self._ahead, text), self.canvas)

    def tell(self, now: Pass, text: str, used: float) -> None:
        """Says what the guard is doing; used: the share of its budget once the next tiles are sampled."""
        self._progress(self._meter.repainting(now.number, used), text)

    def _waves(self, now: Pass, painter: TilePainter, good: list[Rect]) -> None:
        """Tiles sampled and painted, one wave after the other; good: gets those that are painted."""
        chosen, neighbours = set(now.tiles), Neighbours(self.canvas, now.plan, now.blend, self._host.factor)
        for wave in now.plan.waves:
            batches = chunks([tile for tile in wave if tile in chosen], self._settings.batch)
            for group in chunks(batches, self._team.size):
                if self._host.interrupted():
                    raise Interrupted
                share = (len(good) + sum(map(len, group))) / len(now.tiles)
                self._progress(self._meter.painting(now.number, share))
                kept = [self.kept(str(now.number), batch) for batch in group]
                missing = [batch for batch, one in zip(group, kept) if one is None]
                shown = {tile: neighbours.of(tile) for batch in missing for tile in batch}
                work = partial(painter.paint, attempt=Attempt(self._noise, now.denoise, shown, alike=True))
                fresh = iter(self._team.share(missing, work))
                painted = [one or next(fresh) for one in kept]
                for batch, one in zip(group, painted):
                    self._take(now, batch, one, neighbours)
                    good += batch[: len(one.tiles)]
                raise_first(painted)

    def _check(self, now: Pass, painter: TilePainter, good: Sequence[Rect], stopped: bool) -> None:
        """The guard's part: judges the tiles of a pass that are painted, and mends what is in doubt."""
        if self._guard:
            RetryPolicy(
                self._guard,
                self.canvas,
                self._settings,
                self._host,
                self._noise,
                self._size,
                self._team,
                self.report,
                self._budget,
                now,
                painter,
                self,
            )(good, stopped)

    def _take(self, now: Pass, tiles: Sequence[Rect], painted: PaintedBatch, neighbours: Neighbours) -> None:
        for tile, one in zip(tiles, painted.tiles):
            self.canvas.add(tile, one.change.to(self.canvas.device).float().mul_(now.blend.weight(tile)))
            neighbours.add(tile, one.latents)
        self._count(tiles[: len(painted.tiles)])
        self.keep(str(now.number), tiles, painted)

    def _count(self, tiles: Sequence[Rect]) -> None:
        """They are painted."""
        for tile in tiles:
            self.report.set_state(tile, PAINTED)
        self.done += len(tiles)

    def kept(self, step: str, tiles: Sequence[Rect]) -> PaintedBatch | None:
        """Tiles as the journal has them, if it has them all."""
        found = self._journal.get(step, tiles) if self._journal else None
        if found is None:
            return None
        painted, notes = found
        return PaintedBatch([PaintedTile(*one) for one in painted], notes, kept=True)

    def keep(self, step: str, tiles: Sequence[Rect], painted: PaintedBatch) -> None:
        """Reports tiles, and has the journal keep them."""
        self.report.tell(tiles[: len(painted.tiles)], painted.notes, painted.seconds)
        if self._journal and not painted.kept:  # they are painted, also if the disk has no room for them
            for tile, one in zip(tiles, painted.tiles):
                self._journal.put(step, tile, one.change.cpu(), one.latents.cpu(), painted.notes)

    def _fused(self, now: Pass, painter: TilePainter, good: list[Rect]) -> None:
        """The canvas sampled as a whole through its tiles; encoded and decoded in few large pieces.

        good: gets the tiles that are painted.
        """
        host, plan, began = self._host, self._plan, time.perf_counter()
        latents, mask = painter.start([plan.whole], [None]), painter.mask([plan.whole], [None])
        self._progress(self._meter.painting(now.number, 1.0), f"painting {len(now.tiles)} tiles together")

        def tiled_and_noise() -> tuple[MultiDiffusion, TileNoise]:
            tiled = MultiDiffusion(plan, now.tiles, host.factor, painter.batch, self._size, self._team)
            return tiled, TileNoise(self._noise, [plan.whole.shrink(host.factor)])

        def again() -> tuple[Tensor, set[Rect]]:
            tiled, noise = tiled_and_noise()
            sampled = host.sample(latents, tiled, noise, plan.size, None, mask)
            return sampled, _lost(tiled, sampled, now.tiles)

        tiled, noise = tiled_and_noise()
        sampled = host.sample(latents, tiled, noise, plan.size, None, mask)
        lost = first = _lost(tiled, sampled, now.tiles)
        if first:
            sampled, lost = in_full_precision(host, again) or (sampled, lost)
            for tile in now.tiles:
                if tile in first:
                    painter.tell_nan(tile, mended=tile not in lost)
        good += [tile for tile in now.tiles if tile not in lost]
        self._decode(now.blend, set(good), torch.where(sampled.isfinite(), sampled, latents.to(sampled)), painter)
        self._count(now.tiles)
        self.report.tell(now.tiles, (), (time.perf_counter() - began) / len(now.tiles))

    def _decode(self, blend: Blend, tiles: set[Rect], latents: Tensor, painter: TilePainter) -> None:
        """Paint the canvas's latents, as far as they belong to these tiles."""
        host = self._host
        pieces = self._piece.cut(self._plan.whole)
        weights = Blend(pieces, RIM).to(self.canvas.device)
        for piece in pieces.tiles:
            latent = piece.shrink(host.factor).of(latents)

            def pixels_of(latent: Tensor = latent, piece: Rect = piece) -> Tensor:
                return decode(host, latent, piece, self._piece)

            pixels, finite = mended(host, pixels_of(), pixels_of)
            if finite:
                self.canvas.paint(piece, self._corrected(blend, tiles, piece, pixels), weights.weight(piece))
            else:
                painter.tell_nan(piece, mended=False)

    def _corrected(self, blend: Blend, tiles: set[Rect], piece: Rect, pixels: Tensor) -> Tensor:
        """A piece (3, h, w) of the canvas in the source's colours; where there are no tiles, the source."""
        source, weight = self.canvas.source(piece), torch.zeros(piece.height, piece.width, device=pixels.device)
        for tile in self._plan.touching(piece):
            if tile in tiles:
                part = tile.intersection(piece)
                part.within(piece).of(weight).add_(part.within(tile).of(blend.weight(tile)))
        corrected = correct(pixels.clamp(0, 1), source, self._settings.colour, weight > 0)
        return torch.lerp(source, corrected, weight.clamp(max=1))


def _cut(latents: Tensor, factor: int, tile: Rect) -> Tensor:
    """A tile's part of the whole canvas's latents."""
    return tile.shrink(factor).of(latents)


def _lost(tiled: MultiDiffusion, sampled: Tensor, tiles: Sequence[Rect]) -> set[Rect]:
    """The tiles that NaN is left of."""
    return tiled.lost if sampled.isfinite().all() else set(tiles)
