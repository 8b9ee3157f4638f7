"""The guard's policy, in the engine: what is in doubt is painted again, the rest stays as it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lib_dinotile.condition.conditioner import Conditions
from lib_dinotile.condition.guard import Floor, Guard
from lib_dinotile.dino.field import FeatureField, feature_field
from lib_dinotile.dino.look import Look
from lib_dinotile.engine import upscale
from lib_dinotile.hosts.base import Interrupted
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.noise import NoiseField
from tests.test_engine import StubHost
from tests.test_look import Colours, to_tensor
from tests.test_tiling import random_image

SIZE = 192, 128
SPOT = slice(24, 56), slice(8, 40)
"""What the model gets wrong in every tile, in pixels of the tile."""


@dataclass
class Eyes:
    """A conditioner that has a guard only."""

    strictness: float = 3.0

    def features(self, source, size):
        return feature_field(Colours(), to_tensor(source), size, patches=24)

    def conditions(self, source, features, canvas, plan):
        look = Look(Colours(), FeatureField(features.features, features.canvas), plan.padded)
        return Conditions(guard=Guard(look, canvas, Floor(0.0, 0.05), self.strictness, relative=True))


class Forger(StubHost):
    """Paints the opposite of the source into the spot of a tile, but for those noises that the test calls good."""

    denoise = 0.5

    def __init__(self, good=lambda seed: False, wrong=lambda number: True, **more):
        super().__init__(**more)
        self.good, self.wrong, self.calls, self.strengths, self.masks = good, wrong, [], [], []

    def sample(self, latents, views, noise, canvas, denoise=None, mask=None):
        seed = noise._field._seed
        self.calls.append((seed, len(latents)))
        self.strengths.append(denoise)
        self.masks.append(mask)
        painted = self.decode(latents)
        for number in range(len(painted)):
            if not self.good(seed) and self.wrong(number):
                spot = (number, slice(None), *SPOT)
                painted[spot] = 1 - painted[spot]
        result = self.encode(painted)
        return result if mask is None else torch.lerp(latents, result, mask)


def run(host, **values):
    more = {"guard": "retry", "batch": 4, "overlap": 0, **values}
    settings = Settings(scale=1.0, tile=64, colour="none", guidance=0.0, **more)
    source = random_image(*SIZE)
    result = upscale(host, source, settings, NoiseField(7, 4), Eyes())
    return result, np.asarray(source).astype(int), np.asarray(result.image).astype(int)


def test_without_a_guard_it_is_wrong_and_a_report_says_where_and_changes_nothing():
    _, source, off = run(Forger(), guard="off")
    result, _, reported = run(Forger(), guard="report")
    assert (off == reported).all() and abs(off - source).max() > 50
    for tile in result.report.tiles:
        assert tile.verdict.doubt_before == tile.verdict.doubt_after > 0 and tile.verdict.retries == 0
    assert "still in doubt: 1-6" in result.report.lines[0]


def test_another_seed_mends_it():
    host = Forger(good=lambda seed: seed == 9)
    result, source, image = run(host)
    assert abs(image - source).max() <= 1
    assert {seed for seed, _ in host.calls} == {7, 8, 9} and set(host.strengths) == {None, 0.5}
    for tile in result.report.tiles:
        assert tile.verdict.seeds == (1, 2) and tile.verdict.retries == 2 and tile.verdict.doubt_after == 0
        assert tile.verdict.before < tile.verdict.after and tile.seconds > 0
    assert "mended by painting again: 1-6" in result.report.lines[0]


def test_then_less_denoise_is_tried_and_at_last_the_source_is_blended_in():
    host = Forger()
    result, source, image = run(host, guard_seeds=1, guard_weaker=2)
    # Of every tile the first time, then with seed + 1, + 2 and + 3.
    assert {seed for seed, _ in host.calls} == {7, 8, 9, 10}
    assert sorted({strength for strength in host.strengths if strength}) == pytest.approx([0.245, 0.35, 0.5])
    assert abs(image - source).mean() < 0.3 * abs(run(Forger(), guard="off")[2] - source).mean()
    assert all(tile.verdict.blended > 0 for tile in result.report.tiles)
    assert "blended back in part: 1-6" in result.report.lines[0]


def test_blend_back_paints_nothing_again():
    host = Forger()
    result, source, image = run(host, guard="blend back")
    assert {seed for seed, _ in host.calls} == {7}
    assert abs(image - source).mean() < 0.3 * abs(run(Forger(), guard="off")[2] - source).mean()
    assert all(tile.verdict.retries == 0 for tile in result.report.tiles)


def test_only_tiles_in_doubt_are_painted_again_and_only_there():
    def spoils(number):
        return number == 0  # the first of each batch

    first, again = Forger(wrong=spoils), Forger(good=lambda seed: seed == 8, wrong=spoils)
    result, source, image = run(again)
    _, _, before = run(first, guard="report")
    held = [mask for (seed, _), mask in zip(again.calls, again.masks) if seed == 8]
    assert held and all(0 < mask.mean() < 0.8 for mask in held)  # the model holds on to what is not in doubt
    retried = [tile for tile in result.report.tiles if tile.verdict.retries]
    assert len(retried) == 2 and sum(count for seed, count in again.calls if seed == 8) == 2
    changed = abs(image - before).max(2) > 0
    inside = np.zeros_like(changed)
    for tile in retried:
        rows, columns = (slice(s.start - 8, s.stop + 8) for s in SPOT)
        inside[tile.area.slices][rows, columns] = True
    assert changed.any() and not changed[~inside].any()
    assert abs(image - source).max() <= 1


def test_a_tile_that_is_never_in_doubt_is_looked_at_once(monkeypatch):
    looks = []
    similarity = Look.similarity
    monkeypatch.setattr(
        Look, "similarity", lambda self, crop, tiles, px: looks.extend(tiles) or similarity(self, crop, tiles, px)
    )
    run(Forger(good=lambda seed: True))
    assert len(looks) == 6


@pytest.mark.parametrize("order", ["linear", "fused"])
def test_it_mends_in_other_orders_too(order):
    host = Forger(good=lambda seed: seed == 8)
    result, source, image = run(host, order=order)
    if order == "fused":  # the first time all is one picture, with one spot
        assert sum(bool(tile.verdict.retries) for tile in result.report.tiles) >= 1
    assert abs(image - source).max() <= 2


def test_with_overlap_too():
    """But for what shows faintly where a neighbour has painted the most of a patch, which stays."""
    wrong = [
        (abs(image - source).max(2) > 2).mean()
        for _, source, image in (
            run(Forger(good=lambda seed: seed == 8), overlap=16, guard=g) for g in ("off", "retry")
        )
    ]
    assert wrong[0] > 0.1 and wrong[1] < 0.06


def test_a_stop_while_painting_again_keeps_what_is_painted():
    class Stopped(Forger):
        def sample(self, latents, views, noise, *more):
            if noise._field._seed != 7:
                raise Interrupted
            return super().sample(latents, views, noise, *more)

    result, _, image = run(Stopped(), batch=6)
    assert result.painted == 6
    _, _, blended = run(Forger(), guard="blend back")
    assert (image == blended).all()


def test_any_batch_gives_the_same_image():
    one, four = (run(Forger(good=lambda seed: seed == 9), batch=batch)[2] for batch in (1, 4))
    assert (one == four).all()
