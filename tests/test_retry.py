"""The guard's policy, in the engine: what is in doubt is painted again within a budget, the rest stays as it is."""

from __future__ import annotations

import itertools
import re
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lib_dinotile.condition.conditioner import Conditions
from lib_dinotile.condition.guard import Floor, Guard
from lib_dinotile.dino.field import FeatureField, feature_field
from lib_dinotile.dino.tile_features import TileFeatures
from lib_dinotile.engine.flow import UnfinishedError, upscale
from lib_dinotile.engine.host import Interrupted
from lib_dinotile.engine.journal import Journal
from lib_dinotile.engine.retry import RetryPolicy, reserve
from lib_dinotile.engine.team import Team
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.noise import NoiseField
from tests.test_engine import StubHost
from tests.test_tile_features import Colours, to_tensor
from tests.test_tiling import random_image

SIZE = 192, 128
"""Six tiles of 64, if they do not overlap."""
STEPS = 10
SPOT = 32
"""Side of the square that the model gets wrong, in pixels; it begins at 8 pixels from the tile's left and 24 from its
upper edge."""
HALF = (1, 3, 6)
"""Half of the six tiles, which is not yet most of them."""


@dataclass
class Eyes:
    """A conditioner that has a guard only."""

    strictness: float = 3.0

    def features(self, source, size):
        return feature_field(Colours(), to_tensor(source), size, patches=24)

    def conditions(self, source, features, canvas, plan):
        shown = TileFeatures(Colours(), FeatureField(features.features, features.canvas), plan.padded)
        return Conditions(guard=Guard(shown, canvas, Floor(0.0, 0.05), self.strictness, relative=True))


