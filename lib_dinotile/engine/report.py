"""The outcome of every tile, for the user to read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lib_dinotile.condition.guard import Verdict
from lib_dinotile.tiling.plan import Rect

PAINTED, WAITING = "painted", "not reached"
UNMASKED, FLAT = "outside the mask", "flat"


@dataclass(frozen=True)
class RegionShare:
    """A region that a tile shows."""

    letter: str
    share: float
    """Of the tile."""
    words: str
    """What the tile is told of it; may be empty."""


@dataclass
class TileReport:
    """One tile of the plan."""

    number: int
    """From 1, row by row."""
    area: Rect
    prompt: str | None = None
    """Its own prompt: a caption or the user's words."""
    regions: list[RegionShare] = field(default_factory=list)
    """Those with a large share of it, the largest first, where regions have prompts and it has none of its own."""
    state: str = WAITING
    seconds: float | None = None
    """How long it took, a share of its batches' time; None if it was kept from an earlier run."""
    verdict: Verdict | None = None
    """The guard's."""


@dataclass
class Report:
    """The tiles of the plan, and what else is to be said."""

    tiles: list[TileReport]
    notes: list[str] = field(default_factory=list)
    """Lines for the user: memory that ran out, tiles that failed."""

    threshold: float | None = None
    """Cosine below which the guard may doubt a patch."""

    retried: float | None = None
    """Cost of the guard's retries, as a share of the sampling work without them."""

    def __post_init__(self) -> None:
        self._by_area = {tile.area: tile for tile in self.tiles}

    def of(self, area: Rect) -> TileReport | None:
        """The plan's tile that lies there."""
        return self._by_area.get(area)

    def _each(self, areas: Iterable[Rect]) -> Iterator[TileReport]:
        return (tile for tile in map(self.of, areas) if tile is not None)

    def tell(self, tiles: Sequence[Rect], notes: Sequence[str], seconds: float | None) -> None:
        """Add the notes of tiles that were painted, once more perhaps; seconds: that each has taken."""
        for tile in self._each(tiles):
            if seconds is not None:
                tile.seconds = (tile.seconds or 0.0) + seconds
        for note in notes:
            self.note(note)

    def set_state(self, area: Rect, state: str) -> None:
        """If it is a tile of the plan."""
        for tile in self._each([area]):
            tile.state = state

    def judge(self, verdicts: Mapping[Rect, Verdict]) -> None:
        """The guard's verdicts on tiles."""
        for tile in self._each(verdicts):
            tile.verdict = verdicts[tile.area]

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def numbers(self, state: str) -> list[int]:
        """The numbers of the tiles in a state."""
        return [tile.number for tile in self.tiles if tile.state == state]

    @property
    def prompts(self) -> str:
        """The tiles' own prompts, one line each, as the option `tile_prompts` takes them."""
        return "\n".join(f"{tile.number}: {tile.prompt}" for tile in self.tiles if tile.prompt)

    @property
    def lines(self) -> list[str]:
        """All notes for the user."""
        flat = [f"flat tiles skipped: {ranges(self.numbers(FLAT))}"] if self.numbers(FLAT) else []
        return flat + self._by_region + self._guarded + self.notes

    @property
    def _by_region(self) -> list[str]:
        """The regions whose words each tile is told, in a line."""
        found: dict[str, list[int]] = {}
        for tile in self.tiles:
            if tile.prompt is None and tile.state == PAINTED:
                letters = sorted(each.letter for each in tile.regions if each.words)
                found.setdefault(", ".join(letters), []).append(tile.number)
        none = found.pop("", [])
        if not found:
            return []
        told = [f"{letters} in {_tiles(numbers)}" for letters, numbers in sorted(found.items())]
        return ["region prompts: " + "; ".join(told + [f"none in {_tiles(none)}"] * bool(none))]

    @property
    def _guarded(self) -> list[str]:
        """The guard's findings, in a line."""
        judged = {tile.number: tile.verdict for tile in self.tiles if tile.verdict is not None}
        if not judged:
            return []
        doubted = {number: verdict for number, verdict in judged.items() if verdict.doubt_before}
        if not doubted:
            return [f"guard: all {len(judged)} tiles show what the source shows"]
        blended = [number for number, verdict in doubted.items() if verdict.blended]
        left = [number for number, verdict in doubted.items() if verdict.doubt_after and not verdict.blended]
        mended = [number for number in doubted if number not in blended and number not in left]
        outcomes = (("fixed by a retry", mended), ("partly blended back", blended), ("still in doubt", left))
        listed = "; ".join(f"{words}: {ranges(numbers)}" for words, numbers in outcomes if numbers)
        return [f"guard: {len(doubted)} of {len(judged)} tiles were in doubt ({listed})"]

    def json(self) -> dict[str, Any]:
        """All of it."""
        tiles = [
            {
                "number": tile.number,
                "x": tile.area.x,
                "y": tile.area.y,
                "width": tile.area.width,
                "height": tile.area.height,
                "state": tile.state,
                **({"prompt": tile.prompt} if tile.prompt else {}),
                **({"regions": [asdict(each) for each in tile.regions]} if tile.regions else {}),
                **({} if tile.seconds is None else {"seconds": round(tile.seconds, 3)}),
                **(asdict(tile.verdict) if tile.verdict else {}),
            }
            for tile in self.tiles
        ]
        guard = {} if self.threshold is None else {"threshold": self.threshold}
        if self.retried is not None:
            guard["retried"] = round(self.retried, 4)
        return {"tiles": tiles, "notes": self.lines, **guard}


def _tiles(numbers: Sequence[int]) -> str:
    return f"tile{'s' * (len(numbers) > 1)} {ranges(numbers)}"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in words: 1-3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
