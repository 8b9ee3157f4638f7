"""Regions of a source: how they are found, where they lie, and which words each tile is told."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from lib_dinotile import DinotileError
from lib_dinotile.condition.conditioner import Conditions, to_tensor
from lib_dinotile.dino.encoder import load_encoder
from lib_dinotile.dino.field import FeatureField, feature_field
from lib_dinotile.dino.regions import FINEST, MOST, PURE, SPECK, Regions, find_regions
from lib_dinotile.engine.host import Prompt
from lib_dinotile.engine.prompts import TilePrompts, check_letters
from lib_dinotile.engine.report import FLAT, PAINTED, UNMASKED, RegionShare, Report, TileReport
from lib_dinotile.lines import LETTERS
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.plan import Rect, TilePlan
from tests.test_engine import StubHost
from tests.test_tiling import random_image

PHOTO = Path(__file__).parents[1] / "examples" / "photo.png"
few = settings(max_examples=25, deadline=None)


class Shows:
    """A conditioner that finds these regions."""

    def __init__(self, regions):
        self._regions = regions

    def features(self, source, size):
        return None

    def conditions(self, source, features, canvas, plan):
        return Conditions(regions=self._regions)


def columns(letters, canvas, rows=8):
    """Regions as upright stripes: one column of cells for each letter."""
    labels = torch.tensor([LETTERS.index(letter) for letter in letters])
    return Regions(labels.expand(rows, -1).clone(), canvas)


# Found --------------------------------------------------------------------------------------------------------------


def blocks(count, seed, grid=(48, 64)):
    """(labels (h, w), field): a direction of its own for each of so many labels, in twelve blocks, and noise as strong.

    So half of what a patch tells is its own, about as with a DINO.
    """
    numbers = torch.Generator().manual_seed(seed)
    owners = (torch.randperm(12, generator=numbers) % count).reshape(3, 4)
    labels = owners.repeat_interleave(grid[0] // 3, 0).repeat_interleave(grid[1] // 4, 1)
    directions = F.normalize(torch.randn(count, 64, generator=numbers), dim=1)
    features = directions[labels].movedim(-1, 0) + torch.randn(64, *grid, generator=numbers) / 8
    return labels, FeatureField(features, (1024, 768))


def agreement(one, other):
    """Adjusted Rand index."""
    return pytest.importorskip("sklearn.metrics").adjusted_rand_score(one.flatten().numpy(), other.flatten().numpy())


@pytest.fixture(scope="module")
def photo():
    """What the built-in encoder sees in a photo."""
    return feature_field(load_encoder("mini"), to_tensor(Image.open(PHOTO).convert("RGB")), (902, 600))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", range(2, 7))
def test_planted_regions_are_found_and_as_many_as_there_are(count, seed):
    labels, field = blocks(count, seed)
    found = find_regions(field)
    assert len(found.letters) == count
    assert agreement(labels, found.labels) > 0.98
    assert (find_regions(field, count).labels == found.labels).all()


@pytest.mark.parametrize("count", [None, 2, 5, 12])
def test_the_same_features_give_the_same_regions_and_no_random_number_is_drawn(photo, count):
    first = find_regions(photo, count)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    again = find_regions(photo, count)
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]


def test_they_are_the_same_under_inference_mode_and_with_gradients(photo):
    wanted = find_regions(photo).labels
    with torch.inference_mode():
        seen = find_regions(FeatureField(photo.features * 1, photo.canvas))
        outside = find_regions(photo)
    learnt = find_regions(FeatureField(photo.features.clone().requires_grad_(), photo.canvas))
    for each in (seen, outside, learnt):
        assert torch.equal(each.labels, wanted)
        assert not each.labels.is_inference() and not each.labels.requires_grad
        each.labels.add_(0)  # as any tensor


@pytest.mark.parametrize("count", [None, *range(2, MOST + 1)])
def test_a_photo_has_as_many_regions_as_asked_for_the_largest_first(photo, count):
    found = find_regions(photo, count)
    assert found.labels.shape == photo.features.shape[1:] and found.labels.dtype == torch.int64
    assert found.canvas == photo.canvas
    assert len(found.letters) == count or (count is None and 2 <= len(found.letters) <= MOST)
    sizes = torch.bincount(found.labels.flatten()).tolist()
    assert sizes == sorted(sizes, reverse=True) and min(sizes) > 0 and len(sizes) == len(found.letters)
    assert found.areas == pytest.approx([size / found.labels.numel() for size in sizes])


@pytest.mark.parametrize("count", [None, 3, 8, 12])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_features_give_nearly_the_same_regions(photo, dtype, count):
    exact = find_regions(photo, count)
    rounded = find_regions(FeatureField(photo.features.to(dtype), photo.canvas), count)
    assert (exact.labels == rounded.labels).float().mean() >= 0.99


@pytest.mark.parametrize("count", [None, 2, 5, 12])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("shape", [(8, 30, 40), (1, 5, 5), (192, 1, 9)])
def test_a_constant_field_is_one_region(shape, value, count):
    found = find_regions(FeatureField(torch.full(shape, value), (64, 48)), count)
    assert found.labels.shape == shape[1:] and found.letters == "A" and found.areas == [1.0]


@few
@given(
    st.integers(1, 6),
    st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 7), (9, 1), (1, 200), (130, 1), (2, 2), (3, 100)]),
    st.sampled_from([None, 2, 3, 12]),
    st.integers(0, 99),
)
def test_any_grid_has_regions(width, grid, count, seed):
    features = torch.randn(width, *grid, generator=torch.Generator().manual_seed(seed))
    found = find_regions(FeatureField(features, (64, 48)), count)
    assert set(found.labels.flatten().tolist()) == set(range(len(found.letters)))
    assert len(found.letters) <= min(count or MOST, grid[0] * grid[1])


def test_one_cell_is_one_region_and_two_are_two_at_most():
    for grid, count in itertools.product([(1, 1), (1, 2), (2, 1)], [None, 2, 5]):
        features = torch.eye(4)[:, : grid[0] * grid[1]].reshape(4, *grid)
        assert find_regions(FeatureField(features, (64, 48)), count).letters == "AB"[: grid[0] * grid[1]]


def test_specks_are_joined_to_what_is_around_them():
    labels, field = blocks(3, 0)
    features = field.features.clone()
    clean = find_regions(field)
    for x, y, letter in ((6, 6, "A"), (40, 20, "B"), (58, 40, "C")):  # of other regions, far within blocks
        own = next(each for each in "ABC" if each not in (letter, LETTERS[clean.labels[y, x]]))
        features[:, y : y + 3, x : x + 3] = features[:, clean.labels == LETTERS.index(own)][:, :9].reshape(-1, 3, 3)
    specked = find_regions(FeatureField(features, field.canvas), 3)
    assert SPECK * labels.numel() > 9 and agreement(labels, specked.labels) > 0.98


@pytest.mark.parametrize("count", [None, 3, 6, 12])
def test_no_part_of_a_region_is_a_speck(photo, count):
    labels = find_regions(photo, count).labels.numpy()
    for number in range(labels.max() + 1):
        parts, _ = ndimage.label(labels == number)  # by edges
        assert np.bincount(parts.flat)[1:].min() >= SPECK * labels.size


def test_finer_features_are_averaged():
    labels, fine = blocks(4, 1, grid=(96, 128))
    found = find_regions(fine)
    assert found.labels.shape == (48, 64) and max(found.labels.shape) == FINEST
    assert found.canvas == fine.canvas
    assert len(found.letters) == 4 and agreement(labels[::2, ::2], found.labels) > 0.98
    long = FeatureField(fine.features[:, :1], (1024, 8))
    assert find_regions(long).labels.shape == (1, 64)


# Laid over the canvas -----------------------------------------------------------------------------------------------


@st.composite
def regions(draw):
    height, width, count = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 5))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    labels = torch.randint(count, (height, width), generator=numbers).flatten()
    _, labels = labels.unique(return_inverse=True)
    return Regions(labels.reshape(height, width), (draw(st.integers(1, 300)), draw(st.integers(1, 300))))


rects = st.builds(Rect, st.integers(-300, 400), st.integers(-300, 400), st.integers(1, 400), st.integers(1, 400))


@few
@given(regions(), st.lists(rects, min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 9))
def test_shares_of_any_rectangle_sum_to_one(found, tiles, height, width):
    shares = found.shares(tiles, (height, width))
    assert shares.shape == (len(tiles), len(found.letters), height, width) and shares.dtype == torch.float32
    assert shares.min() >= 0 and shares.max() <= 1 + 1e-3
    assert torch.allclose(shares.sum(1), torch.ones(len(tiles), height, width), atol=1e-3)


@few
@given(regions())
def test_areas_are_shares_of_the_whole(found):
    assert sum(found.areas) == pytest.approx(1)
    for number, area in enumerate(found.areas):
        assert area == pytest.approx(float((found.labels == number).float().mean()))


def test_a_tile_that_shows_one_region_shows_only_that():
    found = columns("AAAABBBB", (64, 64))
    for tile, wanted in (
        (Rect(0, 0, 24, 64), [1, 0]),
        (Rect(40, 8, 24, 24), [0, 1]),
        (Rect(-80, -80, 90, 90), [1, 0]),
        (Rect(60, 60, 500, 500), [0, 1]),
    ):
        assert found.shares([tile]).flatten().tolist() == pytest.approx(wanted, abs=1e-6)
    half = found.shares([Rect(0, 0, 64, 64)], (8, 8))[0]
    assert torch.equal(half[0], (torch.arange(8) < 4).float().expand(8, 8))


def test_the_share_of_a_region_is_what_it_covers_of_the_tile():
    found = columns("A" * 24 + "B" * 8, (320, 80))
    for tile, share in ((Rect(160, 0, 160, 80), 0.5), (Rect(0, 0, 320, 80), 0.25), (Rect(80, 0, 200, 80), 0.2)):
        assert float(found.shares([tile])[0, 1]) == pytest.approx(share, abs=0.01)
    whole = found.shares([Rect(0, 0, 320, 80)], (8, 32))[0].argmax(0)
    assert torch.equal(whole, found.labels)


@few
@given(regions(), st.floats(-500, 800), st.floats(-500, 800))
def test_a_place_has_the_letter_of_its_cell_and_one_beyond_the_canvas_that_of_the_border(found, x, y):
    (width, height), (rows, cols) = found.canvas, found.labels.shape
    row, column = min(max(y, 0), height * 0.9999) * rows / height, min(max(x, 0), width * 0.9999) * cols / width
    assert found.at(x, y) == LETTERS[found.labels[int(row), int(column)]]


def pixels(found):
    """(height, width) of the canvas: the region of each."""
    (width, height), (rows, cols) = found.canvas, found.labels.shape
    y, x = ((np.arange(side) + 0.5) * cells / side for side, cells in ((height, rows), (width, cols)))
    return found.labels.numpy()[y.astype(int)][:, x.astype(int)]


@few
@given(regions())
def test_a_region_s_box_has_all_of_it_and_its_best_crop_little_else(found):
    (width, height), (rows, cols) = found.canvas, found.labels.shape
    even = Regions(found.labels, (cols * 4, rows * 4))
    for number, letter in enumerate(found.letters):
        for rect in (found.box(letter), found.best_crop(letter)):  # on any canvas
            assert rect.x >= 0 and rect.y >= 0 and rect.width > 0 and rect.height > 0
            assert rect.right <= width and rect.bottom <= height
        there = np.argwhere(pixels(even) == number)
        box = even.box(letter)
        assert [box.y, box.x] == there.min(0).tolist()
        assert [box.bottom, box.right] == (there.max(0) + 1).tolist()
        crop = even.best_crop(letter)
        assert crop.width == crop.height
        assert (pixels(even)[crop.slices] == number).mean() >= PURE - 1e-6


def test_the_best_crop_is_the_largest_square_of_a_region_the_purest_and_the_first():
    labels = torch.zeros(12, 20, dtype=torch.long)
    labels[2:7, 3:8] = 1
    labels[9, 15] = 2
    found = Regions(labels, (200, 120))
    assert found.box("A") == Rect(0, 0, 200, 120)
    assert found.box("B") == Rect(30, 20, 50, 50) and found.box("C") == found.best_crop("C") == Rect(150, 90, 10, 10)
    assert found.best_crop("B") == Rect(30, 20, 50, 50)
    assert found.best_crop("A") == Rect(80, 0, 120, 120)  # of 12 cells a side, with the one of C


# Told ---------------------------------------------------------------------------------------------------------------

CANVAS = 192, 64
"""Three tiles of 64 pixels, each eight of the cells of `columns`."""
SHOWN = columns("AAAAAAAA" + "AAAAAABB" + "BBBBBCCC", CANVAS)


def prompts(words, shown=SHOWN, host=None, **more):
    """(TilePrompts, report) of the tiles of CANVAS."""
    chosen = Settings(tile=64, overlap=0, region_prompts=words, **more)
    plan = TilePlan(*CANVAS, 64)
    report = Report([TileReport(number, tile) for number, tile in enumerate(plan.tiles, 1)])
    host, canvas = host or StubHost(), Canvas(random_image(*CANVAS), plan)
    return TilePrompts(host, canvas, plan, chosen, report, shown), report


def texts(words, **more):
    """What each tile is told."""
    told, report = prompts(words, **more)
    return [[one.text for one in told.of(tile.area)] for tile in report.tiles]


def test_a_tile_is_told_the_words_of_the_regions_it_shows_the_largest_first():
    assert texts("A: fur\nB: wall\nC: sky") == [
        ["main, fur"],
        ["main, fur", "main, wall"],
        ["main, wall", "main, sky"],
    ]
    assert texts("A: fur\nB: wall\nC: sky", shown=columns("A" * 8 + "BBBBBAAA" + "CCCCCBBB", CANVAS))[1:] == [
        ["main, wall", "main, fur"],
        ["main, sky", "main, wall"],
    ]


def test_the_main_prompt_comes_first_or_not_at_all():
    more = {"tile_prompt": "sharp"}
    assert texts("A: fur\nB: wall", **more)[1] == ["main, sharp, fur", "main, sharp, wall"]
    assert texts("A: fur\nB: wall", **more, tile_prompt_mode="replace")[1] == ["sharp, fur", "sharp, wall"]
    assert texts("A: fur\nB: wall", tile_prompt_mode="replace")[1] == ["fur", "wall"]
    empty = StubHost()
    empty.prompt = ""
    assert texts("A: fur\nB: wall", host=empty)[1] == ["fur", "wall"]


def test_a_region_that_is_too_small_in_a_tile_is_left_out_and_its_place_is_told_of_the_others():
    words = "A: fur\nB: wall\nC: sky"
    assert texts(words, region_share=0.3)[1] == ["main, fur"]
    assert texts(words, region_share=0.4)[2] == ["main, wall"]
    assert texts(words, region_share=0.2)[1] == ["main, fur", "main, wall"]
    assert texts(words, region_share=1.0)[1] == [None]
    told, report = prompts(words, region_share=0.2, shown=columns("A" * 8 + "AAAABBBC" + "C" * 8, CANVAS))
    fur, wall = told.of(report.tiles[1].area)
    assert (fur.text, wall.text) == ("main, fur", "main, wall")
    assert [each.letter for each in report.tiles[1].regions] == ["A", "B"]
    last = fur.mask[:, -1] / wall.mask[:, -1]  # where C is, as much of each as there is in the tile
    assert last.tolist() == pytest.approx([4 / 3] * 8, rel=0.05)
    assert (fur.mask[:, :4] > 0.99).all() and (wall.mask[:, 4:7] > 0.99).all()


def test_where_a_region_has_no_words_the_main_prompt_counts():
    told, report = prompts("B: wall")
    wall, main = told.of(report.tiles[1].area)
    assert (wall.text, main.text) == ("main, wall", None)
    assert (wall.mask[:, 6:] > 0.99).all() and (main.mask[:, :6] > 0.99).all()
    assert [one.text for one in prompts("B: wall", tile_prompt="sharp")[0].of(report.tiles[1].area)] == [
        "main, sharp, wall",
        "main, sharp",
    ]
    assert texts("B: wall", tile_prompt_mode="replace")[1] == ["wall", None]
    assert texts("A: fur", region_share=0.2)[1] == ["main, fur", None]
    # Too little of it: only the words are told.
    assert texts("A: fur", region_share=0.3)[1] == ["main, fur"]


def test_a_tile_without_a_named_region_is_told_what_it_was_told_before():
    told, report = prompts("C: sky")
    assert [told.of(tile.area) for tile in report.tiles[:2]] == [[Prompt(None)]] * 2
    assert texts("C: sky", tile_prompt="sharp")[0] == ["main, sharp"]
    assert prompts("")[0].of(report.tiles[0].area) == [Prompt()]
    assert texts("A: fur", shown=None) == [[None]] * 3
    assert texts("A: fur", regions="0") == [[None]] * 3


def test_a_tile_s_own_line_comes_in_place_of_its_regions():
    told, report = prompts("A: fur\nB: wall\nC: sky", tile_prompts="2: whiskers")
    assert told.of(report.tiles[1].area) == [Prompt("main, whiskers")] and report.tiles[1].regions == []
    assert told.of(report.tiles[0].area) == [Prompt("main, fur")]


def test_only_tiles_without_words_are_captioned():
    asked = []

    class Asked(StubHost):
        def caption(self, images, interrogator):
            asked.extend(image.tobytes() for image in images)
            return ["a corner"] * len(images)

    told, report = prompts("C: sky", host=Asked(), captions="Stub", tile_prompts="1: ear")
    assert asked == [Canvas(random_image(*CANVAS), TilePlan(*CANVAS, 64)).picture(report.tiles[1].area).tobytes()]
    assert [one.text for tile in report.tiles[:2] for one in told.of(tile.area)] == ["main, ear", "main, a corner"]
    # Where C is it is told, elsewhere the main prompt.
    assert [one.text for one in told.of(report.tiles[2].area)] == ["main, sky", None]


def test_equal_words_are_one_prompt():
    assert texts("A: fur\nB: fur\nC: sky") == [["main, fur"], ["main, fur"], ["main, fur", "main, sky"]]
    told, report = prompts("A: fur\nB: fur\nC: fur")
    assert told.of(report.tiles[2].area) == [Prompt("main, fur")]
    # As is a region that is told the main prompt, and one without words.
    empty = StubHost()
    empty.prompt = ""
    told, report = prompts("B: wall\nC: wall", host=empty)
    wall, main = told.of(report.tiles[1].area)
    assert (wall.text, main.text) == ("wall", None)


@few
@given(regions(), st.integers(0, 31), st.sampled_from([0.0, 0.1, 0.4]), st.sampled_from([8, 16]))
def test_masks_of_a_tile_sum_to_one_on_its_latent_grid(found, named, share, factor):
    """Whichever regions have words, wherever the tile lies."""
    shown = Regions(found.labels, CANVAS)
    words = "\n".join(f"{letter}: words {letter}" for number, letter in enumerate("ABCDE") if named >> number & 1)
    told, report = prompts(words, shown, StubHost(factor=factor), region_share=share)
    for area in (*(tile.area for tile in report.tiles), Rect(32, 16, 64, 48), Rect(128, 32, 64, 64)):
        found = told.of(area)
        assert len({one.text for one in found}) == len(found)
        if len(found) == 1:
            assert found[0].mask is None
            continue
        total = sum(one.mask for one in found)
        assert torch.allclose(total, torch.ones(area.height // factor, area.width // factor), atol=1e-5)
        for one in found:
            assert one.mask.dtype == torch.float32 and one.mask.min() >= 0 and one.mask.max() <= 1 + 1e-6


def test_masks_lie_where_the_regions_are():
    told, report = prompts("A: fur\nB: wall\nC: sky")
    for tile in report.tiles[1:]:
        shares = SHOWN.shares([tile.area], (8, 8))[0]
        for one, letter in zip(told.of(tile.area), (each.letter for each in tile.regions)):
            assert torch.allclose(one.mask, shares[LETTERS.index(letter)], atol=1e-3)


def test_a_host_that_knows_one_prompt_a_tile_is_told_all_words_in_it():
    class One(StubHost):
        regional = False

    assert texts("A: fur\nB: wall\nC: sky", host=One()) == [
        ["main, fur"],
        ["main, fur, wall"],
        ["main, wall, sky"],
    ]
    assert texts("A: fur\nB: fur", host=One())[1] == ["main, fur"]
    assert texts("B: wall", host=One(), tile_prompt_mode="replace") == [[None], ["wall"], ["wall"]]
    told, report = prompts("A: fur\nB: wall", host=One())
    assert all(one.mask is None for tile in report.tiles for one in told.of(tile.area))


def test_a_tile_of_another_pass_is_told_what_it_shows_itself():
    told, _ = prompts("A: fur\nB: wall\nC: sky")
    assert [one.text for one in told.of(Rect(120, 0, 32, 64))] == ["main, wall"]
    assert [one.text for one in told.of(Rect(160, 0, 32, 64))] == ["main, sky", "main, wall"]
    assert told.of(Rect(0, 0, 96, 64)) == [Prompt("main, fur")]
    told, _ = prompts("A: fur\nB: wall\nC: sky", tile_prompts="2: whiskers")
    assert told.of(Rect(72, 0, 32, 64)) == [Prompt("main, whiskers")]  # the line of the nearest


def test_words_of_a_region_that_is_not_there_are_refused_in_one_line():
    check_letters(SHOWN, {"A": "fur", "C": "sky"})
    check_letters(None, {})
    with pytest.raises(DinotileError) as error:
        check_letters(SHOWN, {"A": "fur", "D": "sky", "E": "sea"})
    assert (
        str(error.value)
        == "region_prompts: there is no region D, this image has 3 (A to C); the preview in img2img shows them, and "
        "analyze on the command line"
    )


# Reported -----------------------------------------------------------------------------------------------------------


def reported(*shown):
    """A report of tiles with regions: a string of letters each, those with words in capitals."""
    tiles = [TileReport(number, Rect(number * 64, 0, 64, 64)) for number in range(1, len(shown) + 1)]
    for tile, letters in zip(tiles, shown):
        tile.regions = [RegionShare(letter.upper(), 1 / len(letters), "words" * letter.isupper()) for letter in letters]
        tile.state = PAINTED
    return Report(tiles)


def test_the_report_says_which_regions_each_tile_was_told():
    assert reported("A", "A", "A", "AB", "").lines == ["region prompts: A in tiles 1-3; A, B in tile 4; none in tile 5"]
    assert reported("B", "A", "Ab", "b", "bA").lines == [
        "region prompts: A in tiles 2-3, 5; B in tile 1; none in tile 4"
    ]
    assert reported("A", "A").lines == ["region prompts: A in tiles 1-2"]
    assert reported("ab", "", "c").lines == []


def test_tiles_that_were_not_painted_were_told_nothing():
    report = reported("A", "AB", "B")
    report.tiles[1].state, report.tiles[2].state = FLAT, UNMASKED
    assert report.lines == ["flat tiles skipped: 2", "region prompts: A in tile 1"]


def test_small_regions_of_one_name_count_together():
    labels = torch.zeros(4, 32, dtype=torch.long)
    labels[:, 3:4], labels[:, 10:11] = 1, 2
    shown = Regions(labels, (64, 64))

    def told(words):
        canvas, plan = Canvas(random_image(64, 64), TilePlan(64, 64, 64)), TilePlan(64, 64, 64)
        report = Report([TileReport(1, plan.tiles[0])])
        chosen = Settings(tile=64, overlap=0, region_prompts=words, region_share=0.05)
        return [one.text for one in TilePrompts(StubHost(), canvas, plan, chosen, report, shown).of(plan.tiles[0])]

    assert told("B: fur") == [None] and told("B: fur\nC: wall") == [None]
    assert told("B: fur\nC: fur") == ["main, fur", None]


def test_a_place_is_named_where_its_region_has_words_and_the_tile_no_line():
    told, report = prompts("A: fur", tile_prompts="2: whiskers")
    first, second, _ = (tile.area for tile in report.tiles)
    assert told.named(first).min() > 0.9 and told.named(second) is None
    assert prompts("")[0].named(first) is None


def test_the_report_as_json_has_the_regions_of_each_tile():
    report = prompts("A: fur\nC: sky", tile_prompts="3: whiskers")[1]
    for tile in report.tiles:
        tile.state = PAINTED
    found = report.json()
    assert found["notes"] == ["region prompts: A in tiles 1-2"]
    first, second, third = found["tiles"]
    assert first["regions"] == [{"letter": "A", "share": pytest.approx(1), "words": "fur"}]
    assert [(each["letter"], each["words"]) for each in second["regions"]] == [("A", "fur"), ("B", "")]
    assert [each["share"] for each in second["regions"]] == pytest.approx([0.75, 0.25], abs=0.02)
    assert third["prompt"] == "whiskers" and "regions" not in third
    assert all("regions" not in tile for tile in prompts("")[1].json()["tiles"])
