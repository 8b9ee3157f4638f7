"""Which of the sampling steps are between two shares of them."""

from __future__ import annotations

import math

TOLERANCE = 1e-9
"""Shares that differ by less are one: 0.55 of 100 steps is 55.00000000000001 in binary fractions, and a slider may give
0.15000000000000002."""


def is_between(progress: float, start: float, end: float) -> bool:
    """Whether a step is among them; progress: share of the steps before it; an end of 1 has no step behind it."""
    return progress >= start - TOLERANCE and (progress < end - TOLERANCE or end > 1 - TOLERANCE)


def first_step(start: float, total: int) -> int:
    """The number of the first of them, from 0."""
    return math.ceil((start - TOLERANCE) * total)
