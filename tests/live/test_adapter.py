"""What an adapter does to the image, and when it does nothing."""

from __future__ import annotations

import pytest
from adapters import Adapters
from client import Reply, WebUI, difference
from conftest import TILES
from PIL import Image


def test_an_untrained_adapter_changes_nothing(webui: WebUI, source: Image.Image, tiled: Reply, adapters: Adapters):
    reply = webui.img2img(source, {**TILES, "adapter": adapters.untrained})
    assert difference(reply.image, tiled.image) == 0
    assert reply.fields["DINO Tile adapter"] == adapters.untrained


def test_a_trained_adapter_changes_the_image(tiled: Reply, adapted: Reply):
    assert difference(adapted.image, tiled.image) > 8


def test_png_info_says_which_and_how(adapted: Reply, adapters: Adapters):
    expected = {
        "DINO Tile adapter": adapters.random,
        "DINO Tile encoder": "mini",
    }
    assert expected.items() <= adapted.fields.items()


@pytest.mark.parametrize("off", [{"strength": 0}, {"end": 0}, {"start": 1}])
def test_switched_off_it_changes_nothing(webui: WebUI, source: Image.Image, tiled: Reply, adapters: Adapters, off):
    reply = webui.img2img(source, {**TILES, "adapter": adapters.random, **off})
    assert difference(reply.image, tiled.image) == 0


@pytest.mark.parametrize(
    "less",
    [
        {"strength": 0.5},
        {"start": 0.5},
        {"end": 0.5},
        {"patches": 16},
        {"windows": 2},
    ],
)
def test_its_options_count(webui: WebUI, source: Image.Image, tiled: Reply, adapted: Reply, adapters: Adapters, less):
    image = webui.img2img(source, {**TILES, "adapter": adapters.random, **less}).image
    assert difference(image, adapted.image) > 1
    assert difference(image, tiled.image) > 1


def test_it_sees_the_whole_source_and_not_the_tile(webui: WebUI, photo: Image.Image, adapters: Adapters):
    """What lies outside of a tile changes what the adapter makes of it, and nothing else does."""
    source = photo.resize((96, 48))  # three tiles in a row
    other = source.copy()
    other.paste((255, 0, 0), (64, 0, 96, 48))
    first = (0, 0, 48, 96)  # no other tile reaches it

    def differ(adapter: str) -> int:
        options = {**TILES, "order": "linear", "colour": "none", "adapter": adapter}
        return difference(*(webui.img2img(image, options).image.crop(first) for image in (source, other)))

    assert differ("None") == 0
    assert differ(adapters.random) > 0


def test_the_automatic_encoder_is_the_one_that_the_adapter_names(
    webui: WebUI, source: Image.Image, adapted: Reply, adapters: Adapters
):
    reply = webui.img2img(source, {**TILES, "adapter": adapters.random, "encoder": "mini"})
    assert difference(reply.image, adapted.image) == 0
