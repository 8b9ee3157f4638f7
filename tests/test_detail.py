"""Every tile has as much detail as the others, whatever was painted before it."""

import itertools

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from lib_dinotile.engine.flow import make_plan, upscale
from lib_dinotile.hosts.diffusers import load_host
from lib_dinotile.settings import Generation, Settings
from lib_dinotile.tiling.noise import NoiseField

SETTINGS = Settings(scale=2.0, tile=128, overlap=32, guidance=0.0, guard="off")


def texture(side):
    """The same everywhere, and a little blurred."""
    noise = gaussian_filter(np.random.default_rng(0).standard_normal((side, side)), 0.6)
    grey = Image.fromarray((128 + 40 * noise / noise.std()).clip(0, 255).astype(np.uint8))
    return grey.convert("RGB")


def energy(pixels):
    return sum(float((np.diff(pixels.astype(float), axis=axis) ** 2).mean()) for axis in (0, 1))


@pytest.mark.parametrize("order", ["chess", "linear"])
def test_tiles_beside_painted_ones_have_as_much_detail_as_the_first(order):
    """The built-in model; a texture that a tile sees sharp at its border is not to be blurred in its middle."""
    host, source = load_host(Generation(steps=6, denoise=0.35)), texture(160)
    settings = Settings(**{**vars(SETTINGS), "order": order})
    result = upscale(host, source, settings, NoiseField(0, host.channels))
    pixels, plan = np.asarray(result.image), make_plan(host, result.image.size, settings)
    shown = np.asarray(source.resize(result.image.size, Image.Resampling.LANCZOS))
    gains = []
    for x, y in itertools.product(plan.columns, plan.rows):  # what no neighbour shows
        inside = slice(y + 36, y + 92), slice(x + 36, x + 92)
        gains.append(energy(pixels[inside]) / energy(shown[inside]))
    first = gains[0]
    assert len(gains) == 9 and min(gains) > 0.85 * first, [round(gain / first, 2) for gain in gains]
