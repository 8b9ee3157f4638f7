"""Files on the command line: none that is read is written over, and none is left out without a word."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib_dinotile import DinotileError
from lib_dinotile import __main__ as cli
from lib_dinotile.cli.files import check_files
from lib_dinotile.hosts.diffusers import DiffusersHost
from tests.test_cli import QUICK, photo, run  # noqa: F401
from tests.test_diffusers import sd15  # noqa: F401
from tests.test_diffusers_addons import another_vae, with_peft, write_controlnet, write_lora
from tests.test_tiling import random_image


@pytest.fixture
def unpainted(monkeypatch):
    """No tile may be painted, no model loaded."""
    monkeypatch.setattr(DiffusersHost, "sample", None)
    monkeypatch.setattr("lib_dinotile.hosts.diffusers.load_host", None)


def refused(capsys, *arguments):
    """The one line; everything on the disk is as it was."""
    folder = Path(arguments[0]).parent
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert run(*arguments, *QUICK) == 2
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_source_is_not_written_over_by_whatever_name(photo, tmp_path, capsys, unpainted, monkeypatch):  # noqa: F811
    (tmp_path / "sub").mkdir()
    os.symlink(photo, tmp_path / "link.png")
    os.symlink(tmp_path, tmp_path / "folder")
    os.link(photo, tmp_path / "hard.png")
    monkeypatch.chdir(tmp_path)
    same = [photo, "in.png", "./sub/../in.png", tmp_path / "link.png", tmp_path / "hard.png", "folder/in.png"]
    if os.path.exists(tmp_path / "IN.PNG"):  # where the disk does not tell them apart
        same.append(tmp_path / "IN.PNG")
    for out in same:
        assert re.match(r"dinotile: OUT: .* would overwrite IN.*: give another name", refused(capsys, photo, out))
        assert "OUT: " in refused(capsys, out, photo)


def test_no_file_that_is_read_is_written_over(photo, tmp_path, capsys, unpainted):  # noqa: F811
    Image.new("L", (50, 37), 255).save(tmp_path / "mask.png")
    adapter = tmp_path / "a.safetensors"
    adapter.write_bytes(b"weights")
    out = tmp_path / "out.png"
    assert "OUT: " in refused(capsys, photo, tmp_path / "mask.png", "--mask", tmp_path / "mask.png")
    for option, file, name in (
        ("--mask", tmp_path / "mask.png", "mask"),
        ("--adapter", adapter, "adapter"),
        ("--head", adapter, "head"),
        ("--dino", adapter, "encoder"),
        ("--model", adapter, "model"),
        ("--model", tmp_path, "model"),  # a folder
    ):
        line = refused(capsys, photo, out, option, file, "--report", adapter if file == tmp_path else file)
        assert f"report: {adapter if file == tmp_path else file} would overwrite {name}" in line
    for option in ("--lora", "--vae", "--controlnet", "--config"):
        line = refused(capsys, photo, out, "--model", "sd.safetensors", option, adapter, "--report", adapter)
        assert f"report: {adapter} would overwrite {option[2:]}" in line
    assert "report: " in refused(capsys, photo, out, "--report", photo)
    assert f"report: {out} would overwrite OUT" in refused(capsys, photo, out, "--report", out)
    assert not out.exists()


def test_nor_by_what_is_written_beside_the_image(photo, tmp_path, capsys, unpainted):  # noqa: F811
    for name, more in (
        ("a-source.png", ["--maps", "all"]),
        ("a-source.png", ["--maps", "source"]),
        ("a-semantic.png", ["--maps", "all"]),
        ("a-consistency.png", ["--maps", "both"]),
        ("a-unfinished.png", []),
    ):
        random_image(20, 20).save(tmp_path / name)
        assert "would overwrite IN" in refused(capsys, tmp_path / name, tmp_path / "a.png", *more)
    for other, more in (("b-semantic", ["--maps", "semantic"]), ("b-unfinished", [])):
        (tmp_path / other).mkdir()
        for name in ("b", other):
            random_image(20, 20).save(tmp_path / other / f"{name}.png")
        line = refused(capsys, tmp_path / other, tmp_path / "out", *more)
        assert line == (
            f"dinotile: OUT: {tmp_path / 'out' / other}.png would be both a result and a map or the unfinished part of "
            "another image: rename one of the two sources"
        )
    code = cli.main(["analyze", str(tmp_path / "a-consistency.png"), str(tmp_path / "a.png")])
    assert code == 2 and "OUT: " in capsys.readouterr().err and not (tmp_path / "a.png").exists()


def test_a_mask_among_the_results_of_a_folder_is_safe(tmp_path, capsys, unpainted):
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
        random_image(20, 20).save(tmp_path / name / "a.png")
    line = refused(capsys, tmp_path / "in", tmp_path / "out", "--mask", tmp_path / "out" / "a.png")
    assert f"OUT: {tmp_path / 'out' / 'a.png'} would overwrite mask" in line


@pytest.mark.parametrize("text", [b"my thesis\n", b"\x89PNG\r\n", b"[1]\n", b'{"other": 1}\n', b"[" * 9999])
def test_lines_are_added_to_files_of_reports_only(photo, tmp_path, capsys, unpainted, text):  # noqa: F811
    (tmp_path / "notes.txt").write_bytes(text)
    line = refused(capsys, photo, tmp_path / "out.png", "--report", tmp_path / "notes.txt")
    assert "notes.txt exists already and is not a file of reports: give another name" in line


def test_a_report_goes_on(photo, tmp_path):  # noqa: F811
    for name in ("a.png", "b.png"):
        arguments = [photo, tmp_path / name, *QUICK, "--order", "none", "--report", tmp_path / "report.jsonl"]
        assert run(*arguments) == 0
    assert len([json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]) == 2


def test_a_report_that_cannot_be_written_is_bad_input(photo, tmp_path, capsys, unpainted):  # noqa: F811
    (tmp_path / "folder").mkdir()
    for report, says in (
        (tmp_path / "folder", f"report: {tmp_path / 'folder'} is a folder, give a file"),
        (tmp_path / "no" / "report.jsonl", f"report: there is no folder {tmp_path / 'no'}, give another name"),
        ("", "report: is empty, give a file or a folder"),
    ):
        assert refused(capsys, photo, tmp_path / "out.png", "--report", report) == f"dinotile: {says}"


def test_a_report_is_there_with_its_first_line(photo, tmp_path, monkeypatch, capsys):  # noqa: F811
    report = tmp_path / "report.jsonl"
    assert run(photo, tmp_path / "out.png", *QUICK, "--report", report, "--upscaler", "none such") == 2
    assert not report.exists()

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    real = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *a, **b: full() if path == report else real(path, *a, **b))
        assert run(photo, tmp_path / "out.png", *QUICK, "--order", "none", "--report", report) == 1
    assert capsys.readouterr().err.endswith(f"report: {report} cannot be written: No space left on device\n")


def test_what_a_finished_image_lacks_is_told(photo, tmp_path, capsys):  # noqa: F811
    report, out = tmp_path / "report.jsonl", tmp_path / "out.png"
    arguments = [photo, out, *QUICK[1:], "--order", "none"]
    assert run(*arguments) == 0
    capsys.readouterr()
    assert run(*arguments, "--resume") == 0
    assert capsys.readouterr().out == f"{out}: is there already\n"
    more = ["--maps", "source", "--report", report]
    assert run(*arguments, "--resume", *more) == 0
    lacks = "without out-source.png and a line in report.jsonl: delete it to have it made again"
    assert capsys.readouterr().out == f"{out}: is there already, {lacks}\n" and not report.exists()
    out.unlink()
    for _ in range(2):
        assert run(*arguments, "--resume", *more) == 0
    assert capsys.readouterr().out.endswith(f"{out}: is there already\n")
    assert len(report.read_text().splitlines()) == 1


@pytest.mark.parametrize("command", ["upscale", "analyze", "calibrate", "train"])
def test_an_empty_path_is_not_the_current_folder(command, photo, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    flags = {
        "upscale": ("IN", "OUT"),
        "analyze": ("IN", "OUT"),
        "calibrate": ("images", "out"),
        "train": ("images", "out"),
    }
    names = flags[command]
    for empty in names:
        words = [" " if name == empty else str(photo) for name in names]
        given = words if "IN" in names else [f"--{name}={word}" for name, word in zip(names, words)]
        assert cli.main([command, *given]) == 2
        assert capsys.readouterr().err == f"dinotile: {empty}: is empty, give a file or a folder\n"
    assert os.listdir(tmp_path) == ["in.png"]


def test_files_that_are_not_there_are_told_before_the_checkpoint_is_loaded(photo, tmp_path, capsys, unpainted):  # noqa: F811
    (tmp_path / "vae.pt").write_bytes(b"pickle")
    (tmp_path / "folder").mkdir()
    hub = "(Hugging Face ids are only for --model)"
    for option, name, says in (
        ("vae", "gone.safetensors", f"vae: there is no file or folder gone.safetensors {hub}"),
        ("vae", "stabilityai/sd-vae-ft-mse", f"vae: there is no file or folder stabilityai/sd-vae-ft-mse {hub}"),
        ("controlnet", "gone", f"controlnet: there is no file or folder gone {hub}"),
        ("lora", "gone.safetensors:0.5", f"lora: there is no file gone.safetensors {hub}"),
        ("mask", "gone.png", "mask: there is no file gone.png"),
        ("mask", tmp_path / "folder", f"mask: there is no file {tmp_path / 'folder'}"),
        *((name, " ", f"{name}: is empty, give") for name in ("vae", "controlnet", "lora", "mask", "config")),
        ("vae", tmp_path / "vae.pt", f"vae: {tmp_path / 'vae.pt'} is not a .safetensors file; other formats can"),
    ):
        line = refused(capsys, photo, tmp_path / "out" / "x.png", "--model", "sd.safetensors", f"--{option}", name)
        assert line.startswith(f"dinotile: {says}")


def test_a_mask_that_is_no_image_is_called_the_mask(photo, tmp_path, capsys):  # noqa: F811
    (tmp_path / "mask.png").write_bytes(b"text")
    assert run(photo, tmp_path / "out.png", *QUICK, "--mask", tmp_path / "mask.png") == 2
    assert capsys.readouterr().err.startswith(f"dinotile: mask: {tmp_path / 'mask.png'} cannot be read as an image")


def test_other_files_are_written(photo, tmp_path):  # noqa: F811
    (tmp_path / "other").mkdir()
    check_files(
        {"IN": [photo, tmp_path / "gone"]}, [("OUT", tmp_path / "other" / "in.png"), ("report", tmp_path / "r")]
    )


def test_pictures_that_are_not_read_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "register_plugins", lambda: None)
    kinds = {ending: kind for ending, kind in Image.registered_extensions().items() if kind != "HEIF"}
    monkeypatch.setattr(Image, "EXTENSION", kinds)
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(7):
        (folder / f"IMG_{number}.HEIC").write_bytes(b"heic")
    (folder / "raw.dng").write_bytes(b"raw")
    for name in ("notes.txt", ".DS_Store", "a.txt"):
        (folder / name).write_text("not a picture")
    assert run(folder, tmp_path / "out", *QUICK) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no images; IMG_0.HEIC, " in line and "and 3 more: not a kind of image that is read: pip install" in line
    random_image(20, 20).save(folder / "a.png")
    assert run(folder, tmp_path / "out", *QUICK[1:], "--order", "none") == 0
    said = capsys.readouterr().out
    (line,) = [each for each in said.splitlines() if each.startswith("left out: ")]
    assert "IMG_4.HEIC and 3 more" in line and "pillow-heif, or save them as PNG or JPEG" in line and "txt" not in said


def test_so_are_those_that_an_encoder_is_not_calibrated_from(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, "EXTENSION", {".png": "PNG"})
    monkeypatch.setattr(cli, "register_plugins", lambda: None)
    for name in ("a.heic", "b.png"):
        (tmp_path / name).write_bytes(b"picture")
    assert cli.main(["calibrate", "--dino", "mini", "--images", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out.startswith("left out: a.heic: not a kind of image that is read: pip install pillow-heif")
    assert "has 1 pictures, give at least" in said.err


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    image = np.full((48, 64, 3), 200, np.uint8)
    image[:24, :32] = 20
    heif.from_pillow(Image.fromarray(image)).save(tmp_path / "in.heic", quality=95)
    assert run(tmp_path / "in.heic", tmp_path / "out.png", *QUICK, "--order", "none", "--scale", "1") == 0
    assert abs(np.asarray(Image.open(tmp_path / "out.png")).astype(int) - image).mean() < 8


@with_peft
def test_png_info_names_what_was_added_as_the_webuis_do(sd15, photo, tmp_path):  # noqa: F811
    lora, vae = tmp_path / "fur, fine.safetensors", tmp_path / "vae"
    write_lora(lora)
    another_vae(sd15).save_pretrained(vae)
    single = vae / "diffusion_pytorch_model.safetensors"
    net = write_controlnet(tmp_path / "tile", sd15)
    more = ["--lora", f"{lora}:0.5", "--vae", single, "--controlnet", net, "--controlnet-strength", "0.75"]
    arguments = ["--model", sd15, "--prompt", "a (cat:1.2)", "--clip-skip", "2", "--order", "none", *more]
    assert run(photo, tmp_path / "out.png", *QUICK, *arguments) == 0
    prompt, _, values = Image.open(tmp_path / "out.png").text["parameters"].split("\n")
    assert prompt == "a (cat:1.2) <lora:fur, fine:0.5>"
    data = lora.read_bytes()
    own = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()[:12]
    whole = hashlib.sha256(single.read_bytes()).hexdigest()[:10]
    for part in (
        "Clip skip: 2",
        f"VAE hash: {whole}, VAE: diffusion_pytorch_model.safetensors",
        f'Lora hashes: "fur, fine: {own}"',
        'ControlNet 0: "Module: none, Model: tile, Weight: 0.75"',
    ):
        assert part in values


@with_peft
def test_an_image_of_another_lora_is_done_again(sd15, photo, tmp_path):  # noqa: F811
    lora, out = tmp_path / "a.safetensors", tmp_path / "out.png"
    write_lora(lora)
    arguments = [photo, out, *QUICK, "--model", sd15, "--order", "none", "--lora", lora, "--resume"]
    assert run(*arguments) == 0
    first = out.stat().st_mtime_ns
    assert run(*arguments) == 0 and out.stat().st_mtime_ns == first
    write_lora(lora, alpha=3.0)
    os.utime(lora, (1, 1))
    assert run(*arguments) == 0 and out.stat().st_mtime_ns != first


def test_capital_letters_make_no_other_file_of_one_that_is_not_there_yet(tmp_path):
    writes = [("OUT", tmp_path / "Cat.png"), ("report", tmp_path / "cat.PNG")]
    with pytest.raises(DinotileError, match=r"^report: .*cat\.PNG would overwrite OUT"):
        check_files({}, writes)
