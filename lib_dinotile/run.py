"""One canvas being painted: its passes, and in them wave after wave of tiles."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_dinotile.condition.conditioner import Conditions
from lib_dinotile.condition.guard import OFF, Verdict
from lib_dinotile.hosts.base import Batch, Host, Interrupted
from lib_dinotile.journal import Journal
from lib_dinotile.latents import SourceLatents, decode, pieces
from lib_dinotile.neighbours import HALF, Neighbours, Seen
from lib_dinotile.prompts import TilePrompts
from lib_dinotile.report import FLAT, PAINTED, UNMASKED, Report, TileReport
from lib_dinotile.retry import Attempt, Watch
from lib_dinotile.sampling import BatchSize, Fused, Whole, chunks, in_full_precision
from lib_dinotile.settings import Settings
from lib_dinotile.team import Team
from lib_dinotile.tiling.blend import RIM, Blend
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.colour import correct
from lib_dinotile.tiling.flat import detail
from lib_dinotile.tiling.noise import NoiseField, TileNoise
from lib_dinotile.tiling.plan import Rect, TilePlan, Tiles
from lib_dinotile.tiling.seams import seam_passes


@dataclass
class Painted:
    """What became of a batch of tiles."""

    tiles: list[tuple[Tensor, Tensor]]
    """As they are to be painted (3, H, W), and as they were sampled (C, h, w), half precision; as many as were done."""
    notes: Sequence[str] = ()
    """What there is to say."""
    error: BaseException | None = None
    """What broke it off."""
    kept: bool = False
    """Whether the journal has them already."""
    verdicts: Sequence[Verdict] = ()
    """The guard's, one a tile, if there is a guard."""
    seconds: float | None = None
    """How long a tile took, where they were not kept."""


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
        self._watch = None
        if conditions.guard and settings.guard != OFF:
            self.report.threshold = 1 - conditions.guard.limit
            self._watch = Watch(conditions.guard, canvas, settings, host.factor, lambda tile: self._encoded(tile))
        self._pieces = pieces(plan, plan.padded, host.factor)
        self._size = BatchSize(settings.batch, host.free_memory, self.report.note)
        for tile in self.report.tiles:
            tile.state = self._left_out(tile.area) or tile.state
        passes: list[tuple[Tiles, Blend, float | None]] = []
        if settings.order != "none":
            passes.append((plan, Blend(plan, RIM), None))
        seams = seam_passes(plan, settings.seams, settings.seam_width)
        passes += [(grid, blend, settings.seam_denoise) for grid, blend in seams]
        self._passes = [(*entry, [tile for tile in entry[0].tiles if not self._left_out(tile)]) for entry in passes]
        self.done, self.total = 0, sum(len(wanted) for *_, wanted in self._passes)

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
        self._progress(())
        for step, (tiles, blend, denoise, wanted) in enumerate(self._passes):
            if step:
                self.canvas.flatten()
            if self._host.interrupted():
                raise Interrupted
            if not wanted:
                continue
            # What a tile starts from, as latents (C, h, w).
            self._encoded = SourceLatents(self._host, self.canvas, self._pieces, self.report.note).crop
            self._neighbours = Neighbours(self.canvas, tiles, blend, self._host.factor)
            try:
                if tiles.order == "fused":
                    self._fuse(blend, wanted)
                else:
                    self._waves(step, tiles, blend, denoise, wanted)
            finally:  # an image of the canvas is made now, and the memory may not be there for both
                del self._encoded, self._neighbours
            if self._settings.colour != "none":
                self._level(blend, wanted)

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

    def _progress(self, tiles: Sequence[Rect]) -> None:
        for tile in self.report.tiles:
            if tile.area in tiles:
                tile.state = PAINTED
        self.done += len(tiles)
        self._host.progress(self.done, self.total, self.canvas)

    def _waves(self, step: int, plan: Tiles, blend: Blend, denoise: float | None, wanted: Sequence[Rect]) -> None:
        """Tiles sampled and painted, one wave after the other."""
        chosen = set(wanted)
        for wave in plan.waves:
            batches = chunks([tile for tile in wave if tile in chosen], self._settings.batch)
            for group in chunks(batches, self._team.size):
                if self._host.interrupted():
                    raise Interrupted
                done = self._team.share(group, lambda tiles: self._batch(step, tiles, denoise))
                for batch, painted in zip(group, done):
                    self._paint(step, blend, batch, painted)
                for painted in done:
                    if painted.error is not None:
                        raise painted.error

    def _paint(self, step: int, blend: Blend, tiles: Sequence[Rect], painted: Painted) -> None:
        verdicts = dict(zip(tiles, painted.verdicts))
        self.report.tell(tiles[: len(painted.tiles)], painted.seconds, verdicts)
        for tile, (pixels, latents) in zip(tiles, painted.tiles):
            self.canvas.paint(tile, pixels, blend.weight(tile))
            self._neighbours.add(tile, latents)
        for note in painted.notes:
            self.report.note(note)
        self._progress(tiles[: len(painted.tiles)])
        if self._journal and not painted.kept:  # they are painted, also if the disk has no room for them
            for tile, (pixels, latents) in zip(tiles, painted.tiles):
                self._journal.put(step, tile, pixels, latents, painted.notes, verdicts.get(tile))

    def _batch(self, step: int, tiles: Sequence[Rect], denoise: float | None) -> Painted:
        kept = self._journal.get(step, tiles) if self._journal else None
        if kept is not None:
            painted, notes, verdicts = kept
            return Painted(painted, notes, kept=True, verdicts=verdicts)
        done: list[tuple[Tensor, Tensor]] = []
        verdicts: list[Verdict] = []
        known, error, began = len(self.report.notes), None, time.perf_counter()

        def work(part: Sequence[Rect]) -> None:
            painted, found = self._work(part, denoise)
            done.extend(painted)
            verdicts.extend(found)

        try:
            self._size.run(tiles, work)
        except (Exception, KeyboardInterrupt) as caught:
            error = caught
        seconds = (time.perf_counter() - began) / max(1, len(done))
        return Painted(done, self.report.notes[known:], error, verdicts=verdicts, seconds=seconds)

    def _work(
        self, tiles: Sequence[Rect], denoise: float | None
    ) -> tuple[list[tuple[Tensor, Tensor]], Sequence[Verdict]]:
        """The tiles as `Painted` has them, watched by the guard."""
        seen = [self._neighbours.seen(tile) for tile in tiles]
        done, verdicts = self._attempt(tiles, seen, denoise, self._noise), []
        if self._watch:
            done, verdicts = self._watch(tiles, seen, done, functools.partial(self._repaint, denoise))
        return [(pixels.half(), latents.half()) for pixels, latents in done], verdicts

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

    def _repaint(
        self, denoise: float | None, tiles: Sequence[Rect], seen: Sequence[Seen], attempt: Attempt
    ) -> list[tuple[Tensor, Tensor]]:
        """The tiles once more, for the guard."""
        denoise = self._host.denoise if denoise is None else denoise
        return self._attempt(tiles, seen, denoise * attempt.denoise, self._noise.reseeded(attempt.seed))

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

    def _fuse(self, blend: Blend, wanted: Sequence[Rect]) -> None:
        """The canvas sampled as a whole through its tiles; encoded and decoded in few large pieces."""
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

        sampled, lost = sample()
        if lost:
            first = [tile for tile in wanted if tile in lost]
            sampled, lost = in_full_precision(host, sample) or (sampled, lost)
            for tile in first:
                self._not_a_number(tile, mended=tile not in lost)
        good = [tile for tile in wanted if tile not in lost]
        sampled = torch.where(sampled.isfinite(), sampled, latents)
        self._decode(blend, good, sampled)
        self._progress(wanted)  # they are painted, also if the guard fails
        verdicts = self._watch_fused(blend, good, lambda tile: sampled[cells(tile)].cpu()) if self._watch else {}
        self.report.tell(wanted, (time.perf_counter() - began) / len(wanted), verdicts)

    def _watch_fused(
        self, blend: Blend, tiles: Sequence[Rect], latents: Callable[[Rect], Tensor]
    ) -> dict[Rect, Verdict]:
        """The guard's verdicts on a canvas that was sampled as a whole. What it mends fades out as tiles do."""
        canvas, verdicts = self.canvas, {}
        for batch in chunks(tiles, self._size.limit):
            if self._host.interrupted():
                break
            done = [(canvas.painted(tile), latents(tile)) for tile in batch]
            mended, found = self._watch(batch, [None] * len(batch), done, functools.partial(self._repaint, None))
            verdicts.update(zip(batch, found))
            for tile, (before, _), (after, _) in zip(batch, done, mended):
                canvas.add(tile, (after - before) * (blend.weight(tile) / HALF).clamp(max=1))
        return verdicts

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
