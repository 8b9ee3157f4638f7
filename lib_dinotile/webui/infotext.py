"""PNG info: what an image says of the options that it was made with.

It names the version of the defaults and, beside that, only what differs from them. Images from before there were
versions have all options that had a part in them; what they leave out is read by the defaults of version 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lib_dinotile import DinotileError
from lib_dinotile.options import Option
from lib_dinotile.settings import DEFAULTS, VERSION, Settings, Txt2Img

_ALWAYS = Settings.option("target").infotext
"""Every image from before there were versions has it."""


def is_ours(info: Mapping[str, Any]) -> bool:
    """Whether PNG info is of an image that dinotile has upscaled.

    DinotileError if that was made with defaults that are not known here: then it cannot be read what it leaves out.
    """
    found = info.get(VERSION)
    if found is None:
        return _ALWAYS in info
    if str(found) != str(DEFAULTS):
        raise DinotileError(
            f"PNG info: this image was made with version {str(found)[:20]} of DINO Tile's defaults, this DINO Tile "
            f"knows version {DEFAULTS}: update it"
        )
    return True


def is_of_txt2img(info: Mapping[str, Any]) -> bool:
    """Whether an image of ours was upscaled in the txt2img tab."""
    return Txt2Img.option("denoise").infotext in info


def read(option: Option, info: Mapping[str, Any]) -> Any:
    """An option's value in an image of ours, as text, or its default; None for other images, and where that cannot be
    known."""
    try:
        ours = is_ours(info)
    except DinotileError:  # told once, by the switch
        ours = False
    if not ours:
        return None
    value = info.get(str(option.infotext), option.default)
    return value if option.choices is None or value in option.choices else option.default
