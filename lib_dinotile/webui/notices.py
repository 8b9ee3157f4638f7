"""What the accordion says by itself as controls change: whether it is on, and what is set up unlike an upscale."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import gradio as gr
from gradio.context import Context

HIGH = 0.5
"""Denoising strength above which tiles show much that the source does not."""
ON, OFF = "on (folding may switch it off)", "off"
"""The WebUI's accordion with a switch goes off when it is folded, until its box has been clicked once."""
ONLY_MASKED = (
    "Inpaint area is Only masked: the result keeps the size of the source. The target size is the size at which the "
    "masked part is painted."
)


def high_denoise(denoise: float) -> str:
    """What to do about that denoising strength, or nothing if it is fine."""
    if denoise <= HIGH:
        return ""
    return (
        f"Denoising strength {denoise:g} is high for an upscale: tiles may show things that are not in the image. "
        "Set it to 0.2 to 0.4."
    )


def notices(denoise: float | None, only_masked: bool) -> list[str]:
    """What is to be said about the denoising strength, and about inpainting."""
    return [*filter(None, [high_denoise(denoise or 0)]), *([ONLY_MASKED] if only_masked else [])]


def as_html(lines: Sequence[str]) -> str:
    """Lines that look like warnings."""
    return "".join(f"<div class='warning'>{html.escape(line)}</div>" for line in lines)


class Notices:
    """Their place in a tab's accordion."""

    def __init__(self, accordion: Any, prefix: str) -> None:
        """Built where the page is now, within the accordion; prefix: of ids."""
        self._switch = accordion
        with accordion.extra():
            self._state = gr.HTML(OFF, elem_id=f"{prefix}state")
        self._lines = gr.HTML(visible=False, elem_id=f"{prefix}notices")

    def connect(self, denoise: Any, area: Any = None, tab: Any = None, inpainting: Sequence[int] = ()) -> None:
        """The controls that they depend on: denoising strength; in img2img also the inpaint area, by number, and the
        number of the tab that the image is in; inpainting: of those that have a mask."""

        def update(on: bool, denoise: float | None, area: int | None = 0, tab: float | None = 0) -> list[Any]:
            lines = notices(denoise, bool(area) and tab in inpainting) if on else []
            return [ON if on else OFF, gr.update(value=as_html(lines), visible=bool(lines))]

        inputs = [each for each in (self._switch, denoise, area, tab) if each is not None]
        wiring = {"fn": update, "inputs": inputs, "outputs": [self._state, self._lines], "show_progress": False}
        for each in inputs:
            each.change(**wiring, queue=False)  # also while an image is generated
        Context.root_block.load(**wiring, queue=False)  # the user's own defaults are set after the page is built
