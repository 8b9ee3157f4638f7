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
        assert re.match(
            r"dinotile: OUT: .* is IN, too.*, which would be lost: give another name", refused(capsys, photo, out)
        )
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
        ("--config", tmp_path, "config"),
    ):
        line = refused(capsys, photo, out, option, file, "--report", adapter if file == tmp_path else file)
        assert f"report: {adapter if file == tmp_path else file} is {name}, too" in line
    for option in ("--lora", "--vae", "--controlnet"):
        line = refused(capsys, photo, out, "--model", "sd", option, adapter, "--report", adapter)
        assert f"report: {adapter} is {option[2:]}, too" in line
    assert "report: " in refused(capsys, photo, out, "--report", photo)
    assert f"report: {out} is OUT, too" in refused(capsys, photo, out, "--report", out)
    assert not out.exists()


def test_nor_by_what_is_written_beside_the_image(photo, tmp_path, capsys, unpainted):  # noqa: F811
    for name, more in (("a-consistency.png", ["--maps", "both"]), ("a-unfinished.png", [])):
        random_image(20, 20).save(tmp_path / name)
        assert "is IN, too" in refused(capsys, tmp_path / name, tmp_path / "a.png", *more)
    (tmp_path / "in").mkdir()
    for name in ("b.png", "b-semantic.png"):
        random_image(20, 20).save(tmp_path / "in" / name)
    assert "is OUT, too" in refused(capsys, tmp_path / "in", tmp_path / "out", "--maps", "semantic")
    code = cli.main(["analyze", str(tmp_path / "a-consistency.png"), str(tmp_path / "a.png")])
    assert code == 2 and "OUT: " in capsys.readouterr().err and not (tmp_path / "a.png").exists()


def test_a_mask_among_the_results_of_a_folder_is_safe(tmp_path, capsys, unpainted):
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
        random_image(20, 20).save(tmp_path / name / "a.png")
    line = refused(capsys, tmp_path / "in", tmp_path / "out", "--mask", tmp_path / "out" / "a.png")
    assert f"OUT: {tmp_path / 'out' / 'a.png'} is mask, too" in line


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
