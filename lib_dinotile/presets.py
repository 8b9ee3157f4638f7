"""Presets: where to start from, by the rules of thumb for tiled upscalers.

A preset sets what it names. What other presets name goes to its default, but for what they alone set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lib_dinotile import DinotileError
from lib_dinotile.options import Options
from lib_dinotile.tiling.flat import RECOMMENDED


@dataclass(frozen=True)
class Preset:
    """Values for options, and what else belongs to them."""

    name: str
    values: Mapping[str, Any]
    """By option. A table takes those that it has: `denoise` is img2img's own in a WebUI."""
    hint: str
    """What to set besides, that is not an option of dinotile or depends on what is installed."""
    alone: Mapping[str, Any] = field(default_factory=dict)
    """Values that other presets leave as they are: an adapter of the user's goes with most of them."""


PRESETS = (
    Preset(
        "Photo",
        {"denoise": 0.3},
        "In img2img also set Denoising strength to 0.25 to 0.35. As Upscaler choose R-ESRGAN 4x+ or another for "
        "photos.",
    ),
    Preset(
        "Anime",
        {"denoise": 0.25, "flat": RECOMMENDED, "guard": "blend back"},
        "In img2img also set Denoising strength to 0.2 to 0.3. As Upscaler choose R-ESRGAN 4x+ Anime6B or another for "
        "drawings.",
    ),
    Preset(
        "Low VRAM",
        {"tile": 512, "batch": 1},
        "Also choose a small DINOv2 as DINO encoder. If memory is still short, set Guidance strength to 0. "
        "With SDXL and newer try Tile size 768 before 512: small tiles may look worse there.",
    ),
    Preset(
        "Plain tiles",
        {"guidance": 0.0, "guard": "off", "order": "linear"},
        "Tiles as Ultimate SD Upscale paints them, nothing looks at the source.",
        {"adapter": "None"},
    ),
)
NAMES = tuple(preset.name for preset in PRESETS)


def find(name: Any) -> Preset:
    """The preset of that name, in capitals or not. DinotileError if there is none."""
    for preset in PRESETS:
        if isinstance(name, str) and name.strip().casefold() == preset.name.casefold():
            return preset
    raise DinotileError(f"preset: {str(name)[:60]!r} is not allowed, give one of {', '.join(NAMES)}")


def values(name: Any, table: type[Options]) -> dict[str, Any]:
    """Values of all options of a table that any preset sets, for this one, and those that it alone sets. DinotileError
    as above."""
    chosen, named = find(name), {option for preset in PRESETS for option in preset.values}
    rows = {row.name: row.default for row in table.table()}
    found = {option: chosen.values.get(option, default) for option, default in rows.items() if option in named}
    return found | {option: value for option, value in chosen.alone.items() if option in rows}
