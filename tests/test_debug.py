"""What goes wrong is one line; with --debug the traceback comes before it."""

import importlib
import re
from pathlib import Path

import pytest

from lib_dinotile import DinotileError
from lib_dinotile import __main__ as cli
from lib_dinotile.hosts.diffusers import DiffusersHost
from tests.test_tiling import random_image

QUICK = ["--quiet", "--steps", "2", "--denoise", "0.5", "--tile", "64", "--overlap", "0", "--patches", "8"]


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "in.png"
    random_image(40, 30).save(path)
    return path


def test_where_an_error_comes_from_is_shown_on_demand_and_only_then(photo, tmp_path, monkeypatch, capsys):
    def fails(*arguments, **more):
        raise RuntimeError("the fault\nand what a second line says")

    monkeypatch.setattr(DiffusersHost, "decode", fails)
    last = re.compile(r"dinotile: stopped after 0 of \d+ tiles: the fault and what a second line says\n")
    arguments = ["upscale", str(photo), str(tmp_path / "out.png"), *QUICK]
    assert cli.main(arguments) == 1
    assert last.fullmatch(capsys.readouterr().err)
    assert cli.main([*arguments, "--debug"]) == 1
    *shown, line = capsys.readouterr().err.splitlines(keepends=True)
    assert last.fullmatch(line) and shown[0] == "Traceback (most recent call last):\n"
    assert any(f'{Path(__file__).name}", line' in each and each.endswith("in fails\n") for each in shown)


def test_where_errors_with_images_of_a_folder_come_from_is_shown_on_demand(photo, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    photo.rename(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    arguments = ["upscale", str(tmp_path / "in"), str(tmp_path / "out"), *QUICK]
    for more, tracebacks in ((), 0), (("--debug",), 2):
        assert cli.main([*arguments, *more]) == 2
        said = capsys.readouterr().err
        assert said.count("Traceback") >= tracebacks and bool(tracebacks) == ("in read_image" in said)
        assert said.splitlines()[-1].startswith("dinotile: 1 of 2 images failed: bad.png: ")
        assert tracebacks or said.count("\n") == 1


@pytest.mark.parametrize("name", ["upscale", "analyze", "train", "calibrate", "encoders", "info"])
def test_every_command_shows_on_demand_where_an_error_comes_from(name, monkeypatch, capsys):
    def fails(arguments):
        raise DinotileError("what is wrong")

    module = importlib.import_module(f"lib_dinotile.cli.{name}")
    monkeypatch.setattr(module, "add_arguments", lambda command: command.set_defaults(run=fails))
    assert cli.main([name]) == 2
    assert capsys.readouterr().err == "dinotile: what is wrong\n"
    assert cli.main([name, "--debug"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "in fails\n" in said and said.endswith("\ndinotile: what is wrong\n")
