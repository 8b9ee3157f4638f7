"""Low-resolution sources made from sharp pictures."""

import itertools

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from lib_dinotile.dino.degradation import clean_shrink, convolve, degrade, gaussian_kernel, sinc_kernel
from tools.mini.textures import TEXTURES


@pytest.fixture(scope="module")
def sharp() -> Image.Image:
    """Four textures with an edge between them, 150 x 130."""
    rng = np.random.default_rng(4)
    parts = [painter(rng, 80) for painter in list(TEXTURES.values())[:4]]
    whole = np.vstack([np.hstack(parts[:2]), np.hstack(parts[2:])])
    return Image.fromarray(np.ascontiguousarray(whole[:130, :150]))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


@pytest.mark.parametrize("orders", [1, 2])
@pytest.mark.parametrize("severity", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("size, scale", [((1, 1), 4), ((5, 300), 3), ((300, 5), 1), ((63, 41), 2.5), ((4, 4), 16)])
def test_a_source_has_the_size_asked_for(size, scale, severity, orders):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    for seed in range(4):
        made = degrade(np.random.default_rng(seed), image, scale, severity, orders)
        assert made.mode == "RGB" and made.size == tuple(max(round(side / scale), 1) for side in size)


@pytest.mark.parametrize("orders", [1, 2])
def test_the_same_generator_makes_the_same_source(sharp, orders):
    first, again, other = (degrade(np.random.default_rng(seed), sharp, 2, 0.5, orders) for seed in (1, 1, 2))
    assert (pixels(first) == pixels(again)).all()
    assert (pixels(first) != pixels(other)).any()


@pytest.mark.parametrize("orders", [1, 2])
def test_severity_0_is_a_clean_shrink(sharp, orders):
    wanted = sharp.resize((60, 52), Image.Resampling.LANCZOS)
    assert (pixels(degrade(np.random.default_rng(0), sharp, 2.5, 0.0, orders)) == pixels(wanted)).all()


@pytest.mark.parametrize("orders", [1, 2])
def test_more_severity_is_farther_from_the_clean_shrink_and_keeps_the_colour(sharp, orders):
    clean, errors, shifts = pixels(clean_shrink(sharp, 2)), [], []
    for severity in (0.02, 0.25, 0.5, 1.0):
        made = [pixels(degrade(np.random.default_rng(seed), sharp, 2, severity, orders)) for seed in range(24)]
        errors.append(np.mean([np.sqrt(np.mean((each - clean) ** 2)) for each in made]))
        shifts.append(np.abs(np.mean([(each - clean).mean((0, 1)) for each in made], axis=0)).max())
    assert all(less < 0.9 * more for less, more in itertools.pairwise(errors)), errors
    assert max(shifts) < 3, shifts


@pytest.mark.parametrize("bad", [{"scale": 0.5}, {"severity": 1.5}, {"severity": -0.1}, {"orders": 3}, {"orders": 0}])
def test_what_is_out_of_range_is_refused(sharp, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        degrade(np.random.default_rng(0), sharp, **{"scale": 2.0, **bad})


@pytest.mark.parametrize(
    "kernel",
    [
        gaussian_kernel(7, 1.0, 1.0),
        gaussian_kernel(21, 3.0, 0.5, 0.4),
        gaussian_kernel(13, 2.0, 1.0, 1.0, 0.5),
        gaussian_kernel(9, 2.0, 2.0, 0.0, 2.0, plateau=True),
        sinc_kernel(21, 1.2),
    ],
)
@pytest.mark.parametrize("size", [(90, 300), (236, 5), (1, 1)])
def test_a_filter_is_the_plain_convolution(kernel, size):
    assert kernel.sum() == pytest.approx(1) and np.allclose(kernel, kernel[::-1, ::-1])
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    plain = ndimage.convolve(image.astype(float), kernel[..., None], mode="reflect")
    assert np.abs(pixels(convolve(Image.fromarray(image), kernel)) - np.clip(plain, 0, 255)).max() < 0.51


def test_a_sinc_filter_takes_away_what_is_above_its_cutoff():
    wave = np.cos(np.arange(128) * 2.0) * 100 + 128  # 2 radians a pixel
    image = Image.fromarray(np.repeat(np.repeat(wave[None, :, None], 64, 0), 3, 2).astype(np.uint8))
    low, high = (pixels(convolve(image, sinc_kernel(21, cutoff)))[20:-20, 20:-20].std() for cutoff in (1.1, 3.0))
    assert low < 8 and high > 60
