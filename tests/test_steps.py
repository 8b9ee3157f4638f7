"""Between which steps guidance and adapter are at work, in whole numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_dinotile.condition.adapter import AdapterCondition
from lib_dinotile.condition.guidance import Guidance
from lib_dinotile.settings import PATCHES
from tests.test_adapter import random_adapter
from tests.test_tile_features import latents

PERCENT = range(101)
TOTALS = range(1, 151)


def guidance(start: float, end: float, every: int) -> Guidance:
    return Guidance(None, latents, 1.0, start, end, every, 1, PATCHES)


def expected(step: int, total: int, start: int, end: int) -> bool:
    """start, end: percent."""
    return 100 * step >= start * total and (100 * step < end * total or end == 100)


def forms(percent: int) -> list[float]:
    """The share as it is written, and as sums of slider steps come out; within [0, 1] as the options are."""
    share = percent / 100
    return [share, min(1.0, math.nextafter(share, 2)), max(0.0, math.nextafter(share, -1))]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_guidance_begins_at_the_first_step_that_is_not_before_its_start(every):
    for total in TOTALS:
        for percent in PERCENT:
            first = -(-percent * total // 100)
            wanted = list(range(first, total, every))
            for start in forms(percent) if total <= 50 or total == 100 else [percent / 100]:
                made = guidance(start, 1.0, every)
                assert [step for step in range(total) if made.at_work(step, total)] == wanted, (total, start)


def test_guidance_ends_before_the_first_step_that_is_not_before_its_end():
    for total in TOTALS:
        for percent in PERCENT:
            wanted = [step for step in range(total) if expected(step, total, 0, percent)]
            for end in forms(percent) if total <= 50 or total == 100 else [percent / 100]:
                made = guidance(0.0, end, 1)
                assert [step for step in range(total) if made.at_work(step, total)] == wanted, (total, end)


def test_the_adapter_is_at_work_at_the_same_steps():
    adapter = random_adapter()
    features = torch.zeros(1, 12, 4, 4)
    for percent in PERCENT:
        for start, end in ((percent, 100), (0, percent)):
            for first, last in zip(forms(start), forms(end)):
                condition = AdapterCondition(adapter, features, (16, 16), start=first, end=last)
                condition._cached = 1.0, []  # nothing is to be computed
                for total in (7, 20, 30, 50, 100):
                    given = [step for step in range(total) if condition.residuals(1.0, step / total) is not None]
                    assert given == [step for step in range(total) if expected(step, total, start, end)]


@given(st.integers(1, 1000), st.integers(0, 100), st.integers(0, 100), st.integers(1, 10), st.integers(0, 999))
def test_any_step_between_any_shares(total, one, other, every, step):
    (start, end), step = sorted((one, other)), step % total
    first = -(-start * total // 100)
    made = guidance(start / 100, end / 100, every)
    assert made.at_work(step, total) == (expected(step, total, start, end) and (step - first) % every == 0)
