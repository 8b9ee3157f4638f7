"""Images in and out of files."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from lib_dinotile import DinotileError, Handling, one_line
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


MAX_PIXELS = 2**30
"""Of an image that is read: 32768x32768, say, which take 4 GiB as Pillow keeps them and over 12 as the encoder is given
them. A file of a few bytes can say that it holds any number; it is refused before memory is taken."""

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "ICO", "PPM", "PSD", "QOI", "TGA", "HEIF")
"""Formats that are read, by Pillow's names. Not all that it can: it has programs such as Ghostscript open EPS, and of
JPEG 2000 files that were cut off it may show nothing as if that were all."""
UNREAD = (
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".exr", ".hdr", ".eps", ".svg"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
)
"""Endings of pictures that are not read, or only where Pillow or a plug-in of it does."""
PAGED = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")
"""Those of them that can hold several images of equal rank."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transpositions that make a picture upright, by its EXIF orientation."""


SHOWN = 5
"""Files that a line names."""


LONGEST_NAME = 200
"""Of a file that is written, in bytes without its ending: most file systems hold 255, and files beside it add to it."""


def endings() -> set[str]:
    """Endings of the files that can be read, in lower case."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}


def register_plugins() -> None:
    """Have Pillow read HEIC, too, if pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


def unread(files: Iterable[Path]) -> str:
    """A line on the pictures among some files that are of no kind that is read; nothing if there are none."""
    kinds = set(UNREAD) - endings()
    found = sorted(file.name for file in files if file.suffix.lower() in kinds)
    if not found:
        return ""
    shown = ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
    heif = any(name.lower().endswith((".heic", ".heif", ".hif")) for name in found)
    help = "pip install pillow-heif, or save them as PNG or JPEG" if heif else "save them as PNG or JPEG"
    return f"{shown}: not a kind of image that is read: {help}"


def read_image(
    file: Path | BinaryIO, name: str = "", limit: int = MAX_PIXELS, tell: Callable[[str], None] = lambda line: None
) -> Image.Image:
    """The first frame as sRGB (RGB), turned as its EXIF says, transparency on white.

    name: what messages call it, if not by its path; limit: of pixels; tell: is given a line if there are more frames.
    DinotileError if it is no whole image of a kind in FORMATS.
    """
    name = name or str(file)
    with _told(name, limit), _opened(file, name, limit, tell) as image:
        profile = image.info.get("icc_profile")
        image = _on(image, "white")
        return (_in_srgb(image, profile) if profile else image).convert("RGB")


def read_mask(file: Path | BinaryIO, name: str = "", limit: int = MAX_PIXELS) -> Image.Image:
    """The same as shades of grey (L); what is transparent is black."""
    name = name or str(file)
    with _told(name, limit), _opened(file, name, limit) as image:
        return _on(image, "black").convert("L")


