"""python -m lib_dinotile, on the built-in model."""

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from lib_dinotile import DinotileError
from lib_dinotile import __main__ as cli
from lib_dinotile.cli import upscale as upscale_command
from lib_dinotile.cli.common import WEBUI, parse_options
from lib_dinotile.condition import conditioner
from lib_dinotile.condition.conditioner import MINI
from lib_dinotile.hosts.diffusers import DiffusersHost
from lib_dinotile.images import read_image
from lib_dinotile.settings import Generation, Settings
from tests.processes import ROOT, launch_two, run_two
from tests.test_encoder import write_checkpoint
from tests.test_settings import another
from tests.test_tiling import random_image

EXAMPLE = Path(__file__).parents[1] / "examples" / "photo.png"
QUICK = ["--quiet", "--steps", "4", "--denoise", "0.3", "--tile", "64", "--overlap", "16", "--patches", "8"]


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "in.png"
    random_image(40, 30).resize((50, 37)).save(path)
    return path


def run(*arguments):
    return cli.main(["upscale", *map(str, arguments)])


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_an_image_is_upscaled_and_says_how(photo, tmp_path):
    out = tmp_path / "out.png"
    assert run(photo, out, *QUICK, "--scale", "1.5", "--seed", "7") == 0
    image = Image.open(out)
    assert image.size == (75, 56)
    told = ("Seed: 7", "Denoising strength: 0.3", "DINO Tile: 1, DINO Tile scale: 1.5", "DINO Tile adapter: mini")
    for part in (*told, 'DINO Tile notes: "guard: '):
        assert part in image.text["parameters"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.png", "out.png"]


def test_pictures_besides_the_result_are_written_beside_it(photo, tmp_path):
    every = {"source", "semantic", "consistency"}
    for maps, wanted in (("source", {"source"}), ("both", every - {"source"}), ("all", every)):
        folder = tmp_path / maps
        folder.mkdir()
        assert run(photo, folder / "out.png", *QUICK, "--scale", "1.5", "--maps", maps) == 0
        assert {file.name for file in folder.iterdir()} == {"out.png", *(f"out-{name}.png" for name in wanted)}
    assert Image.open(folder / "out-source.png").size == Image.open(folder / "out.png").size


def test_same_seed_same_image_at_any_batch_and_the_adapter_counts(photo, tmp_path):
    for name, *more in (("a", "--batch", 1), ("b", "--batch", 4), ("c", "--seed", 1), ("d", "--adapter", "None")):
        assert run(photo, tmp_path / f"{name}.png", *QUICK, *more) == 0
    a, b, c, d = (pixels(tmp_path / f"{name}.png") for name in "abcd")
    assert abs(a - b).max() <= 1
    assert abs(a - c).max() > 1 and (a != d).any()


def test_a_folder_gives_a_folder_and_a_bad_file_does_not_stop_the_others(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("b.jpg", "a.png"):
        random_image(20, 20).save(tmp_path / "in" / name)
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    (tmp_path / "in" / "notes.txt").write_text("not looked at")
    assert run(tmp_path / "in", tmp_path / "out", *QUICK) == 2
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.png", "b.png"]
    assert "1 of 3 images failed: broken.png: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--scale", "9"], "scale: 9.0 is not allowed, give a number from 1 to 8"),
        (["--scale", "big"], "scale: 'big' is not allowed, give a number from 1 to 8"),
        (["--tile", "100"], "tile: 100 is not allowed"),
        (["--denoise", "-1"], "denoise: -1.0 is not allowed, give a number from 0 to 1"),
        (["--tile", "64", "--overlap", "64"], "overlap: 64 is not allowed with tile 64, give at most 32"),
        (["--upscaler", "ESRGAN"], "upscaler: 'ESRGAN' is not installed, give one of Lanczos"),
        (["--adapter", "none.safetensors"], "adapter: there is no file none.safetensors"),
        (["--dino", "facebook/dinov2-nano"], "facebook/dinov2-nano"),
        (["--model", "gone.safetensors"], "model: there is no file gone.safetensors"),
        (["--scal", "2"], "unrecognized arguments: --scal 2"),
        (["--tiles", "2"], "unrecognized arguments: --tiles 2"),
        (["--captions", "BLIP"], "unrecognized arguments: --captions BLIP"),
        (
            ["--preset", "", "--tile", "100"],
            "preset: '' is not allowed, give one of Photo, Anime, Low VRAM, Plain tiles; tile: 100",
        ),
        (
            ["--preset", "foto", "--cfg", "0"],
            "preset: 'foto' is not allowed, give one of Photo, Anime, Low VRAM, Plain tiles; cfg: 0",
        ),
        (["--longest", "80", "--scale", "2"], "longest: has no effect with --scale: leave one of them out"),
        (
            ["--longest", "80", "--target", "scale"],
            "longest: has no effect with --target 'scale': leave one of them out",
        ),
        (["--width", "80", "--target", "longest side"], "width: has no effect with --target 'longest side'"),
        (["--scale", "2", "--target", "img2img size"], "scale: has no effect with --target 'img2img size'"),
        (["--width", "80", "--longest", "80"], "width: has no effect with --longest: leave one of them out"),
        (["--config", "x"], "config: the built-in model mini has no use for it: leave it out, or give a --model"),
        (["--config", "x", "--model", "a/b"], "config: only a checkpoint file needs it, a/b has its own: leave it out"),
        (["--config", "x", "--model", "."], "config: only a checkpoint file needs it, . has its own: leave it out"),
        (
            ["--controlnet-strength", "0.5", "--model", "x.safetensors"],
            "controlnet_strength: there is no ControlNet: leave it out, or give a --controlnet",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(photo, tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "out.png"
    try:
        code = run(photo, out, *arguments, "--quiet")
    except SystemExit as stopped:
        code = stopped.code
    err = capsys.readouterr().err
    assert code == 2 and says in err and err.count("\n") == 1
    assert not out.exists()


def test_two_images_of_one_name_are_both_written(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "a.jpg"):
        random_image(20, 20).save(tmp_path / "in" / name)
    assert run(tmp_path / "in", tmp_path / "out", *QUICK) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.jpg.png", "a.png.png"]


@pytest.mark.parametrize(
    "more, size",
    [
        (["--longest", 80], (80, 59)),
        (["--width", 80], (80, 59)),
        (["--height", 90], (122, 90)),
        (["--width", 80, "--height", 90], (80, 90)),
        (["--longest", 80, "--target", "longest side"], (80, 59)),
        (["--width", 80, "--target", "img2img size"], (80, 59)),
        (["--target", "scale"], (100, 74)),
    ],
)
def test_a_size_stands_for_its_target(photo, tmp_path, more, size):
    assert run(photo, tmp_path / "out.png", *QUICK, "--order", "none", *more) == 0
    assert Image.open(tmp_path / "out.png").size == size


def test_plain_tiles_look_at_nothing(photo, tmp_path, monkeypatch):
    told, load = [], upscale_command.Conditioner.load

    def loaded(settings, *arguments, **more):
        told.append((settings.adapter, settings.looks))
        return load(settings, *arguments, **more)

    monkeypatch.setattr(upscale_command.Conditioner, "load", loaded)
    for more in (
        ["--preset", "plain tiles"],
        ["--preset", "plain tiles", "--adapter", "mini"],
        ["--preset", "photo"],
        [],
    ):
        assert run(photo, tmp_path / "out.png", *QUICK, "--order", "none", *more) == 0
    assert told == [("None", False), *[("mini", True)] * 3]


def test_one_step_is_a_step(photo, tmp_path):
    assert run(photo, tmp_path / "out.png", *QUICK, "--steps", "1") == 0
    plain = np.asarray(Image.open(photo).resize((100, 74), Image.Resampling.LANCZOS)).astype(int)
    assert abs(pixels(tmp_path / "out.png") - plain).max() > 1


def test_bad_files_are_one_line_and_exit_code_2(photo, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    cases = [
        (tmp_path / "gone.png", tmp_path / "o.png", "gone.png does not exist"),
        (tmp_path / "text.png", tmp_path / "o.png", "cannot be read as an image"),
        (tmp_path / "empty", tmp_path / "o", "has no images"),
        (photo, tmp_path / "o.xyz", "no image is written with the ending '.xyz'"),
        (photo, tmp_path / "gone" / "o.png", "does not exist or is not writable"),
        (photo, tmp_path, "no image is written with the ending"),
        (photo, tmp_path / "o.psd", "no image is written with the ending '.psd'"),
        (photo.parent, photo.parent, "is where the images come from"),
        (photo.parent, photo, "cannot be made a folder of images"),
        (photo.parent, photo / "x", "cannot be made a folder of images"),
    ]
    for source, target, says in cases:
        assert run(source, target, *QUICK) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "error, code, done, why",
    [(RuntimeError("no memory left"), 1, "stopped", ": no memory left"), (KeyboardInterrupt(), 130, "cancelled", "")],
)
@pytest.mark.parametrize("name", ["out.png", "out.jpg"])
def test_what_is_painted_is_kept_when_a_run_breaks_off(
    photo, tmp_path, capsys, monkeypatch, error, code, done, why, name
):
    sample, calls = DiffusersHost.sample, []

    def breaks(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return sample(self, *arguments)

    monkeypatch.setattr(DiffusersHost, "sample", breaks)
    (tmp_path / "out-other-unfinished.png").write_bytes(b"of another image")
    assert run(photo, tmp_path / name, *QUICK, "--batch", 1) == code
    err = capsys.readouterr().err
    kept = re.escape(f"(kept in {tmp_path / 'out-unfinished.png'}; --resume continues with it)")
    assert re.fullmatch(rf"dinotile: {done} after 2 of \d tiles {kept}{why}\n", err)
    kept = pixels(tmp_path / "out-unfinished.png")
    plain = np.asarray(Image.open(photo).resize((100, 74), Image.Resampling.LANCZOS)).astype(int)
    assert kept.shape == plain.shape and abs(kept - plain).max() > 1
    assert not (tmp_path / name).exists()
    monkeypatch.setattr(DiffusersHost, "sample", sample)
    assert run(photo, tmp_path / name, *QUICK, "--batch", 1, "--resume") == 0
    assert {each.name for each in tmp_path.iterdir()} == {"in.png", name, "out-other-unfinished.png"}


def test_a_cancel_while_plugins_are_looked_for_is_one_line(photo, tmp_path, capsys, monkeypatch):
    def cancelled():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "register_plugins", cancelled)
    assert run(photo, tmp_path / "out.png", *QUICK) == 130
    assert capsys.readouterr().err == "dinotile: cancelled\n"


def test_an_image_that_is_only_called_unfinished_stays(photo, tmp_path):
    assert run(photo, tmp_path / "out-unfinished.png", *QUICK, "--order", "none") == 0
    assert run(photo, tmp_path / "out.png", *QUICK, "--order", "none") == 0
    assert (tmp_path / "out-unfinished.png").exists()


def test_a_cancel_before_the_first_tile_is_done_is_one_line(photo, tmp_path, capsys, monkeypatch):
    def cancelled(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(DiffusersHost, "sample", cancelled)
    assert run(photo, tmp_path / "out.png", *QUICK) == 130
    assert re.fullmatch(r"dinotile: cancelled after 0 of \d tiles\n", capsys.readouterr().err)


def test_a_cancel_while_libraries_are_imported_ends_without_a_word():
    code = """
import runpy, sys
class Cancels:
    def find_spec(self, name, *_):
        if name == "torch":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Cancels())
sys.argv = ["dinotile", "upscale", "in.png", "out.png"]
runpy.run_module("lib_dinotile", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.fixture
def sampled(monkeypatch):
    """What each call of the sampler was given to sample; `stop` says before which of them the machine goes down."""
    sample = DiffusersHost.sample

    class Calls(list):
        stop = None

    calls = Calls()

    def watched(self, latents, *arguments):
        if len(calls) == calls.stop:
            raise SystemExit("the machine went down")  # nothing in the command line catches this
        calls.append(len(latents))
        return sample(self, latents, *arguments)

    monkeypatch.setattr(DiffusersHost, "sample", watched)
    return calls


@pytest.mark.parametrize("more", [(), ("--order", "linear", "--seams", "half tile")])
def test_a_run_that_broke_off_is_resumed_to_the_same_image(photo, tmp_path, sampled, more):
    whole, broken = tmp_path / "whole.png", tmp_path / "broken.png"
    arguments = [*QUICK, "--batch", 2, *more]
    assert run(photo, whole, *arguments) == 0
    total, sampled[:], sampled.stop = len(sampled), [], 3
    with pytest.raises(SystemExit):
        run(photo, broken, *arguments)
    kept = sorted((tmp_path / "broken.png.tiles").glob("*.safetensors"))
    assert kept and not broken.exists()
    kept[-1].write_bytes(kept[-1].read_bytes()[:100])  # cut off when it went down
    sampled[:], sampled.stop = [], None
    assert run(photo, broken, *arguments, "--resume") == 0
    assert len(sampled) == total - 2
    assert broken.read_bytes() == whole.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["broken.png", "in.png", "whole.png"]


def test_a_tile_that_failed_before_a_run_broke_off_is_named_after_all(photo, tmp_path, monkeypatch, capsys):
    sample, calls = DiffusersHost.sample, []

    def fails(self, *arguments):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("the power went")
        return sample(self, *arguments) * (np.nan if len(calls) < 3 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusersHost, "sample", fails)
        assert run(photo, tmp_path / "out.png", *QUICK[1:], "--batch", 1) == 1
    line = "tile 1 shows the enlarged source: the model returned NaN"
    assert f"in.png: {line}\n" in capsys.readouterr().out
    report = tmp_path / "report.jsonl"
    assert run(photo, tmp_path / "out.png", *QUICK[1:], "--batch", 1, "--resume", "--report", report) == 0
    assert line in json.loads(report.read_text())["notes"]
    assert f"in.png: {line}\n" in capsys.readouterr().out


def test_painted_tiles_are_not_painted_over_by_mistake(photo, tmp_path, sampled, capsys):
    sampled.stop = 2
    with pytest.raises(SystemExit):
        run(photo, tmp_path / "out.png", *QUICK, "--batch", 1)
    sampled[:], sampled.stop = [], None
    assert run(photo, tmp_path / "out.png", *QUICK, "--batch", 1) == 2 and not sampled
    assert "out.png.tiles holds painted tiles of this image: --resume continues with them" in capsys.readouterr().err
    assert run(photo, tmp_path / "out.png", *QUICK, "--batch", 1, "--resume") == 0


def test_what_has_no_room_on_the_disk_is_said_with_where_the_tiles_are(photo, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise DinotileError("out.png cannot be written: No space left on device", 500)

    monkeypatch.setattr(upscale_command, "write_image", full)
    assert run(photo, tmp_path / "out.png", *QUICK) == 1
    kept = re.escape(f"(painted tiles are kept in {tmp_path / 'out.png.tiles'}; --resume continues with them)")
    assert re.fullmatch(rf"dinotile: out.png cannot .* left on device {kept}\n", capsys.readouterr().err)
    sample, calls = DiffusersHost.sample, []

    def breaks(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(self, *arguments)

    monkeypatch.setattr(DiffusersHost, "sample", breaks)
    assert run(photo, tmp_path / "other.png", *QUICK, "--batch", 1) == 130
    assert "other.png.tiles; --resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(photo, tmp_path / "out.png", *QUICK, "--resume") == 0


def test_one_image_that_breaks_off_does_not_stop_a_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        random_image(40, 30).save(tmp_path / "in" / name)
    sample, calls = DiffusersHost.sample, []

    def breaks(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("something")
        return sample(self, *arguments)

    monkeypatch.setattr(DiffusersHost, "sample", breaks)
    assert run(tmp_path / "in", tmp_path / "out", *QUICK, "--batch", 1) == 1
    assert "1 of 2 images failed: a.png: stopped after 1 of" in capsys.readouterr().err
    assert {file.name for file in (tmp_path / "out").glob("*.png")} == {"a-unfinished.png", "b.png"}


def test_files_of_like_names_all_get_one_of_their_own(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "a.png", "a.jpg.png"):
        random_image(8, 8).save(tmp_path / "in" / name)
    assert run(tmp_path / "in", tmp_path / "out", *QUICK, "--order", "none") == 0
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_name_that_cannot_be_printed_stops_nothing(photo, tmp_path, monkeypatch):
    photo.rename(tmp_path / "猫.png")
    printed = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, into in printed.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(into, encoding="cp1252", errors="strict", write_through=True))
    assert run(tmp_path / "猫.png", tmp_path / "鳥.png", *QUICK[1:], "--order", "none") == 0
    assert b"Traceback" not in printed["stderr"].getvalue() and (tmp_path / "鳥.png").is_file()
    assert any(into.getvalue() for into in printed.values())


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_tiles_of_other_settings_are_left_alone_and_said_to_be_there(photo, tmp_path, sampled, capsys, resume):
    tiles, whole, other = (tmp_path / name for name in ("out.png.tiles", "whole.png", "other.png"))
    assert run(photo, whole, *QUICK, "--batch", 1) == 0
    total, sampled[:], sampled.stop = len(sampled), [], 3
    with pytest.raises(SystemExit):
        run(photo, tmp_path / "out.png", *QUICK, "--batch", 1)
    sampled[:], sampled.stop = [], None
    kept = {file.name: file.read_bytes() for file in tiles.iterdir()}
    assert run(photo, tmp_path / "out.png", *QUICK, "--batch", 1, "--overlap", 8, *resume) == 2 and not sampled
    said = capsys.readouterr().err
    assert said == (
        f"dinotile: {tiles} holds tiles painted with another overlap (16, now 8): --resume with the same settings goes "
        "on with them; to start over, delete it or give another OUT\n"
    )
    assert {file.name: file.read_bytes() for file in tiles.iterdir()} == kept
    assert run(photo, other, *QUICK, "--batch", 1, "--overlap", 8) == 0
    sampled[:] = []
    assert run(photo, tmp_path / "out.png", *QUICK, "--batch", 1, "--resume") == 0 and len(sampled) == total - 3
    assert (tmp_path / "out.png").read_bytes() == whole.read_bytes() and not tiles.exists()


def test_tiles_of_other_settings_beside_a_finished_image_are_left_alone(photo, tmp_path, sampled):
    assert run(photo, tmp_path / "out.png", *QUICK) == 0
    sampled[:], sampled.stop, tiles = [], 2, tmp_path / "out.png.tiles"
    with pytest.raises(SystemExit):
        run(photo, tmp_path / "out.png", *QUICK, "--batch", 1, "--overlap", 8)
    kept = {file.name: file.read_bytes() for file in tiles.iterdir()}
    assert len(kept) == 3
    assert run(photo, tmp_path / "out.png", *QUICK, "--resume") == 0
    assert {file.name: file.read_bytes() for file in tiles.iterdir()} == kept


def test_an_image_of_an_encoder_that_was_exchanged_since_is_done_again(photo, tmp_path, sampled, monkeypatch):
    """Also where it lies in the folder of encoders, and not at a path that is named."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "dinotile" / "encoders" / "tiny"
    write_checkpoint(place)
    arguments = [
        photo,
        tmp_path / "out.png",
        *QUICK,
        "--adapter",
        "None",
        "--dino",
        "tiny",
        "--guidance",
        0,
        "--head",
        "None",
    ]
    assert run(*arguments) == 0
    sampled[:] = []
    assert run(*arguments, "--resume") == 0 and not sampled
    shutil.rmtree(place)
    write_checkpoint(place, seed=1)
    assert run(*arguments, "--resume") == 0 and sampled


def test_what_else_differs_is_counted_and_no_text_is_told_in_full(photo, tmp_path, sampled, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    masks = ["a\nlong name" * 9 + ".png", "fur.png"]
    for mask in masks:
        Image.new("L", (50, 37), 255).save(mask)
    sampled.stop = 2
    with pytest.raises(SystemExit):
        run(photo, tmp_path / "out.png", *QUICK, "--batch", 1, "--mask", masks[0])
    photo.write_bytes(photo.read_bytes() + b" ")
    other = [*QUICK, "--overlap", 8, "--seed", 3, "--mask", masks[1]]
    assert run(photo, tmp_path / "out.png", *other) == 2
    said = capsys.readouterr().err
    assert "another overlap (16, now 8), mask ('a\\nlong " in said and " and 2 more: --resume" in said
    assert len(said) < 400 + len(str(tmp_path)) and said.count("\n") == 1


def test_a_folder_of_tiles_without_a_tile_is_no_hindrance(photo, tmp_path, sampled):
    sampled.stop = 2
    with pytest.raises(SystemExit):
        run(photo, tmp_path / "out.png", *QUICK, "--batch", 1)
    sampled.stop = None
    for file in (tmp_path / "out.png.tiles").glob("*.safetensors"):
        file.unlink()
    assert run(photo, tmp_path / "out.png", *QUICK, "--overlap", 8) == 0
    assert not (tmp_path / "out.png.tiles").exists()


def test_other_files_among_the_tiles_stay(photo, tmp_path, sampled):
    sampled.stop, tiles = 2, tmp_path / "out.png.tiles"
    with pytest.raises(SystemExit):
        run(photo, tmp_path / "out.png", *QUICK, "--batch", 1)
    sampled.stop = None
    (tiles / "thesis.txt").write_text("mine")
    assert run(photo, tmp_path / "out.png", *QUICK, "--resume") == 0
    assert [file.name for file in tiles.iterdir()] == ["thesis.txt"]


def test_tiles_whose_recipe_cannot_be_read_now_are_left_alone(photo, tmp_path, sampled, capsys, monkeypatch):
    sampled.stop, tiles = 2, tmp_path / "out.png.tiles"
    with pytest.raises(SystemExit):
        run(photo, tmp_path / "out.png", *QUICK, "--batch", 1)
    sampled.stop, read = None, Path.read_text

    def unreadable(path, *arguments, **more):
        if path.name == "recipe.json":
            raise PermissionError(13, "Permission denied")
        return read(path, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", unreadable)
        assert run(photo, tmp_path / "out.png", *QUICK) == 1
    assert re.fullmatch(r"dinotile: \S*, where painted tiles .*Permission denied\n", capsys.readouterr().err)
    assert run(photo, tmp_path / "out.png", *QUICK, "--resume") == 0 and not tiles.exists()


def test_resuming_with_another_batch_goes_on_and_a_run_without_a_tile_keeps_what_was_painted(photo, tmp_path, sampled):
    sampled.stop = 2
    with pytest.raises(SystemExit):
        run(photo, tmp_path / "out.png", *QUICK, "--batch", 1)
    sampled[:], sampled.stop = [], None
    kept = sorted(file.name for file in (tmp_path / "out.png.tiles").iterdir())
    assert run(photo, tmp_path / "out.png", *QUICK, "--upscaler", "nothing such") == 2
    assert sorted(file.name for file in (tmp_path / "out.png.tiles").iterdir()) == kept
    assert run(photo, tmp_path / "out.png", *QUICK, "--batch", 4, "--resume") == 0
    assert run(photo, tmp_path / "whole.png", *QUICK, "--batch", 4) == 0
    assert abs(pixels(tmp_path / "out.png") - pixels(tmp_path / "whole.png")).max() <= 1


@pytest.mark.parametrize("left", [b"", b'{"vers', None])
def test_a_recipe_that_was_cut_off_is_no_hindrance(photo, tmp_path, sampled, left):
    sampled.stop = 2
    with pytest.raises(SystemExit):
        run(photo, tmp_path / "out.png", *QUICK, "--batch", 1)
    sampled.stop, recipe = None, tmp_path / "out.png.tiles" / "recipe.json"
    recipe.unlink() if left is None else recipe.write_bytes(left)
    assert run(photo, tmp_path / "out.png", *QUICK, "--resume") == 0
    assert not recipe.parent.exists()


def test_a_folder_with_other_files_is_left_alone(photo, tmp_path, capsys):
    (tmp_path / "out.png.tiles").mkdir()
    (tmp_path / "out.png.tiles" / "thesis.txt").write_text("mine")
    assert run(photo, tmp_path / "out.png", *QUICK) == 2
    assert "it is not a folder of tiles" in capsys.readouterr().err
    assert (tmp_path / "out.png.tiles" / "thesis.txt").read_text() == "mine"


def test_an_image_of_another_mask_is_done_again(photo, tmp_path, sampled):
    mask, arguments = tmp_path / "mask.png", (photo, tmp_path / "out.png", *QUICK, "--mask", tmp_path / "mask.png")
    Image.new("L", (50, 37), 255).save(mask)
    assert run(*arguments) == 0
    sampled[:] = []
    assert run(*arguments, "--resume") == 0 and not sampled
    Image.new("L", (50, 37), 254).save(mask)
    os.utime(mask, (1, 1))
    assert run(*arguments, "--resume") == 0 and sampled


def test_resuming_a_folder_leaves_what_is_finished(tmp_path, sampled):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        random_image(20, 20).save(tmp_path / "in" / name)
    sampled.stop = 1
    with pytest.raises(SystemExit):
        run(tmp_path / "in", tmp_path / "out", *QUICK)
    before = (tmp_path / "out" / "a.png").stat().st_mtime_ns
    sampled[:], sampled.stop = [], None
    assert run(tmp_path / "in", tmp_path / "out", *QUICK, "--resume") == 0
    assert len(sampled) == 1 and (tmp_path / "out" / "a.png").stat().st_mtime_ns == before
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.png", "b.png"]


def test_a_mask_a_size_and_a_report(photo, tmp_path):
    mask = Image.new("L", (50, 37))
    mask.paste(255, (5, 5, 20, 20))
    mask.save(tmp_path / "mask.png")
    report = tmp_path / "report.jsonl"
    more = ["--mask", tmp_path / "mask.png", "--target", "img2img size", "--width", 151, "--height", 111]
    assert run(photo, tmp_path / "out.png", *QUICK, *more, "--report", report) == 0
    plain = np.asarray(Image.open(photo).resize((151, 111), Image.Resampling.LANCZOS)).astype(int)
    outside = np.asarray(mask.resize((151, 111), Image.Resampling.BILINEAR)) == 0
    changed = (pixels(tmp_path / "out.png") != plain).any(2)
    assert changed.any() and not changed[outside].any()
    told = json.loads(report.read_text())
    assert {tile["state"] for tile in told["tiles"]} == {"painted", "outside the mask"}
    assert told["image"] == str(photo) and not [note for note in told["notes"] if "number" in note]
    assert "restoration head: calibrated" in told["notes"]


def test_what_is_transparent_in_a_mask_is_not_painted(photo, tmp_path):
    Image.new("L", (50, 37)).save(tmp_path / "mask.png")
    clear = Image.new("RGBA", (50, 37), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (5, 5, 20, 20))
    clear.save(tmp_path / "mask.png")
    assert run(photo, tmp_path / "out.png", *QUICK, "--mask", tmp_path / "mask.png") == 0
    plain = np.asarray(Image.open(photo).resize((100, 74), Image.Resampling.LANCZOS)).astype(int)
    changed = (pixels(tmp_path / "out.png") != plain).any(2)
    assert changed[12:38, 12:38].any() and not changed[44:].any() and not changed[:, 44:].any()


def test_a_mask_that_does_not_fit_is_refused(photo, tmp_path, capsys):
    for image, says in (
        (Image.new("L", (8, 8), 255), "is 8x8, the image is 50x37"),
        (Image.new("L", (50, 37)), "black"),
    ):
        image.save(tmp_path / "mask.png")
        assert run(photo, tmp_path / "out.png", *QUICK, "--mask", tmp_path / "mask.png") == 2
        assert says in capsys.readouterr().err


SHARED = [*QUICK, "--batch", "1", "--seams", "bands"]


def test_two_processes_share_a_wave_and_give_the_image_of_one(photo, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        "import sys; from lib_dinotile import __main__; from lib_dinotile.engine import team; "
        "assert team.make_team().size == 2; "
        "sys.exit(__main__.main(sys.argv[1:]))"
    )
    done = launch_two(script, "upscale", photo, tmp_path / "two.png", *SHARED)
    assert done.returncode == 0, done.stderr[-2000:]
    assert run(photo, tmp_path / "one.png", *SHARED) == 0
    assert (pixels(tmp_path / "two.png") == pixels(tmp_path / "one.png")).all()


def test_two_processes_share_a_folder_and_a_bad_file_stops_none(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "c.png", "e.png"):
        random_image(30, 20, seed=ord(name[0])).save(tmp_path / "in" / name)
    (tmp_path / "in" / "b.png").write_bytes(b"no image")
    done = run_two("upscale", tmp_path / "in", tmp_path / "two", *SHARED)
    assert done.returncode != 0 and "dinotile: 1 of 4 images failed: b.png: " in done.stderr
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == ["a.png", "c.png", "e.png"]
    assert run(tmp_path / "in", tmp_path / "one", *SHARED) == 2
    for name in ("a.png", "c.png", "e.png"):
        assert (pixels(tmp_path / "two" / name) == pixels(tmp_path / "one" / name)).all()


def test_every_option_is_a_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["upscale", "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    for option in (*Settings.table(), *Generation.table()):
        flag = option.flag or option.name.replace("_", "-")
        assert (f"--{flag} " in shown) == (option.name not in WEBUI)


@pytest.mark.parametrize("table", [Settings, Generation])
def test_every_flag_sets_its_option(monkeypatch, table):
    given = []
    monkeypatch.setattr(upscale_command, "run", given.append)
    values = {option.name: another(option) for option in table.table() if option.name not in WEBUI}
    flags = [f"--{option.flag or option.name.replace('_', '-')}" for option in table.table() if option.name in values]
    assert cli.main(["upscale", "in.png", "out.png", *itertools.chain(*zip(flags, map(str, values.values())))]) == 0
    assert parse_options(table, given[0]) == table(**values)


def test_images_of_every_kind_are_read_as_rgb(tmp_path):
    base = random_image(12, 8)
    sixteen = Image.fromarray((np.arange(96).reshape(8, 12) * 680).astype(np.uint16))
    for name, image in {
        "rgb.png": base,
        "grey.png": base.convert("L"),
        "palette.gif": base.convert("P"),
        "cmyk.jpg": base.convert("CMYK"),
        "one.png": base.convert("1"),
        "sixteen.png": sixteen,
    }.items():
        image.save(tmp_path / name)
        read = read_image(tmp_path / name)
        assert (read.mode, read.size) == ("RGB", (12, 8)), name
    assert (
        abs(np.asarray(read_image(tmp_path / "sixteen.png"))[..., 0] - np.arange(96).reshape(8, 12) * 680 / 256).max()
        <= 1
    )
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    turned, exif = Image.new("RGB", (6, 3)), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (3, 6)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_an_image_whose_white_is_not_known_is_refused(tmp_path, kind):
    Image.fromarray(np.ones((8, 12), kind)).save(tmp_path / "deep.tiff")
    with pytest.raises(DinotileError, match=r"deep\.tiff has colour values of an unknown range"):
        read_image(tmp_path / "deep.tiff")


def test_colours_are_those_of_the_profile(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    for profile, red in ((srgb, (200, 30, 40)), (swapped, (30, 200, 40)), (b"damaged", (200, 30, 40))):
        plain = Image.new("RGB", (4, 4), (200, 30, 40))
        for image in (plain, plain.convert("RGBA"), plain.quantize(2)):
            image.save(tmp_path / "in.png", icc_profile=profile)
            read = read_image(tmp_path / "in.png").getpixel((0, 0))
            assert max(abs(one - other) for one, other in zip(read, red)) <= 2, (image.mode, profile[:8])
    Image.new("CMYK", (4, 4), (10, 200, 100, 0)).save(tmp_path / "in.jpg", icc_profile=swapped)
    assert read_image(tmp_path / "in.jpg").mode == "RGB"


@pytest.mark.parametrize("name", ["out.webp", "out.ico", "out.avif"])
def test_a_file_that_cannot_hold_the_image_is_refused_before_it_is_made(tmp_path, name, sampled, capsys):
    random_image(2100, 1).save(tmp_path / "in.png")
    assert run(tmp_path / "in.png", tmp_path / name, *QUICK, "--scale", 8) == 2 and not sampled
    assert "try .png" in capsys.readouterr().err


def test_what_was_written_can_be_read_again_however_large_it_is(photo, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert run(photo, tmp_path / "out.png", *QUICK, "--order", "none") == 0


def test_a_report_that_cannot_be_written_is_told_before_a_tile_is_painted(photo, tmp_path, sampled, capsys):
    assert run(photo, tmp_path / "out.png", *QUICK, "--report", tmp_path / "no" / "report.jsonl") == 2
    assert "report: " in capsys.readouterr().err and not sampled


def test_a_canvas_that_does_not_fit_into_memory_is_one_line(photo, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise MemoryError

    monkeypatch.setattr(DiffusersHost, "upscale", full)
    assert run(photo, tmp_path / "out.png", *QUICK) == 1
    assert capsys.readouterr().err == (
        "dinotile: out of memory before the first tile: make the result smaller than 100x74\n"
    )


def test_a_cancel_before_the_first_tile_is_one_line(photo, tmp_path, monkeypatch, capsys):
    def cancelled(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("lib_dinotile.hosts.diffusers.load_host", cancelled)
    assert run(photo, tmp_path / "out.png", *QUICK) == 130
    assert capsys.readouterr().err == "dinotile: cancelled\n"


def test_analyze_shows_the_regions_and_what_they_are_called(tmp_path, capsys):
    target, more = tmp_path / "map.png", ("--scale", "1", "--patches", "16")
    assert (
        cli.main(["analyze", str(EXAMPLE), str(target), *more, "--regions", "3", "--region-prompts", "A: fur; B: wall"])
        == 0
    )
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"{re.escape(str(tmp_path / 'map-regions.png'))}: regions: A \d+%, B \d+%, C \d+%", line)
    with Image.open(EXAMPLE) as photo, Image.open(tmp_path / "map-regions.png") as regions:
        assert regions.width == photo.width and regions.height > photo.height  # the legend is below it
    assert cli.main(["analyze", str(EXAMPLE), str(tmp_path / "none.png"), *more, "--regions", "0"]) == 0
    assert (tmp_path / "none-consistency.png").exists() and not (tmp_path / "none-regions.png").exists()


def test_analyze_shows_the_regions_of_the_encoder_that_upscale_would_take(tmp_path, capsys, monkeypatch):
    """An adapter brings an encoder with it."""
    asked: list[str | None] = []
    own = conditioner._encoder_for
    monkeypatch.setattr(
        conditioner, "_encoder_for", lambda settings, named, *more: asked.append(named) or own(settings, named, *more)
    )
    arguments = ["analyze", str(EXAMPLE), str(tmp_path / "map.png"), "--scale", "1", "--patches", "16"]
    for more, named in (([], None), (["--adapter", str(MINI / "adapter.safetensors")], "mini")):
        asked.clear()
        assert cli.main([*arguments, *more]) == 0
        assert asked == [named] and capsys.readouterr().out.startswith("encoder: mini\n")
    assert cli.main([*arguments, "--adapter", "gone.safetensors"]) == 2
    assert "adapter: there is no file gone.safetensors" in capsys.readouterr().err


def test_analyze_refuses_words_of_a_region_that_there_is_not(tmp_path, capsys):
    code = cli.main(
        ["analyze", str(EXAMPLE), str(tmp_path / "map.png"), "--patches", "16", "--region-prompts", "L: sea"]
    )
    assert not list(tmp_path.iterdir())
    assert code == 2 and "region_prompts: there is no region L, this image has" in capsys.readouterr().err
