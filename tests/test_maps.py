"""Pictures of what DINO sees, and the restoration head's file."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lib_dinotile import DinotileError
from lib_dinotile import __main__ as cli
from lib_dinotile.dino.field import FeatureField
from lib_dinotile.dino.head import RestorationHead, load_heads, save_heads
from lib_dinotile.dino.regions import Regions
from lib_dinotile.engine.maps import consistency_map, principal_colours, region_map, semantic_map
from lib_dinotile.tiling.plan import TilePlan
from tests.test_tiling import random_image


def features(seed=0, width=24):
    return (
        torch.randn(width, 6, 8, generator=torch.Generator().manual_seed(seed))
        * torch.linspace(3, 0.1, width)[:, None, None]
    )


def test_colours_are_the_principal_components_whatever_their_signs():
    given = features()
    colours = principal_colours(given)
    assert colours.shape == (3, 6, 8) and colours.min() == 0 and colours.max() == 1
    assert torch.equal(colours, principal_colours(given.clone()))
    _, _, axes = torch.linalg.svd((given.flatten(1).T - given.flatten(1).T.mean(0)).double(), full_matrices=False)
    parts = (given.flatten(1).T.double() - given.flatten(1).T.double().mean(0)) @ axes[:3].T
    for shown, part in zip(colours.flatten(1), parts.T):
        assert abs(np.corrcoef(shown.numpy(), part.numpy())[0, 1]) > 0.98


def test_a_map_has_the_size_of_the_image_and_shows_the_tiles():
    plan = TilePlan(160, 120, tile=64, overlap=16)
    image = Image.new("RGB", (160, 120), "grey")
    shown = np.asarray(semantic_map(image, FeatureField(features(), (160, 120)), plan))
    assert shown.shape == (120, 160, 3)
    assert (shown[plan.tiles[0].bottom - 1, 2:60] == 255).all(1).mean() > 0.5
    same = np.asarray(semantic_map(image, FeatureField(features(), (160, 120)), plan))
    assert (same == shown).all()


@pytest.mark.parametrize("tiles", [1, 2, 3])
def test_letters_of_regions_hide_no_numbers_of_tiles(tiles):
    side = 240
    plan = TilePlan(side, side, tile=side // tiles, overlap=0)
    number = torch.arange(tiles)
    regions = Regions(number.tile(tiles, 1) + tiles * number[:, None], (side, side))  # each is a tile
    image = Image.new("RGB", (side, side), "grey")
    letters, shown = (np.asarray(region_map(image, regions, given))[:side] for given in (None, plan))
    numbers = np.asarray(semantic_map(image, FeatureField(torch.zeros(24, 6, 8), (side, side)), plan))
    as_many, letters_own, whole = ((picture == 0).all(axis=2).sum() for picture in (shown, letters, numbers))
    assert abs(as_many - letters_own - whole) < 0.1 * whole and whole > 100 * tiles**2
    around = (slice(side // tiles // 2 - 8, side // tiles // 2 + 8),) * 2
    assert (shown[around] == letters[around]).all()


def test_the_scale_is_always_the_same_and_doubt_has_a_border():
    image = Image.new("RGB", (320, 240), "grey")
    low, high = torch.full((30, 40), 0.2), torch.full((30, 40), 0.9)
    nothing, some = torch.zeros(30, 40, dtype=torch.bool), torch.zeros(30, 40, dtype=torch.bool)
    some[10:20, 10:30] = True
    first, second, third = (
        np.asarray(consistency_map(image, values, doubt)).astype(int)
        for values, doubt in ((low, nothing), (high, nothing), (high, some))
    )
    assert first.shape[1] == 320 and first.shape[0] > 240
    assert (first[250:260] == second[250:260]).all()  # the bar of the legend
    assert (first[100, 100] != second[100, 100]).any()
    assert first[100, 100].sum() < second[100, 100].sum()  # brighter is better, also without colours
    assert (third[80, 150] == (200, 0, 0)).all() and (third[120, 150] == second[120, 150]).all()


@pytest.mark.parametrize("width", [1, 40, 200, 260, 300, 340, 400, 700])
def test_the_legend_is_whole_however_narrow_the_picture(width):
    """All its words are there, in one line or in several."""

    def legend(width):
        doubt = torch.ones(30, 5, dtype=torch.bool)
        drawn = np.asarray(consistency_map(Image.new("RGB", (width, 240), "white"), torch.full((30, 5), 0.5), doubt))
        assert (drawn[240:, :2] == 255).all() and (drawn[240:, -2:] == 255).all() and (drawn[-2:] == 255).all()
        return (drawn[240 + 42 :] < 128).all(2).sum()  # below the numbers

    assert legend(width) == pytest.approx(legend(1000), rel=0.03)


def test_where_no_tile_is_painted_the_picture_shows():
    image = Image.new("RGB", (320, 240), (90, 90, 90))
    values = torch.full((30, 40), 0.9)
    values[:, :20] = torch.nan
    shown = np.asarray(consistency_map(image, values, torch.zeros(30, 40, dtype=torch.bool)))
    assert (shown[100, 40] == 90).all() and (shown[100, 250] != 90).any()


def test_analyze_writes_both_maps(tmp_path, capsys):
    source, result = random_image(60, 45), random_image(120, 90, seed=3)
    source.save(tmp_path / "in.png")
    result.save(tmp_path / "result.png")
    out = tmp_path / "map.png"
    more = ["--tile", "64", "--overlap", "16", "--patches", "12"]
    assert cli.main(["analyze", str(tmp_path / "in.png"), str(out), *more]) == 0
    assert Image.open(out).size == (120, 90)
    plain = np.asarray(Image.open(tmp_path / "map-consistency.png"))[:90, 70:190].astype(int)
    compared = ["--result", str(tmp_path / "result.png")]
    assert cli.main(["analyze", str(tmp_path / "in.png"), str(out), *more, *compared]) == 0
    other = np.asarray(Image.open(tmp_path / "map-consistency.png"))[:90, 70:190].astype(int)
    assert other.mean() < plain.mean() - 5  # another picture is darker
    assert cli.main(["analyze", str(tmp_path / "nowhere.png"), str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_untrained_head_changes_nothing_and_a_file_gives_it_back(tmp_path):
    torch.manual_seed(0)
    heads = {-1: RestorationHead(12, 8), -2: RestorationHead(12, 8)}
    tokens = torch.randn(2, 12, 5, 4)
    assert torch.equal(heads[-1](tokens), tokens)
    torch.nn.init.normal_(heads[-2].outer.weight)
    heads[-2].floor.copy_(torch.tensor([0.25, 0.125]))
    save_heads(heads, tmp_path / "head.safetensors", "some/encoder", trained="in a test")
    found = load_heads(tmp_path / "head.safetensors", "some/encoder", 12)
    assert set(found) == {-1, -2} and found[-2].floor.tolist() == [0.25, 0.125]
    assert torch.allclose(found[-2](tokens), heads[-2](tokens), atol=0.05)
    for encoder, width in (("other", 12), ("some/encoder", 13)):
        with pytest.raises(DinotileError, match="is for encoder"):
            load_heads(tmp_path / "head.safetensors", encoder, width)


def test_what_is_no_head_is_refused_in_one_line(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("other", "text"):
        with pytest.raises(DinotileError) as error:
            load_heads(tmp_path / f"{name}.safetensors", "mini", 12)
        assert "\n" not in str(error.value)


def test_doubt_has_a_border_also_where_the_picture_ends():
    doubtful = torch.ones(4, 4, dtype=torch.bool)
    doubtful[1, 1] = False
    drawn = np.asarray(consistency_map(Image.new("RGB", (320, 320)), torch.zeros(4, 4), doubtful))[:320, :320]
    red = (drawn == (200, 0, 0)).all(axis=2)
    assert red[0].all() and red[-1].all() and red[:, 0].all() and red[:, -1].all() and not red[100:140, 100:140].any()
