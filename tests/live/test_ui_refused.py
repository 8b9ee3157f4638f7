"""A refusal on the page is a line for users."""

from __future__ import annotations

import pytest
from client import WebUI
from PIL import Image

pytest.importorskip("playwright", reason="the page is tested with playwright: pip install '.[live]'")

from browser import open_browser, open_tab


def test_the_page_says_whose_refusal_it_is_and_what_to_do(webui: WebUI, small: Image.Image, request):
    url = request.config.getoption("--webui").rstrip("/")
    with open_browser() as browser, open_tab(browser, url) as tab:
        tab.drop(small)
        tab.enable()
        tab.fold("Prompts per region")
        tab.control("tile_prompts").locator("textarea").fill("99: whiskers")
        tab.fold("Prompts per region")
        tab.generate()
        tab.done()
        folder = request.config.getoption("--shots")
        if folder is not None:
            tab.shot(folder / "refused.png", whole=True)
        told = tab.page.locator("#html_log_img2img").first.inner_text()
    assert "DINO Tile: Prompts per tile: there is no tile 99, this image has 1" in told
    assert "Error" not in told
