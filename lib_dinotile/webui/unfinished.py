"""Images that a failed run has painted, kept on the disk: with an error the WebUI answers none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modules import images, shared
from PIL import Image

from lib_dinotile import one_line


def keep(p: Any, done: Sequence[tuple[Image.Image, int, str]]) -> str:
    """Saves images, each with its seed and prompt, where the finished ones would have gone, also if those would not
    have been saved. Words for where that is."""
    if not done:
        return ""
    folder, form = p.outpath_samples, shared.opts.samples_format
    try:
        kept = [
            images.save_image(image, folder, "", seed, prompt, form, p=p, suffix="-unfinished")[0]
            for image, seed, prompt in done
        ]
    except Exception as error:  # for want of space, say
        return f" (they could not be saved: {one_line(error)})"
    return f" (kept in {', '.join(filter(None, kept))})"
