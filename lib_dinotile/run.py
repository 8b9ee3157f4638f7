"""One canvas being painted: its passes, and in them wave after wave of tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_dinotile.hosts.base import Batch, Host, Interrupted, Residuals
from lib_dinotile.journal import Journal
from lib_dinotile.neighbours import Neighbours, Seen
from lib_dinotile.prompts import TilePrompts
from lib_dinotile.report import FLAT, PAINTED, UNMASKED, Report, TileReport
from lib_dinotile.sampling import BatchSize, Fused, Whole, chunks
from lib_dinotile.settings import Settings
from lib_dinotile.team import Team
from lib_dinotile.tiling.blend import RIM, Blend
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.colour import correct
from lib_dinotile.tiling.flat import detail
from lib_dinotile.tiling.noise import NoiseField, TileNoise
from lib_dinotile.tiling.plan import Grid, Rect, TilePlan, Tiles, fewest
from lib_dinotile.tiling.seams import seam_passes

PIECE, PIECE_OVERLAP = 768, 64
"""A canvas that is sampled as a whole is encoded and decoded in pieces of at most so many pixels a side."""

Painted = tuple[list[Tensor], list[str], "BaseException | None"]
"""Tiles as they are to be painted, half precision (3, h, w), what there is to say, and the error that broke it off."""


class Run:
    """Paints the canvas; what it says is kept in `report`."""

    def __init__(
        self,
        host: Host,
        settings: Settings,
        noise: NoiseField,
        canvas: Canvas,
        plan: TilePlan,
        condition: Callable[[Sequence[Rect], tuple[int, int]], Residuals] | None,
        journal: Journal | None,
        team: Team,
    ) -> None:
        """condition: gives that of some tiles with this latent (h, w)."""
        self.canvas, self._host, self._settings, self._noise, self._plan = canvas, host, settings, noise, plan
        self._condition, self._journal, self._team = condition, journal, team
        self.report = Report([TileReport(number, tile) for number, tile in enumerate(plan.tiles, 1)])
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
            if tiles.order == "fused":
                self._fuse(blend, wanted)
            else:
                self._waves(step, tiles, blend, denoise, wanted)
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
        chosen, self._neighbours = set(wanted), Neighbours(self.canvas, blend, self._host.factor)
        for wave in plan.waves:
            batches = chunks([tile for tile in wave if tile in chosen], self._settings.batch)
            for group in chunks(batches, self._team.size):
                if self._host.interrupted():
                    raise Interrupted
                for batch, painted in zip(
                    group, self._team.share(group, lambda tiles: self._batch(step, tiles, denoise))
                ):
                    self._paint(step, blend, batch, painted)

    def _paint(self, step: int, blend: Blend, tiles: Sequence[Rect], painted: Painted) -> None:
        pixels, notes, error = painted
        for tile, seen in zip(tiles, pixels):
            self.canvas.paint(tile, seen, blend.weight(tile))
            self._neighbours.add(tile)
            if self._journal:
                self._journal.put(step, tile, seen)
        for note in notes:
            self.report.note(note)
        self._progress(tiles[: len(pixels)])
        if error is not None:
            raise error

    def _batch(self, step: int, tiles: Sequence[Rect], denoise: float | None) -> Painted:
        saved = self._journal.get(step, tiles) if self._journal else None
        if saved is not None:
            return saved, [], None
        pixels: list[Tensor] = []
        known, error = len(self.report.notes), None
        try:
            self._size.run(tiles, lambda part: pixels.extend(self._work(part, denoise)))
        except (Exception, KeyboardInterrupt) as caught:
            error = caught
        return pixels, self.report.notes[known:], error

    def _work(self, tiles: Sequence[Rect], denoise: float | None) -> list[Tensor]:
        """The tiles as they are to be painted; what is not finite is done again in full precision, once."""
        pixels = list(self._sample(tiles, denoise))
        bad = [number for number, seen in enumerate(pixels) if not seen.isfinite().all()]
        if bad:
            with self._host.full_precision():
                again = self._sample([tiles[number] for number in bad], denoise)
            for number, seen in zip(bad, again):
                finite = bool(seen.isfinite().all())
                pixels[number] = seen if finite else self.canvas.source(tiles[number])
                self._not_a_number(tiles[number], finite)
        return [self._finish(tile, seen) for tile, seen in zip(tiles, pixels)]

    def _not_a_number(self, tile: Rect, mended: bool) -> None:
        numbers = [known.number for known in self.report.tiles if known.area == tile]
        name = f"tile {numbers[0]}" if numbers else f"the seam tile at {tile.x}, {tile.y}"
        outcome = "was done again in full precision" if mended else "is kept from the source"
        self.report.note(f"{name} {outcome}: the model gave what is not a number")

    def _finish(self, tile: Rect, pixels: Tensor) -> Tensor:
        """Pixels (3, h, w) to be painted, in the source's colours; what was painted already comes as it is."""
        seen = self._neighbours.seen(tile)
        own = None if seen is None else ~seen.held[0]
        corrected = correct(pixels.clamp(0, 1), self.canvas.source(tile), self._settings.colour, own)
        return (corrected if seen is None else torch.lerp(corrected, seen.pixels, seen.hold)).half()

    def _make(self, tiles: Sequence[Rect]) -> Batch:
        latent = tiles[0].height // self._host.factor, tiles[0].width // self._host.factor
        condition = self._condition(tiles, latent) if self._condition else None
        return Batch(tiles, [self._prompts.of(tile) for tile in tiles], condition)

    def _mask(self, tiles: Sequence[Rect], seen: Sequence[Seen | None]) -> Tensor | None:
        """(k, 1, h, w): 1 for latent cells that may change, all those that show any of the mask and are not held."""
        masks = [self.canvas.mask(tile) for tile in tiles]
        if masks[0] is None and not any(seen):
            return None
        free = [torch.ones(1, tile.height, tile.width) if mask is None else mask for tile, mask in zip(tiles, masks)]
        free = [mask if one is None else mask * ~one.held for mask, one in zip(free, seen)]
        return F.max_pool2d(torch.stack(free), self._host.factor).ceil()

    def _sample(self, tiles: Sequence[Rect], denoise: float | None) -> Tensor:
        """The tiles as the model paints them (k, 3, h, w).

        Where neighbours have painted already a tile sees that, and holds on to it; everywhere else it starts from the
        source. So it fits to what is there, and yet no pixel is denoised twice.
        """
        host, canvas = self._host, self.canvas
        seen = [self._neighbours.seen(tile) for tile in tiles]
        pixels = [
            canvas.crop(tile, None if one is None else torch.where(one.held, one.pixels, canvas.source(tile)))
            for tile, one in zip(tiles, seen)
        ]
        latents = host.encode(torch.stack(pixels))
        noise = TileNoise(self._noise, [tile.shrink(host.factor) for tile in tiles])
        size = self._plan.width, self._plan.height
        return host.decode(
            host.sample(latents, Whole(self._make(tiles)), noise, size, denoise, self._mask(tiles, seen))
        )

    def _fuse(self, blend: Blend, wanted: Sequence[Rect]) -> None:
        """The canvas sampled as a whole through its tiles; encoded and decoded in few large pieces."""
        host, plan, factor = self._host, self._plan, self._host.factor
        (columns, width), (rows, height) = (fewest(side, PIECE, PIECE_OVERLAP, factor) for side in plan.padded)
        pieces = Grid(columns, rows, (width, height))
        small, whole = Blend(pieces.shrink(factor), rim=1), Rect(0, 0, *plan.padded).shrink(factor)
        latents = mask = None
        for piece in pieces.tiles:
            area = piece.shrink(factor)
            index = (0, slice(None), *area.slices)
            encoded = host.encode(self.canvas.crop(piece)[None])
            cut = self._mask([piece], [None])
            if latents is None:
                latents = encoded.new_zeros(1, encoded.shape[1], whole.height, whole.width)
                mask = None if cut is None else torch.zeros(1, 1, whole.height, whole.width)
            latents[index] += encoded[0] * small.weight(area).to(encoded)
            if mask is not None:
                mask[index] = cut[0]

        def sample() -> tuple[Tensor, set[Rect]]:
            views = Fused(plan, wanted, factor, self._make, self._size, self._team)
            noise = TileNoise(self._noise, [whole])
            sampled = host.sample(latents, views, noise, (plan.width, plan.height), None, mask)
            return sampled, views.lost if sampled.isfinite().all() else set(wanted)

        sampled, lost = sample()
        if lost:
            first = [tile for tile in wanted if tile in lost]
            with host.full_precision():
                sampled, lost = sample()
            for tile in first:
                self._not_a_number(tile, mended=tile not in lost)
        good = [tile for tile in wanted if tile not in lost]
        self._decode(blend, good, pieces, torch.where(sampled.isfinite(), sampled, latents))
        self._progress(wanted)

    def _decode(self, blend: Blend, tiles: Sequence[Rect], pieces: Grid, latents: Tensor) -> None:
        """Paint the canvas's latents, as far as they belong to these tiles."""
        host, weights = self._host, Blend(pieces, RIM)
        for piece in pieces.tiles:
            latent = latents[(slice(None), slice(None), *piece.shrink(host.factor).slices)]
            pixels = host.decode(latent)[0]
            if not pixels.isfinite().all():
                with host.full_precision():
                    pixels = host.decode(latent)[0]
                if not pixels.isfinite().all():
                    self._not_a_number(piece, mended=False)
                    continue
            self.canvas.paint(piece, self._corrected(blend, tiles, piece, pixels), weights.weight(piece))

    def _corrected(self, blend: Blend, tiles: Sequence[Rect], piece: Rect, pixels: Tensor) -> Tensor:
        """A piece (3, h, w) of the canvas in the source's colours, tile by tile; where there are none, the source."""
        source = self.canvas.source(piece)
        finished = source.clone()
        for tile in tiles:
            part = tile.intersection(piece)
            if part is not None:
                index = (slice(None), *part.within(piece).slices)
                corrected = correct(pixels[index].clamp(0, 1), source[index], self._settings.colour)
                finished[index] += (corrected - source[index]) * blend.weight(tile)[part.within(tile).slices]
        return finished.clamp(0, 1)
