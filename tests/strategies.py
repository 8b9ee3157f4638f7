"""Files of images and sets of options as they come: right, at the border, and wrong."""

from __future__ import annotations

import io
import math
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from PIL import Image, ImageCms

from lib_dinotile.options import Option, Options

# Options ------------------------------------------------------------------------------------------------------------

ODD_TEXTS = (
    "",
    " ",
    "a\nb",
    "a\0b",
    "ö 猫 \u200b",
    "half \ud800",
    "\x1b[31m",
    "x" * 300,
    "-1",
    "nan",
    "1e999",
    "٥",
    "None",
)
"""Texts that trip something up somewhere; a command line cannot carry NUL."""
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([-0.0, math.inf, -math.inf, math.nan, 10**400, -(2**63), sys.float_info.max, b"512"]),
    st.text(max_size=20),
    st.sampled_from(ODD_TEXTS),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.just([[[[[["x" * 200] * 9] * 9] * 9] * 9] * 9]),
)
"""Values of any type."""


def good(option: Option, most: float | None = None) -> st.SearchStrategy:
    """Values that the option takes, its ends among them; most: where its own maximum would take too long."""
    if option.choices is not None:
        return st.sampled_from(option.choices)
    if option.type is bool:
        return st.booleans()
    if option.type is str:
        return st.sampled_from([option.default, "fur", 'a "b", c: d', "1: ear\n2: eye"])
    least, most = option.minimum, option.maximum if most is None else most
    if option.type is float:
        return st.floats(least, most) | st.sampled_from([float(least), float(most)])
    step = int(option.step or 1)
    whole = st.integers(-(-int(least) // step), int(most) // step).map(lambda n: n * step)
    return whole | st.sampled_from([int(least), int(most) // step * step]) | whole.map(float)


def wrong(option: Option) -> st.SearchStrategy:
    """Values just outside of what the option takes."""
    if option.type is int:
        steps = [int(option.minimum) + 1] if option.step and option.step > 1 else []
        return st.sampled_from([int(option.minimum) - 1, int(option.maximum) + 1, option.minimum + 0.5, *steps])
    if option.type is float:
        return st.sampled_from([math.nextafter(option.minimum, -math.inf), math.nextafter(option.maximum, math.inf)])
    return st.sampled_from([text for text in ODD_TEXTS if "\ud800" in text or option.choices] or [1])


def option_sets(*tables: type[Options]) -> st.SearchStrategy[dict]:
    """Some options with their values, most of them right."""
    rows = [row for table in tables for row in table.table()]
    pair = st.sampled_from(rows).flatmap(
        lambda row: st.tuples(st.just(row.name), st.one_of(good(row), good(row), good(row), wrong(row), ODD))
    )
    stray = st.tuples(st.text(max_size=12) | st.sampled_from([*ODD_TEXTS, 7, None, ("tile",)]), ODD)
    return st.lists(st.one_of(*[pair] * 9, stray), max_size=6).map(dict)


# Images -------------------------------------------------------------------------------------------------------------

SIZES = ((1, 1), (1, 7), (5, 3), (33, 20), (1, 5000), (5000, 1), (3000, 2))
LOSSLESS = {
    ".png": ("PNG", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    ".tif": ("TIFF", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK")),
    ".bmp": ("BMP", ("1", "L", "P", "RGB")),
    ".gif": ("GIF", ("L", "P")),
    ".webp": ("WEBP", ("RGB", "RGBA")),
    ".ico": ("ICO", ("RGBA",)),
    ".tga": ("TGA", ("L", "LA", "RGB", "RGBA")),
    ".ppm": ("PPM", ("1", "L", "RGB")),
    ".psd": ("PSD", ("RGB",)),
    ".qoi": ("QOI", ("RGB", "RGBA")),
}
LOSSY = {".jpg": ("JPEG", ("L", "RGB", "CMYK"))}
KINDS = [(ending, name, mode) for ending, (name, modes) in {**LOSSLESS, **LOSSY}.items() for mode in modes]
ORIENTED = ("PNG", "JPEG", "WEBP", "TIFF")
"""Pillow writes EXIF into these, and colour profiles."""
TOLERANCE = 24
"""How far JPEG may be off, in levels of 255."""
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
"""How a stored picture is to be turned, by its orientation (EXIF 2.3, tag 274)."""


@dataclass(frozen=True)
class File:
    """An image as it lies on the disk."""

    data: bytes
    ending: str
    shown: np.ndarray | None
    """What it shows (h, w, 3), if it is whole; None if it is damaged in a way that may show anything."""
    state: str
    """whole; cut off, which must be refused unless nothing is lost; damaged; nothing: no image at all."""
    tolerance: int = 0

    def __repr__(self) -> str:
        size = None if self.shown is None else self.shown.shape[1::-1]
        return f"File({self.state}, {self.ending}, {size}, {len(self.data)} bytes, starts {self.data[:24]!r})"


def stored(mode: str, size: tuple[int, int], blue: int, clear: bool) -> tuple[Image.Image, np.ndarray]:
    """An image of that mode, and what it shows on white (h, w, 3)."""
    width, height = size
    rgb = np.empty((height, width, 3), np.uint8)
    rgb[..., 0] = np.linspace(0, 255, width)
    rgb[..., 1] = np.linspace(255, 0, height)[:, None]
    rgb[..., 2] = blue
    grey = np.repeat(rgb[..., :1], 3, axis=2)
    alpha = np.linspace(0, 255, width * height).reshape(height, width, 1).astype(np.uint8)

    def on_white(pixels: np.ndarray) -> np.ndarray:
        share = alpha / 255
        return np.round(pixels * share + 255 * (1 - share)).astype(np.uint8)

    if mode == "1":
        bits = rgb[..., 0] > 127
        return Image.fromarray(bits), np.repeat(bits[..., None] * np.uint8(255), 3, axis=2)
    if mode == "L":
        return Image.fromarray(rgb[..., 0]), grey
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(rgb[..., 0]), Image.fromarray(alpha[..., 0])]), on_white(grey)
    if mode == "P":
        palette = np.array([(n * 16, 255 - n * 16, blue) for n in range(16)], np.uint8)
        index = rgb[..., 0] // 16
        image, shown = Image.fromarray(index).convert("P"), palette[index]
        image.putpalette(palette.tobytes())
        if clear:
            image.info["transparency"] = 3
            shown[index == 3] = 255
        return image, shown
    if mode == "I;16":
        return Image.fromarray(rgb[..., 0].astype(np.uint16) * 256 + 200), grey
    if mode == "CMYK":
        channels = [Image.fromarray(255 - rgb[..., n]) for n in range(3)]
        return Image.merge("CMYK", [*channels, Image.new("L", size, 0)]), rgb
    if mode == "RGBA":
        return Image.fromarray(np.concatenate([rgb, alpha], 2)), on_white(rgb)
    return Image.fromarray(rgb), rgb


def psd(pixels: np.ndarray) -> bytes:
    """Pixels (h, w, 3) as an uncompressed Photoshop file without layers."""
    height, width, channels = pixels.shape
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, channels, height, width, 8, 3)
    return header + bytes(14) + np.moveaxis(pixels, 2, 0).tobytes()


def qoi(pixels: np.ndarray) -> bytes:
    """Pixels (h, w, 3 or 4) as a QOI file (qoiformat.org) that spells every pixel out."""
    height, width, channels = pixels.shape
    whole = np.full((height * width, channels + 1), 0xFB + channels, np.uint8)
    whole[:, 1:] = pixels.reshape(-1, channels)
    return struct.pack(">4sIIBB", b"qoif", width, height, channels, 0) + whole.tobytes() + bytes(7) + b"\1"


def encoded(
    image: Image.Image, name: str, orientation: int = 1, profile: bytes | None = None, frames: int = 1, **more: object
) -> bytes:
    """The image as a file of that format; frames: how many, the others are black."""
    if name in ("PSD", "QOI"):  # Pillow does not write them, or only of late
        return {"PSD": psd, "QOI": qoi}[name](np.asarray(image))
    more |= {"quality": 95, "subsampling": 0} if name == "JPEG" else {}
    more |= {"lossless": True} if name == "WEBP" else {}
    more |= {"sizes": [image.size]} if name == "ICO" else {}
    if name in ORIENTED:
        if orientation > 1:
            exif = Image.Exif()
            exif[0x0112] = orientation
            more["exif"] = exif
        more |= {"icc_profile": profile} if profile else {}
    if frames > 1 and name in ("PNG", "TIFF", "WEBP", "GIF"):
        others = [Image.new(image.mode, image.size) for _ in range(frames - 1)]
        for other in others if image.mode == "P" else ():
            other.putpalette(image.getpalette())
        more |= {"save_all": True, "append_images": others}
    if "transparency" in image.info:
        more["transparency"] = image.info["transparency"]
    file = io.BytesIO()
    image.save(file, name, **more)
    return file.getvalue()


NOTHING = (b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\0" * 99)
STATES = (*["whole"] * 3, "cut off", "cut off", "damaged", "nothing", "renamed", "more")
PROFILES = (None, None, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"damaged", b"\0" * 200)
"""Colour profiles (ICC) that change nothing."""


@st.composite
def files(draw: st.DrawFn, sizes: Sequence[tuple[int, int]] = SIZES) -> File:
    """An image file, whole or not."""
    ending, name, mode = draw(st.sampled_from(KINDS))
    size = draw(st.sampled_from([size for size in sizes if max(size) <= 256 or name != "ICO"]))
    image, shown = stored(mode, size, draw(st.integers(0, 255)), name in ("PNG", "GIF") and draw(st.booleans()))
    orientation = draw(st.integers(1, 8)) if name in ORIENTED else 1
    profile = draw(st.sampled_from(PROFILES))
    # Pillow itself writes animations of greys with transparency or of 16 bits wrongly, or not at all.
    frames = draw(st.integers(1, 3)) if mode in ("RGB", "RGBA", "L") else 1
    more = {}
    if name == "TIFF":
        more["compression"] = draw(st.sampled_from([None, "tiff_lzw", "tiff_adobe_deflate", "packbits"]))
    elif name == "JPEG":
        more["progressive"] = draw(st.booleans())
    data = encoded(image, name, orientation, profile, frames, **more)
    shown, tolerance = UPRIGHT[orientation](shown), TOLERANCE if ending in LOSSY else 1
    state = draw(
        st.sampled_from(["whole", "whole", "whole", "cut off", "cut off", "damaged", "nothing", "renamed", "more"])
    )
    if state == "cut off":
        return File(data[: draw(st.integers(0, len(data) - 1))], ending, shown, state, tolerance)
    if state == "damaged":
        spots = draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), min_size=1, max_size=8))
        broken = bytearray(data)
        for place, value in spots:
            broken[place] = value
        return File(bytes(broken), ending, None, state)
    if state == "nothing":
        return File(draw(st.sampled_from(NOTHING)), ending, None, state)
    if state == "renamed":
        ending = draw(st.sampled_from(sorted({**LOSSLESS, **LOSSY})))
    elif state == "more":
        data += draw(st.binary(min_size=1, max_size=40))
    return File(data, ending, shown, "whole", tolerance)
