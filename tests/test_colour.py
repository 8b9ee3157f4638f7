"""Colours of a painted tile: always those of the source, and never at the cost of the detail."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from lib_dinotile.tiling import colour
from lib_dinotile.tiling.colour import CORRECTIONS, correct

PHOTO = Path(__file__).parents[1] / "examples" / "photo.png"
METHODS = [method for method in CORRECTIONS if method != "none"]
LEVEL = 1 / 255
OFF = 1e-4
"""Of the mean colour, at most: a fortieth of a level."""


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
    height, width = draw(st.sampled_from([(1, 1), (8, 8), (64, 16), (37, 75), (1, 130), (96, 96)]))
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
    assert (mean(result) - mean(source)).abs().max() < OFF


@pytest.mark.parametrize("method", METHODS)
@given(pairs(), st.floats(0, 1), st.integers(0, 99))
def test_the_mean_colour_is_that_of_the_source_where_it_is_asked_for(method, pair, share, seed):
    pixels, source = pair
    within = torch.rand(source.shape[1:], generator=torch.Generator().manual_seed(seed)) < share
    result = correct(pixels, source, method, within)
    assert result.shape == source.shape and result.dtype == torch.float32
    assert result.min() >= 0 and result.max() <= 1
    if within.any():
        assert (mean(result[:, None, within]) - mean(source[:, None, within])).abs().max() < OFF


@pytest.mark.parametrize("method", METHODS)
def test_the_mean_colour_of_a_large_canvas_is_as_exact(method):
    source = torch.full((3, 2048, 2048), 0.7)
    pixels = torch.rand(source.shape, generator=torch.Generator().manual_seed(0))
    for within in (None, torch.ones(source.shape[1:], dtype=torch.bool)):
        assert (mean(correct(pixels, source, method, within)) - mean(source)).abs().max() < OFF


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("shape", [(64, 48), (37, 75)])
def test_nothing_waits_for_a_device_before_the_third_step(method, part, shape, monkeypatch):
    """On PyTorch's meta device there are no values to wait for."""
    monkeypatch.setattr(colour, "STEPS", 2)
    pixels, source = torch.empty(2, 3, *shape, device="meta")
    within = torch.empty(shape, dtype=torch.bool, device="meta") if part else None
    result = correct(pixels, source, method, within)
    assert result.device == pixels.device and result.shape == pixels.shape


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


def decomposed(image):
    """The coarse levels of the decomposition written out: five dilated 3x3 kernels."""
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).expand(len(image), 1, 3, 3) / 16
    for level in range(5):
        padded = F.pad(image, [2**level] * 4, mode="replicate")
        image = F.conv2d(padded[None], kernel, dilation=2**level, groups=len(image))[0]
    return image


def repainted():
    """A photo in the middle of the range, and the same with other colours, changing slowly, and with noise."""
    source = 0.25 + 0.5 * photo()
    down, across = torch.meshgrid(*[torch.linspace(0, 1, 256)] * 2, indexing="ij")
    tint = torch.stack([0.12 * across, 0.08 * down, -0.1 * across * down])
    noise = 0.02 * torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
    return source * torch.tensor([0.9, 1.05, 0.8])[:, None, None] + tint + noise, source


@pytest.mark.parametrize("height, width", [(256, 256), (201, 75)])
def test_wavelet_takes_the_coarse_levels_of_the_source_and_the_fine_ones_of_the_result(height, width):
    pixels, source = (image[:, :height, :width] for image in repainted())
    expected = pixels + decomposed(source - pixels)
    expected += source.mean((1, 2), keepdim=True) - expected.mean((1, 2), keepdim=True)
    assert (expected - pixels).abs().mean() > 10 * LEVEL
    error = (correct(pixels, source, "wavelet") - expected).abs()
    assert error.max() < 1.5 * LEVEL and error.mean() < 0.1 * LEVEL


def test_wavelet_takes_the_coarse_levels_of_a_part_from_that_part():
    pixels, source = repainted()
    within = torch.ones(256, 256, dtype=torch.bool)
    within[:100] = within[:, :37] = within[150:160, 150:160] = False
    within[62, 140] = True  # on its own, but in reach of a sloppy blur
    blurred = decomposed(torch.cat([(source - pixels) * within, within[None].float()]))
    expected = (pixels + blurred[:3] / blurred[3:])[:, within]
    expected += source[:, within].mean(1, keepdim=True) - expected.mean(1, keepdim=True)
    error = (correct(pixels, source, "wavelet", within)[:, within] - expected).abs()
    assert error.max() < 1.5 * LEVEL and error.mean() < 0.1 * LEVEL


def test_wavelet_blurs_no_more_than_the_decomposition():
    """Held against a wave, as what is as wide as the kernel suffers most."""
    pixels, _ = repainted()
    wave = 0.1 * torch.sin(torch.arange(256) * torch.pi / 48).expand(3, 256, 256)
    change = correct(pixels, pixels + wave, "wavelet") - pixels
    away = slice(64, -64)
    expected = decomposed(wave) - decomposed(wave).mean() + wave.mean()
    assert (change - expected)[:, away, away].abs().max() < 0.2 * LEVEL


@pytest.mark.parametrize("method", METHODS)
def test_two_steps_are_enough_for_a_picture_with_much_black_and_white(method, monkeypatch):
    pixels, source = ((2 * image - 0.5).clamp(0, 1) for image in repainted())
    source = (2 * source - 0.5).clamp(0, 1)
    assert ((source == 0) | (source == 1)).float().mean() > 0.1
    monkeypatch.setattr(colour, "STEPS", 1)
    assert (mean(correct(pixels, source, method)) - mean(source)).abs().max() > OFF
    monkeypatch.setattr(colour, "STEPS", 2)
    assert (mean(correct(pixels, source, method)) - mean(source)).abs().max() < OFF


@pytest.mark.parametrize("method", METHODS)
def test_what_lies_elsewhere_has_no_say(method):
    pair = repainted()
    within = torch.rand(256, 256, generator=torch.Generator().manual_seed(1)) < 0.5
    within[:, 128:] = False
    changed = [torch.where(within, image, 1 - image) for image in pair]
    result, other = correct(*pair, method, within), correct(*changed, method, within)
    assert torch.allclose(result[:, within], other[:, within], atol=1e-6)
    assert (result[:, ~within] - other[:, ~within]).abs().mean() > 10 * LEVEL


@pytest.mark.parametrize("method", METHODS)
def test_nothing_asked_for_is_fine(method):
    pixels, source = repainted()
    result = correct(pixels, source, method, torch.zeros(256, 256, dtype=torch.bool))
    assert result.shape == source.shape and result.isfinite().all()


def test_wavelet_follows_an_even_change_of_colour_exactly():
    pixels, _ = repainted()
    ramp = torch.tensor([0.1, -0.1, 0.05])[:, None, None] * torch.linspace(-1, 1, 256)
    assert torch.allclose(correct(pixels, pixels + 0.05, "wavelet"), pixels + 0.05, atol=1e-5)
    away = slice(64, -64)  # from the border, beyond which the last colours go on
    for change in (ramp, ramp.transpose(1, 2)):
        result = correct(pixels, pixels + change, "wavelet")
        assert torch.allclose((result - pixels)[:, away, away], change.expand(3, 256, 256)[:, away, away], atol=1e-4)
