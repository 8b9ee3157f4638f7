"""Colours of a painted tile: always those of the source, and never at the cost of the detail."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from lib_dinotile.tiling.colour import CORRECTIONS, correct

PHOTO = Path(__file__).parents[1] / "examples" / "photo.png"
METHODS = [method for method in CORRECTIONS if method != "none"]
LEVEL = 1 / 255


@st.composite
def images(draw, height, width):
    """Anything from flat to pure noise, from black to white, with channels clipped at either end."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    level = torch.tensor(draw(st.lists(st.floats(-0.5, 1.5), min_size=3, max_size=3)))[:, None, None]
    image = level + draw(st.sampled_from([0, 0.001, 0.05, 0.3, 2])) * torch.randn(3, height, width, generator=generator)
    if draw(st.booleans()):  # one pixel that stands out
        image[:, 0, 0] = 1 - image[:, 0, 0]
    return image.clamp(0, 1)


@st.composite
def pairs(draw):
    height, width = draw(st.sampled_from([(1, 1), (8, 8), (64, 16), (40, 72), (96, 96)]))
    return draw(images(height, width)), draw(images(height, width))


def black_and_white(side, seed):
    """Every channel of every pixel at one end of the range."""
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed)).round()


def mean(image):
    return image.double().mean((1, 2))


def coarse(image):
    """The image blurred so far that only its colours are left."""
    down = F.avg_pool2d(image, (33, 1), 1, (16, 0), count_include_pad=False)
    return F.avg_pool2d(down, (1, 33), 1, (0, 16), count_include_pad=False)


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def photo():
    return torch.from_numpy(np.array(Image.open(PHOTO).convert("RGB"))).permute(2, 0, 1)[:, :256, :256].float() / 255


@pytest.mark.parametrize("method", METHODS)
@given(pairs())
@example((torch.ones(3, 8, 8), torch.zeros(3, 8, 8)))
@example((torch.zeros(3, 8, 8), torch.ones(3, 8, 8)))
@example((black_and_white(64, 0), black_and_white(64, 1)))
@example((F.pad(torch.ones(3, 1, 1), (0, 511, 0, 511)), black_and_white(512, 0)))
def test_the_mean_colour_is_that_of_the_source(method, pair):
    pixels, source = pair
    result = correct(pixels, source, method)
    assert result.shape == source.shape and result.dtype == torch.float32
    assert result.min() >= 0 and result.max() <= 1
    assert (mean(result) - mean(source)).abs().max() < 0.1 * LEVEL


@pytest.mark.parametrize("method", METHODS)
@given(st.data())
def test_a_result_like_the_source_comes_back_unchanged(method, data):
    source = data.draw(images(48, 24))
    assert torch.allclose(correct(source.clone(), source, method), source, atol=1e-5)


@given(pairs())
def test_none_returns_what_it_is_given(pair):
    assert correct(*pair, "none") is pair[0]


@pytest.mark.parametrize("method", CORRECTIONS)
@given(pairs())
def test_the_arguments_are_left_alone(method, pair):
    pixels, source = pair
    before = pixels.clone(), source.clone()
    correct(pixels, source, method)
    assert torch.equal(pixels, before[0]) and torch.equal(source, before[1])


@pytest.mark.parametrize("wrong", ["", "adain", "Wavelet", "histogram"])
def test_an_unknown_method_is_refused(wrong):
    with pytest.raises(ValueError, match=r"AdaIN.*wavelet"):
        correct(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), wrong)


def test_adain_gives_every_channel_the_spread_of_the_source():
    source = photo()
    cast = source * torch.tensor([0.5, 0.8, 0.9])[:, None, None] + torch.tensor([0.1, 0.0, 0.05])[:, None, None]
    assert torch.allclose(correct(cast, source, "AdaIN"), source, atol=LEVEL)


@pytest.mark.parametrize("method, left", [("AdaIN", 6), ("wavelet", 1.5)])
def test_a_colour_cast_goes_and_added_detail_stays(method, left):
    source = photo()
    added = 0.04 * torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
    painted = (source + added).clamp(0, 1)
    across = torch.linspace(0, 1, source.shape[2])  # a cast that grows from left to right
    tint = torch.tensor([0.2, -0.1, -0.15])[:, None, None] * (0.75 + 0.25 * across)
    cast = (painted * torch.tensor([0.75, 0.9, 0.8])[:, None, None] + tint).clamp(0, 1)
    assert (coarse(cast) - coarse(source)).abs().mean() > 20 * LEVEL
    result = correct(cast, source, method)
    assert (coarse(result) - coarse(source)).abs().mean() < left * LEVEL
    assert correlation(result - coarse(result), painted - coarse(painted)) > 0.95
    assert correlation(result - coarse(result), painted - coarse(painted)) > correlation(
        source - coarse(source), painted - coarse(painted)
    )


def test_wavelet_takes_the_coarse_levels_of_the_source_and_the_fine_ones_of_the_result():
    """Held against the decomposition written out: five dilated 3x3 kernels on each image."""

    def blurred(image):
        kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).expand(3, 1, 3, 3) / 16
        for level in range(5):
            padded = F.pad(image, [2**level] * 4, mode="replicate")
            image = F.conv2d(padded[None], kernel, dilation=2**level, groups=3)[0]
        return image

    generator = torch.Generator().manual_seed(0)
    source = 0.4 + 0.2 * torch.rand(3, 80, 56, generator=generator)
    pixels = 0.4 + 0.2 * torch.rand(3, 80, 56, generator=generator)
    expected = pixels - blurred(pixels) + blurred(source)
    expected += source.mean((1, 2), keepdim=True) - expected.mean((1, 2), keepdim=True)
    assert torch.allclose(correct(pixels, source, "wavelet"), expected, atol=1e-5)
