"""The feature field: one field over the canvas, the same whichever tile looks at it; and the cache of fields."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib_dinotile.dino.cache import FeatureCache
from lib_dinotile.dino.field import FeatureField, feature_field, patch_grid
from lib_dinotile.tiling.plan import Rect, TilePlan

sides = st.integers(1, 12)
few = settings(max_examples=25, deadline=None)


@dataclasses.dataclass
class ToyEncoder:
    """The mean colour of each patch, times the layer: it sees no surroundings and no position."""

    id: str = "toy"
    fingerprint: str = "0"
    patch: int = 4
    width: int = 3
    depth: int = 3
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    seen: list[tuple[int, ...]] = dataclasses.field(default_factory=list)

    def __call__(self, pixels: Tensor, layer: int = -1, facet: str = "tokens") -> Tensor:
        self.seen.append(tuple(pixels.shape))
        return F.avg_pool2d(pixels, self.patch) * (range(self.depth)[layer] + 1)

    def several(self, pixels: Tensor, wanted: list[tuple[int, str]]) -> list[Tensor]:
        return [self(pixels, *each) for each in wanted]


def ramp(gh: int, gw: int, canvas: tuple[int, int]) -> FeatureField:
    """Each cell holds the canvas position (x, y) of its centre."""
    x = (torch.arange(gw) + 0.5) * canvas[0] / gw
    y = (torch.arange(gh) + 0.5) * canvas[1] / gh
    return FeatureField(torch.stack(torch.meshgrid(x, y, indexing="xy")), canvas)


def centres(rect: Rect, grid: tuple[int, int]) -> Tensor:
    """(2, h, w): canvas positions (x, y) of the centres of a grid over a rectangle."""
    x = rect.x + (torch.arange(grid[1]) + 0.5) * rect.width / grid[1]
    y = rect.y + (torch.arange(grid[0]) + 0.5) * rect.height / grid[0]
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))


# Crops --------------------------------------------------------------------------------------------------------------


@few
@given(sides, sides, st.integers(1, 5000), st.integers(1, 5000))
def test_the_whole_canvas_on_the_field_s_own_grid_is_the_field(gh, gw, width, height):
    field = FeatureField(torch.randn(2, gh, gw), (width, height))
    assert torch.equal(field.crop([Rect(0, 0, width, height)], (gh, gw)), field.features[None])


rects = st.builds(Rect, st.integers(-300, 300), st.integers(-300, 300), st.integers(1, 400), st.integers(1, 400))


@few
@given(sides, sides, st.lists(rects, max_size=3), st.tuples(sides, sides))
def test_a_constant_field_is_constant_in_any_crop(gh, gw, tiles, grid):
    field = FeatureField(torch.tensor([3.0, -7.0])[:, None, None].expand(2, gh, gw), (200, 100))
    crop = field.crop(tiles, grid)
    assert crop.shape == (len(tiles), 2, *grid)
    assert torch.allclose(crop, torch.tensor([3.0, -7.0]).view(1, 2, 1, 1).expand_as(crop))


@few
@given(rects, st.tuples(sides, sides))
def test_a_crop_stays_within_the_field_s_values(rect, grid):
    field = FeatureField(torch.rand(2, 7, 5), (200, 100))
    crop = field.crop([rect], grid)
    assert crop.min() >= field.features.min() - 1e-6 and crop.max() <= field.features.max() + 1e-6


@few
@given(st.integers(40, 60), st.integers(40, 60), st.integers(40, 80), st.integers(40, 80), st.tuples(sides, sides))
def test_a_ramp_is_reproduced_inside_the_canvas_on_coarse_and_fine_grids(x, y, width, height, grid):
    """Cell centres on cell centres: a field that says where it is says so of every cell of every crop."""
    # No cell (of up to 80 pixels, and as much to either side) meets the border of the canvas.
    field, rect = ramp(32, 32, (512, 512)), Rect(x + 100, y + 100, width, height)
    assert torch.allclose(field.crop([rect], grid)[0], centres(rect, grid), atol=1e-3)


def test_beyond_the_canvas_the_border_goes_on():
    field = ramp(8, 8, (64, 64))
    outside = field.crop([Rect(64, -640, 32, 32)], (4, 4))[0]
    assert torch.equal(outside, torch.tensor([60.0, 4.0]).view(2, 1, 1).expand(2, 4, 4))
    padded = field.crop([Rect(0, 0, 72, 64)], (8, 9))[0]
    assert torch.equal(padded[..., :8], field.features)
    assert torch.equal(padded[..., 8], field.features[..., 7])


def test_a_coarser_grid_averages_instead_of_picking_single_cells():
    board = (torch.arange(64)[:, None] + torch.arange(64)[None]) % 2
    field = FeatureField(board[None].float(), (640, 640))
    coarse = field.crop([Rect(0, 0, 640, 640)], (9, 9))
    assert (coarse - 0.5).abs().max() < 0.01
    stripes = FeatureField((torch.arange(64) % 2).expand(1, 64, 64).float(), (640, 640))
    assert (stripes.crop([Rect(0, 0, 640, 640)], (9, 9)) - 0.5).abs().max() < 0.1
    noise = FeatureField(torch.rand(3, 64, 48), (480, 640))
    blocks = F.avg_pool2d(noise.features, 8)
    assert (noise.crop([Rect(0, 0, 480, 640)], (8, 6))[0] - blocks).abs().max() < 0.05


@few
@given(st.floats(1, 4, exclude_min=True))
def test_the_grid_may_grow_coarser_without_a_jump(ratio):
    field = FeatureField(torch.rand(1, 200, 200, generator=torch.Generator().manual_seed(0)), (10**6, 10**6))
    near, nearer = (field.crop([Rect(0, 0, round(r * 10**5), 10**5)], (20, 20)) for r in (ratio, ratio + 1e-4))
    assert (near - nearer).abs().max() < 0.1


@few
@given(
    *(st.integers(64, 400), st.integers(64, 400)),
    *(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from((8, 16, 32)),
)
def test_overlapping_tiles_see_the_same_where_they_share_cells(width, height, gh, gw, cell):
    plan = TilePlan(width, height, tile=64, overlap=32, factor=cell)
    field = FeatureField(torch.randn(2, gh, gw), (width, height))
    columns, rows = (side // cell for side in plan.padded)
    tiles = [tile.shrink(cell) for tile in plan.tiles]
    whole = field.crop([Rect(0, 0, *plan.padded)], (rows, columns))[0]
    crops = field.crop(plan.tiles, (tiles[0].height, tiles[0].width))
    for tile, crop in zip(tiles, crops, strict=True):
        assert torch.equal(crop, whole[(..., *tile.slices)])


def test_a_crop_keeps_dtype_and_gradient():
    features = torch.randn(2, 4, 4, dtype=torch.float16, requires_grad=True)
    crop = FeatureField(features, (32, 32)).crop([Rect(0, 0, 16, 16)], (2, 2))
    assert crop.dtype == torch.float16
    crop.sum().backward()
    assert torch.equal(features.grad[0], torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]).half())


# The field of a source -----------------------------------------------------------------------------------------------


def test_the_longest_side_has_the_number_of_patches_asked_for():
    assert patch_grid(640, 480, 64) == (48, 64)
    assert patch_grid(100, 100, 16) == (16, 16)
    assert patch_grid(1, 5000, 64) == (64, 1)
    encoder = ToyEncoder()
    field = feature_field(encoder, torch.rand(3, 30, 40), (400, 300), patches=16)
    assert encoder.seen == [(1, 3, 12 * 4, 16 * 4)]
    assert field.features.shape == (3, 12, 16) and field.canvas == (400, 300)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (3, 2)])
@pytest.mark.parametrize("windows", [1, 3])
def test_thin_and_tiny_sources_have_a_field(size, windows):
    field = feature_field(ToyEncoder(), torch.full((3, *size), 0.25), (64, 64), patches=8, windows=windows)
    assert torch.allclose(field.features, torch.tensor(0.75))


@few
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 12), st.integers(1, 4))
def test_windows_give_the_field_that_the_whole_gives_to_an_encoder_without_surroundings(
    height, width, patches, windows
):
    source, encoder = torch.rand(3, height, width), ToyEncoder()
    windowed = feature_field(encoder, source, (width, height), patches, windows)
    assert all(max(shape[2:]) <= patches * encoder.patch for shape in encoder.seen)
    whole = feature_field(ToyEncoder(), source, (width, height), patches * windows)
    assert torch.allclose(windowed.features, whole.features, atol=1e-5)


def test_windows_overlap_and_their_borders_are_blended():
    class Edges(ToyEncoder):
        """One at a window's right border, zero elsewhere."""

        def __call__(self, pixels: Tensor, layer: int = -1, facet: str = "tokens") -> Tensor:
            features = super().__call__(pixels * 0, layer)
            features[..., -1] = 1
            return features

    encoder = Edges()
    features = feature_field(encoder, torch.rand(3, 32, 32), (64, 64), patches=16, windows=2).features
    assert len(encoder.seen) == 9
    assert features[..., :-1].max() < 0.2 and (features[..., -1] == 1).all()


