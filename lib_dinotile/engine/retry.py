"""The guard's policy: when a pass is painted, what is in doubt is painted again, and at last blended back.

Retries have a budget, a share of the sampling work without them: pixels times sampling steps, not seconds, so that the
image does not depend on the machine. All tiles of a pass are judged first; then those most in doubt are painted again,
as many as the budget pays for, and what is still in doubt once more. What a pass leaves of its budget the next has too.

Where most tiles are in doubt another seed is no help: then none is painted again, and a note says what to change. Of
fewer tiles than `FEW` that cannot be known; there the budget alone is the limit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lib_dinotile import Handling, one_line
from lib_dinotile.condition.guard import Guard, Verdict
from lib_dinotile.engine.denoisers import chunks
from lib_dinotile.engine.host import Host, Interrupted
from lib_dinotile.engine.memory import BatchSize
from lib_dinotile.engine.neighbours import HALF
from lib_dinotile.engine.painter import Attempt, PaintedBatch, TilePainter, raise_first
from lib_dinotile.engine.passes import Pass
from lib_dinotile.engine.report import Report
from lib_dinotile.engine.team import Team
from lib_dinotile.settings import BLEND, RETRY, Settings
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.noise import NoiseField
from lib_dinotile.tiling.plan import Rect

WEAKER = 0.7
"""Each retry with less denoise has this share of the denoising strength before."""
MOST, FEW = 0.5, 4
"""With more than this share of the tiles in doubt none is painted again, unless there are fewer tiles than that."""


@dataclass(frozen=True)
class Retry:
    """How a tile is painted again."""

    seed: int
    """Which noise, counted from the image's own."""
    denoise: float
    """Share of the denoising strength."""


def retries(settings: Settings) -> list[Retry]:
    """First other seeds, then other seeds with less and less denoise; none with another policy."""
    if settings.guard != RETRY or settings.guard_budget == 0:
        return []
    seeds, weaker = settings.guard_seeds, settings.guard_weaker
    fresh = [Retry(1 + number, 1.0) for number in range(seeds)]
    return fresh + [Retry(1 + seeds + number, WEAKER ** (number + 1)) for number in range(weaker)]


def reserve(settings: Settings) -> float:
    """Largest cost of the retries, as a share of the work without them."""
    return min(settings.guard_budget, sum(retry.denoise for retry in retries(settings)))


@dataclass
class Budget:
    """The budget of the retries, and what is spent of it."""

    share: float
    """Of the work without them."""
    work: int = 0
    """Of the passes so far, without retries."""
    spent: int = 0
    """On retries."""
    hopeless: bool = False
    """Whether so many tiles are in doubt that painting them again is no help."""

    def pays_for(self, cost: int) -> int:
        """How many more retries of that cost there may be."""
        return max(0, int((self.share * self.work - self.spent) / cost + 1e-9)) if cost else 0

    def used(self, more: int = 0) -> float:
        """The share of it that is spent, once this is spent, too."""
        return (self.spent + more) / (self.share * self.work or 1)


@dataclass(frozen=True)
class Judged:
    """The guard's findings in a tile."""

    distances: Tensor
    """(h, w) of its window's patches."""
    doubt: Tensor
    """(h, w), true for those in doubt."""
    excess: float
    """How far those are beyond the limit, summed up: how much the tile is in doubt."""
    mended: int = 0
    """How many tiles of the pass were mended before that was found."""

    @property
    def doubtful(self) -> bool:
        """Whether any of it is in doubt."""
        return self.excess > 0


@dataclass(frozen=True)
class Change:
    """A change to a tile."""

    judged: Judged
    """As it will be."""
    pixels: Tensor | None = None
    """To be added to the canvas (3, H, W), half precision."""
    repainted: bool = False
    blended: float = 0.0
    """Share of its patches that are blended back to the source."""

    def to(self, device: torch.device | str) -> Change:
        """The same on a device; what is judged is on the CPU anyway."""
        return replace(self, pixels=None if self.pixels is None else self.pixels.to(device))


class Record(Protocol):
    """Who keeps what is painted, and says how far it is: the run."""

    resumable: bool
    """Whether a run that breaks off can be taken up again, so that an error is better than a retry left out."""

    def kept(self, step: str, tiles: Sequence[Rect]) -> PaintedBatch | None:
        """Tiles as an earlier run has painted them in that step, if it has."""

    def keep(self, step: str, tiles: Sequence[Rect], painted: PaintedBatch) -> None:
        """They are painted, perhaps by another process."""

    def tell(self, now: Pass, text: str, used: float) -> None:
        """Say what is being done, and what share of the budget is spent once the next tiles are sampled."""


