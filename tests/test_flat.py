"""How much detail a tile shows: nothing that can be seen is passed over, a clean sky is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lib_dinotile.tiling.flat import RECOMMENDED, detail

PHOTO = Path(__file__).parents[1] / "examples" / "photo.png"


def enlarged(source, factor):
    """An array (h, w, 3) in levels of 255 as the tile (3, h, w) that Lanczos makes of it."""
    image = Image.fromarray(np.asarray(source).round().clip(0, 255).astype(np.uint8))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def sky(side):
    """A sunset, (side, side, 3): a steep gradient in every channel."""
    return np.linspace([240, 120, 60], [120, 180, 160], side)[:, None].repeat(side, axis=1)


def noise(sigma, *shape):
    return np.random.default_rng(0).normal(0, sigma, shape)


@pytest.mark.parametrize("factor", [2, 4])
def test_a_gradient_is_flat(factor):
    assert detail(enlarged(sky(128), factor)) < 0.3
    assert detail(enlarged(sky(128).transpose(1, 0, 2), factor)) < 0.3


@pytest.mark.parametrize("factor", [2, 4])
def test_ordinary_camera_noise_is_flat(factor):
    """A level in each channel; with two it is no more than the faintest texture."""
    assert detail(enlarged(sky(128) + noise(1, 128, 128, 3), factor)) < RECOMMENDED
    assert detail(enlarged(sky(128) + noise(2, 128, 128, 3), factor)) < 1.7 * RECOMMENDED


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("line", ["across", "down", "slanting", "short"])
def test_a_thin_line_on_a_sky_is_detail(factor, line):
    source = sky(128)
    along = np.arange(100, 112) if line == "short" else np.arange(128)
    rows, columns = {"across": (40, along), "down": (along, 40), "slanting": (along, along)}.get(line, (along, 127))
    source[rows, columns] -= 10
    assert detail(enlarged(source, factor)) > RECOMMENDED


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("side", [60, 63, 128, 250])
def test_texture_in_a_corner_is_detail(factor, corner, side):
    source = sky(side)
    down, across = (slice(-8, None) if end else slice(8) for end in corner)
    source[down, across] += noise(10, 8, 8, 1)
    assert detail(enlarged(source, factor)) > 1.5 * RECOMMENDED


@given(st.sampled_from([128, 200, 256, 504]), st.sampled_from([128, 200, 256, 504]), st.integers(0, 2**16))
def test_the_size_of_the_tile_does_not_matter(height, width, seed):
    tile = torch.full((3, height, width), 0.5)
    lively = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed))
    tile[:, 32:96, 48:112] = lively
    small = torch.full((3, 128, 128), 0.5)
    small[:, 32:96, 48:112] = lively
    assert detail(tile) == pytest.approx(detail(small), rel=0.02)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1))
def test_a_tile_of_one_colour_has_none_whatever_its_size(height, width, value):
    assert detail(torch.full((3, height, width), value)) == pytest.approx(0, abs=0.01)


def test_contrast_is_a_standard_deviation_in_levels_of_255():
    stripes = np.full((64, 64, 3), 110.0) + 10 * np.sign(np.sin(np.arange(64) * np.pi / 2 + 0.1))[:, None]
    assert detail(enlarged(stripes, 4)) == pytest.approx(10, rel=0.15)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("tile", [256, 512])
def test_no_tile_of_a_cat_is_flat(factor, tile):
    source, side = np.array(Image.open(PHOTO).convert("RGB")), tile // factor
    for y in range(0, source.shape[0] - side + 1, side):
        for x in range(0, source.shape[1] - side + 1, side):
            assert detail(enlarged(source[y : y + side, x : x + side], factor)) > 1.4 * RECOMMENDED


@pytest.mark.parametrize("factor", [2, 4])
def test_clear_skies_are_flat_and_what_stands_before_them_is_not(factor):
    china = pytest.importorskip("sklearn.datasets").load_sample_image("china.jpg")
    rocket = pytest.importorskip("skimage.data").rocket()
    for clear in (china[:64, 256:320], china[:64, 320:384], rocket[:64, 192:256], rocket[:64, 256:320]):
        assert detail(enlarged(clear, factor)) < RECOMMENDED
    for busy in (china[:128, 200:328], china[200:264, 256:320], rocket[60:124, 192:256]):
        assert detail(enlarged(busy, factor)) > 2 * RECOMMENDED


@pytest.mark.parametrize("factor", [2, 4])
def test_wires_that_hardly_show_on_an_evening_sky_are_detail(factor):
    rocket = pytest.importorskip("skimage.data").rocket()
    assert detail(enlarged(rocket[121:185, 128:192], factor)) > RECOMMENDED
