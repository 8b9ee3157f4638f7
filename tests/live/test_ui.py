"""The img2img and txt2img tabs in a browser, as a user goes through them."""

from __future__ import annotations

import contextlib
import io
import re
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from client import WebUI, difference, fields
from PIL import Image

from lib_dinotile.dino.checkpoint import BUILT_IN
from lib_dinotile.lines import LETTERS
from lib_dinotile.settings import AUTOMATIC, Settings, Txt2Img
from lib_dinotile.tiling.plan import TilePlan

pytest.importorskip("playwright", reason="the page is tested with playwright: pip install '.[live]'")

from browser import LONG, MIDDLE, NARROW, PATIENCE, WIDE, Browser, Tab, open_browser, open_tab
from playwright.sync_api import expect

PHOTO = Path(__file__).parents[2] / "examples" / "photo.png"
FOLDED = 6
"""Groups that a beginner need not open."""


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """A cat, 150x100."""
    return Image.open(PHOTO).convert("RGB").resize((150, 100), Image.Resampling.LANCZOS)


@pytest.fixture(scope="module")
def url(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--webui").rstrip("/")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def tab(browser: Browser, url: str, picture: Image.Image) -> Iterator[Tab]:
    """With the picture, DINO Tile on, and everything so small that it does not take long."""
    with open_tab(browser, url) as tab:
        tab.drop(picture)
        tab.enable()
        tab.number("#img2img_steps", 4)
        tab.number("#img2img_denoising_strength", 0.4)
        tab.number("#img2img_seed", 7)
        tab.slide("tile", 128)
        tab.fold("Upscaler and tiles")
        tab.slide("overlap", 32)
        tab.fold("Upscaler and tiles")
        yield tab
        assert not [error for error in tab.errors if "dinotile" in error.lower()]


@pytest.fixture
def shots(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = request.config.getoption("--shots") or tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    return folder


STARTED = "internal/profile-startup"
"""How long the WebUI took to start, which it tells when it is done."""


def up(webui: WebUI, before: str) -> bool:
    """Waits until a WebUI that starts its page anew is done with that; before: what it told of its start before."""
    for _ in range(240):
        time.sleep(1)
        with contextlib.suppress(requests.ConnectionError):
            told = webui.get(STARTED)
            if told.ok and told.text != before:
                return True
    return False


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("window", [WIDE, MIDDLE, NARROW], ids=["wide", "middle", "narrow"])
def test_a_beginner_sees_few_plain_choices(
    browser: Browser, url: str, shots: Path, theme: str, window: tuple[int, int]
):
    with open_tab(browser, url, theme, window) as tab:
        assert not tab.switch.first.is_checked()
        tab.enable()
        seen = [option.name for option in Settings.table() if option.name != "enabled" and tab.shows(option.name)]
        assert seen == ["target", "scale", "tile", "guidance", "guard"]
        tab.shot(shots / f"folded-{theme}-{window[0]}.png")
        folded = tab.accordion.locator(".label-wrap").all_inner_texts()[1:]
        assert len(folded) == FOLDED
        for title in folded:
            tab.fold(title.split("\n")[0].strip(" ▼◀"))
        hidden = [option.name for option in Settings.table() if option.name != "enabled" and not tab.shows(option.name)]
        assert hidden == ["longest"]
        tab.shot(shots / f"open-{theme}-{window[0]}.png")
        frame = tab.accordion.bounding_box()
        for option in Settings.table():
            if option.name not in ("enabled", "longest"):
                box = tab.control(option.name).bounding_box()
                inside = frame["x"] <= box["x"] and box["x"] + box["width"] <= frame["x"] + frame["width"] + 1
                assert inside and box["width"] > 100, (option.name, box, frame)


def test_only_the_size_that_counts_is_shown(tab: Tab):
    for target, seen in (("longest side", (False, True)), ("img2img size", (False, False)), ("scale", (True, False))):
        tab.choose("target", target)
        tab.page.wait_for_timeout(2000)
        assert (tab.shows("scale"), tab.shows("longest")) == seen, target


def test_every_control_says_what_it_does(tab: Tab):
    page = tab.accordion.inner_text() + tab.accordion.evaluate("element => element.textContent")
    for option in Settings.table():
        if option.name != "enabled":
            assert option.label in page and option.help in page, option.name


def test_a_preview_shows_tiles_map_and_time_before_anything_is_run(tab: Tab, picture: Image.Image, shots: Path):
    plan = TilePlan(300, 200, 128, 32)
    line = tab.preview()
    more = r", up to \d+ (s|min) if the guard repaints tiles(; guidance takes extra time, [\w ]+)?"
    found = re.match(rf"300 x 200 pixels: (\d+) tiles of 128 x 128, about \d+ (s|min){more}\. ", line)
    assert found and int(found[1]) == len(plan), line
    shown = tab.page.locator("#dinotile_preview_image img")
    assert shown.is_visible()
    width, height = shown.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert width == 300 and height > 200  # a legend is below it
    tab.shot(shots / "preview.png")


def test_a_high_denoising_strength_is_warned_of_without_pressing_anything(browser: Browser, url: str, shots: Path):
    with open_tab(browser, url) as tab:
        notices = tab.control("notices").first
        expect(notices).not_to_be_visible()
        tab.enable()
        high = re.compile(r"Denoising strength 0\.\d+ is high for an upscale")  # as it is in this WebUI
        expect(notices).to_contain_text(high, timeout=PATIENCE)
        tab.shot(shots / "warned.png")
        tab.number("#img2img_denoising_strength", 0.3)
        expect(notices).not_to_be_visible(timeout=PATIENCE)
        tab.page.locator("#mode_img2img .tab-nav button", has_text=re.compile(r"^\s*Inpaint\s*$")).first.click()
        tab.page.locator("#img2img_inpaint_full_res label", has_text="Only masked").click()
        expect(notices).to_contain_text("the result keeps the size of the source", timeout=PATIENCE)
    with open_tab(browser, url, name="txt2img") as tab:
        tab.enable()
        tab.slide("denoise", 0.6)
        expect(tab.control("notices").first).to_contain_text("Denoising strength 0.6 is high", timeout=PATIENCE)


def test_the_title_says_whether_it_is_on_however_it_is_folded(browser: Browser, url: str):
    with open_tab(browser, url) as tab:
        state = tab.control("state").first
        for text, ticked in (("on", True), ("off", False)):  # the WebUI's accordion switches as it is folded
            tab.fold("DINO Tile")
            expect(state).to_have_text(re.compile(rf"^\s*{text}"), timeout=PATIENCE)
            assert tab.switch.first.is_checked() == ticked
        tab.switch.first.check()
        for shown in (True, False):  # once its box has been clicked no more
            tab.fold("DINO Tile")
            tab.page.wait_for_timeout(1000)
            assert tab.shows("scale") == shown and tab.switch.first.is_checked()
            expect(state).to_have_text(re.compile(r"^\s*on"), timeout=PATIENCE)


def test_whatever_is_typed_into_a_field_becomes_an_allowed_number(browser: Browser, url: str):
    with open_tab(browser, url) as tab:
        tab.enable()
        for title in tab.accordion.locator(".label-wrap").all_inner_texts()[1:]:
            tab.fold(title.split("\n")[0].strip(" ▼◀"))
        for option in Settings.table():
            if option.type not in (int, float) or option.choices or not tab.shows(option.name):
                continue
            least, most, step = option.minimum, option.maximum, option.step
            for typed in (least - 1, least + 1.6 * step, most - 0.6 * step, most + 1000, (least + most) / 2 + step / 3):
                tab.slide(option.name, typed)
                tab.page.wait_for_timeout(300)
                found = tab.slid(option.name)
                assert option.check(found) == found, (option.name, typed)
                inside = least <= typed <= most
                assert not inside or abs(found - typed) <= step / 2 + 1e-6, (option.name, typed, found)


def test_regions_are_named_on_the_preview_and_told_to_the_tiles(tab: Tab, shots: Path):
    tab.control("preview").click()
    boxes = [tab.page.locator(f"#dinotile_region_{letter} textarea") for letter in LETTERS]
    boxes[1].wait_for(state="visible")
    count = sum(box.is_visible() for box in boxes)
    assert 2 <= count < len(boxes) and all(box.is_visible() for box in boxes[:count])
    shown = tab.page.locator("#dinotile_preview_image img")
    shown.scroll_into_view_if_needed()
    frame = shown.bounding_box()
    said = set()
    for x, y in ((0.05, 0.1), (0.5, 0.4), (0.95, 0.5)):
        tab.page.mouse.click(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"])
        tab.page.wait_for_timeout(1500)
        said.add(tab.control("region_at").first.inner_text().strip())
    assert len(said) > 1 and all(re.fullmatch("This place is in region [A-L].", line) for line in said), said
    boxes[0].fill("tabby fur: soft")
    boxes[1].fill("wall ")
    tab.fold("Prompts per region")
    prompts = tab.control("region_prompts").locator("textarea")
    assert prompts.input_value() == "A: tabby fur: soft\nB: wall"
    prompts.fill("Ｂ：a blurred room\nA: fur")
    expect(boxes[0]).to_have_value("fur")
    expect(boxes[1]).to_have_value("a blurred room")
    tab.shot(shots / "regions.png")
    prompts.fill("B: a blurred room\nnot a line\nA: fur")
    boxes[0].fill("fine fur")
    expect(prompts).to_have_value("B: a blurred room\nnot a line\nA: fine fur")  # the other lines stay as they are
    prompts.fill("Ｂ：a blurred room\nA: fur")
    tab.control("preview").click()
    boxes[1].fill("a dark room")  # while the preview is made
    tab.page.wait_for_timeout(5000)
    assert boxes[0].input_value() == "fur" and boxes[1].input_value() == "a dark room"
    assert prompts.input_value() == "B: a dark room\nA: fur"
    tab.fold("Prompts per region")
    tab.generate()
    tab.done()
    assert re.search(r"region prompts: A.* in tiles? \d", tab.told), tab.told
    assert "A: fur" in fields(tab.image().info["parameters"])["DINO Tile region prompts"]
    tab.shot(shots / "regions-told.png", whole=True)
    tab.fold("Prompts per region")
    prompts.fill("")
    tab.fold("Prompts per region")


def test_an_interrogator_is_asked_for_regions_without_words_or_says_why_not(tab: Tab):
    buttons = tab.page.locator("#dinotile_naming button")
    if not buttons.count():
        pytest.skip("this WebUI has no interrogators")
    tab.page.locator("#dinotile_region_A textarea").fill("")
    buttons.last.click()
    tab.page.wait_for_function(
        "() => document.querySelector('#dinotile_preview_text .error') || "
        "document.querySelector('#dinotile_region_A textarea').value",
        timeout=LONG,
    )
    if not tab.page.locator("#dinotile_preview_text .error").count():
        assert all(
            field.input_value() for field in tab.page.locator("#dinotile_naming textarea").all() if field.is_visible()
        )
        return
    assert tab.page.locator("#dinotile_preview_text .error").inner_text().startswith("Tile captions: ")


def test_a_preview_follows_the_options(tab: Tab):
    tab.choose("target", "longest side")
    tab.slide("longest", 600)
    line = tab.preview()
    tab.choose("target", "scale")
    assert line.startswith("600 x 400 pixels: ")


def test_what_cannot_be_is_told_in_a_line(browser: Browser, tab: Tab, url: str):
    tab.slide("tile", 64)
    tab.fold("Upscaler and tiles")
    tab.slide("overlap", 40)
    assert tab.preview() == "Tile overlap: 40 is not allowed with Tile size 64, give at most 32"
    tab.slide("overlap", 32)
    tab.fold("Upscaler and tiles")
    tab.slide("tile", 128)
    with open_tab(browser, url) as empty:
        empty.enable()
        assert empty.preview() == "there is no image to upscale: drop one into the img2img tab"


def test_adapters_and_encoders_can_be_looked_up_anew(tab: Tab, request: pytest.FixtureRequest):
    folder: Path = request.config.getoption("--models") / "adapters"
    new = folder / "just-copied.safetensors"
    tab.fold("Adapter")
    try:
        new.write_bytes(b"")
        assert "just-copied" not in tab.choices("adapter")
        tab.page.locator("#dinotile_refresh_adapter").click()
        tab.page.wait_for_timeout(2000)
        assert "just-copied" in tab.choices("adapter")
    finally:
        new.unlink()
        tab.page.locator("#dinotile_refresh_adapter").click()
        tab.fold("Adapter")


def test_a_photo_is_upscaled_and_its_png_info_gives_it_again(
    browser: Browser, tab: Tab, url: str, picture: Image.Image, shots: Path
):
    tab.slide("guidance", 0.75)
    tab.choose("guard", "report")
    tab.generate()
    tab.done()
    first = tab.image()
    assert first.size == (300, 200)
    told = fields(first.info["parameters"])
    assert told["DINO Tile guidance"] == "0.75" and told["DINO Tile guard"] == "report"
    assert told["DINO Tile tile size"] == "128"
    assert "guidance decoder: " in tab.told
    tab.shot(shots / "generated.png", whole=True)
    with open_tab(browser, url) as other:
        other.read_png_info(first)
        assert other.switch.first.is_checked()
        assert other.slid("guidance") == 0.75 and other.chosen("guard") == "report" and other.slid("tile") == 128
        other.shot(shots / "sent.png", whole=True)
        other.drop(picture)
        other.generate()
        other.done()
        assert difference(first, other.image()) == 0
    tab.slide("guidance", 0.5)
    tab.choose("guard", "retry")


def test_an_interrupted_image_keeps_what_is_painted(tab: Tab, shots: Path):
    tab.number("#img2img_steps", 20)
    tab.slide("guidance", 0)
    tab.choose("guard", "off")
    tab.generate()
    tab.page.wait_for_function(
        "() => [...document.querySelectorAll('.progressDiv')].some("
        "bar => /DINO Tile: painting tiles: [1-9]\\d* of/.test(bar.innerText))",
        timeout=LONG,
    )
    tab.shot(shots / "running.png", whole=True)
    tab.page.locator("#img2img_interrupt").click()
    tab.done()
    told = fields(tab.image().info["parameters"])
    painted, total = map(int, told["DINO Tile painted"].split(" of "))
    assert 0 < painted < total
    tab.number("#img2img_steps", 4)
    tab.slide("guidance", 0.5)
    tab.choose("guard", "retry")


def test_a_refusal_is_told_where_the_user_looks(tab: Tab):
    tab.slide("tile", 64)
    tab.fold("Upscaler and tiles")
    tab.slide("overlap", 40)
    tab.generate()
    tab.done()
    assert "Tile overlap: 40 is not allowed with Tile size 64, give at most 32" in tab.told
    tab.slide("overlap", 32)
    tab.fold("Upscaler and tiles")
    tab.slide("tile", 128)


def test_txt2img_generates_and_upscales_and_its_png_info_gives_the_image_again(browser: Browser, url: str, shots: Path):
    with open_tab(browser, url, name="txt2img") as tab:
        assert not tab.switch.first.is_checked()
        tab.enable()
        seen = [option.name for option in Txt2Img.table() if option.name != "enabled" and tab.shows(option.name)]
        assert sorted(seen) == sorted(["target", "scale", "denoise", "steps", "tile", "guidance", "guard"])
        assert tab.page.locator("#txt2img_dinotile_preview").count() == 0
        tab.choose("target", "longest side")
        tab.page.wait_for_timeout(2000)
        assert tab.shows("longest") and not tab.shows("scale")
        tab.choose("target", "scale")
        tab.page.wait_for_timeout(2000)
        tab.number("#txt2img_steps", 4)
        tab.number("#txt2img_width", 128)
        tab.number("#txt2img_height", 64)
        tab.number("#txt2img_seed", 7)
        tab.slide("scale", 1.5)
        tab.slide("tile", 128)
        tab.slide("denoise", 0.45)
        tab.slide("steps", 6)
        tab.choose("guard", "report")
        tab.shot(shots / "txt2img-accordion.png")
        tab.generate()
        tab.done()
        first = tab.image()
        assert first.size == (192, 96)
        told = fields(first.info["parameters"])
        assert (told["Size"], told["DINO Tile denoise"], told["DINO Tile steps"]) == ("128x64", "0.45", "6")
        assert "guidance decoder: " in tab.told
        tab.shot(shots / "txt2img-generated.png", whole=True)
        assert not [error for error in tab.errors if "dinotile" in error.lower()]
    with open_tab(browser, url, name="txt2img") as other:
        other.read_png_info(first)
        expect(other.switch.first).to_be_checked(timeout=PATIENCE)
        for name, value in (("denoise", "0.45"), ("steps", "6"), ("scale", "1.5")):
            expect(other.control(name).locator("input[type=number]")).to_have_value(value, timeout=PATIENCE)
        assert other.chosen("guard") == "report"
        other.generate()
        other.done()
        assert difference(first, other.image()) == 0
        sent = other.page.locator("#img2img_seed input")
        for _ in range(3):  # a busy Forge may send nothing but the image
            other.show()
            other.page.locator("#txt2img_send_to_img2img").click()
            other.page.wait_for_timeout(5000)
            if sent.first.input_value() == "7":
                break
        # Its options go with it, but it is upscaled already.
        expect(other.page.locator("#dinotile_scale input[type=number]")).to_have_value("1.5", timeout=PATIENCE)
        assert other.page.locator("#dinotile_guard input").first.input_value() == "report"
        img2img = "#dinotile_enabled input.input-accordion-checkbox, #dinotile_enabled-visible-checkbox"
        assert not other.page.locator(img2img).first.is_checked()
        other.shot(shots / "txt2img-sent.png", whole=True)
        assert not [error for error in other.errors if "dinotile" in error.lower()]
    with open_tab(browser, url) as other:
        other.read_png_info(first)
        assert not other.switch.first.is_checked()


def compared(tab: Tab) -> list[Image.Image]:
    """Source and result, as the slider shows them."""
    button, shown = tab.page.locator("#dinotile_compare"), tab.page.locator("#dinotile_slider img")
    if not button.count():
        pytest.skip("this WebUI has no image slider")
    button.click()
    tab.page.wait_for_timeout(5000)  # until then those of the last time are there
    expect(shown).to_have_count(2)
    addresses = [urllib.parse.urljoin(tab.page.url, image.get_attribute("src")) for image in shown.all()]
    return [Image.open(io.BytesIO(tab.page.request.get(each).body())).convert("RGB") for each in addresses]


@pytest.mark.parametrize("stretched", [False, True])
def test_a_result_is_laid_over_its_source(tab: Tab, picture: Image.Image, stretched: bool, shots: Path):
    if stretched:  # by img2img's resize mode, Just resize
        tab.choose("target", "img2img size")
        tab.number("#img2img_width", 192)
        tab.number("#img2img_height", 192)
    try:
        tab.generate()
        tab.done()
        result = tab.image()
        before, after = compared(tab)
        tab.shot(shots / "slider.png")
        assert result.size == ((192, 192) if stretched else (300, 200))
        assert difference(before, picture.resize(result.size, Image.Resampling.LANCZOS)) <= 1
        assert difference(after, result) <= 1
    finally:
        tab.choose("target", "scale")


def test_the_first_of_several_results_is_compared_and_not_their_grid(tab: Tab):
    tab.number("#img2img_batch_count", 2)
    try:
        tab.generate()
        tab.done()
        assert {image.size for image in compared(tab)} == {(300, 200)}
    finally:
        tab.number("#img2img_batch_count", 1)


def test_an_encoder_is_chosen_by_its_marked_name(tab: Tab):
    tab.fold("DINO encoder")
    [shown] = [text for text in tab.choices("encoder") if BUILT_IN in text]
    assert shown in (BUILT_IN, f"{BUILT_IN} (built in)")
    tab.choose("encoder", BUILT_IN)
    try:
        line = tab.page.locator("#dinotile_encoder_line").first
        expect(line.get_by_text("Looks at your image: the small built-in encoder")).to_be_visible()
        tab.generate()
        tab.done()
        assert fields(tab.image().info["parameters"])["DINO Tile encoder"] == BUILT_IN
    finally:
        tab.choose("encoder", AUTOMATIC)
        tab.fold("DINO encoder")


def test_the_plots_button_fills_in_the_choices_of_an_axis(tab: Tab, shots: Path):
    page, option = tab.page, Settings.option("guard")
    plot = page.locator("#img2img_script_container")

    def choose(place: str, text: str) -> None:
        plot.locator(f"{place} input").first.fill(text)
        page.locator("ul.options li, ul[role=listbox] li").filter(has_text=text).first.click()
        page.wait_for_timeout(2000)

    choose("#script_list", "X/Y/Z plot")
    try:
        choose("#script_img2img_xyz_plot_x_type", f"[DINO Tile] {option.label}")
        plot.locator("#xyz_grid_fill_x_tool_button").click()
        page.wait_for_timeout(2000)
        for value in option.choices:
            expect(plot.locator(".token").filter(has_text=value).first).to_be_visible()
        plot.screenshot(path=shots / "plot.png")
    finally:
        choose("#script_list", "None")


def test_the_users_defaults_survive_a_reload(browser: Browser, url: str, webui: WebUI):
    """The last test: pages that are open are of no use then."""

    def apply(scale: float) -> None:
        before = webui.get(STARTED).text
        with open_tab(browser, url) as tab:
            tab.enable()
            tab.slide("scale", scale)
            tab.switch.first.uncheck()
            tab.page.wait_for_timeout(1000)
            tab.apply_defaults()
            tab.reload_ui()
        assert up(webui, before)

    try:
        apply(3.5)
        with open_tab(browser, url) as tab:
            tab.enable()
            assert tab.slid("scale") == 3.5
    finally:
        apply(2.0)
