"""The first minute in a browser: from no DINOv2 to one that is calibrated, and how far one gets without a network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client import WebUI
from conftest import TILES
from PIL import Image

from lib_dinotile.dino.checkpoint import CONFIG, KNOWN, WEIGHTS
from lib_dinotile.settings import AUTOMATIC, Settings
from tests.hub import Hub, serve

pytest.importorskip("playwright", reason="the page is tested with playwright: pip install '.[live]'")

from browser import Browser, Tab, open_browser, open_tab
from playwright.sync_api import Locator, expect

NAME, SHORT = KNOWN[0], KNOWN[0].split("/")[1]
OFFER = "No DINOv2 is installed: the small built-in encoder looks at your image, and it sees much less."
BUTTON = f"Download {SHORT} (88 MB)"
PATIENCE = 180_000
"""Milliseconds for a calibration, on a slow machine."""
PAUSE = 0.02
"""Seconds between two blocks of the download: it can be watched, and stopped."""
DEFAULTS = {name: Settings.option(name).default for name in ("guidance", "guard")}


@pytest.fixture(scope="module")
def port(request: pytest.FixtureRequest) -> int:
    """Where the WebUI looks for the Hub."""
    port = request.config.getoption("--hub")
    if not port:
        pytest.skip("needs --hub=PORT, and a WebUI that looks for the Hugging Face Hub there")
    return port


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A DINOv2 of random weights: little work, and 11 MB, nearly all of them position embeddings."""
    transformers = pytest.importorskip("transformers", reason="it makes the model to download")
    import torch

    folder = tmp_path_factory.mktemp("published")
    config = transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=2800, patch_size=14
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.Dinov2Model(config).save_pretrained(folder, safe_serialization=True)
    return {file: (folder / file).read_bytes() for file in (CONFIG, WEIGHTS)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def models(webui: WebUI, port: int, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The WebUI's models, without any DINOv2; what a test adds is taken away again."""
    there = [entry["name"] for entry in encoders(webui).values() if entry["installed"]]
    if there != ["mini"]:
        pytest.skip(f"the WebUI has a DINOv2: {', '.join(there[1:])}")
    folder: Path = request.config.getoption("--models")
    before = contents(folder)
    yield folder
    shutil.rmtree(folder / "encoders" / SHORT, ignore_errors=True)
    for file in contents(folder) - before:
        if file.startswith("heads/calibrated/"):
            (folder / file).unlink()


@pytest.fixture(params=["light", "dark"])
def tab(browser: Browser, webui: WebUI, models: Path, request: pytest.FixtureRequest) -> Iterator[Tab]:
    with open_tab(browser, address(request), request.param) as tab:
        tab.enable()
        yield tab
        assert not [error for error in tab.errors if "dinotile" in error.lower()]


@pytest.fixture
def shot(tab: Tab, request: pytest.FixtureRequest, tmp_path: Path):
    """Keeps a picture of the accordion."""
    folder = request.config.getoption("--shots") or tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    theme = request.node.callspec.params["tab"]
    return lambda name: tab.shot(folder / f"first-minute-{name}-{theme}.png")


def address(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--webui").rstrip("/")


def encoders(webui: WebUI) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in webui.dinotile("encoders").json()}


def contents(folder: Path) -> set[str]:
    """Of a folder, hidden files too, those in folders as paths."""
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def line(tab: Tab) -> Locator:
    return tab.control("encoder_line").first  # in old gradio there are two, one in the other


def offers(tab: Tab) -> None:
    """It says that there is no DINOv2, and has a button that gets one."""
    expect(line(tab)).to_contain_text(OFFER, timeout=PATIENCE)
    expect(tab.control("get_ready")).to_have_text(BUTTON)
    expect(tab.control("get_ready")).to_be_visible()
    expect(tab.control("stop")).not_to_be_visible()
    expect(line(tab).locator("progress")).to_have_count(0)


def works(tab: Tab, text: str | re.Pattern[str]) -> None:
    """It says what it does, with a bar, and has a button to stop that."""
    expect(line(tab)).to_contain_text(text, timeout=PATIENCE)
    expect(line(tab).locator("progress")).to_be_visible()
    expect(tab.control("stop")).to_be_visible()
    expect(tab.control("get_ready")).not_to_be_visible()


def test_without_a_network_a_line_says_which_files_go_where(tab: Tab, models: Path, shot):
    """Nobody answers where the WebUI looks for the Hub."""
    before = contents(models)
    offers(tab)
    shot("offer")
    tab.control("get_ready").click()
    failure = line(tab).locator(".error")
    expect(failure).to_be_visible(timeout=PATIENCE)
    told = failure.inner_text()
    assert "the Hugging Face Hub cannot be reached" in told and "\n" not in told
    target = (models / "encoders" / SHORT).resolve()
    assert f"put {CONFIG} and {WEIGHTS} of https://huggingface.co/{NAME} into " in told
    assert Path(told.rpartition(" into ")[2]).resolve() == target
    offers(tab)
    shot("offline")
    assert contents(models) == before and not target.exists()


def test_a_download_can_be_stopped_and_ends_with_a_calibrated_encoder(
    tab: Tab,
    browser: Browser,
    webui: WebUI,
    small: Image.Image,
    models: Path,
    port: int,
    files: dict[str, bytes],
    shot,
    request: pytest.FixtureRequest,
):
    before, megabytes = contents(models), round(sum(map(len, files.values())) / 1e6)
    downloading = re.compile(rf"Downloading {SHORT}, [1-9] of {megabytes} MB")
    looks = f"Looks at your image: {SHORT}, {{}}."
    offers(tab)
    with serve(Hub({NAME: files}, pause=PAUSE), port) as hub:
        tab.control("get_ready").click()
        works(tab, downloading)
        tab.control("stop").click()
        offers(tab)
        assert contents(models) == before
        assert not line(tab).locator(".error").count()

        tab.control("get_ready").click()
        works(tab, downloading)
        shot("downloading")
        hub.pause = 50 * PAUSE  # until the other pages stand, which may take a while
        with open_tab(browser, address(request)) as second, open_tab(browser, address(request)) as third:
            for other in (second, third):
                other.enable()
                works(other, f"Downloading {SHORT}")
        hub.pause = 0
        works(tab, f"Getting to know {SHORT}, once")
        shot("calibrating")
        tab.control("stop").click()
        expect(tab.control("get_ready")).to_be_visible(timeout=PATIENCE)
        expect(tab.control("get_ready")).to_have_text("Calibrate now")
        assert line(tab).inner_text().strip() == looks.format("not calibrated yet: done once, at the first run")
        shot("not-calibrated")
    tab.control("get_ready").click()
    works(tab, f"Getting to know {SHORT}, once")
    expect(line(tab)).to_have_text(looks.format("calibrated"), timeout=PATIENCE)
    assert not tab.shows("get_ready") and not tab.shows("stop")
    shot("done")
    check_installed(tab, webui, models, files)
    check_used(webui, small)


def check_installed(tab: Tab, webui: WebUI, models: Path, files: dict[str, bytes]) -> None:
    """On disk, in the list, for the API and on the command line."""
    assert {file.name: file.read_bytes() for file in (models / "encoders" / SHORT).iterdir()} == files
    assert not [file for file in contents(models) if Path(file).name.startswith(".") or file.endswith(".lock")]
    tab.fold("DINO encoder")
    assert tab.choices("encoder")[:3] in (
        [AUTOMATIC, "mini (built in)", f"{SHORT} (installed)"],
        [AUTOMATIC, "mini", NAME],  # gradio 3 shows values as they are, and the text above them says it
    )
    assert tab.chosen("encoder") == AUTOMATIC
    found = encoders(webui)
    assert found[NAME] == {"name": NAME, "installed": True, "calibrated": [2.0], "automatic": True}
    assert found["mini"]["installed"] and not found["mini"]["automatic"]
    # It looks in the user's cache, or below the WebUI that it is an extension of.
    command = [sys.executable, "-m", "lib_dinotile", "encoders", "--json"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(models.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert {entry["name"]: entry for entry in json.loads(done.stdout)}[NAME] == found[NAME]


def check_used(webui: WebUI, small: Image.Image) -> None:
    """By the next run, which has nothing to calibrate any more."""
    reply = webui.img2img(small, {**TILES, **DEFAULTS})
    assert (reply.fields["DINO Tile encoder"], reply.fields["DINO Tile head"]) == (NAME, "calibrated")
    notes = reply.extra["DINO Tile report"][0]["notes"]
    assert "restoration head: calibrated" in notes and not [note for note in notes if note.startswith("calibrated ")]
