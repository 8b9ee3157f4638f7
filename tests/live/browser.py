"""A running WebUI as its user sees it: its img2img and txt2img tabs in headless Chromium."""

from __future__ import annotations

import io
import re
import shutil
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Browser, Locator, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""The system's own browser."""
PATIENCE = 60_000
"""Milliseconds that the page may take for anything, on a slow machine."""
LONG = 600_000
"""Milliseconds for a generation."""
WIDE, MIDDLE, NARROW = (1400, 1100), (800, 1000), (500, 1000)
"""Windows, in pixels."""


@contextmanager
def open_browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


@contextmanager
def open_tab(
    browser: Browser, url: str, theme: str = "light", window: tuple[int, int] = WIDE, name: str = "img2img"
) -> Iterator[Tab]:
    """The tab of that name in a window of its own."""
    page = browser.new_page(viewport={"width": window[0], "height": window[1]})
    page.set_default_timeout(PATIENCE)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    try:
        page.goto(f"{url}/?__theme={theme}", wait_until="domcontentloaded")
        yield Tab(page, errors, name)
    finally:
        page.close()


class Tab:
    """What a user does there."""

    def __init__(self, page: Page, errors: list[str], name: str = "img2img") -> None:
        self.page, self.errors, self._name = page, errors, name
        self._own = "#dinotile_" if name == "img2img" else f"#{name}_dinotile_"
        self.show()
        self.accordion = page.locator(f"{self._own}enabled").first
        self.accordion.scroll_into_view_if_needed()
        # The switch in the header is laid there by the WebUI's own script, once the page stands.
        self.switch = page.locator(
            f"{self._own}enabled input.input-accordion-checkbox, {self._own}enabled-visible-checkbox"
        )
        self.switch.first.wait_for()
        page.wait_for_timeout(3000)

    def show(self) -> None:
        """Comes back to the tab."""
        self.page.locator("#tabs > .tab-nav button", has_text=self._name).first.click()

    def enable(self) -> None:
        """Opens the accordion, which turns its switch on."""
        label = self.accordion.locator(".label-wrap").first
        label.scroll_into_view_if_needed()
        label.click()
        self.control("scale").wait_for(state="visible")
        assert self.switch.first.is_checked()

    def control(self, name: str) -> Locator:
        return self.page.locator(f"{self._own}{name}")

    def shows(self, name: str) -> bool:
        return self.control(name).first.is_visible()

    def fold(self, title: str) -> None:
        """Opens a group, or closes it."""
        label = self.accordion.locator(".label-wrap", has_text=title)
        label.scroll_into_view_if_needed()
        label.click()

    def slide(self, name: str, value: float) -> None:
        box = self.control(name).locator("input[type=number]")
        box.fill(str(value))
        box.blur()

    def slid(self, name: str) -> float:
        return float(self.control(name).locator("input[type=number]").input_value())

    def choose(self, name: str, value: str) -> None:
        box = self.control(name).locator("input").first
        box.scroll_into_view_if_needed()
        box.click()
        self.page.locator("ul.options li, ul[role=listbox] li").filter(has_text=value).first.click()

    def chosen(self, name: str) -> str:
        return self.control(name).locator("input").first.input_value()

    def choices(self, name: str) -> list[str]:
        self.control(name).locator("input").first.click()
        found = self.page.locator("ul.options li, ul[role=listbox] li").all_inner_texts()
        self.page.keyboard.press("Escape")
        self.control(name).locator("input").first.blur()  # or the next click would not open it
        return [text.replace("✓", "").strip() for text in found]

    def drop(self, image: Image.Image, place: str = "#img2img_image") -> None:
        """Drops an image into the img2img tab, or another place."""
        information = PngInfo()
        for key, text in image.info.items():
            if isinstance(text, str):
                information.add_text(key, text)
        file = io.BytesIO()
        image.save(file, "PNG", pnginfo=information)
        upload = {"name": "photo.png", "mimeType": "image/png", "buffer": file.getvalue()}
        self.page.locator(f"{place} input[type=file]").first.set_input_files(upload)
        self.page.locator(f"{place} img").first.wait_for(state="attached")
        self.page.wait_for_timeout(2000)

    def number(self, selector: str, value: float) -> None:
        """One of the WebUI's own sliders."""
        box = self.page.locator(f"{selector} input[type=number]").first
        box.fill(str(value))
        box.blur()

    def preview(self) -> str:
        """What the preview says."""
        answer = self.page.locator("#dinotile_preview_text p, #dinotile_preview_text .error").first
        before = answer.inner_text() if answer.count() else ""
        self.control("preview").click()
        self.page.wait_for_function(
            "before => { const found = document.querySelector("
            "'#dinotile_preview_text p, #dinotile_preview_text .error');"
            "return found && found.innerText !== before; }",
            arg=before,
        )
        self.page.wait_for_timeout(1000)
        return answer.inner_text().strip()

    def read_png_info(self, image: Image.Image) -> None:
        """Through the PNG Info tab, and its button that sends everything to this tab."""
        self.page.locator("#tabs > .tab-nav button", has_text="PNG Info").click()
        self.drop(image, "#pnginfo_image")
        self.page.locator("#tab_pnginfo").get_by_text("DINO Tile: ").first.wait_for()
        self.page.locator(f"#tab_pnginfo #{self._name}_tab").click()
        self.page.wait_for_timeout(4000)

    def apply_defaults(self) -> None:
        """What the controls are at becomes the user's defaults: Settings, Defaults, Apply."""
        self.page.locator("#tabs > .tab-nav button", has_text="Settings").click()
        self.page.locator("#settings .tab-nav button", has_text=re.compile(r"^\s*Defaults\s*$")).click()
        self.page.locator("#ui_defaults_apply").click()
        self.page.wait_for_timeout(3000)

    def reload_ui(self) -> None:
        """The link at the foot of the page."""
        self.page.locator("#footer").get_by_text("Reload UI").click()
        self.page.wait_for_timeout(5_000)

    def generate(self) -> None:
        """Does not wait for the image."""
        self.page.locator(f"#{self._name}_generate").click()

    def done(self) -> None:
        """Waits for the end of a generation."""
        self.page.wait_for_timeout(1500)
        self.page.wait_for_function("() => !document.querySelector('.progressDiv, .livePreview')", timeout=LONG)
        self.page.wait_for_timeout(1500)

    @property
    def told(self) -> str:
        """What stands below the images."""
        places = (f"#html_info_{self._name}", f"#html_log_{self._name}")
        return "\n".join(self.page.locator(place).first.inner_text() for place in places)

    def image(self) -> Image.Image:
        """The first of the gallery, as the file that it is, PNG info and all."""
        source = self.page.locator(f"#{self._name}_gallery img").first.get_attribute("src")
        answer = self.page.request.get(urllib.parse.urljoin(self.page.url, source))
        return Image.open(io.BytesIO(answer.body()))

    def shot(self, path: Path, whole: bool = False) -> None:
        """A picture of the accordion, or of the whole page."""
        self.page.mouse.move(0, 0)
        self.page.wait_for_timeout(500)
        (self.page if whole else self.accordion).screenshot(path=path)