class Forger(StubHost):
    """Paints the opposite of the source into a spot of tiles, but for those noises that the test calls good."""

    denoise = 0.5

    def __init__(self, good=lambda seed: False, wrong=lambda number: SPOT * (number in HALF), columns=3, **more):
        """wrong: gives the side of the spot of tiles in a grid of so many columns, counted from 1."""
        super().__init__(**more)
        self.good, self.wrong, self.columns = good, wrong, columns
        self.calls, self.strengths, self.masks, self.work = [], [], [], {}

    def steps(self, denoise=None):
        return max(1, round(STEPS * (self.denoise if denoise is None else denoise)))

    def number(self, area):
        """Of the tile that has these latent cells."""
        width, height = area.width * self.factor, area.height * self.factor
        return 1 + area.y * self.factor // height * self.columns + area.x * self.factor // width

    def sample(self, latents, tiled, noise, canvas, denoise=None, mask=None):
        seed, numbers = noise._field._seed, [self.number(area) for area in noise._areas]
        self.calls += [(seed, number) for number in numbers]
        self.strengths.append(denoise)
        self.masks.append(mask)
        painted = self.decode(latents)
        self.work[seed] = self.work.get(seed, 0) + self.steps(denoise) * painted[:, 0].numel()
        for number, tile in enumerate(painted):
            for top, left in itertools.product(range(0, tile.shape[1], 64), range(0, tile.shape[2], 64)):
                side = self.wrong(numbers[number] + top // 64 * self.columns + left // 64)
                if side and not self.good(seed):
                    spot = (slice(None), slice(top + 24, top + 24 + side), slice(left + 8, left + 8 + side))
                    tile[spot] = 1 - tile[spot]
        result = self.encode(painted)
        return result if mask is None else torch.lerp(latents, result, mask)

    @property
    def retries(self):
        """Of each seed the tiles that were painted again."""
        seeds = dict.fromkeys(seed for seed, _ in self.calls if seed != 7)
        return {seed: sorted(number for each, number in self.calls if each == seed) for seed in seeds}

    @property
    def extra(self):
        """The work of retries, as a share of the work without them."""
        return sum(work for seed, work in self.work.items() if seed != 7) / self.work[7]


def everywhere(number):
    return SPOT


def run(host, journal=None, team=None, **values):
    more = {"guard": "retry", "batch": 4, "overlap": 0, "guard_budget": 10.0, **values}
    settings = Settings(scale=1.0, tile=64, colour="none", guidance=0.0, **more)
    source = random_image(*SIZE)
    result = upscale(host, source, settings, NoiseField(7, 4), Eyes(), journal=journal, team=team)
    return result, np.asarray(source).astype(int), np.asarray(result.image).astype(int)


def test_without_a_guard_it_is_wrong_and_a_report_says_where_and_changes_nothing():
    _, source, off = run(Forger(), guard="off")
    result, _, reported = run(Forger(), guard="report")
    assert (off == reported).all() and abs(off - source).max() > 50
    for tile in result.report.tiles:
        wrong = tile.number in HALF
        assert tile.verdict.doubt_before == tile.verdict.doubt_after and (tile.verdict.doubt_after > 0) == wrong
        assert tile.verdict.retries == 0
    assert "still in doubt: 1, 3, 6" in result.report.lines[0]


def test_another_seed_mends_it():
    host = Forger(good=lambda seed: seed == 9)
    result, source, image = run(host)
    assert abs(image - source).max() <= 1
    assert host.retries == {8: [*HALF], 9: [*HALF]} and set(host.strengths) == {None, 0.5}
    for tile in (result.report.tiles[number - 1] for number in HALF):
        assert tile.verdict.seeds == (1, 2) and tile.verdict.retries == 2 and tile.verdict.doubt_after == 0
        assert tile.verdict.before < tile.verdict.after and tile.seconds > 0
    assert "fixed by a retry: 1, 3, 6" in result.report.lines[0]


def test_then_less_denoise_is_tried_and_at_last_the_source_is_blended_in():
    host = Forger()
    result, source, image = run(host, guard_seeds=1, guard_weaker=2)
    assert host.retries == {8: [*HALF], 9: [*HALF], 10: [*HALF]}
    assert sorted({strength for strength in host.strengths if strength}) == pytest.approx([0.245, 0.35, 0.5])
    assert abs(image - source).mean() < 0.3 * abs(run(Forger(), guard="off")[2] - source).mean()
    assert all((tile.verdict.blended > 0) == (tile.number in HALF) for tile in result.report.tiles)
    assert "partly blended back: 1, 3, 6" in result.report.lines[0]


def test_blend_back_paints_nothing_again():
    host = Forger(wrong=everywhere)
    result, source, image = run(host, guard="blend back")
    assert host.retries == {} and result.report.retried is None
    assert abs(image - source).mean() < 0.3 * abs(run(Forger(wrong=everywhere), guard="off")[2] - source).mean()
    assert all(tile.verdict.retries == 0 for tile in result.report.tiles)


def test_only_tiles_in_doubt_are_painted_again_and_only_there():
    again = Forger(good=lambda seed: seed == 8)
    result, source, image = run(again)
    _, _, before = run(Forger(), guard="report")
    held = [mask for mask in again.masks if mask is not None]
    assert held and all(0 < mask.mean() < 0.8 for mask in held)  # the model holds on to what is not in doubt
    assert again.retries == {8: [*HALF]}
    changed = abs(image - before).max(2) > 0
    inside = np.zeros_like(changed)
    for tile in (result.report.tiles[number - 1].area for number in HALF):
        inside[tile.slices][16 : 32 + SPOT, 0 : 16 + SPOT] = True
    assert changed.any() and not changed[~inside].any()
    assert abs(image - source).max() <= 1


def test_a_tile_that_is_never_in_doubt_is_looked_at_once(monkeypatch):
    looks = []
    similarity = TileFeatures.similarity
    monkeypatch.setattr(
        TileFeatures,
        "similarity",
        lambda self, crop, tiles, px: looks.extend(tiles) or similarity(self, crop, tiles, px),
    )
    run(Forger(good=lambda seed: True))
    assert len(looks) == 6


@pytest.mark.parametrize("order", ["linear", "fused"])
def test_it_mends_in_other_orders_too(order):
    host = Forger(good=lambda seed: seed == 8)
    _, source, image = run(host, order=order)
    assert host.retries == {8: [*HALF]}
    assert abs(image - source).max() <= 1


def test_with_overlap_too():
    """But for what shows faintly where a neighbour has painted the most of a patch, which stays."""
    wrong = [
        (abs(image - source).max(2) > 2).mean()
        for _, source, image in (
            run(Forger(good=lambda seed: seed == 8, columns=4), overlap=16, guard=g) for g in ("off", "retry")
        )
    ]
    assert wrong[0] > 0.05 and wrong[1] < wrong[0] / 4


def test_a_stop_while_painting_again_keeps_what_is_painted():
    class Stopped(Forger):
        def sample(self, latents, tiled, noise, *more):
            if noise._field._seed != 7:
                raise Interrupted
            return super().sample(latents, tiled, noise, *more)

    result, _, image = run(Stopped(), batch=6)
    assert result.painted == 6
    _, _, blended = run(Forger(), guard="blend back")
    assert (image == blended).all()


def test_a_stop_while_painting_has_what_is_painted_checked():
    """Blended back, that is: the user does not wait for more to be painted."""
    host = Forger(stop_after=2)
    host.sampled = host.strengths
    result, source, image = run(host, batch=2)
    assert not result.complete and result.painted == 4 and host.retries == {}
    assert [tile.number for tile in result.report.tiles if tile.verdict] == [1, 2, 3, 4]
    assert abs(image - source).mean() < 0.3 * abs(run(Forger(), guard="off")[2] - source).mean()


# The budget ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["chess", "linear", "fused"])
@pytest.mark.parametrize("budget", [0.0, 0.15, 0.2, 0.5, 0.7, 1.0, 10.0])
def test_retries_cost_no_more_than_the_budget_whatever_they_are_good_for(budget, order):
    host = Forger()
    result, *_ = run(host, guard_budget=budget, order=order, guard_weaker=2)
    assert host.extra <= budget and host.extra == pytest.approx(result.report.retried)
    # One more would not have been paid for, or every tile had all its attempts: two whole, 4 and 2 of 5 steps.
    assert host.extra + 1 / 6 > budget or host.extra == pytest.approx(3 * (2 + 0.8 + 0.4) / 6)


def test_what_a_budget_leaves_is_told():
    result, *_ = run(Forger(), guard_budget=0.2)
    assert "guard: 2 doubtful tiles not painted again: the retry budget of 0.2 is used up" in result.report.lines
    assert run(Forger(), guard_budget=0.5)[0].report.notes == []
    assert run(Forger(), guard_budget=0.0)[0].report.notes == []


def test_tiles_most_in_doubt_come_first():
    sides = {2: 24, 4: 40, 5: 32}
    host = Forger(wrong=lambda number: sides.get(number, 0))
    result, *_ = run(host, guard_budget=0.4)
    assert host.retries == {8: [4, 5]}
    doubts = {tile.number: tile.verdict.doubt_before for tile in result.report.tiles if tile.number in sides}
    assert sorted(doubts, key=doubts.get) == [2, 5, 4]


def test_what_one_pass_leaves_the_next_may_use():
    """Two seam passes have four and three tiles; a fifth of those would not pay for one more."""

    class OnSeams(Forger):
        def sample(self, latents, tiled, noise, canvas, denoise=None, mask=None):
            result = super().sample(latents, tiled, noise, canvas, denoise, mask)
            return result if denoise is not None else latents

    host = OnSeams(wrong=lambda number: SPOT * (number == 1), columns=10, good=lambda seed: seed == 8)
    result, *_ = run(host, guard_budget=0.2, seams="bands", seam_width=64, seam_denoise=0.5)
    assert host.retries == {8: [1, 1]}
    assert result.total == 6 + 4 + 3 and result.report.retried == pytest.approx(2 / 13)


def test_a_hopeless_run_paints_nothing_again_and_says_what_to_change():
    host = Forger(wrong=everywhere)
    result, _, image = run(host)
    assert host.retries == {} and result.report.retried == 0
    line = (
        "the guard doubts most tiles (6 of 6) and paints none of them again: use a lower denoising strength, another "
        "checkpoint or a higher guard threshold"
    )
    assert result.report.notes == [line] and line in result.report.json()["notes"]
    assert all(tile.verdict.blended for tile in result.report.tiles)  # judging and blending back go on
    assert (image == run(Forger(wrong=everywhere), guard="blend back")[2]).all()


def test_after_a_hopeless_pass_the_seam_pass_is_judged_only():
    result, *_ = run(Forger(wrong=everywhere), seams="bands", seam_width=32)
    assert sum("doubts most tiles" in note for note in result.report.notes) == 1 and result.report.retried == 0


@pytest.mark.parametrize("count, again", [(1, True), (2, True), (3, True), (4, False)])
def test_of_few_tiles_nothing_is_hopeless(count, again):
    host, settings = (
        Forger(wrong=everywhere, columns=count),
        Settings(scale=1.0, tile=64, overlap=0, colour="none", guidance=0.0, guard="retry", guard_budget=1.0),
    )
    upscale(host, random_image(64 * count, 64), settings, NoiseField(7, 4), Eyes())
    assert bool(host.retries) == again


def test_without_attempts_nothing_is_reserved():
    assert reserve(Settings(guard="retry")) == 0.5
    assert reserve(Settings(guard="retry", guard_budget=10.0)) == pytest.approx(2.7)
    for values in ({"guard_seeds": 0, "guard_weaker": 0}, {"guard_budget": 0.0}, {"guard": "blend back"}):
        assert reserve(Settings(**{"guard": "retry", **values})) == 0


# The same image ------------------------------------------------------------------------------------------------------

SOME = {"guard_budget": 0.6, "overlap": 16}


def uneven():
    """Twelve tiles that overlap, five of them wrong in different degrees, which two other seeds mend in part."""
    sides = {1: 40, 4: 24, 6: 32, 8: 28, 11: 36}
    return Forger(good=lambda seed: seed == 9, wrong=lambda number: sides.get(number, 0), columns=4)


@pytest.mark.parametrize("order", ["chess", "linear", "fused"])
def test_any_batch_gives_the_same_image(order):
    (one, _, first), (four, _, again) = (run(uneven(), batch=batch, order=order, **SOME) for batch in (1, 4))
    assert (first == again).all() and 0 < one.report.retried == four.report.retried
    assert [tile.verdict.seeds for tile in one.report.tiles] == [tile.verdict.seeds for tile in four.report.tiles]


@pytest.mark.parametrize(
    "fails, left", [(lambda strength: strength == 0.5, [1, 2]), (lambda strength: strength, [1, 2, 3])]
)
def test_a_retry_that_cannot_be_done_is_left_out_and_said(fails, left):
    """What is painted already, and what the guard can do without painting, is not lost for it."""

    class Broken(Forger):
        def sample(self, latents, tiled, noise, canvas, denoise=None, mask=None):
            if denoise is not None and fails(denoise):
                raise RuntimeError("broken")
            return super().sample(latents, tiled, noise, canvas, denoise, mask)

    host = Broken()
    result, source, image = run(host, guard_seeds=2, guard_weaker=1)
    assert result.complete and host.freed
    assert [line for line in result.report.notes if "failed" in line] == [
        f"guard: repaint attempt {number} failed: broken" for number in left
    ]
    assert host.retries == ({} if 3 in left else {10: [*HALF]})
    assert abs(image - source).max() <= 1, "it was not blended back"


def test_a_retry_with_more_steps_than_it_asked_for_says_so():
    class Needy(Forger):
        def steps_note(self, denoise=None):
            return "4 sampling steps instead of 3" if denoise is not None and denoise < 0.5 else ""

    result, *_ = run(Needy(), guard_seeds=1, guard_weaker=1)
    assert "guard, repaint attempt 2: 4 sampling steps instead of 3" in result.report.notes
    assert not [line for line in run(Needy(wrong=lambda number: 0))[0].report.notes if "steps" in line]


def test_where_the_guard_fails_the_colours_of_what_is_painted_are_levelled_all_the_same(monkeypatch):
    levelled, level = [], Canvas.level

    def fails(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(RetryPolicy, "__call__", fails)
    monkeypatch.setattr(Canvas, "level", lambda canvas: (levelled.append(1), level(canvas)))
    with pytest.raises(UnfinishedError, match="broken") as caught:
        run(Forger())
    assert levelled == [1] and caught.value.result.later == "the guard"


@pytest.mark.parametrize("order", ["chess", "linear", "fused"])
@pytest.mark.parametrize("after", [1, 9, 13, 15, 17])
def test_a_run_that_broke_off_is_resumed_to_the_same_image(tmp_path, order, after):
    """While painting twelve tiles, or one canvas, or while painting again."""
    if order == "fused":
        after = max(0, after - 11)

    class Broken(Forger):
        def sample(self, *arguments, **more):
            if len(self.strengths) == after:
                raise RuntimeError("broken")
            return super().sample(*arguments, **more)

    whole_host = uneven()
    whole, _, image = run(whole_host, batch=1, order=order, **SOME)
    broken, folder = uneven(), tmp_path / "tiles"
    broken.__class__ = Broken
    with pytest.raises(UnfinishedError):
        run(broken, Journal(folder, {}, resume=False), batch=1, order=order, **SOME)
    host = uneven()
    resumed, _, again = run(host, Journal(folder, {}, resume=True), batch=1, order=order, **SOME)
    assert (again == image).all() and resumed.report.retried == whole.report.retried
    kept = after if order != "fused" else max(0, after - 1)  # the canvas itself is not
    assert len(host.strengths) == len(whole_host.strengths) - kept
    assert resumed.report.json()["notes"] == whole.report.json()["notes"]


class Two(Team):
    """Two threads, as two processes are."""

    size = 2

    def __init__(self, rank, board, barrier):
        self.rank, self._board, self._barrier = rank, board, barrier

    def gather(self, mine):
        self._board[self.rank] = mine
        self._barrier.wait(60)
        found = [self._board[0], self._board[1]]
        self._barrier.wait(60)
        return found


@pytest.mark.parametrize("order", ["chess", "linear", "fused"])
def test_two_processes_give_the_image_of_one_and_share_the_retries(order):
    board, barrier, hosts, images = {}, threading.Barrier(2), [uneven(), uneven()], {}

    def work(rank):
        images[rank] = run(hosts[rank], team=Two(rank, board, barrier), batch=1, order=order, **SOME)[2]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = uneven()
    _, _, image = run(alone, batch=1, order=order, **SOME)
    assert (images[0] == image).all() and (images[1] == image).all()
    again = [[call for call in host.calls if call[0] != 7] for host in hosts]
    assert all(again) and sorted(again[0] + again[1]) == sorted(call for call in alone.calls if call[0] != 7)


# Progress ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["chess", "linear", "fused"])
@pytest.mark.parametrize("more", [{}, {"guard_budget": 0.1}, {"seams": "half tile"}])
def test_progress_never_falls_and_says_what_happens(order, more):
    host = uneven()
    run(host, batch=2, order=order, **{**SOME, **more})
    shares = [share for look in host.seen for share in (look.done, look.ahead)]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    texts = list(dict.fromkeys(look.text for look in host.seen))
    count = host.seen[0].text.split()[-1]
    assert texts[0] == f"painting tiles: 0 of {count}" and texts[-1] == f"painted {count} tiles"
    assert "checking 12 tiles" in texts
    if more.get("guard_budget"):
        assert "repainting 1 doubtful tile" in texts
    else:
        again = [text for text in texts if text.startswith("repainting")]
        assert re.fullmatch(r"repainting \d doubtful tiles", again[0])
        assert re.fullmatch(r"repainting \d doubtful tiles, attempt 2", again[1])


def test_the_bar_is_as_far_as_the_work():
    """Half of the budget is spent after the main pass's twelve tiles: 12 + 0.6 of 12 is all that it may be."""
    host = uneven()
    run(host, batch=1, **SOME)
    painted = next(look for look in host.seen if look.text.startswith("checking"))
    assert painted.done == pytest.approx(1 / 1.6)
    first, second, *_ = [look for look in host.seen if look.text.startswith("repainting 5")]
    assert second.done - first.done == pytest.approx(1 / 12 / 1.6)
