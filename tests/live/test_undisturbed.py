"""What a run leaves behind: nothing. (Every other test is held to this too, see `undisturbed`.)"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from adapters import Adapters
from client import WebUI, difference
from conftest import TILES
from PIL import Image

Run = Callable[[WebUI, Image.Image, Adapters], object]


def interrupted(webui: WebUI, source: Image.Image, adapters: Adapters) -> None:
    """With an adapter, in the middle of a tile."""
    job = webui.start(source, {**TILES, "adapter": adapters.random, "batch": 1}, steps=20)
    next(look for look in job.looks() if look.tiles)
    webui.post("interrupt")
    assert "DINO Tile painted" in job.reply().fields


RUNS: dict[str, Run] = {
    "without an adapter": lambda webui, source, adapters: webui.img2img(source, TILES),
    "with an adapter": lambda webui, source, adapters: webui.img2img(source, {**TILES, "adapter": adapters.random}),
    "refused for its options": lambda webui, source, adapters: webui.refusal(source, {**TILES, "scale": 0}),
    "refused for its adapter": lambda webui, source, adapters: webui.refusal(
        source, {**TILES, "adapter": adapters.other_shape}
    ),
    "interrupted": interrupted,
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_a_run_leaves_plain_generations_as_they_were(
    webui: WebUI, source: Image.Image, small: Image.Image, adapters: Adapters, run: Run
):
    before = webui.txt2img().image, webui.img2img(small).image
    run(webui, source, adapters)
    after = webui.txt2img().image, webui.img2img(small).image
    assert [difference(*pair) for pair in zip(before, after)] == [0, 0]
