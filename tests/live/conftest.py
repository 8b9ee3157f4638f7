"""Tests against a WebUI that runs: python -m pytest tests/live --webui=URL --models=FOLDER."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import pytest
from adapters import Adapters
from client import Reply, WebUI, difference
from PIL import Image
from plots import Plot

LOOPBACK = ("127.0.0.1", "localhost", "::1")
TILES = {"scale": 2.0, "tile": 96, "overlap": 16, "batch": 4}
"""Small tiles, so that also a slow machine gets through."""

SETTINGS = {
    "batch_cond_uncond": True,
    "img2img_background_color": "#ffffff",
    "img2img_color_correction": False,
    "img2img_extra_noise": 0.0,
    "img2img_fix_steps": False,
    "live_previews_enable": True,
    "samples_save": True,
}
"""Settings of the WebUI that tests override, with its own defaults."""

PREVIEWS = {"override_settings": {"live_previews_enable": True}}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("live", "tests against a running WebUI")
    group.addoption("--webui", metavar="URL", help="address of the WebUI, on this machine, with --api")
    group.addoption("--shots", metavar="FOLDER", type=Path, help="where pictures of the page are put, to be looked at")
    group.addoption("--hub", metavar="PORT", type=int, help="where it looks for the Hugging Face Hub")
    group.addoption("--api-auth", metavar="USER:PASSWORD", help="its own --api-auth, if it was started with one")
    group.addoption("--models", metavar="FOLDER", type=Path, help="its models/dinotile folder; adapters are lent to it")
    group.addoption("--unet-channels", default="320,640,1280,1280", help="of the loaded checkpoint, level by level")
    group.addoption("--unet-blocks", default=2, type=int, help="its residual blocks per level")
    group.addoption("--base", default="sd15", help="its family, as adapters name it")
    group.addoption("--controlnet", metavar="MODEL", help="a ControlNet for that checkpoint, as the WebUI names it")


def pytest_configure(config: pytest.Config) -> None:
    url, models = config.getoption("--webui"), config.getoption("--models")
    if not url or urlparse(url).hostname not in LOOPBACK:
        raise pytest.UsageError("tests/live needs --webui=URL, the address of a WebUI on this machine")
    if not models or not models.is_dir():
        raise pytest.UsageError("tests/live needs --models=FOLDER, the models/dinotile folder of that WebUI")


@pytest.fixture(scope="session")
def webui(request: pytest.FixtureRequest) -> WebUI:
    auth = request.config.getoption("--api-auth")
    return WebUI(request.config.getoption("--webui"), tuple(auth.split(":", 1)) if auth else None)


@pytest.fixture(scope="session", autouse=True)
def settings(webui: WebUI) -> None:
    """The WebUI puts an overridden setting back only if its configuration has it: see to it that it has."""
    present = webui.get("sdapi/v1/options").json()
    known = {name: default for name, default in SETTINGS.items() if name in webui.settings}
    webui.post("options", {name: present.get(name, default) for name, default in known.items()}).raise_for_status()


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A portrait, 256x192."""
    data = pytest.importorskip("skimage.data", reason="the photograph comes with scikit-image")
    return Image.fromarray(data.astronaut()[0:288, 64:448]).resize((256, 192), Image.Resampling.LANCZOS)


@pytest.fixture(scope="session")
def source(photo: Image.Image) -> Image.Image:
    """The portrait, 112x80: six of `TILES` when upscaled, three by two."""
    return photo.resize((112, 80), Image.Resampling.LANCZOS)


@pytest.fixture(scope="session")
def small(photo: Image.Image) -> Image.Image:
    """The portrait, 64x48: two of `TILES` when upscaled."""
    return photo.resize((64, 48), Image.Resampling.LANCZOS)


@pytest.fixture(scope="session")
def adapters(request: pytest.FixtureRequest) -> Iterator[Adapters]:
    """Adapters for the loaded checkpoint, in a folder of their own that is taken away again."""
    option = request.config.getoption
    folder = option("--models") / "adapters" / f"live-tests-{os.getpid()}"
    channels = [int(width) for width in option("--unet-channels").split(",")]
    folder.mkdir(parents=True)
    try:
        yield Adapters(folder, option("--base"), channels, option("--unet-blocks"))
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def tiled(webui: WebUI, source: Image.Image) -> Reply:
    """The source in `TILES`, without an adapter."""
    return webui.img2img(source, TILES)


@pytest.fixture(scope="session")
def adapted(webui: WebUI, source: Image.Image, adapters: Adapters) -> Reply:
    """The source in `TILES`, with an adapter of random weights."""
    return webui.img2img(source, {**TILES, "adapter": adapters.random})


@pytest.fixture(scope="session")
def plot(webui: WebUI) -> Plot:
    return Plot(webui)


@pytest.fixture(scope="session")
def plain(webui: WebUI, small: Image.Image, settings: None) -> Image.Image:
    """What the WebUI makes without DINO Tile, before any test has run. On some CPUs its first image after a start is a
    level off, also without the extension: that one does not count."""
    webui.img2img(small)
    return webui.img2img(small).image


@pytest.fixture(autouse=True)
def undisturbed(webui: WebUI, small: Image.Image, plain: Image.Image) -> Iterator[None]:
    """Whatever a test did: a plain generation after it is, bit for bit, what it was before the first.

    In Forge Neo the first image after one of another batch size may be a level off, also without the extension.
    """
    yield
    found = webui.img2img(small)
    off = difference(found.image, plain)
    neo = found.fields.get("Version", "").startswith("neo")
    assert off <= (1 if neo else 0), "a plain generation is no longer what it was"
    assert not off or difference(webui.img2img(small).image, plain) == 0, "plain generations stay a level off"
