"""PNG info in a request sets DINO Tile's options: the WebUI takes scripts' from it, not the prompt and the seed."""

from __future__ import annotations

import pytest
from client import Reply, WebUI, difference
from PIL import Image


@pytest.mark.parametrize("run", ["tiled", "adapted"])
def test_png_info_gives_the_image_again(webui: WebUI, source: Image.Image, request: pytest.FixtureRequest, run: str):
    first: Reply = request.getfixturevalue(run)
    second = webui.img2img(source, infotext=first.infotexts[0])
    assert difference(first.image, second.image) == 0
    assert first.infotexts == second.infotexts


def test_png_info_without_dino_tile_does_not_switch_it_on(webui: WebUI, small: Image.Image):
    first = webui.img2img(small)
    second = webui.img2img(small, infotext=first.infotexts[0])
    assert difference(first.image, second.image) == 0
