"""The Preview button: the tiles, what DINO sees and how long it will take, before anything is painted."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import gradio as gr
from modules import call_queue, errors

from lib_dinotile import DinotileError
from lib_dinotile.hosts import pace
from lib_dinotile.retry import reserve
from lib_dinotile.settings import Settings
from lib_dinotile.ui.prospect import Prospect, checkpoint, flat

IMAGES = ("img2img_image", "img2img_sketch", "img2maskimg", "inpaint_sketch", "img_inpaint_base")
"""The places for a source, in the order of img2img's tabs."""
BACKGROUND = "logical_image_background"
"""Class of the component that holds the picture of a place in Forge."""
BATCH = len(IMAGES)
"""Number of the tab that has no picture to show."""
NUMBERS = {
    "steps": "img2img_steps",
    "denoise": "img2img_denoising_strength",
    "width": "img2img_width",
    "height": "img2img_height",
    "resize": "resize_mode",
    "scale": "img2img_scale",
}
"""img2img's own controls that a preview depends on."""
LAST = "img2img_gallery"
"""By the time that this is there, all of them are."""


class Img2Img:
    """img2img's own controls, picked up while the WebUI builds its page."""

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}
        self._place: str | None = None
        self._hidden: list[Any] = []
        self._own: tuple[Any, Any, Any, Mapping[str, Any]] | None = None

    def pick(self, component: Any, **arguments: Any) -> None:
        """Called with every component that is built, and the arguments that it is built with."""
        name = arguments.get("elem_id")
        if name == "mode_img2img":  # img2img's part of the page begins
            self.__init__()
        if name in IMAGES:
            self._place = name
        if name in IMAGES and isinstance(component, gr.Image):
            self._found[name] = component
        elif self._place and BACKGROUND in (arguments.get("elem_classes") or ()):
            self._found.setdefault(self._place, component)
        elif name in NUMBERS.values():
            self._found[name] = component
        elif name is None and isinstance(component, gr.Number) and not component.visible:
            self._hidden.append(component)  # the numbers of the chosen tabs: of sources, and of sizes
        elif name == LAST:
            self._connect()

    def show_in(self, button: Any, text: Any, picture: Any, options: Mapping[str, Any]) -> None:
        """What the preview is asked by and shown in, and the controls that its options come from."""
        self._own = button, text, picture, options

    def _connect(self) -> None:
        if self._own is None:
            return
        button, text, picture, options = self._own
        places = [name for name in IMAGES if name in self._found]
        numbers = [key for key, name in NUMBERS.items() if name in self._found]
        tabs = self._hidden[:2]
        inputs = [
            *(self._found[name] for name in places),
            *(self._found[NUMBERS[key]] for key in numbers),
            *tabs,
            *options.values(),
        ]

        def ask(*values: Any) -> tuple[Any, Any]:
            rest = iter(values)
            sources = {name: next(rest) for name in places}
            img2img = {key: next(rest) for key in numbers}
            chosen, sizing = [next(rest) for _ in tabs] if len(tabs) == 2 else (0, 0)
            told = dict(zip(options, rest))
            return answer(sources, int(chosen or 0), int(sizing or 0), img2img, told)

        button.click(fn=ask, inputs=inputs, outputs=[text, picture])


def answer(
    sources: Mapping[str, Any], chosen: int, sizing: int, img2img: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[Any, Any]:
    """What to show: a line, and the picture. What cannot be upscaled is told in the line."""
    try:
        with call_queue.queue_lock:  # after what is being generated
            line, picture = look(sources, chosen, sizing, img2img, options)
        return gr.update(value=f"<p>{html.escape(line)}</p>"), gr.update(value=picture, visible=True)
    except DinotileError as error:
        line = str(error)
    except Exception as error:
        errors.report("DINO Tile: preview failed", exc_info=True)
        line = f"the preview failed: {' '.join(str(error).split()) or type(error).__name__}"
    return gr.update(value=f"<div class='error'>{html.escape(line)}</div>"), gr.update(value=None, visible=False)


def look(
    sources: Mapping[str, Any], chosen: int, sizing: int, img2img: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[str, Any]:
    """The line and the picture (RGB). DinotileError as in a run."""
    if chosen == BATCH:
        raise DinotileError("a preview shows one image: choose a tab with one, Batch has many")
    source = sources.get(IMAGES[chosen])
    source = source["image"] if isinstance(source, dict) else source  # with a mask drawn on it
    if source is None:
        raise DinotileError("there is no image to upscale: drop one into the img2img tab")
    source, settings = flat(source), Settings.parse({**options, "enabled": True})
    given = int(img2img.get("width") or 0), int(img2img.get("height") or 0)
    if sizing == 1:  # Resize by, as img2img counts it
        given = tuple(int(side * img2img["scale"]) // 8 * 8 for side in source.size)
    model = checkpoint()
    prospect = Prospect(source.size, settings, model, given, int(img2img.get("resize") or 0))
    picture = prospect.semantic_map(source)
    steps = max(1, int((img2img.get("steps") or 20) * min(img2img.get("denoise") or 0, 0.999)) + 1)
    return describe(prospect, guess(prospect, model, steps)), picture


def guess(prospect: Prospect, model: Any, steps: int) -> float | None:
    """Seconds that it will take, or None if that cannot be said."""
    _, pixels = prospect.workload
    known = pace.guess(model, pixels, steps)
    if known is None and pixels:
        try:
            pace.try_out(model, prospect.plan.tile_size)
        except Exception:
            errors.report("DINO Tile: a tile could not be tried out", exc_info=True)
        known = pace.guess(model, pixels, steps)
    return known


def describe(prospect: Prospect, seconds: float | None) -> str:
    """It in a line."""
    plan, (tiles, _) = prospect.plan, prospect.workload
    main = 0 if plan.order == "none" else len(plan)
    parts = [f"{main} tiles of {plan.tile_size[0]} x {plan.tile_size[1]}"] if main else []
    if tiles > main:
        parts.append(f"{tiles - main} for the seam pass")
    work = " and ".join(parts) or "nothing to paint"
    time = "" if not tiles else ", time not known yet" if seconds is None else f", about {in_words(seconds)}"
    more = reserve(prospect.settings) * (seconds or 0)
    time += f", and up to {in_words(more)} more for tiles that the guard paints again" if more else ""
    return f"{plan.width} x {plan.height} pixels: {work}{time}. In colours: what DINO sees; alike is what looks alike."


def in_words(seconds: float) -> str:
    """A time as one says it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"
