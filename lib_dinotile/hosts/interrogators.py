"""The WebUI's interrogators, where it has any: what an image shows, in words."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

from modules import shared
from PIL import Image

from lib_dinotile import DinotileError, one_line
from lib_dinotile.engine.host import Interrupted
from lib_dinotile.hosts.bars import stopped
from lib_dinotile.hosts.patched import patched


def _load(name: str, load: Callable[[], object]) -> None:
    """DinotileError if it cannot be loaded."""
    try:
        load()
    except Exception as error:  # whatever a download or a damaged file raises
        # The WebUIs take the first of no files where the download has failed.
        here = not isinstance(error, (IndexError, OSError))
        why = one_line(error) if here else "its model is not on this machine and could not be downloaded"
        raise DinotileError(
            f"captions: {name} cannot be loaded: {why}; see the WebUI's log, or choose another interrogator or None"
        ) from error


def _each(name: str, images: Sequence[Image.Image], ask: Callable[[Image.Image], str]) -> list[str]:
    """What it says of each of them. Interrupted if the user stops it."""
    captions = []
    for number, image in enumerate(images, 1):
        if stopped():
            raise Interrupted
        shared.state.textinfo = f"DINO Tile: {name} looks at tile {number} of {len(images)}"
        caption = ask(image)
        if "<error>" in caption:
            raise DinotileError(
                f"captions: {name} failed, see the WebUI's log; choose another interrogator, or None", 500
            )
        captions.append(" ".join(caption.split()))  # a tile's prompt is one line
    return captions


def _clip(images: Sequence[Image.Image]) -> list[str]:
    model = shared.interrogator

    def ask(image: Image.Image) -> str:
        caption: str = model.interrogate(image)
        if "<error>" in caption:  # it only logs why
            _load("CLIP", model.load)
        return caption

    # It would begin and end a job of its own, and the running one with it.
    with patched(shared.state, begin=lambda *_, **__: None, end=lambda: None):
        return _each("CLIP", images, ask)


def _deepbooru(images: Sequence[Image.Image]) -> list[str]:
    from modules import deepbooru

    model = deepbooru.model
    _load("DeepBooru", model.start)
    try:
        return _each("DeepBooru", images, model.tag_multi)
    finally:
        model.stop()


def interrogators() -> dict[str, Callable[[Sequence[Image.Image]], list[str]]]:
    """Those of this WebUI by name: they give a caption of each of the RGB images."""
    found: dict[str, Callable[[Sequence[Image.Image]], list[str]]] = {}
    if hasattr(shared, "interrogator"):
        found["CLIP"] = _clip
    if importlib.util.find_spec("modules.deepbooru") is not None:
        found["DeepBooru"] = _deepbooru
    return found
