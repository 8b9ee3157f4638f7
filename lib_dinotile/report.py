"""What became of every tile, for the user to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lib_dinotile.tiling.plan import Rect

PAINTED, WAITING = "painted", "not reached"
UNMASKED, FLAT = "outside the mask", "flat"


@dataclass
class TileReport:
    """One tile of the plan."""

    number: int
    """From 1, row by row."""
    area: Rect
    prompt: str | None = None
    """What it was told of its own: a caption or the user's words."""
    state: str = WAITING


@dataclass
class Report:
    """The tiles of the plan, and what else is to be said."""

    tiles: list[TileReport]
    notes: list[str] = field(default_factory=list)
    """Lines for the user: memory that ran out, tiles that failed."""

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def numbers(self, state: str) -> list[int]:
        """The numbers of the tiles in a state."""
        return [tile.number for tile in self.tiles if tile.state == state]

    @property
    def prompts(self) -> str:
        """What tiles were told of their own, one line each, as the option `tile_prompts` takes them."""
        return "\n".join(f"{tile.number}: {tile.prompt}" for tile in self.tiles if tile.prompt)

    @property
    def lines(self) -> list[str]:
        """All of it that is worth telling in words."""
        told = [f"tiles passed over as flat: {ranges(self.numbers(FLAT))}"] if self.numbers(FLAT) else []
        return told + self.notes

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
            }
            for tile in self.tiles
        ]
        return {"tiles": tiles, "notes": self.lines}


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in words: 1-3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