def test_the_field_is_in_the_range_and_place_of_the_source():
    """Bicubic resizing overshoots at edges; the encoder gets [0, 1] all the same. And left stays left."""

    class Range(ToyEncoder):
        def __call__(self, pixels: Tensor, layer: int = -1, facet: str = "tokens") -> Tensor:
            assert pixels.min() >= 0 and pixels.max() <= 1
            return super().__call__(pixels, layer)

    source = torch.zeros(3, 20, 30)
    source[:, :10, :15] = 1
    features = feature_field(Range(), source, (300, 200), patches=12, layer=0).features
    assert features[:, 1, 1].min() > 0.99 and features[:, -2, 1].max() < 0.01 and features[:, 1, -2].max() < 0.01


def test_the_field_can_take_part_in_a_gradient_even_if_made_under_inference_mode():
    with torch.inference_mode():
        source = torch.rand(3, 16, 16)
        fields = [feature_field(ToyEncoder(), source, (64, 64), 4, windows) for windows in (1, 2)]
        cache = FeatureCache()
        fields += [cache.field(ToyEncoder(), source, (64, 64), 4) for _ in range(2)]
    for field in fields:
        scale = torch.ones(1, requires_grad=True)
        (field.features * scale).sum().backward()
        assert scale.grad > 0 and not field.features.requires_grad