class _Watched:
    """A tile that is watched."""

    def __init__(self, guard: Guard, tile: Rect, fade: Tensor, free: Tensor | None) -> None:
        self._guard, self.tile, self.fade, self.free = guard, tile, fade, free
        self.plain = functools.cache(lambda: guard.plain(tile))
        self.judged = Judged(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 0.0)
        self.verdict = Verdict(1.0, 1.0, 0.0, 0.0)

    def begin(self, change: Change) -> None:
        """It is judged for the first time."""
        self.take(change)
        self.verdict.before, self.verdict.doubt_before = self.verdict.after, self.verdict.doubt_after

    def take(self, change: Change) -> None:
        """It has become that."""
        self.judged, guard = change.judged, self._guard
        own = guard.own(self.tile, self.judged.distances, self.free)
        self.verdict.after = guard.score(self.tile, self.judged.distances, self.free)
        self.verdict.doubt_after = float(self.judged.doubt.sum() / own.sum())
        self.verdict.blended = max(self.verdict.blended, change.blended)


class RetryPolicy:
    """The guard and its policy, for one pass over a canvas."""

    def __init__(
        self,
        guard: Guard,
        canvas: Canvas,
        settings: Settings,
        host: Host,
        noise: NoiseField,
        size: BatchSize,
        team: Team,
        report: Report,
        budget: Budget,
        done: Pass,
        painter: TilePainter,
        record: Record,
    ) -> None:
        """budget: of the whole run; done: the pass that is painted; painter: has painted it."""
        self._guard, self._canvas, self._settings, self._host, self._noise = guard, canvas, settings, host, noise
        self._size, self._team, self._report, self._budget = size, team, report, budget
        self._pass, self._painter, self._record = done, painter, record
        self._mended: list[Rect] = []
        """The tiles that were mended, one after the other, some more than once."""

    def __call__(self, tiles: Sequence[Rect], stopped: bool) -> None:
        """Judges these tiles, mends what is in doubt, and reports.

        stopped: the user does not want to wait for more to be painted.
        """
        done, budget = self._pass, self._budget
        budget.work += len(tiles) * done.cost(done.steps)
        if not tiles:
            return
        self._record.tell(done, f"checking {counted(len(tiles), 'tile')}", budget.used())
        watched = [_Watched(self._guard, tile, *self._fades(tile)) for tile in tiles]
        for one, change in self._shared(watched, self._judge):
            one.begin(change)
        try:
            if not stopped:
                self._retry(watched)
        except Interrupted:
            pass  # what is painted already is kept; the user's wish is heard before the next batch
        if self._settings.guard in (BLEND, RETRY):
            for wave in self._apart([one for one in watched if one.judged.doubtful]):
                for one, change in self._shared(wave, self._blend_back):
                    self._apply(one, change)
        self._report.judge({one.tile: one.verdict for one in watched})
        if self._settings.guard == RETRY:
            self._report.retried = budget.spent / (budget.work or 1)

    def _fades(self, tile: Rect) -> tuple[Tensor, Tensor | None]:
        """(H, W) in [0, 1]: how far the tile is mended at each pixel, less where neighbours show; and how much of each
        it may change, None for all."""
        fade, mask = (self._pass.blend.weight(tile) / HALF).clamp(max=1), self._canvas.mask(tile)
        free = fade if mask is None else fade * mask[0]
        return fade, None if bool((free == 1).all()) else free.cpu()

    def _shared(
        self, watched: Sequence[_Watched], work: Callable[[Sequence[_Watched]], list[Change]]
    ) -> Iterator[tuple[_Watched, Change]]:
        """`work` on tiles that do not touch, or that nothing is done to, batches of them shared out by the team."""
        for group in chunks(chunks(watched, self._settings.batch), self._team.size):
            for batch, found in zip(group, self._team.share(group, work)):
                yield from zip(batch, found)

    def _judged(self, watched: Sequence[_Watched], pixels: Sequence[Tensor]) -> list[Judged]:
        """The tiles with these pixels (3, H, W), judged."""
        found: list[Judged] = []
        each = list(zip(watched, pixels))
        for part in self._size.parts(each, found):
            with self._size.halved(len(part)):
                tiles, shown = [one.tile for one, _ in part], torch.stack([image for _, image in part])
                judged = []
                for (one, _), distances in zip(part, self._guard.distances(tiles, shown)):
                    doubt = self._guard.doubt(one.tile, distances, one.free, one.plain)
                    beyond = (distances - self._guard.limit).nan_to_num(nan=2.0)
                    judged.append(Judged(distances, doubt, float(beyond[doubt].sum()), len(self._mended)))
                found += judged
        return found

    def _shown(self, watched: Sequence[_Watched]) -> list[tuple[Tensor, Judged]]:
        """The tiles as the canvas shows them, judged: once more only where other tiles were mended since."""
        pixels = [self._canvas.painted(one.tile) for one in watched]
        judged = [one.judged for one in watched]
        old = [number for number, one in enumerate(watched) if self._outdated(one)]
        found = self._judged([watched[number] for number in old], [pixels[number] for number in old])
        for number, each in zip(old, found):
            judged[number] = each
        return list(zip(pixels, judged))

    def _outdated(self, one: _Watched) -> bool:
        """Whether a neighbour that shows in its window was mended since it was judged."""
        window = self._guard.window(one.tile)
        return any(tile != one.tile and tile.meets(window) for tile in self._mended[one.judged.mended :])

    def _judge(self, watched: Sequence[_Watched]) -> list[Change]:
        pixels = [self._canvas.painted(one.tile) for one in watched]
        return [Change(judged) for judged in self._judged(watched, pixels)]

    def _apart(self, watched: Sequence[_Watched]) -> list[list[_Watched]]:
        """The tiles in groups of which no two overlap."""
        by_tile = {one.tile: one for one in watched}
        waves = [[by_tile[tile] for tile in wave if tile in by_tile] for wave in self._pass.plan.apart]
        return [wave for wave in waves if wave]

    def _apply(self, one: _Watched, change: Change) -> None:
        if change.pixels is not None:
            self._canvas.add(one.tile, change.pixels.to(self._canvas.device))
            self._mended.append(one.tile)
        one.take(change)

    def _retry(self, watched: Sequence[_Watched]) -> None:
        """All retries, each for as many tiles as the budget pays for."""
        done, budget, ways = self._pass, self._budget, retries(self._settings)
        doubtful = sum(one.judged.doubtful for one in watched)
        if ways and not budget.hopeless and len(watched) >= FEW and doubtful > MOST * len(watched):
            budget.hopeless = True
            self._report.note(
                f"the guard doubts most tiles ({doubtful} of {len(watched)}) and paints none of them again: use a "
                "lower denoising strength, another checkpoint or a higher guard threshold"
            )
        if budget.hopeless:
            return
        failed = ""
        for number, retry in enumerate(ways, 1):
            cost = done.cost(self._host.steps(self._denoise(retry)))
            most_first = sorted((one for one in watched if one.judged.doubtful), key=lambda one: -one.judged.excess)
            chosen = most_first[: budget.pays_for(cost)]
            attempt = f"attempt {number}" if number > 1 else ""
            if chosen and (note := self._host.steps_note(self._denoise(retry))):
                self._report.note(f"guard, repaint {attempt or 'attempt 1'}: {note}")
            failed = self._attempt(retry, chosen, cost, attempt)
            if failed:
                self._report.note(f"guard: repaint {attempt or 'attempt 1'} failed: {failed}")
                self._host.free_memory()
        left = sum(one.judged.doubtful and not one.verdict.retries for one in watched)
        if left and ways and not failed:
            self._report.note(
                f"guard: {counted(left, 'doubtful tile')} not painted again: the retry budget of "
                f"{budget.share:g} is used up"
            )

    def _attempt(self, retry: Retry, chosen: Sequence[_Watched], cost: int, attempt: str) -> str:
        """These tiles painted once more; what is against it, in words, if that fails: they are painted already."""
        text = f"repainting {counted(len(chosen), 'doubtful tile')}{attempt and f', {attempt}'}"
        for wave in self._apart(chosen):
            for group in chunks(chunks(wave, self._settings.batch), self._team.size):
                if self._host.interrupted():
                    raise Interrupted
                self._record.tell(self._pass, text, self._budget.used(cost * sum(map(len, group))))
                if failed := self._again(group, retry, cost):
                    return failed
        return ""

    def _denoise(self, retry: Retry) -> float:
        """Its denoising strength."""
        return retry.denoise * (self._host.denoise if self._pass.denoise is None else self._pass.denoise)

    def _step(self, retry: Retry) -> str:
        """How the journal names it."""
        return f"{self._pass.number}-retry{retry.seed}"

    def _again(self, group: Sequence[Sequence[_Watched]], retry: Retry, cost: int) -> str:
        """One more attempt at what is in doubt of some batches of tiles, one for each of the team; why it fails."""
        found: list[tuple[list[Change], PaintedBatch | None]] = []
        failed: list[str] = []

        def leave_out(error: Exception) -> bool:
            if isinstance(error, Interrupted) or self._record.resumable:
                return False
            failed.append(one_line(error))
            return True

        with Handling(leave_out):
            found = self._team.share(group, functools.partial(self._mend, retry))
        for batch, (changes, painted) in zip(group, found):
            again = [one for one, change in zip(batch, changes) if change.repainted]
            for one, change in zip(batch, changes):
                self._apply(one, change)
            for one in again:
                one.verdict.retries += 1
                one.verdict.seeds += (retry.seed,)
            self._budget.spent += cost * len(again)
            if painted is not None:
                self._record.keep(self._step(retry), [one.tile for one in again], painted)
        with Handling(leave_out):
            raise_first([painted for _, painted in found if painted is not None])
        return failed[0] if failed else ""

    def _mend(self, retry: Retry, batch: Sequence[_Watched]) -> tuple[list[Change], PaintedBatch | None]:
        """Of each patch in doubt the better of what shows and one more attempt; nothing for tiles that neighbours have
        mended already."""
        now = self._shown(batch)
        changes = [Change(judged) for _, judged in now]
        doubted = [number for number, (_, judged) in enumerate(now) if judged.doubtful]
        if not doubted:
            return changes, None
        tiles = [batch[number].tile for number in doubted]
        painted = self._record.kept(self._step(retry), tiles)
        if painted is None:
            held = {
                tile: self._painter.holding(tile, now[number][0], 1 - self._guard.area(tile, now[number][1].doubt))
                for number, tile in zip(doubted, tiles)
            }
            attempt = Attempt(self._noise.reseeded(retry.seed), self._denoise(retry), held)
            painted = self._painter.paint(tiles, attempt)
        doubted = doubted[: len(painted.tiles)]
        ones, before = [batch[number] for number in doubted], [now[number] for number in doubted]
        fresh = [
            self._canvas.source(tile).add_(one.change.to(self._canvas.device))
            for tile, one in zip(tiles, painted.tiles)
        ]
        mixed = [
            self._mix(one, judged.doubt & (new.distances < judged.distances), pixels, other)
            for one, (pixels, judged), new, other in zip(ones, before, self._judged(ones, fresh), fresh)
        ]
        for number, (pixels, judged), new, other in zip(doubted, before, self._judged(ones, mixed), mixed):
            better = new.excess < judged.excess
            changes[number] = Change(new, (other - pixels).half(), True) if better else Change(judged, None, True)
        return changes, painted

    def _mix(self, one: _Watched, patches: Tensor, pixels: Tensor, other: Tensor) -> Tensor:
        """The tile (3, H, W) with these patches (h, w) of another."""
        return torch.lerp(pixels, other, self._guard.area(one.tile, patches) * one.fade)

    def _blend_back(self, watched: Sequence[_Watched]) -> list[Change]:
        """The source, where it is nearer to itself than what was painted."""
        changes, mixed = [], {}
        for number, (one, (pixels, judged)) in enumerate(zip(watched, self._shown(watched))):
            changes.append(Change(judged))
            worse = judged.doubt & (one.plain() < judged.distances) if judged.doubtful else judged.doubt
            if worse.any():
                share = float(worse.sum() / self._guard.own(one.tile, worse, one.free).sum())
                mixed[number] = share, pixels, self._mix(one, worse, pixels, self._canvas.source(one.tile))
        found = self._judged([watched[number] for number in mixed], [other for *_, other in mixed.values()])
        for (number, (share, pixels, other)), judged in zip(mixed.items(), found):
            changes[number] = Change(judged, (other - pixels).half(), blended=share)
        return changes


def counted(count: int, noun: str) -> str:
    """As "1 tile" and "3 tiles"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
