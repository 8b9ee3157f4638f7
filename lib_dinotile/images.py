"""Images in and out of files."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from lib_dinotile import DinotileError
from lib_dinotile.settings import MAX_SIDE

LARGEST = {
    ".png": MAX_SIDE,
    ".jpg": 65500,
    ".jpeg": 65500,
    ".webp": 16383,
    ".bmp": 32768,
    ".tif": 32768,
    ".tiff": 32768,
}
"""Endings of the files that can be written, and how long a side may be: what the format holds, for the last three
what keeps a square one below 4 GiB."""


def read_image(path: Path) -> Image.Image:
    """The first frame as sRGB, turned as its EXIF says, transparency on white. DinotileError if it is no image."""
    image = _open(path)
    profile = image.info.get("icc_profile")
    image = _on(image, "white")
    return (_in_srgb(image, profile) if profile else image).convert("RGB")


def read_mask(path: Path) -> Image.Image:
    """The same as shades of grey (L); what is transparent is black."""
    return _on(_open(path), "black").convert("L")


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except Exception as error:  # decoders of damaged files raise whatever they like
        raise DinotileError(f"{path} cannot be read as an image: {error}") from error
    if image.mode == "F" or (image.mode == "I" and file.format == "TIFF"):
        raise DinotileError(f"{path} has 32 bits a channel: save it with 8 or 16")
    if image.mode.startswith("I"):  # 16 bit; Pillow would cut it off at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    return image


def _on(image: Image.Image, background: str) -> Image.Image:
    """The image with nothing transparent any more."""
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Colours of that profile (ICC) as those that models are trained on."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(own):
            return image
        image = image if image.mode in ("RGB", "CMYK", "L") else image.convert("RGB")
        return ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):  # damaged, or for colours of another kind
        return image


def check_writable(path: Path, size: tuple[int, int] = (1, 1)) -> None:
    """DinotileError if no image of (width, height) can be written to `path`."""
    largest = LARGEST.get(path.suffix.lower())
    if largest is None:
        raise DinotileError(f"{path}: no image is written with the ending {path.suffix!r}, try .png")
    if max(size) > largest:
        raise DinotileError(
            f"{path}: {path.suffix} images have at most {largest} pixels a side, this one has {size[0]}x{size[1]}; "
            "try .png"
        )
    if path.is_dir():
        raise DinotileError(f"{path} is a folder, give a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise DinotileError(f"{path}: the folder {path.parent} is not there or not writable")


def write_image(image: Image.Image, path: Path, texts: Mapping[str, str]) -> None:
    """Write `image`, all of it or nothing; PNG files carry the texts by their keys, as the WebUIs' do `parameters`."""
    information = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        information.add_text(key, text)
    more = {"pnginfo": information} if path.suffix.lower() == ".png" else {"quality": 95}
    name = None
    try:
        handle, name = tempfile.mkstemp(suffix=path.suffix, dir=path.parent)
        os.close(handle)
        image.save(name, **more)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except (OSError, ValueError) as error:
        raise DinotileError(f"{path} cannot be written: {error}", 500) from error
    finally:
        if name:
            Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