def read_size(file: BinaryIO, name: str, limit: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of what `read_image` gives, from the header alone: what is damaged behind it is not noticed.

    DinotileError as there, but for that.
    """
    with _told(name, limit), _found(file, name, limit) as image:
        _check_depth(image, name)
        if image.format == "TIFF":  # newer versions of Pillow have exchanged the sides already
            size, orientation = (image.tag_v2[256], image.tag_v2[257]), image.tag_v2.get(ExifTags.Base.Orientation)
        else:
            if image.format == "PNG" and _has_texts_behind(file):
                image.load()
            size, orientation = image.size, _orientation(image)
    return size[::-1] if orientation in TURNS and orientation >= 5 else size


def _has_texts_behind(png: BinaryIO) -> bool:
    """Whether EXIF or XMP may stand behind the pixels of a PNG, where Pillow finds it only once it has decoded them."""
    before, pixels, found = png.tell(), False, False
    png.seek(8)
    while not found and len(head := png.read(8)) == 8:
        kind = head[4:]
        pixels |= kind == b"IDAT"
        found = pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
        png.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    png.seek(before)
    return found


@contextlib.contextmanager
def _opened(
    file: Path | BinaryIO, name: str, limit: int, tell: Callable[[str], None] = lambda line: None
) -> Iterator[Image.Image]:
    """The first frame, upright."""
    with _found(file, name, limit) as found:
        if not enough_memory(2 * 4 * found.width * found.height):
            raise MemoryError
        found.load()
        yield _turned(_in_8_bits(found, name))
        if found.format in PAGED and _has_more(found):  # which goes to the second
            tell("holds several images, the first is taken")


@contextlib.contextmanager
def _found(file: Path | BinaryIO, name: str, limit: int) -> Iterator[Image.Image]:
    """The image as its header tells of it, not decoded yet."""
    if isinstance(file, Path) and not os.path.isfile(file):  # a pipe would be waited for
        raise DinotileError(f"{name} is not a file" if os.path.lexists(file) else f"{name} does not exist")
    with contextlib.ExitStack() as stack:
        # Not by its path: Pillow would map a TIFF into memory then, and scrambles those that lie on their side.
        stream = stack.enter_context(file.open("rb")) if isinstance(file, Path) else file
        opened = Image.open(stream, formats=_formats())
        if opened.width * opened.height > limit:
            raise Image.DecompressionBombError
        yield opened


def _formats() -> list[str]:
    """Those of FORMATS that this Pillow has."""
    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN]


def _told(name: str, limit: int) -> Handling:
    """DinotileError for whatever is raised in it."""

    def tell(error: Exception) -> bool:
        if isinstance(error, DinotileError):
            return False
        if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
            line = f"has too many pixels: at most {min(limit, Image.MAX_IMAGE_PIXELS or limit):,} are read"
        elif isinstance(error, MemoryError):
            line = "needs more memory than there is: make it smaller"
        elif isinstance(error, UnidentifiedImageError):
            line = f"cannot be read as an image: it is damaged, or none of {', '.join(_formats())}"
        else:  # decoders of damaged files raise whatever they like
            line = f"cannot be read as an image: {one_line(error)}"
        raise DinotileError(f"{name} {line}") from error

    return Handling(tell)


def _has_more(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # what follows the first frame may be damaged
        return False


def _turned(image: Image.Image) -> Image.Image:
    """Upright. ImageOps.exif_transpose wants to write EXIF anew, and stumbles over it if it is damaged."""
    if image.format == "TIFF":  # these Pillow turns when it loads them, and its older versions still say how
        return image
    turn = TURNS.get(_orientation(image) or 1)
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int | None:
    """By EXIF or XMP; damaged ones say nothing."""
    try:
        # PNG's own decodes the picture, for EXIF behind it: that is known here, or was looked for.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # it raises whatever it likes, too
        return None
    return orientation if isinstance(orientation, int) else None


def _check_depth(image: Image.Image, name: str) -> None:
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise DinotileError(f"{name} has colour values of an unknown range: save it with 8 or 16 bits")


def _in_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Greys of 12 or 16 bits scaled to 8, where Pillow would cut them off at 255; others as they are."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    _check_depth(image, name)
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).clip(0, 65535).astype(np.uint16)
    grey = (values >> (4 if tags.get(ExifTags.Base.BitsPerSample) == (12,) else 8)).astype(np.uint8)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero
        grey = 255 - grey
    clear, info = image.info.get("transparency"), {**image.info}
    channels = [grey] if clear is None else [grey, np.where(values == clear, 0, 255).astype(np.uint8)]
    result = Image.merge("L" if clear is None else "LA", [Image.fromarray(channel) for channel in channels])
    info.pop("transparency", None)
    result.info = info
    return result


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
    if os.path.isdir(path):
        raise DinotileError(f"{path} is a folder, give a file")
    if not os.path.isdir(path.parent) or not os.access(path.parent, os.W_OK):
        raise DinotileError(f"{path}: the folder {path.parent} does not exist or is not writable")
    if len(os.fsencode(path.stem)) > LONGEST_NAME:
        raise DinotileError(f"{path}: the name is too long, give one of at most {LONGEST_NAME} bytes")


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
    except (OSError, ValueError, MemoryError) as error:
        raise DinotileError(f"{path} cannot be written: {one_line(error)}", 500) from error
    finally:
        if name:
            Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def enough_memory(count: int) -> bool:
    """Whether so many bytes can be taken; True where that is not known.

    Linux promises more than it has, and ends a program that takes it at its word.
    """
    try:
        import psutil  # the WebUIs have it, and accelerate
    except ImportError:
        return True
    return psutil.virtual_memory().available + psutil.swap_memory().free >= count
