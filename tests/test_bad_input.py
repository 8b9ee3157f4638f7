"""Whatever images and options come: done right, or refused with one line and nothing left on the disk.

Many more examples: pytest tests/test_bad_input.py --hypothesis-profile=thorough
"""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import signal
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from lib_dinotile import LONGEST, DinotileError
from lib_dinotile import __main__ as cli
from lib_dinotile.cli import upscale as upscale_command
from lib_dinotile.cli.checks import target_of
from lib_dinotile.cli.common import WEBUI, silenced
from lib_dinotile.engine.flow import canvas_size
from lib_dinotile.hosts import diffusers
from lib_dinotile.images import FORMATS, MAX_PIXELS, endings, read_image, read_mask, read_size
from lib_dinotile.settings import MAPS, Generation, Settings
from tests.processes import Running
from tests.strategies import ODD_TEXTS, SIZES, UPRIGHT, File, encoded, files, good, option_sets, stored, wrong

LONGEST_LINE = 600
"""Characters of a line that refuses: what is not an option's name is answered with all that are."""
SECONDS = 60
"""That no example may take."""
CHEAP = {
    "longest": 70,
    "width": 70,
    "height": 70,
    "scale": 2,
    "steps": 4,
    "patches": 12,
    "windows": 2,
    "views": 2,
    "guard_seeds": 1,
    "guard_weaker": 1,
}
"""What runs of the whole command are asked for at most."""
SLOW = {"model", "config", "encoder", "prediction", "decoder", "layer"}
"""Options that are left alone there: they load other models, or calibrate the encoder, which takes a minute."""
UNUSED = {"cfg", "clip_skip", "controlnet_strength"}
"""Those that the built-in model has no use for, which is said."""
QUICK = ("--quiet", "--steps=2", "--patches=8", "--tile=64", "--overlap=8", "--guard-seeds=0")
TOGETHER = (
    r"dinotile: (overlap: .* with tile|[a-z_]*start: .* with|target: no size|layer: encoder|.*a side"
    r"|(scale|longest|width|height): has no effect with"
    r"|precision: torch \S+ does not compute in fp16 on cpu)"
)
"""What is said of options that are allowed, but not with each other, not with this image, or not on this machine."""
PLAIN = ("--order=none", "--guard=off", "--guidance=0", "--adapter=None", "--seams=none", "--upscaler=Lanczos")
"""Nothing is painted."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """The built-in model's UNet is read once, not for every example."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(diffusers.MINI / "unet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers.UNet2DConditionModel, "from_pretrained", lambda *_, **__: unet)
        yield


