"""What a run leaves behind: nothing. (Every other test is held to this too, see `undisturbed`.)"""

from __future__ import annotations

import pytest
from adapters import Adapters
from client import WebUI
from conftest import TILES
from PIL import Image


@pytest.fixture(params=["no adapter", "adapter", "refused options", "refused adapter"])
def run(request: pytest.FixtureRequest, webui: WebUI, small: Image.Image, adapters: Adapters) -> None:
    """A run of every kind; an interrupted one is in test_interrupt.py."""
    kinds = {
        "no adapter": lambda: webui.img2img(small, TILES),
        "adapter": lambda: webui.img2img(small, {**TILES, "adapter": adapters.random}),
        "refused options": lambda: webui.refusal(small, {**TILES, "scale": 0}),
        "refused adapter": lambda: webui.refusal(small, {**TILES, "adapter": adapters.other_shape}),
    }
    kinds[request.param]()


def test_a_plain_generation_is_the_same_after_a_run(webui: WebUI, small: Image.Image, plain, run):
    assert webui.plain(small) == plain
