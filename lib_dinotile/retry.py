"""Tiles that the guard doubts: what is in doubt is painted again, and at last blended back to the source."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_dinotile.condition.guard import BLEND, RETRY, Guard, Verdict
from lib_dinotile.hosts.base import Interrupted
from lib_dinotile.neighbours import Seen
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.plan import Rect

WEAKER = 0.7
"""Each retry with less denoise has this share of the denoising strength before."""

Tile = tuple[Tensor, Tensor]
"""Pixels (3, H, W) as they are to be painted, and latents (C, h, w)."""


@dataclass(frozen=True)
class Attempt:
    """How a tile is painted again."""

    seed: int
    """Which noise, counted from the image's own."""
    denoise: float
    """Share of the denoising strength."""


Repaint = Callable[[Sequence[Rect], Sequence[Seen], Attempt], list[Tile]]
"""Paints tiles again, holding on to what they are told they have seen."""


def attempts(settings: Settings) -> list[Attempt]:
    """First other seeds, then other seeds with less and less denoise."""
    seeds, weaker = settings.guard_seeds, settings.guard_weaker
    fresh = [Attempt(1 + number, 1.0) for number in range(seeds)]
    return fresh + [Attempt(1 + seeds + number, WEAKER ** (number + 1)) for number in range(weaker)]


class Watch:
    """The guard and its policy, for the tiles of one canvas."""

    def __init__(
        self, guard: Guard, canvas: Canvas, settings: Settings, factor: int, source: Callable[[Rect], Tensor]
    ) -> None:
        """factor: pixels per latent cell; source: gives a tile's source as latents (C, h, w)."""
        self._guard, self._canvas, self._settings, self._factor = guard, canvas, settings, factor
        self._source = source

    def __call__(
        self, tiles: Sequence[Rect], seen: Sequence[Seen | None], done: Sequence[Tile], repaint: Repaint
    ) -> tuple[list[Tile], list[Verdict]]:
        """The tiles as they are to be, and what became of each.

        seen: what neighbours show of them, which stays; done: the tiles as they were painted; repaint: paints some
        again.
        """
        policy = self._settings.guard
        found = self._guard.distances(tiles, torch.stack([pixels for pixels, _ in done]))
        watched = [
            _Watched(self._guard, tile, self._free(tile, one), *entry)
            for tile, one, *entry in zip(tiles, seen, done, found)
        ]
        for attempt in attempts(self._settings) if policy == RETRY else ():
            doubted = [one for one in watched if one.doubt.any()]
            if not doubted:
                break
            try:
                self._again(doubted, attempt, repaint)
            except Interrupted:
                break  # what is painted already is kept; the user's wish is heard before the next batch
        if policy in (BLEND, RETRY):
            for one in watched:
                self._blend_back(one)
        return [one.painted for one in watched], [one.verdict for one in watched]

    def _free(self, tile: Rect, seen: Seen | None) -> Tensor | None:
        """(H, W) in [0, 1]: how much of each pixel the tile may change; None for all of them."""
        mask = self._canvas.mask(tile)
        if seen is None:
            return None if mask is None else mask[0]
        return (1 - seen.hold[0]) * (1 if mask is None else mask[0])

    def _again(self, watched: Sequence[_Watched], attempt: Attempt, repaint: Repaint) -> None:
        """One more attempt at what is in doubt of some tiles; of each patch the better one is kept."""
        tiles = [one.tile for one in watched]
        fresh = repaint(tiles, [self._hold(one) for one in watched], attempt)
        found = self._guard.distances(tiles, torch.stack([pixels for pixels, _ in fresh]))
        mixed = [
            self._mix(one, one.doubt & (distances < one.distances), new)
            for one, new, distances in zip(watched, fresh, found)
        ]
        found = self._guard.distances(tiles, torch.stack([pixels for pixels, _ in mixed]))
        for one, new, distances in zip(watched, mixed, found):
            one.verdict.retries += 1
            one.verdict.seeds += (attempt.seed,)
            one.take(new, distances)

    def _hold(self, one: _Watched) -> Seen:
        """What is not in doubt, as if neighbours had painted it."""
        pixels, latents = one.painted
        hold = 1 - self._guard.area(one.tile, one.doubt)
        return Seen(pixels, hold, latents, F.max_pool2d(1 - hold, self._factor) < 0.5)

    def _mix(self, one: _Watched, patches: Tensor, new: Tile) -> Tile:
        """The tile with these patches of the new one."""
        (pixels, latents), share = one.painted, self._guard.area(one.tile, patches)
        cells = (F.avg_pool2d(share, self._factor) > 0.5).to(latents.device)
        return torch.lerp(pixels, new[0], share), torch.where(cells, new[1].to(latents), latents)

    def _blend_back(self, one: _Watched) -> None:
        """The source, where it is nearer to itself than what was painted."""
        worse = one.doubt
        if worse.any():
            worse = worse & (one.plain() < one.distances)
        if not worse.any():
            return
        source = self._canvas.source(one.tile), self._source(one.tile).cpu()
        one.verdict.blended = float(worse.sum() / self._guard.own(one.tile, worse, one.free).sum())
        one.painted = self._mix(one, worse, source)
        one.judge(self._guard.distances([one.tile], one.painted[0][None])[0])


class _Watched:
    """A tile that is watched."""

    def __init__(self, guard: Guard, tile: Rect, free: Tensor | None, painted: Tile, distances: Tensor) -> None:
        self._guard, self.tile, self.free, self.painted = guard, tile, free, painted
        self.plain = functools.cache(lambda: guard.plain(tile))
        self.verdict = Verdict(0.0, 0.0, 0.0, 0.0)
        self.judge(distances)
        self.verdict.before, self.verdict.doubt_before = self.verdict.after, self.verdict.doubt_after

    def judge(self, distances: Tensor) -> None:
        """Of what it shows now."""
        guard, tile, free = self._guard, self.tile, self.free
        self.distances, self.doubt = distances, guard.doubt(tile, distances, free, self.plain)
        own = guard.own(tile, distances, free)
        self.verdict.after = guard.score(tile, distances, free)
        self.verdict.doubt_after = float(self.doubt.sum() / own.sum())

    def take(self, painted: Tile, distances: Tensor) -> None:
        """Something else in its place, if that is less in doubt."""
        doubt = self._guard.doubt(self.tile, distances, self.free, self.plain)
        limit = self._guard.limit
        if (distances[doubt] - limit).sum() < (self.distances[self.doubt] - limit).sum():
            self.painted = painted
            self.judge(distances)
