"""The result over its source with a slider between them, where the WebUI has such a control: Forge has."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
from PIL import Image

from lib_dinotile import DinotileError

try:
    from gradio_imageslider import ImageSlider
except ImportError:
    ImageSlider = getattr(gr, "ImageSlider", None)  # newer versions of gradio have one

SELECTED = "(...values) => [...values.slice(0, -1), selected_gallery_index()]"
"""Puts the number of the image that is open in the gallery in the last place; -1 if all are shown."""


class Comparison:
    """A button and the slider; nothing at all where the WebUI has no slider."""

    def __init__(self, prefix: str) -> None:
        """Builds the button where the page is now; prefix: of ids."""
        self._prefix, self._slider = prefix, None
        if ImageSlider is not None:
            self._button = gr.Button("Compare result and source", size="sm", elem_id=f"{prefix}compare")

    def build(self) -> None:
        """Builds the rest where the page is now."""
        if ImageSlider is None:
            return
        self._line = gr.HTML(elem_id=f"{self._prefix}compare_text")
        self._number = gr.Number(-1, visible=False)
        self._slider = ImageSlider(
            visible=False, interactive=False, type="pil", show_label=False, elem_id=f"{self._prefix}slider"
        )

    def connect(
        self, gallery: Any, information: Any, inputs: Sequence[Any], source: Callable[..., Image.Image]
    ) -> None:
        """gallery: shows the results; information: on them, as JSON (`Processed.js`); source: gives the source (RGB) as
        it is laid on a canvas, for its (width, height) and the values of these inputs, or raises DinotileError."""
        if self._slider is None:
            return

        def compare(*values: Any) -> list[Any]:
            *given, results, information, number = values
            try:
                result = chosen(results, information, int(number))
                pair = source(result.size, *given), result
            except DinotileError as error:
                line = f"<div class='error'>{html.escape(str(error))}</div>"
                return [line, gr.update(value=None, visible=False)]
            return ["", gr.update(value=pair, visible=True)]

        inputs, outputs = [*inputs, gallery, information, self._number], [self._line, self._slider]
        self._button.click(fn=compare, inputs=inputs, outputs=outputs, js=SELECTED)


def chosen(
    results: Sequence[tuple[Image.Image, str | None]] | None, information: str | None, number: int
) -> Image.Image:
    """The result (RGB) that is open in a gallery, the first one if none is, or the grid of all.

    results: as a gallery has them, in front of them perhaps that grid; information: see `connect`; number: of what is
    open. DinotileError if there are none at all.
    """
    if not results:
        raise DinotileError("there is no result to compare yet: generate one")
    first = json.loads(information or "{}").get("index_of_first_image", 0)
    return results[number if first <= number < len(results) else min(first, len(results) - 1)][0].convert("RGB")
