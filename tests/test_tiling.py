"""Tiles, blending, noise and the canvas, over any size of image, tile and overlap."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lib_dinotile import DinotileError
from lib_dinotile.engine.flow import plan_tiles
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.blend import Blend
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.noise import NoiseField, TileNoise
from lib_dinotile.tiling.plan import ORDERS, Rect, TilePlan


@st.composite
def plans(draw, largest=700):
    factor = draw(st.sampled_from([1, 2, 8]))
    tile = draw(st.integers(factor, 256))
    largest = min(largest, 8 * tile)
    return TilePlan(
        width=draw(st.integers(1, largest)),
        height=draw(st.integers(1, largest)),
        tile=tile,
        overlap=draw(st.integers(0, tile // 2)),
        factor=factor,
        order=draw(st.sampled_from(ORDERS)),
        least=draw(st.none() | st.integers(factor, tile)),
    )


@st.composite
def automatic(draw):
    """Plans with an automatic tile size, for both kinds of checkpoints."""
    base, longest = draw(st.sampled_from([("sd15", 2500), ("sdxl", 5000)]))
    overlap = draw(st.integers(0, 32 if base == "sd15" else 64)) * 8
    size = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    return plan_tiles(size, Settings(overlap=overlap), base)


def random_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(plans())
def test_tiles_have_one_size_on_the_latent_grid_and_lie_inside_the_padded_canvas(plan):
    sizes = {(tile.width, tile.height) for tile in plan.tiles}
    assert sizes == {plan.tile_size}
    for tile in plan.tiles:
        assert tile.x >= 0 and tile.right <= plan.padded[0] and tile.y >= 0 and tile.bottom <= plan.padded[1]
        assert tile.shrink(plan.factor).width * plan.factor == tile.width <= max(plan.tile, plan.factor)


@given(plans())
def test_every_pixel_is_painted(plan):
    painted = np.zeros(plan.padded[::-1], dtype=bool)
    for tile in plan.tiles:
        painted[tile.slices] = True
    assert painted.all()


@given(plans())
def test_waves_hold_every_tile_once_and_tiles_of_one_wave_are_disjoint(plan):
    assert sorted(map(repr, (tile for wave in plan.waves for tile in wave))) == sorted(map(repr, plan.tiles))
    for wave in plan.waves if plan.order != "fused" else ():
        painted = np.zeros(plan.padded[::-1], dtype=int)
        for tile in wave:
            painted[tile.slices] += 1
        assert painted.max() == 1
    if plan.order == "linear":
        assert [wave for wave in plan.waves if len(wave) != 1] == []


@given(plans())
def test_neighbours_overlap_at_least_as_asked(plan):
    wanted = min(-(-plan.overlap // plan.factor) * plan.factor, min(plan.tile_size) // plan.factor // 2 * plan.factor)
    for starts, side in ((plan.columns, plan.tile_size[0]), (plan.rows, plan.tile_size[1])):
        assert all(a + side - b >= wanted for a, b in itertools.pairwise(starts))


@given(plans())
def test_no_more_tiles_than_needed(plan):
    for starts, side, length in zip((plan.columns, plan.rows), plan.tile_size, plan.padded):
        overlap = min(-(-plan.overlap // plan.factor), side // plan.factor // 2) * plan.factor
        fewer = len(starts) - 1
        assert fewer == 0 or fewer * side - (fewer - 1) * overlap < length


@given(plans(largest=300), st.sampled_from([0, 1, 8]))
def test_blend_weights_sum_to_one(plan, rim):
    blend, total = Blend(plan, rim), torch.zeros(plan.padded[::-1])
    for tile in plan.tiles:
        weight = blend.weight(tile)
        assert weight.min() >= 0
        total[tile.slices] += weight
    assert (total - 1).abs().max() < 1e-5


@given(plans(largest=200))
def test_tiles_that_come_back_unchanged_leave_the_canvas_unchanged(plan):
    image = random_image(plan.width, plan.height)
    canvas, blend = Canvas(image, plan), Blend(plan)
    for tile in plan.tiles:
        canvas.paint(tile, canvas.crop(tile), blend.weight(tile))
    canvas.flatten()
    assert canvas.finish().tobytes() == image.tobytes()


@settings(max_examples=30)
@given(plans(largest=200))
def test_a_canvas_painted_all_over_shows_what_was_painted(plan):
    image, other = random_image(plan.width, plan.height), random_image(plan.width, plan.height, seed=1)
    canvas, wanted, blend = Canvas(image, plan), Canvas(other, plan), Blend(plan)
    for tile in plan.tiles:
        canvas.paint(tile, wanted.source(tile), blend.weight(tile))
    difference = np.asarray(canvas.finish()).astype(int) - np.asarray(other).astype(int)
    assert abs(difference).max() <= 1


def test_feathering_runs_straight_across_the_overlap():
    plan = TilePlan(width=96, height=32, tile=64, overlap=32, factor=8)
    left, right = plan.tiles
    weight = Blend(plan).weight(left)[0]
    assert (left.x, right.x) == (0, 32)
    assert torch.allclose(weight[:32], torch.ones(32))
    assert torch.allclose(weight[32:], 1 - (torch.arange(32) + 0.5) / 32)


def test_a_tiles_rim_has_no_weight_where_a_neighbour_shows_it():
    plan = TilePlan(width=96, height=32, tile=64, overlap=32, factor=8)
    left, right = (Blend(plan, rim=8).weight(tile)[0] for tile in plan.tiles)
    assert (left[:40] == 1).all() and (left[56:] == 0).all() and (right[:8] == 0).all()
    assert torch.allclose(left[40:56], 1 - (torch.arange(16) + 0.5) / 16)


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 0},
        {"height": -1},
        {"tile": 7},
        {"overlap": -8},
        {"overlap": 40},
        {"order": "spiral"},
        {"factor": 0},
        {"least": 7},
        {"least": 65},
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError):
        TilePlan(**{"width": 100, "height": 100, "tile": 64, "overlap": 16, **wrong})


@settings(max_examples=300)
@given(automatic())
def test_automatic_tiles_paint_as_few_pixels_as_the_overlap_allows(plan):
    """Of all widths and heights from 3/4 of what the checkpoint likes on: any other one paints more, or as many and is
    smaller."""
    home = plan.tile
    for side, starts, length in zip(plan.tile_size, (plan.columns, plan.rows), plan.padded):
        if length <= home:
            assert (side, starts) == (length, [0])
            continue
        assert side % 64 == 0 and 3 / 4 * home <= side <= home
        assert all(left + side - right >= plan.overlap for left, right in itertools.pairwise(starts))
        for other in range(int(3 / 4 * home), home + 1, 64):
            if other >= 2 * plan.overlap:
                count = 1
                while count * other - (count - 1) * plan.overlap < length:
                    count += 1
                assert (count * other, -other) >= (len(starts) * side, -side)


@pytest.mark.parametrize(
    ("base", "size", "tiles", "side"),
    [
        ("sd15", (902, 600), (2, 2), (512, 384)),
        ("sd15", (600, 902), (2, 2), (384, 512)),
        ("sd15", (1024, 1024), (3, 3), (384, 384)),
        ("sd15", (2048, 2048), (5, 5), (512, 512)),
        ("sd15", (400, 300), (1, 1), (400, 304)),
        ("sdxl", (902, 600), (1, 1), (904, 600)),
        ("sdxl", (2048, 1536), (3, 2), (768, 832)),
    ],
)
def test_an_automatic_tile_is_a_rectangle(base, size, tiles, side):
    plan = plan_tiles(size, Settings(), base)
    assert ((len(plan.columns), len(plan.rows)), plan.tile_size) == (tiles, side)


@given(st.sampled_from(["sd15", "sdxl"]), st.integers(8, 256), st.integers(1, 5000), st.integers(1, 5000))
def test_a_tile_size_that_is_set_stays_as_it_is(base, cells, width, height):
    plan = plan_tiles((width, height), Settings(tile=8 * cells, overlap=0), base)
    assert plan.tile_size == (min(8 * cells, plan.padded.width), min(8 * cells, plan.padded.height))


@pytest.mark.parametrize(("base", "most"), [("mini", 256), ("sd15", 256), ("sdxl", 512), ("sd3", 512)])
def test_an_overlap_too_wide_for_the_automatic_tile_is_refused(base, most):
    assert plan_tiles((3000, 3000), Settings(overlap=most), base).tile_size == (2 * most, 2 * most)
    with pytest.raises(DinotileError, match=f"overlap: {most + 8} is not allowed with tile {2 * most}, give at most"):
        plan_tiles((3000, 3000), Settings(overlap=most + 8), base)


def test_even_tiles_of_a_large_canvas():
    plan = TilePlan(width=1000, height=500, tile=512, overlap=64)
    assert plan.columns == [0, 240, 488]  # 3 tiles, and not 0, 448, 488
    assert plan.rows == [0]
    assert plan.padded == (1000, 504)
    assert plan.tile_size == (512, 504)


@settings(max_examples=50)
@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 90), st.integers(1, 90), st.integers(0, 2))
def test_any_crop_of_the_noise_is_a_crop_of_one_field(x, y, width, height, draw):
    field = NoiseField(seed=7, channels=3)
    whole = field.crop([Rect(0, 0, 190, 190)], draw)[0]
    crop = field.crop([Rect(x, y, width, height)], draw)[0]
    assert torch.equal(crop, whole[:, y : y + height, x : x + width])


def test_noise_is_standard_normal_and_draws_and_seeds_are_independent():
    area = [Rect(0, 0, 256, 256)]
    first, second = (NoiseField(1, 4).crop(area, draw) for draw in (0, 1))
    other = NoiseField(2, 4).crop(area, 0)
    for noise in (first, second, other):
        assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    for a, b in ((first, second), (first, other)):
        assert abs((a * b).mean()) < 0.01
    assert abs((first[..., :32] * first[..., 32:64]).mean()) < 0.05


def test_a_subseed_turns_the_start_noise_and_keeps_its_spread():
    area = [Rect(0, 0, 128, 128)]
    plain, other = NoiseField(1, 4).crop(area, 0), NoiseField(2, 4).crop(area, 0)
    assert torch.equal(NoiseField(1, 4, subseed=2, subseed_strength=0).crop(area, 0), plain)
    assert torch.allclose(NoiseField(1, 4, subseed=2, subseed_strength=1).crop(area, 0), other, atol=1e-6)
    half = NoiseField(1, 4, subseed=2, subseed_strength=0.5).crop(area, 0)
    assert abs(half.std() - 1) < 0.02
    assert torch.equal(NoiseField(1, 4, 2, 0.5).crop(area, 1), NoiseField(1, 4).crop(area, 1))


def test_tile_noise_draws_one_after_the_other():
    field, areas = NoiseField(3, 4), [Rect(0, 0, 8, 8), Rect(4, 0, 8, 8)]
    noise = TileNoise(field, areas)
    first, second = noise.next(), noise.next()
    assert torch.equal(first, field.crop(areas, 0)) and torch.equal(second, field.crop(areas, 1))
    assert torch.equal(first[0, :, :, 4:], first[1, :, :, :4])