def test_nothing_to_see_is_refused():
    for patches, windows in ((0, 1), (4, 0)):
        with pytest.raises(ValueError, match="show nothing"):
            feature_field(ToyEncoder(), torch.rand(3, 8, 8), (8, 8), patches, windows)


# The cache ----------------------------------------------------------------------------------------------------------


def test_a_field_is_made_once_for_an_image_an_encoder_and_a_way_of_looking():
    cache, encoder, source = FeatureCache(), ToyEncoder(), torch.rand(3, 16, 24)
    first = cache.field(encoder, source, (48, 32), patches=6)
    again = cache.field(encoder, source.clone(), (96, 64), patches=6)
    assert len(encoder.seen) == 1
    assert torch.equal(first.features, again.features)
    assert (first.canvas, again.canvas) == ((48, 32), (96, 64))
    assert cache.size == first.features.nbytes


def test_a_different_image_encoder_layer_or_resolution_is_not_the_same_field():
    cache, source = FeatureCache(), torch.rand(3, 16, 24)
    other = source.clone()
    other[0, 0, 0] += 1e-6
    toy = ToyEncoder()
    cases = [
        (toy, source, 6, 1, -1),
        (toy, other, 6, 1, -1),
        (toy, source.reshape(3, 24, 16), 6, 1, -1),
        (ToyEncoder(id="other"), source, 6, 1, -1),
        (ToyEncoder(fingerprint="1"), source, 6, 1, -1),
        (ToyEncoder(dtype=torch.float16), source, 6, 1, -1),
        (toy, source, 7, 1, -1),
        (toy, source, 6, 2, -1),
        (toy, source, 6, 1, 0),
    ]
    for encoder, image, *how in cases:
        seen = len(encoder.seen)
        made = cache.field(encoder, image, (48, 32), *how)
        assert len(encoder.seen) > seen
        assert torch.equal(made.features, feature_field(encoder, image, (48, 32), *how).features)
    assert len(cache) == len(cases)
    cache.clear()
    assert len(cache) == cache.size == 0
    seen = len(toy.seen)
    cache.field(toy, source, (48, 32), 6)
    assert len(toy.seen) == seen + 1


def test_the_cache_is_bounded_and_gives_up_the_least_recently_used():
    encoder = ToyEncoder()
    images = [torch.full((3, 8, 8), value) for value in (0.1, 0.2, 0.3)]
    size = 4 * 3 * 2 * 2
    cache = FeatureCache(limit=2 * size)
    for index in (0, 1, 0, 2):  # 1 has to go
        cache.field(encoder, images[index], (8, 8), patches=2)
    assert len(cache) == 2 and cache.size == 2 * size
    seen = len(encoder.seen)
    cache.field(encoder, images[0], (8, 8), patches=2)
    assert len(encoder.seen) == seen
    cache.field(encoder, images[1], (8, 8), patches=2)
    assert len(encoder.seen) == seen + 1
    cache.field(encoder, images[0], (8, 8), patches=8)  # larger than the limit by itself: nothing is given up for it
    assert len(cache) == 2 and cache.size == 2 * size


def test_the_cache_may_be_used_from_several_threads():
    encoder, cache, failures = ToyEncoder(), FeatureCache(limit=4 * 3 * 2 * 2 * 3), []
    images = [torch.full((3, 8, 8), i / 8) for i in range(8)]

    def use(start: int) -> None:
        for i in range(60):
            value = (start + i * 3) % 8
            features = cache.field(encoder, images[value], (8, 8), patches=2, layer=0).features
            if not torch.allclose(features, torch.tensor(value / 8)):
                failures.append(value)

    threads = [threading.Thread(target=use, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert cache.size == sum(t.nbytes for t in cache._kept.values()) <= cache.limit


def test_several_layers_are_made_together_and_kept_apart():
    encoder, cache, source = ToyEncoder(), FeatureCache(), torch.rand(3, 16, 16)
    together = []
    encoder.several = lambda pixels, wanted: (
        together.append(list(wanted)) or ToyEncoder.several(encoder, pixels, wanted)
    )
    first = cache.fields(encoder, source, (32, 32), 4, 1, [(-1, "tokens"), (-2, "tokens"), (-1, "tokens")])
    assert together == [[(-1, "tokens"), (-2, "tokens")]]
    assert torch.equal(first[0].features, first[2].features) and not torch.equal(first[0].features, first[1].features)
    again = cache.fields(encoder, source, (64, 64), 4, 1, [(-2, "tokens"), (-1, "keys")])
    assert together[1:] == [[(-1, "keys")]]
    assert torch.equal(again[0].features, first[1].features) and again[0].canvas == (64, 64)
