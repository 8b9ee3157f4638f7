"""One canvas being painted: its passes, and in them wave after wave of tiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_dinotile.condition.conditioner import Conditions
from lib_dinotile.condition.guard import OFF
from lib_dinotile.engine.host import Batch, Host, Interrupted
from lib_dinotile.engine.journal import Journal
from lib_dinotile.engine.latents import SourceLatents, decode, pieces
from lib_dinotile.engine.neighbours import Neighbours, Seen
from lib_dinotile.engine.passes import Painted, Pass
from lib_dinotile.engine.progress import Meter, Progress
from lib_dinotile.engine.prompts import TilePrompts
from lib_dinotile.engine.report import FLAT, PAINTED, UNMASKED, Report, TileReport
from lib_dinotile.engine.retry import Attempt, RetryPolicy, Shown, counted, reserve
from lib_dinotile.engine.sampling import BatchSize, Fused, Whole, chunks, in_full_precision
from lib_dinotile.engine.team import Team
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.blend import RIM, Blend
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.colour import correct
from lib_dinotile.tiling.flat import detail
from lib_dinotile.tiling.noise import NoiseField, TileNoise
from lib_dinotile.tiling.plan import Rect, TilePlan, Tiles
from lib_dinotile.tiling.seams import seam_passes


class Run:
    """Paints the canvas; what it says is kept in `report`."""

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
        self.report = Report([TileReport(number, tile) for number, tile in enumerate(plan.tiles, 1)])
        self.report.notes += conditions.notes
        self._pieces = pieces(plan, plan.padded, host.factor)
        self._size = BatchSize(settings.batch, host.free_memory, self.report.note)
        self._guard = None
        if conditions.guard and settings.guard != OFF:
            self.report.threshold = 1 - conditions.guard.limit
            self._guard = RetryPolicy(conditions.guard, canvas, settings, host, self._size, team, self.report)
        for tile in self.report.tiles:
            tile.state = self._left_out(tile.area) or tile.state
        self._passes = [
            Pass(number, *entry, host.steps(entry[-1])) for number, entry in enumerate(self._grids(plan, settings))
        ]
        self.done, self.total = 0, sum(len(each.tiles) for each in self._passes)
        self._meter = Meter([each.work for each in self._passes], reserve(settings) if self._guard else 0.0)
        self._ahead = 0.0

    def _grids(self, plan: TilePlan, settings: Settings) -> Iterator[tuple[Tiles, Blend, list[Rect], float | None]]:
        """What is painted, one on top of the other: grid, weights, tiles, and denoising strength."""
        grids: list[tuple[Tiles, Blend, float | None]] = []
        if settings.order != "none":
            grids.append((plan, Blend(plan, RIM), None))
        seams = seam_passes(plan, settings.seams, settings.seam_width)
        grids += [(grid, blend, settings.seam_denoise) for grid, blend in seams]
        for grid, blend, denoise in grids:
            yield grid, blend, [tile for tile in grid.tiles if not self._left_out(tile)], denoise

    @property
    def painted(self) -> list[Rect]:
        """The tiles of the plan that are painted."""
        return [tile.area for tile in self.report.tiles if tile.state == PAINTED]

    def _left_out(self, tile: Rect) -> str | None:
        """Why this tile is not painted, if it is not."""
        mask = self.canvas.mask(tile)
        if mask is not None and not mask.any():
            return UNMASKED
        if self.canvas.filled:  # flat or not, it is not to stay
            return None
        return FLAT if self._settings.flat and detail(self.canvas.source(tile)) < self._settings.flat else None

    def paint(self) -> None:
        """All passes, one on top of the other."""
        self._prompts = TilePrompts(self._host, self.canvas, self._plan, self._settings, self.report)
        self._progress(0.0)
        for now in self._passes:
            if now.number:
                self.canvas.flatten()
            if self._host.interrupted():
                raise Interrupted
            if not now.tiles:
                continue
            # What a tile starts from, as latents (C, h, w).
            self._encoded = SourceLatents(self._host, self.canvas, self._pieces, self.report.note).crop
            try:
                self._pass(now)
            finally:  # an image of the canvas is made now, and the memory may not be there for both
                del self._encoded
            if self._settings.colour != "none":
                self._level(now.blend, now.tiles)
        self._progress(1.0, f"painted {counted(self.done, 'tile')}")

    def _pass(self, now: Pass) -> None:
        """All of its tiles painted, and then checked; those that are painted, if the user stops it."""
        good: list[Rect] = []
        try:
            (self._fuse if now.plan.order == "fused" else self._waves)(now, good)
        except Interrupted:
            if self._guard:
                self._guard(now, good, self, stopped=True)
            raise
        if self._guard:
            self._guard(now, good, self, stopped=False)

    def _level(self, blend: Blend, tiles: Sequence[Rect]) -> None:
        """Colours that are right in every tile can be wrong where tiles are blended: shift what the canvas shows of
        each to the source's mean, with the weights that it was painted with."""
        canvas, shifts = self.canvas, []
        for tile in tiles:
            mask = canvas.mask(tile)
            weight = torch.ones(1, tile.height, tile.width) if mask is None else mask
            short = (canvas.source(tile) - canvas.painted(tile)) * weight
            shifts.append(short.sum((1, 2), keepdim=True) / weight.sum())
        for tile, shift in zip(tiles, shifts):
            canvas.add(tile, shift * blend.weight(tile))

    def _progress(self, ahead: float, text: str = "") -> None:
        """ahead: share of the whole run that is done once the next tiles are sampled."""
        before, self._ahead = self._ahead, max(self._ahead, ahead)
        text = text or f"painting tiles: {self.done} of {self.total}"
        self._host.progress(Progress(before, self._ahead, text), self.canvas)

    def tell(self, done: Pass, text: str, used: float) -> None:
        self._progress(self._meter.repainting(done.number, used), text)

    def _waves(self, now: Pass, good: list[Rect]) -> None:
        """Tiles sampled and painted, one wave after the other; good: gets those that are painted."""
        chosen, neighbours = set(now.tiles), Neighbours(self.canvas, now.plan, now.blend, self._host.factor)

        def work(tiles: Sequence[Rect]) -> Painted:
            seen = {tile: neighbours.seen(tile) for tile in tiles}
            return self._batch(
                str(now.number),
                tiles,
                lambda part: self._attempt(part, [seen[tile] for tile in part], now.denoise, self._noise),
            )

        for wave in now.plan.waves:
            batches = chunks([tile for tile in wave if tile in chosen], self._settings.batch)
            for group in chunks(batches, self._team.size):
                if self._host.interrupted():
                    raise Interrupted
                share = (len(good) + sum(map(len, group))) / len(now.tiles)
                self._progress(self._meter.painting(now.number, share))
                done = self._team.share(group, work)
                for batch, painted in zip(group, done):
                    self._paint(now, batch, painted, neighbours)
                    good += batch[: len(painted.tiles)]
                for painted in done:
                    if painted.error is not None:
                        raise painted.error

    def _paint(self, now: Pass, tiles: Sequence[Rect], painted: Painted, neighbours: Neighbours) -> None:
        for tile, (pixels, latents) in zip(tiles, painted.tiles):
            self.canvas.paint(tile, pixels, now.blend.weight(tile))
            neighbours.add(tile, latents)
        self._count(tiles[: len(painted.tiles)])
        self._keep(str(now.number), tiles, painted)

    def _count(self, tiles: Sequence[Rect]) -> None:
        """They are painted."""
        for tile in self.report.tiles:
            if tile.area in tiles:
                tile.state = PAINTED
        self.done += len(tiles)

    def _keep(self, step: str, tiles: Sequence[Rect], painted: Painted) -> None:
        """Reports tiles, and has the journal keep them."""
        self.report.tell(tiles[: len(painted.tiles)], painted)
        if self._journal and not painted.kept:  # they are painted, also if the disk has no room for them
            for tile, (pixels, latents) in zip(tiles, painted.tiles):
                self._journal.put(step, tile, pixels, latents, painted.notes)

    def _batch(
        self, step: str, tiles: Sequence[Rect], paint: Callable[[Sequence[Rect]], list[tuple[Tensor, Tensor]]]
    ) -> Painted:
        """Tiles as the journal has them, or else as `paint` gives them (pixels, latents), some at a time."""
        kept = self._journal.get(step, tiles) if self._journal else None
        if kept is not None:
            return Painted(*kept, kept=True)
        done: list[tuple[Tensor, Tensor]] = []
        known, error, began = len(self.report.notes), None, time.perf_counter()

        def work(part: Sequence[Rect]) -> None:
            done.extend((pixels.half(), latents.half()) for pixels, latents in paint(part))

        try:
            self._size.run(tiles, work)
        except (Exception, KeyboardInterrupt) as caught:
            error = caught
        seconds = (time.perf_counter() - began) / max(1, len(done))
        return Painted(done, self.report.notes[known:], error, seconds=seconds)

    def repaint(self, done: Pass, shown: Sequence[Shown], attempt: Attempt) -> Painted:
        """Tiles once more, for the guard."""
        known = {one.tile: one for one in shown}
        denoise = self._host.denoise if done.denoise is None else done.denoise
        noise = self._noise.reseeded(attempt.seed)
        return self._batch(
            _step(done, attempt),
            list(known),
            lambda part: self._attempt(
                part, [self._held(known[tile]) for tile in part], denoise * attempt.denoise, noise
            ),
        )

    def keep(self, done: Pass, tiles: Sequence[Rect], painted: Painted, attempt: Attempt) -> None:
        self._keep(_step(done, attempt), tiles, painted)

    def _held(self, one: Shown) -> Seen:
        """What is to stay of a tile, as if neighbours had painted it."""
        latents = self._host.encode(one.pixels[None])[0]
        latents = torch.where(latents.isfinite(), latents, self._encoded(one.tile).to(latents))
        return Seen(one.pixels, one.hold, latents, F.max_pool2d(1 - one.hold, self._host.factor) < 0.5)

    def _attempt(
        self, tiles: Sequence[Rect], seen: Sequence[Seen | None], denoise: float | None, noise: NoiseField
    ) -> list[tuple[Tensor, Tensor]]:
        """The tiles sampled and finished; what is not finite is done again in full precision, once."""
        done = self._sample(tiles, seen, denoise, noise)
        for number, (tile, one) in enumerate(zip(tiles, seen)):
            if done[number][0].isfinite().all():
                continue
            mended = in_full_precision(
                self._host, lambda tile=tile, one=one: self._sample([tile], [one], denoise, noise)[0]
            )
            finite = mended is not None and bool(mended[0].isfinite().all())
            done[number] = mended if finite else (self.canvas.source(tile), self._encoded(tile).cpu())
            self._not_a_number(tile, finite)
        return [(self._finish(tile, one, pixels), latents) for tile, one, (pixels, latents) in zip(tiles, seen, done)]

    def _not_a_number(self, tile: Rect, mended: bool) -> None:
        numbers = [known.number for known in self.report.tiles if known.area == tile]
        name = f"tile {numbers[0]}" if numbers else f"the part of the picture at {tile.x}, {tile.y}"
        outcome = "was done again in full precision" if mended else "is kept from the source"
        self.report.note(f"{name} {outcome}: the model gave what is not a number")

    def _finish(self, tile: Rect, seen: Seen | None, pixels: Tensor) -> Tensor:
        """Pixels (3, h, w) to be painted, in the source's colours; what was painted already comes as it is."""
        own = None if seen is None else seen.hold[0] < 1
        corrected = correct(pixels.clamp(0, 1), self.canvas.source(tile), self._settings.colour, own)
        return corrected if seen is None else torch.lerp(corrected, seen.pixels, seen.hold)

    def _make(self, tiles: Sequence[Rect]) -> Batch:
        latent = tiles[0].height // self._host.factor, tiles[0].width // self._host.factor
        adapted, guidance = self._conditions.adapted, self._conditions.guidance
        guide = guidance and guidance.of(self.canvas, tiles, self._encoded, self.report.note)
        prompts = [self._prompts.of(tile) for tile in tiles]
        return Batch(tiles, prompts, adapted and adapted(tiles, latent), guide)

    def _mask(self, tiles: Sequence[Rect], seen: Sequence[Seen | None]) -> Tensor | None:
        """(k, 1, h, w): 1 for latent cells that may change, all those that show any of the mask and are not held."""
        masks = [self.canvas.mask(tile) for tile in tiles]
        if masks[0] is None and not any(seen):
            return None
        free = [torch.ones(1, tile.height, tile.width) if mask is None else mask for tile, mask in zip(tiles, masks)]
        cells = F.max_pool2d(torch.stack(free), self._host.factor).ceil()
        return torch.stack([free if one is None else free * ~one.held for free, one in zip(cells, seen)])

    def _start(self, tile: Rect, seen: Seen | None) -> Tensor:
        """Pixels (3, h, w) that a tile starts from."""
        pixels = self.canvas.source(tile)
        return self.canvas.crop(tile, pixels if seen is None else torch.lerp(pixels, seen.pixels, seen.hold))

    def _sample(
        self, tiles: Sequence[Rect], seen: Sequence[Seen | None], denoise: float | None, field: NoiseField
    ) -> list[tuple[Tensor, Tensor]]:
        """The tiles as the model paints them (3, h, w), and their latents (C, h, w).

        Where neighbours have painted already a tile sees that, and holds on to it; everywhere else it starts from the
        source. So it fits to what is there, and yet no pixel is denoised twice.
        """
        host = self._host
        latents = torch.stack([self._encoded(tile) for tile in tiles])
        for latent, one in zip(latents, seen):
            if one is not None:
                latent.copy_(torch.where(one.held.to(latent.device), one.latents.to(latent), latent))
        views = Whole(self._make(tiles), lambda: torch.stack([*map(self._start, tiles, seen)]))
        noise = TileNoise(field, [tile.shrink(host.factor) for tile in tiles])
        size = self._plan.width, self._plan.height
        sampled = host.sample(latents, views, noise, size, denoise, self._mask(tiles, seen))
        return list(zip(host.decode(sampled), sampled.cpu()))

    def _fuse(self, now: Pass, good: list[Rect]) -> None:
        """The canvas sampled as a whole through its tiles; encoded and decoded in few large pieces.

        good: gets the tiles that are painted.
        """
        wanted = now.tiles
        host, plan, factor = self._host, self._plan, self._host.factor
        whole = Rect(0, 0, *plan.padded)
        latents, began = self._encoded(whole)[None], time.perf_counter()
        mask = self._mask([whole], [None])

        def cells(tile: Rect) -> tuple[Any, ...]:
            return (0, slice(None), *tile.shrink(factor).slices)

        self._encoded = lambda tile: latents[cells(tile)]

        def sample() -> tuple[Tensor, set[Rect]]:
            views = Fused(plan, wanted, factor, self._make, self._size, self._team)
            noise = TileNoise(self._noise, [whole.shrink(factor)])
            sampled = host.sample(latents, views, noise, (plan.width, plan.height), None, mask)
            return sampled, views.lost if sampled.isfinite().all() else set(wanted)

        self._progress(self._meter.painting(now.number, 1.0), f"painting {len(wanted)} tiles together")
        sampled, lost = sample()
        if lost:
            first = [tile for tile in wanted if tile in lost]
            sampled, lost = in_full_precision(host, sample) or (sampled, lost)
            for tile in first:
                self._not_a_number(tile, mended=tile not in lost)
        good += [tile for tile in wanted if tile not in lost]
        self._decode(now.blend, good, torch.where(sampled.isfinite(), sampled, latents))
        self._count(wanted)
        self.report.tell(wanted, Painted([], seconds=(time.perf_counter() - began) / len(wanted)))

    def _decode(self, blend: Blend, tiles: Sequence[Rect], latents: Tensor) -> None:
        """Paint the canvas's latents, as far as they belong to these tiles."""
        host, weights = self._host, Blend(self._pieces, RIM)
        for piece in self._pieces.tiles:
            latent = latents[(slice(None), slice(None), *piece.shrink(host.factor).slices)]
            pixels = decode(host, latent, piece)
            if not pixels.isfinite().all():
                mended = in_full_precision(host, lambda latent=latent, piece=piece: decode(host, latent, piece))
                if mended is None or not mended.isfinite().all():
                    self._not_a_number(piece, mended=False)
                    continue
                pixels = mended
            self.canvas.paint(piece, self._corrected(blend, tiles, piece, pixels), weights.weight(piece))

    def _corrected(self, blend: Blend, tiles: Sequence[Rect], piece: Rect, pixels: Tensor) -> Tensor:
        """A piece (3, h, w) of the canvas in the source's colours; where there are no tiles, the source."""
        source, weight = self.canvas.source(piece), torch.zeros(piece.height, piece.width)
        for tile in tiles:
            part = tile.intersection(piece)
            if part is not None:
                weight[part.within(piece).slices] += blend.weight(tile)[part.within(tile).slices]
        corrected = correct(pixels.clamp(0, 1), source, self._settings.colour, weight > 0)
        return torch.lerp(source, corrected, weight.clamp(max=1))


def _step(done: Pass, attempt: Attempt) -> str:
    """How the journal names an attempt to paint tiles of a pass again."""
    return f"{done.number}-retry{attempt.seed}"
