"""How far a run is: one share of its work that never falls, and a line that says what is being done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Progress to show while the next tiles are sampled."""

    done: float = 0.0
    """Share of the run's work, in [0, 1], that is done."""
    ahead: float = 0.0
    """The same once the next tiles are sampled."""
    text: str = ""
    """The current work, as "painting tiles: 4 of 15"."""

    def at(self, share: float) -> float:
        """The run's share when this share of the next tiles' sampling is done."""
        return self.done + (self.ahead - self.done) * share


class Meter:
    """The work of a run: its passes one after the other, and after each of them what retries may cost at most."""

    def __init__(self, works: Sequence[int], reserve: float) -> None:
        """works: of each pass, in any unit; reserve: what retries may cost, as a share of that."""
        self._works, self._reserve = works, reserve
        self._total = sum(works) * (1 + reserve) or 1.0

    def painting(self, number: int, share: float) -> float:
        """Of the whole run when that share of a pass's tiles is painted."""
        before = sum(self._works[:number]) * (1 + self._reserve)
        return min(1.0, (before + self._works[number] * share) / self._total)

    def repainting(self, number: int, share: float) -> float:
        """Of the whole run when that share of what retries may cost is spent after a pass."""
        return min(1.0, self.painting(number, 1 + self._reserve * min(1.0, share)))
