"""Images in and out of files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from lib_dinotile import DinotileError


def read_image(path: Path) -> Image.Image:
    """The first frame as RGB, turned as its EXIF says, transparency on white. DinotileError if it is no image."""
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise DinotileError(f"{path} cannot be read as an image: {error}") from error
    if image.mode.startswith("I"):  # 16 bit; Pillow would cut it off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def check_writable(path: Path) -> None:
    """DinotileError if no image can be written to `path`."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise DinotileError(f"{path}: no image format has the ending {path.suffix!r}, try .png")
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
    handle, name = tempfile.mkstemp(suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        image.save(name, **more)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except (OSError, ValueError) as error:
        raise DinotileError(f"{path} cannot be written: {error}", 500) from error
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