@contextlib.contextmanager
def no_hang():
    def late(*_):
        raise TimeoutError(f"over {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_one_line(text: str) -> bool:
    return bool(text) and text.isprintable() and len(text) <= LONGEST_LINE


def run(*arguments: str) -> tuple[int, str]:
    """(exit code, stderr) of the command line."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()), no_hang():
        try:
            code = cli.main(arguments)
        except SystemExit as stopped:
            code = stopped.code
    return code, err.getvalue()


# Options ------------------------------------------------------------------------------------------------------------


@given(values=option_sets(Settings))
@example({"tile_prompt": "half \ud800"})
@example({"x" * 300: 1})
@example({"tile_prompt": " fur\n"})
@example({"regions": 10**400})
@example({"regions": float("inf")})
@example({"regions": 2.0000001})
def test_options_of_a_request_are_taken_as_they_are_or_refused_by_name(values):
    try:
        parsed = Settings.parse(values)
    except DinotileError as error:
        line, names = str(error), {row.name for row in Settings.table()}
        assert line.isprintable() and len(line) <= LONGEST + len(" ... ") and error.status_code == 422
        assert line.split(":")[0] in names or "is not an option of DINO Tile" in line
        return
    assert Settings.parse(dataclasses.asdict(parsed)) == parsed
    for row in Settings.table():
        value = getattr(parsed, row.name)
        assert type(value) is row.type
        if row.name in values and row.type is not str:
            assert value == values[row.name]
        if row.infotext in parsed.infotext:
            assert row.parse(str(parsed.infotext[row.infotext])) == value


def test_the_command_line_names_all_wrong_options_at_once():
    code, said = run("upscale", "in.png", "out.png", "--tile", "100", "--steps", "999", "--guidance-end", "3")
    assert code == 2 and said.count("\n") == 1
    assert all(f"{name} is not allowed" in said for name in ("tile: 100", "steps: 999", "guidance_end: 3.0")), said


@given(data=st.data())
def test_what_is_within_an_option_s_range_is_taken_and_what_is_not_is_refused(data):
    row = data.draw(st.sampled_from([*Settings.table(), *Generation.table()]))
    value = data.draw(good(row))
    assert row.check(value) == (value.strip() if isinstance(value, str) else value)
    assert row.parse(str(row.check(value))) == row.check(value)
    with pytest.raises(DinotileError, match=rf"^{row.name}: .* is not allowed, give "):
        row.check(data.draw(wrong(row)))


def test_a_number_that_python_does_not_write_is_refused():
    for values in ({"tile": 10**5000}, {"tile": [10**5000]}, {10**5000: 1}):
        with pytest.raises(DinotileError) as error:
            Settings.parse(values)
        assert is_one_line(str(error.value))


@pytest.mark.parametrize("values", [None, [1], "scale", 2])
def test_options_that_are_no_dict_are_refused(values):
    with pytest.raises(DinotileError, match="give one dict of options"):
        Settings.parse(values)


def flags(values: dict) -> list[str]:
    rows = {row.name: row for table in (Settings, Generation) for row in table.table()}
    return [
        f"--{(rows[name].flag if name in rows else None) or str(name).replace('_', '-')}={value}"
        for name, value in values.items()
    ]


@st.composite
def command_lines(draw):
    """(whether all values are right, flags with values)"""
    values, careful = {}, draw(st.booleans())
    for table in (Settings, Generation):
        for row in table.table():
            if row.name in WEBUI or row.name in SLOW or draw(st.integers(0, 7)):
                continue
            if careful and row.name not in UNUSED and (row.type is not str or row.choices):
                values[row.name] = row.check(draw(good(row, CHEAP.get(row.name))))
            if careful:
                continue
            kinds = [good(row, CHEAP.get(row.name))] * 6
            if row.type is not str or row.choices:
                kinds.append(wrong(row).filter(lambda value: "\0" not in str(value)))
            value = draw(st.one_of(*kinds, st.sampled_from([text for text in ODD_TEXTS if "\0" not in text])))
            values[row.name] = value
    if values.get("target") == "longest side":
        values.setdefault("longest", 40)
    return careful, flags(values)


# Images -------------------------------------------------------------------------------------------------------------


@given(file=files())
def test_an_image_is_read_right_or_refused(file: File):
    try:
        with no_hang():
            read = read_image(io.BytesIO(file.data), "it")
            mask = read_mask(io.BytesIO(file.data), "it")
    except DinotileError as error:
        assert is_one_line(str(error)) and str(error).startswith("it ") and file.state != "whole"
        return
    assert file.state != "nothing" and read.mode == "RGB" and (mask.mode, mask.size) == ("L", read.size)
    if file.shown is not None:  # what was cut off may have been of no use
        pixels = np.asarray(read).astype(int)
        assert pixels.shape == file.shown.shape and abs(pixels - file.shown).max() <= file.tolerance


@given(file=files())
def test_the_size_of_an_image_is_the_one_that_it_has_when_it_is_read(file: File):
    """Of a file that cannot be read there may be one, too: more than the header is not looked at."""
    try:
        with no_hang():
            size = read_size(io.BytesIO(file.data), "it")
    except DinotileError as error:
        assert is_one_line(str(error)) and str(error).startswith("it ") and file.state != "whole"
        size = None
    try:
        read = read_image(io.BytesIO(file.data), "it").size
    except DinotileError:
        return
    assert size == read


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "PSD", "QOI"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_size_of_an_image_is_known_without_decoding_it(name, orientation, monkeypatch):
    image = Image.new("RGB", (70, 30))
    file = io.BytesIO(encoded(image.convert("P") if name == "GIF" else image, name, orientation))
    upright = (30, 70) if orientation == 6 and name in ("PNG", "JPEG", "WEBP", "TIFF") else (70, 30)
    assert read_image(io.BytesIO(file.getvalue())).size == upright

    def decoded(*_):
        pytest.fail("it was decoded")

    for kind in (ImageFile.ImageFile, type(Image.open(io.BytesIO(file.getvalue())))):
        monkeypatch.setattr(kind, "load", decoded)
    assert read_size(file, "it") == upright


@pytest.mark.parametrize("kind", ["eXIf", "iTXt"])
def test_a_png_may_say_behind_its_pixels_how_it_is_turned(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='6' tiff:Orientation=\"6\"/>"
    behind = chunk(kind.encode(), exif.tobytes()[6:] if kind == "eXIf" else xmp)
    whole = encoded(Image.new("RGB", (70, 30)), "PNG")
    end = whole.rindex(b"IEND") - 4
    data = whole[:end] + behind + whole[end:]
    assert read_size(io.BytesIO(data), "it") == read_image(io.BytesIO(data)).size == (30, 70)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK"])
def test_a_tiff_on_its_side_is_read_alike_from_a_file_and_from_memory(mode, orientation, tmp_path):
    image, shown = stored(mode, (7, 3), 9, False)
    (tmp_path / "in.tif").write_bytes(encoded(image, "TIFF", orientation))
    upright = UPRIGHT[orientation](shown).astype(int)
    for source in (tmp_path / "in.tif", io.BytesIO((tmp_path / "in.tif").read_bytes())):
        assert abs(np.asarray(read_image(source)) - upright).max() <= 1


def test_a_profile_and_exif_that_are_damaged_are_passed_over():
    image, shown = stored("RGB", (6, 3), 9, False)
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.5
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif, icc_profile=b"damaged")
    upright = np.rot90(shown, -1)
    assert (np.asarray(read_image(file)) == upright).all()
    # A fraction for a width: Pillow reads the orientation, but cannot write the rest anew.
    raw = exif.tobytes()
    broken = raw.replace(struct.pack("<HH", 0x011A, 5), struct.pack("<HH", 0x0100, 5))
    broken = broken.replace(struct.pack(">HH", 0x011A, 5), struct.pack(">HH", 0x0100, 5))
    assert broken != raw
    file = io.BytesIO()
    image.save(file, "PNG", exif=broken)
    assert (np.asarray(read_image(file)) == upright).all()


@pytest.mark.parametrize("name", ["GIF", "PNG", "TIFF", "WEBP"])
def test_of_several_images_the_first_is_taken_and_that_is_said(name, tmp_path):
    image, shown = stored("L" if name == "GIF" else "RGB", (20, 10), 9, False)
    lines = []
    for frames, said in ((1, []), (3, ["holds several images, the first is taken"])):
        (tmp_path / "in").write_bytes(encoded(image, name, frames=frames))
        lines.clear()
        read = read_image(tmp_path / "in", tell=lines.append)
        assert lines == said and abs(np.asarray(read).astype(int) - shown).max() <= 1


def deep_tiff(bits: int, photometric: int, samples: bytes, width: int) -> io.BytesIO:
    """A TIFF of one row of greys, as a scanner writes it."""
    tags = ((256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (278, 1), (279, len(samples)))
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    samples += bytes(len(samples) % 2)
    return io.BytesIO(struct.pack("<2sHI", b"II", 42, 8 + len(samples)) + samples + directory + bytes(4))


def test_greys_of_more_than_8_bits_are_scaled_not_cut_off():
    sixteen = np.array([0, 1, 255, 256, 0x8000, 0xFFFF], "<u2")
    for photometric, greys in ((1, [0, 0, 0, 1, 128, 255]), (0, [255, 255, 255, 254, 127, 0])):
        read = read_image(deep_tiff(16, photometric, sixteen.tobytes(), 6))
        assert np.asarray(read)[0, :, 0].tolist() == greys
    twelve = bytes([0xFF, 0xF8, 0x00])  # 4095, 2048
    assert np.asarray(read_image(deep_tiff(12, 1, twelve, 2)))[0, :, 0].tolist() == [255, 128]
    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(struct.pack(">BHH", 0, 0x1234, 0x8000))) + chunk(b"IEND", b"")
    png = header + chunk(b"tRNS", struct.pack(">H", 0x1234)) + pixels
    if "transparency" in Image.open(io.BytesIO(png)).info:  # where Pillow reads it
        assert np.asarray(read_image(io.BytesIO(png)))[0, :, 0].tolist() == [255, 128]
        assert np.asarray(read_mask(io.BytesIO(png))).tolist() == [[0, 128]]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, colour: int = 2) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))


def bombs(side: int) -> dict[str, bytes]:
    """Files of a few bytes that say they hold side x side pixels."""
    png = png_header(side, side) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(png), 22)
    found = {
        "png": png,
        "ico": icon + png,
        "bmp": struct.pack("<2sI4xIIiiHH24x", b"BM", 99, 54, 40, side, side, 1, 24) + bytes(45),
        "ppm": f"P6 {side} {side} 255\n".encode() + bytes(99),
        "psd": struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, side, side, 8, 3) + bytes(99),
        "qoi": struct.pack(">4sIIBB", b"qoif", side, side, 3, 0) + b"\xfd" * 99,
    }
    if side < 65536:
        found["gif"] = (
            struct.pack("<6sHHBBB", b"GIF89a", side, side, 0x80, 0, 0)
            + bytes(6)
            + (struct.pack("<BHHHHBB", 0x2C, 0, 0, side, side, 0, 2) + b"\x02\x44\x01\x00;")
        )
        found["tga"] = struct.pack("<BBB5xHHHHBB", 0, 0, 2, 0, 0, side, side, 24, 0) + bytes(99)
        small = encoded(Image.new("RGB", (8, 8)), "JPEG")
        start = small.index(b"\xff\xc0") + 5
        found["jpg"] = small[:start] + struct.pack(">HH", min(side, 65500), min(side, 65500)) + small[start + 4 :]
    return found


def damaged_tiffs() -> dict[str, bytes]:
    """Such as Pillow warns of, and such as libtiff writes to stderr of."""
    whole = encoded(Image.effect_noise((60, 40), 90), "TIFF", compression="tiff_lzw")
    return {"a": whole[: len(whole) // 2], "b": whole[:300] + bytes(500) + whole[800:], "c": whole[:-5]}


def _reads(folder: Path) -> int:
    """Reads every file in all ways, and prints the lines that refuse it and the exit statuses."""
    import resource

    has = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (has + 700 * 2**20,) * 2)
    codes = []
    for file in sorted(folder.iterdir()):
        codes.append(cli.main(["analyze", str(file), str(file.with_suffix(".out.png"))]))
        for read in (read_image, read_mask):
            with file.open("rb") as opened, silenced():
                try:
                    read(opened, file.name)
                except DinotileError as error:
                    print(error)
    print(codes)
    return 0


def test_what_is_huge_or_damaged_is_one_line_in_a_process_of_its_own(tmp_path):
    """It may take 700 MiB more than it has: Pillow would keep the smallest of the huge ones in 3 GiB."""
    for side in (30000, 60000, 2**30):
        for kind, data in bombs(side).items():
            (tmp_path / f"{side}.{kind}").write_bytes(data)
    for kind, data in damaged_tiffs().items():
        (tmp_path / f"{kind}.tif").write_bytes(data)
    done = Running(_reads, tmp_path).wait()
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, codes = done.stdout.splitlines()
    files = sorted(file.name for file in tmp_path.iterdir())
    assert codes == str([2] * len(files)) and not [name for name in files if "out" in name]
    told = done.stderr.splitlines()
    assert len(told) == len(files), done.stderr[-2000:]
    for name, line, *again in zip(files, told, lines[::2], lines[1::2]):
        assert line == f"dinotile: {tmp_path}/{again[0]}" and again[0] == again[1] and line.isprintable()
        if name.startswith("60000"):
            assert again[0] == f"{name} has too many pixels: at most {MAX_PIXELS:,} are read"
        elif name.startswith("30000"):
            assert "needs more memory than there is" in again[0] or "cannot be read as an image" in again[0]
        else:
            assert re.search("too many pixels|cannot be read as an image", again[0])
    assert sum("needs more memory" in line for line in lines) >= 2 * 4


def test_what_there_is_no_memory_for_is_refused_before_it_is_taken(tmp_path, monkeypatch):
    Image.new("RGB", (100, 50)).save(tmp_path / "in.png")
    source, out, had = str(tmp_path / "in.png"), str(tmp_path / "out.png"), psutil.virtual_memory()
    for kibibytes, says in ((20, "in.png needs more memory than there is"), (200, "smaller than 200x100")):
        monkeypatch.setattr(psutil, "virtual_memory", lambda n=kibibytes: had._replace(available=n * 1024))
        monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=0))
        for arguments in (("upscale", source, out, *QUICK), ("analyze", source, out)):
            code, err = run(*arguments)
            assert code and says in err and err.count("\n") == 1 and outcome(tmp_path) == {"in.png"}


def test_the_limit_of_pixels_is_kept_to_the_pixel():
    file = io.BytesIO(encoded(Image.new("RGB", (40, 25)), "PNG"))
    assert read_image(file, limit=1000).size == (40, 25)
    with pytest.raises(DinotileError, match=r"^this has too many pixels: at most 999 are read$"):
        read_image(file, "this", limit=999)
    assert read_size(file, "this", limit=1000) == (40, 25)
    with pytest.raises(DinotileError, match=r"^this has too many pixels: at most 999 are read$"):
        read_size(file, "this", limit=999)
    assert 65536**2 > MAX_PIXELS >= 16384**2


def test_no_program_is_run_for_an_image(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was run"))
    file = tmp_path / "in.eps"
    Image.new("RGB", (9, 9)).save(file)
    for name in ("in.eps", "in.png"):
        file = file.rename(tmp_path / name)
        with pytest.raises(DinotileError, match=r"cannot be read as an image: it is damaged, or none of PNG, JPEG"):
            read_image(file)
    assert "EPS" not in FORMATS and {".png", ".jpg", ".webp"} <= endings() and not endings() & {".eps", ".ps", ".wmf"}


@pytest.mark.parametrize("kind", ["pipe", "folder", "broken link", "device", "nothing", "long"])
def test_what_is_no_file_is_refused_and_not_waited_for(kind, tmp_path):
    path, out, image = tmp_path / "in\n.png", tmp_path / "out.png", tmp_path / "image.png"
    Image.new("RGB", (9, 9)).save(image)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "broken link":
        path.symlink_to("gone.png")
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "long":
        path = tmp_path / ("x" * 300 + ".png")
    cases = [("upscale", str(image), str(out), "--mask", str(path)), ("analyze", str(path), str(out))]
    cases += [("analyze", str(image), str(out), "--result", str(path))]
    if kind != "folder":
        cases.append(("upscale", str(path), str(out), "--quiet"))
    for arguments in cases:
        code, err = run(*arguments)
        assert code == 2 and err.endswith("\n") and is_one_line(err[:-1]), (arguments, err)
        gone = kind in ("nothing", "long") and "--mask" not in arguments
        assert (
            "does not exist" if gone else "mask: there is no file" if "--mask" in arguments else "is not a file"
        ) in err
    assert {file.name for file in tmp_path.iterdir()} <= {"in\n.png", "image.png"}


def test_links_and_odd_names_are_fine(tmp_path):
    image, _ = stored("RGB", (9, 6), 1, False)
    for number, name in enumerate(("a b\n.png", "-x.png", "ö猫\u202e.png", os.fsdecode(b"\xff.png"), "%s{0}.png")):
        image.save(tmp_path / "image.png")
        (tmp_path / "link.png").symlink_to("image.png")
        (tmp_path / "link.png").rename(tmp_path / name)
        out = tmp_path / str(number) / name
        out.parent.mkdir()
        assert run("upscale", str(tmp_path / name), str(out), "--quiet", *PLAIN) == (0, "")
        assert Image.open(out).size == (18, 12)


# The whole way ------------------------------------------------------------------------------------------------------

_image, _shown = stored("RGB", (9, 6), 77, False)
SMALL = File(encoded(_image, "PNG"), ".png", _shown, "whole")


def outcome(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(file=files(), line=command_lines(), plain=st.booleans(), ending=st.sampled_from([".png", ".bmp", ".webp"]))
@example(SMALL, (True, ["--precision=fp16"]), False, ".png")  # old versions of torch do not compute in it on a CPU
@example(SMALL, (True, ["--precision=bf16"]), False, ".png")
def test_an_image_and_options_give_an_image_or_one_line(file: File, line, plain, ending):
    careful, arguments = line
    large = file.shown is None or max(file.shown.shape) > 100
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, out = folder / f"in{file.ending}", folder / f"out{ending}"
        source.write_bytes(file.data)
        arguments = [*QUICK, *arguments, *(PLAIN if plain or large else ())]
        code, err = run("upscale", str(source), str(out), *arguments)
        if code:
            assert code == 2 and err.endswith("\n") and is_one_line(err[:-1]), err
            assert outcome(folder) == {source.name}
            event(f"refused, {file.state}, {'good' if careful else 'odd'} options")
            assert not careful or file.state != "whole" or re.match(TOGETHER, err), err
            return
        event(f"done, {file.state}, {'good' if careful else 'odd'} options")
        assert not err and file.state != "nothing"
        assert outcome(folder) - {f"out-{name}.png" for name in MAPS["all"]} == {source.name, out.name}
        with Image.open(out) as written:
            made = written.convert("RGB")
        source = read_image(source)
        parser_values = {part.split("=", 1)[0]: part.split("=", 1)[1] for part in arguments if "=" in part}
        settings_, size = settings_of(parser_values), None
        size = canvas_size(source.size, settings_[0], settings_[1])
        assert made.size == size
        if (plain or large) and file.shown is not None and ending != ".webp":
            expected = np.asarray(Image.fromarray(file.shown).resize(size, Image.Resampling.LANCZOS)).astype(int)
            # Lanczos overshoots: what was off by one comes out a little more.
            assert abs(np.asarray(made).astype(int) - expected).max() <= 2 * file.tolerance


def settings_of(values: dict[str, str]) -> tuple[Settings, tuple[int, int]]:
    """The last value of each flag, as the command line takes it."""
    parsed, sizes = [], dict.fromkeys(("target", "scale", "longest", "width", "height"))
    for table in (Settings, Generation):
        flags = {f"--{row.flag or row.name.replace('_', '-')}": row for row in table.table()}
        parsed.append(table.parse({flags[f].name: flags[f].parse(text) for f, text in values.items() if f in flags}))
        sizes |= {flags[f].name: text for f, text in values.items() if f in flags and flags[f].name in sizes}
    target = target_of(argparse.Namespace(**sizes), parsed[0])
    return dataclasses.replace(parsed[0], target=target), (parsed[1].width, parsed[1].height)


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    some=st.lists(files(SIZES[:4]), max_size=4),
    analyzed=st.booleans(),
)
def test_bad_images_of_a_folder_are_left_out_and_the_others_done(some: list[File], analyzed):
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name) / "in", Path(name) / "out"
        folder.mkdir()
        Image.new("RGB", (9, 9), "red").save(folder / "good.png")
        for number, file in enumerate(some):
            (folder / f"{number}{file.ending}").write_bytes(file.data)
        code, err = run("upscale", str(folder), str(out), "--quiet", *PLAIN)
        done = outcome(out)
        assert "good.png" in done and all(f"{n}.png" in done for n, file in enumerate(some) if file.state == "whole")
        missing = [f"{n}{file.ending}" for n, file in enumerate(some) if f"{n}.png" not in done]
        assert code == (2 if missing else 0) and err.count("\n") == bool(missing)
        assert all(f"{each}: " in err for each in missing) and len(done) == 1 + len(some) - len(missing)
        assert f"{len(missing)} of {1 + len(some)} images failed" in err or not missing
        for number, file in enumerate(some if analyzed else ()):
            if file.shown is None and f"{number}.png" in done:
                continue  # damaged, it may say that it is large: true work, but for minutes
            code, err = run("analyze", str(folder / f"{number}{file.ending}"), str(out / "map.png"), "--patches=8")
            assert (code == 0 and not err) if f"{number}.png" in done else (code == 2 and err.count("\n") == 1)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_painted_and_mapped(size, tmp_path):
    stored("RGB", size, 77, False)[0].save(tmp_path / "in.png")
    quick = ("--steps=1", "--patches=8", "--tile=1024", "--overlap=16", "--maps=both", "--quiet")
    assert run("upscale", str(tmp_path / "in.png"), str(tmp_path / "out.png"), *quick) == (0, "")
    assert Image.open(tmp_path / "out.png").size == (2 * size[0], 2 * size[1])
    assert run("analyze", str(tmp_path / "in.png"), str(tmp_path / "map.png"), "--patches=8") == (0, "")
    for name in ("out-semantic.png", "out-consistency.png", "map.png", "map-consistency.png"):
        assert max(Image.open(tmp_path / name).size) >= min(2 * max(size), 1024)


# What lies on the disk already --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["x" * 300, "x" * 300 + ".safetensors", "a\nb.safetensors", "/dev/null.bin", "\u202e/"]
)
@pytest.mark.parametrize("option", ["model", "dino", "adapter", "head", "mask"])
def test_a_name_of_nothing_is_refused(option, name, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "in.png")
    code, err = run("upscale", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--quiet", f"--{option}={name}")
    assert code == 2 and err.endswith("\n") and err[:-1].isprintable() and len(err) < 1000
    assert outcome(tmp_path) == {"in.png"}


@pytest.mark.parametrize("length", [201, 251, 300])
def test_a_name_that_is_too_long_to_write_is_refused(length, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "in.png")
    code, err = run("upscale", str(tmp_path / "in.png"), str(tmp_path / ("x" * length + ".png")), *QUICK)
    assert code == 2 and "the name is too long" in err and err.count("\n") == 1
    (tmp_path / "in.png").rename(tmp_path / ("x" * min(length, 251) + ".png"))
    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    code, err = run("upscale", str(tmp_path), str(tmp_path / "out"), *QUICK)
    assert code == 2 and "1 of 2 images failed" in err and outcome(tmp_path / "out") == {"good.png"}


def test_what_lies_where_the_image_goes_does_not_matter(tmp_path):
    source, out = tmp_path / "in.png", tmp_path / "out.png"
    Image.new("RGB", (9, 9)).save(source)
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**21)))
    for found in (b"", b"no image", png_header(9, 9)[:30], png_header(9, 9) + text):
        out.write_bytes(found)
        assert run("upscale", str(source), str(out), "--resume", *QUICK) == (0, "")
        assert Image.open(out).size == (18, 18)
    out.unlink()
    os.mkfifo(out)
    assert run("upscale", str(source), str(out), "--resume", *QUICK) == (0, "")
    assert Image.open(out).size == (18, 18)


@pytest.mark.parametrize("recipe", ["[]", "3", "null", "{", '{"tile": 1}'])
def test_a_folder_of_tiles_that_is_none_of_ours_stops_with_a_line_or_not_at_all(recipe, tmp_path):
    source, out, tiles = tmp_path / "in.png", tmp_path / "out.png", tmp_path / "out.png.tiles"
    Image.new("RGB", (9, 9)).save(source)
    tiles.mkdir()
    (tiles / "recipe.json").write_text(recipe)
    for more in (["--resume"], []):
        code, err = run("upscale", str(source), str(out), *QUICK, *more)
        assert (code, err) == (0, "") or (code == 2 and "--resume" in err and err.count("\n") == 1)
    assert outcome(tmp_path) == {"in.png", "out.png"}
    tiles.write_text("a file")
    code, err = run("upscale", str(source), str(out), *QUICK)
    assert code == 2 and "move it away" in err and err.count("\n") == 1 and tiles.read_text() == "a file"


def test_what_may_not_be_read_is_one_line():
    """As somebody who is not root, who may read anything."""
    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name) / "folder", Path(name) / "in.png"
        Image.new("RGB", (9, 9)).save(file)
        folder.mkdir()
        os.chmod(name, 0o755)
        file.chmod(0)
        folder.chmod(0)
        before = os.geteuid()
        os.seteuid(65534 if before == 0 else before)
        try:
            with pytest.raises(DinotileError, match=r"^in cannot be read as an image: .*Permission denied"):
                read_image(file, "in")
            with pytest.raises(DinotileError, match=r"folder cannot be read: Permission denied$"):
                upscale_command._jobs(folder, Path(name) / "out")
        finally:
            os.seteuid(before)
            folder.chmod(0o755)
