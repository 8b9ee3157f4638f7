"""python -m lib_dinotile train: what it writes is an adapter that fits, learns, and goes on where it was broken off."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

pytest.importorskip("tensorboard")

from lib_dinotile import __main__ as cli
from lib_dinotile.condition.adapter_file import load_adapter, read_config, read_metadata
from lib_dinotile.condition.conditioner import MINI, Conditioner, to_tensor
from lib_dinotile.dino.encoder import load_encoder
from lib_dinotile.dino.field import feature_field
from lib_dinotile.dino.head import load_heads
from lib_dinotile.engine.team import Team
from lib_dinotile.hosts.diffusers import load_host
from lib_dinotile.settings import Generation, Settings
from lib_dinotile.train import loop, pictures
from lib_dinotile.train.adapter import AdapterLoss, AdapterTraining, Tiles, fitting, new_adapter, prepared_tiles
from lib_dinotile.train.loop import _put, last_checkpoint
from lib_dinotile.train.options import Training
from lib_dinotile.train.pictures import Photos, Prepared, find_photos
from tests.processes import run_two
from tests.test_diffusers import sd15, sdxl  # noqa: F401
from tools.mini.textures import TEXTURES

_FEW = {"tile": 64, "patches": 8, "width": 16, "variants": 1, "held-out": 2, "precision": "no"}
_SHORT = {"steps": 4, "batch": 2, "accumulate": 2, "warmup": 1, "report-every": 99}
QUICK = [f"--{name}={value}" for name, value in {**_FEW, **_SHORT}.items()]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures, two with captions, one too small, and a file that is no image."""
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(("fur", "leaves", "brick", "bark", "water", "cloth")):
        pixels = TEXTURES[name](np.random.default_rng(number), 128)
        Image.fromarray(pixels[: 96 + 8 * number]).save(folder / f"{name}.png")
    (folder / "fur.txt").write_text("a cat")
    (folder / "leaves.txt").write_text("green leaves " * 40)  # more than a text encoder reads
    Image.new("RGB", (40, 200)).save(folder / "narrow.png")
    (folder / "broken.jpg").write_text("no image")
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_measured() -> Iterator[None]:
    """A report measures on 64 tiles: more than all steps here train on."""
    compare = AdapterLoss.compare

    def on_few(self: AdapterLoss, model: torch.nn.Module, tiles: Tiles, count: int = 8) -> dict[str, float]:
        return compare(self, model, tiles, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterLoss, "compare", on_few)
        yield


def train(photos: Path, out: Path, *more: str, code: int = 0) -> None:
    base = ["--dino", "mini"] if {"--head", "--base"} & set(more) else ["--base", "mini"]
    assert cli.main(["train", "--images", str(photos), "--out", str(out), *base, *QUICK, *more]) == code


def test_without_dino_the_built_in_model_s_own_encoder_is_trained_with(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """And for other bases that which was the default before."""
    loaded: list[str] = []

    def told(name: str, **more: Any) -> Any:
        loaded.append(name)
        return load_encoder("mini", **more)

    monkeypatch.setattr("lib_dinotile.train.command.load_encoder", told)
    out = tmp_path / "a.safetensors"
    train(photos, out, "--steps", "1")
    assert loaded == ["mini"] and read_config(out).encoder == "mini"
    assert "--dino mini" in read_metadata(out)["options"]
    other = ["--base", request.getfixturevalue("sd15"), "--out", str(tmp_path / "b.safetensors")]
    assert cli.main(["train", "--images", str(photos), *other, *QUICK, "--steps", "1"]) == 0
    assert loaded[1:] == ["facebook/dinov2-small"]


def log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out.with_suffix(".run") / "log.jsonl").read_text().splitlines()]


def test_the_command_writes_an_adapter_and_says_how_it_was_made(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapter.safetensors"
    train(photos, out, "--report-every", "2")
    said = capsys.readouterr().out
    assert "narrow.png: 40x200 is smaller than a tile of 64" in said and "broken.jpg" in said
    assert "4 images to train on, 2 held out" in said
    config, metadata = read_config(out), read_metadata(out)
    assert (config.base, config.encoder, config.layer, config.restored) == ("mini", "mini", -1, False)
    assert metadata["steps"] == "4" and metadata["examples"] == "4" and "--patches 8" in metadata["options"]
    assert any(output.weight.any() for output in load_adapter(out).outputs)
    reports = [line for line in log(out) if "gap" in line]
    assert [line["step"] for line in reports] == [2, 4]
    assert reports[-1]["gap"] == pytest.approx(reports[-1]["shuffled"] - reports[-1]["right"])
    assert float(metadata["held out, gap"]) == pytest.approx(reports[-1]["gap"], abs=1e-5)
    done = ["--adapter", str(out), "--dino", "mini", "--guidance", "0", "--guard", "off", "--steps", "2", "--quiet"]
    assert cli.main(["upscale", str(photos / "bark.png"), str(tmp_path / "x.png"), *done]) == 0


def test_tensorboard_gets_losses_and_sample_tiles(photos: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(photos, tmp_path / "a.safetensors", "--steps", "20", "--report-every", "20")
    events = EventAccumulator(str(tmp_path / "a.run" / "tensorboard"))
    events.Reload()
    assert {"train/loss", "held out/right", "held out/shuffled", "held out/none", "held out/gap"} <= set(
        events.Tags()["scalars"]
    )
    strips = [tag for tag in events.Tags()["images"] if tag.startswith("source, plain, adapter, truth/")]
    assert len(strips) == 2
    shown = events.Images(strips[0])[-1]
    assert (shown.width, shown.height) == (4 * 64, 64)


SIX = ["--steps", "6"]


@pytest.fixture(scope="module")
def six_steps(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What six steps come to."""
    out = tmp_path_factory.mktemp("six") / "whole.safetensors"
    train(photos, out, *SIX)
    return load_file(out)


@pytest.mark.parametrize("at", [7, 8])
def test_resuming_goes_on_to_the_same_adapter(
    at: int, photos: Path, six_steps: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled in the first or in the second batch of a step: that is finished, and then saved."""
    out, calls, value = tmp_path / "parts.safetensors", [], AdapterLoss.value

    def cancelled(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return value(*arguments)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(AdapterLoss, "value", cancelled)
        train(photos, out, *SIX, code=130)
    assert read_metadata(out)["steps"] == "4"
    assert signal.getsignal(signal.SIGINT) is handler
    train(photos, out, *SIX, "--resume")
    again = load_file(out)
    assert six_steps.keys() == again.keys() and any(again[name].any() for name in again if name.startswith("outputs"))
    assert all(torch.equal(six_steps[name], again[name]) for name in again)


def test_a_checkpoint_of_another_run_is_not_gone_on_with_and_not_written_over(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.safetensors"
    train(photos, out)
    for more, says in (
        (["--resume", "--width", "32"], "width: the checkpoint"),
        (["--resume", "--seed", "1"], "seed: the checkpoint"),
        ([], "exists already and is an adapter"),
        (["--head"], "train a head first"),
    ):
        train(photos, out, *more, code=2)
        assert says in capsys.readouterr().err
    out.unlink()
    train(photos, out, code=2)
    assert "the checkpoint of another run" in capsys.readouterr().err


def test_whenever_it_is_killed_a_whole_checkpoint_is_left(tmp_path: Path) -> None:
    def write(name: str, step: int) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "step.json").write_text(json.dumps({"step": step}))
        return tmp_path / name

    assert last_checkpoint(tmp_path) is None
    new = write("checkpoint-new", 1)
    assert last_checkpoint(tmp_path) == new
    _put(new, tmp_path)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint" and not new.exists()
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint-old")  # killed between the two moves
    new = write("checkpoint-new", 2)
    assert last_checkpoint(tmp_path) == new
    _put(new, tmp_path)
    assert json.loads((last_checkpoint(tmp_path) / "step.json").read_text()) == {"step": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


def test_a_full_disk_is_one_line(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos\nmore")

    monkeypatch.setattr(loop.Accelerator, "save_state", full)
    train(photos, tmp_path / "a.safetensors", code=1)
    assert "cannot be written: [enforce fail" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(pictures.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    train(photos, tmp_path / "b.safetensors", code=1)
    assert "GB are free" in capsys.readouterr().err.splitlines()[-1]


def test_a_second_run_finds_all_in_the_cache(photos: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """What it is told nothing with is then encoded for the first time."""
    model, cache = request.getfixturevalue("sd15"), str(tmp_path / "cache")
    for name in ("a", "b"):
        train(photos, tmp_path / f"{name}.safetensors", "--base", model, "--cache", cache)
    first, again = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_two_processes_make_the_same_steps_as_one_with_twice_the_batches(photos: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    train(photos, one, "--accumulate", "2")
    words = ["train", "--base", "mini", "--images", photos, "--out", two, *QUICK, "--accumulate", "1"]
    done = run_two(*words)
    assert done.returncode == 0, done.stderr[-2000:]
    made, again = load_file(one), load_file(two)
    assert any(tensor.any() for name, tensor in made.items() if name.startswith("outputs"))
    assert all(torch.allclose(made[name].float(), again[name].float(), atol=1e-4) for name in made)


@pytest.mark.parametrize("family, kind", [("sd15", "v_prediction"), ("sdxl", "epsilon")])
def test_stable_diffusion_of_both_families_and_predictions(
    family: str, kind: str, photos: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(family), model)
    scheduler = model / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": kind}))
    out = tmp_path / "adapter.safetensors"
    train(photos, out, "--base", str(model), "--checkpointing", "true")
    assert read_config(out).base == family and read_config(out).shape == load_host(Generation(str(model))).shape
    assert any(output.weight.any() for output in load_adapter(out).outputs)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_zero_for_the_true_prediction(
    kind: str, photos: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    host = load_host(Generation(request.getfixturevalue("sd15")))
    host.prediction = kind
    loss, generator = AdapterLoss(host, Training(batch=3)), torch.Generator().manual_seed(0)
    batch = {name: torch.randn(3, 4, 8, 8, generator=generator) for name in ("sharp", "degraded")}
    x, t = loss.noised(batch, generator)
    alpha = host.alphas[t][:, None, None, None]
    noise = (x - alpha.sqrt() * batch["sharp"]) / (1 - alpha).sqrt()
    truth = {
        "epsilon": noise,
        "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * batch["sharp"],
        "sample": batch["sharp"],
    }[kind]
    host.predict = lambda *_: truth
    assert loss.value(None, (x, t), batch, torch.zeros(3), []).item() < 1e-6
    host.predict = lambda *_: truth + 1
    assert loss.value(None, (x, t), batch, torch.zeros(3), []).item() > 1e-3


def test_an_untrained_adapter_gains_nothing_and_the_gap_is_zero(photos: Path, tmp_path: Path) -> None:
    options = Training(encoder="mini", tile=64, patches=8, width=16, batch=2)
    host, encoder = load_host(Generation()), load_encoder("mini")
    files, _, _ = find_photos(photos, 64, 0)
    prepared = Prepared(Photos(photos, files, options, 64, 1), prepared_tiles(host, encoder, options, 64), tmp_path, [])
    prepared.prepare(Team(), "images")
    adapter = new_adapter(host, encoder, options)
    loss, tiles = AdapterLoss(host, options), Tiles(prepared, 64, host.factor, adapter.grid((32, 32)), 0)
    figures = loss.compare(AdapterTraining(adapter), tiles, 4)
    assert figures["right"] == figures["shuffled"] == figures["none"] > 0 and figures["gap"] == 0
    torch.nn.init.normal_(adapter.outputs[0].weight)
    assert loss.compare(AdapterTraining(adapter), tiles, 4)["gap"] != 0


def test_prompt_and_condition_are_dropped_as_often_as_asked(request: pytest.FixtureRequest) -> None:
    host = load_host(Generation(request.getfixturevalue("sd15")))
    words, seen = host.words("a cat")[0], []
    batch = {name: torch.zeros(4, 4, 8, 8) for name in ("sharp", "degraded")}
    batch |= {"features": torch.ones(4, 3, 2, 2), "words.0": words.expand(4, -1, -1)}
    for share in (0.0, 1.0):
        loss = AdapterLoss(host, Training(drop_prompt=share, drop_condition=share))
        loss.value = lambda model, noised, batch, features, words: seen.append((features, words[0]))
        loss(None, batch, torch.Generator().manual_seed(0))
    (kept, told), (dropped, silent) = seen
    assert torch.equal(kept, batch["features"]) and torch.equal(told, batch["words.0"])
    assert not dropped.any() and torch.equal(silent, host.words("")[0].expand(4, -1, -1))


def test_what_was_prepared_is_kept_and_made_again_where_it_is_damaged(photos: Path, tmp_path: Path) -> None:
    options, calls = Training(), []

    def compute(picture):
        calls.append(picture)
        return {"size": torch.tensor(picture.sharp.size).half()}

    files, _, _ = find_photos(photos, 64, 0)
    for expected in (6, 6):
        prepared = Prepared(Photos(photos, files, options, 64, 1), compute, tmp_path, ["one"])
        prepared.prepare(Team(), "images")
        assert len(calls) == expected
    next(tmp_path.glob("*.safetensors")).write_bytes(b"cut off")
    assert all(prepared[i]["size"].min() >= 64 for i in range(6)) and len(calls) == 7
    Prepared(Photos(photos, files, options, 64, 1), compute, tmp_path, ["another"]).prepare(Team(), "images")
    assert len(calls) == 13


def test_held_out_pictures_are_not_trained_on(photos: Path) -> None:
    trained_on, held_out, left_out = find_photos(photos, 64, 2)
    assert len(held_out) == 2 and not set(trained_on) & set(held_out) and len(left_out) == 2
    assert len(trained_on) == 4


def test_only_images_are_photos_and_no_program_is_run_for_one(photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Pillow has programs such as Ghostscript open some of what it takes for an image."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was run"))
    image = Image.new("RGB", (80, 80))
    for name in ("page.eps", "page.pdf", "tall.png", "photo.JPG", "scan.tiff"):
        image.save(tmp_path / name)
    (tmp_path / "renamed.png").write_bytes((tmp_path / "page.eps").read_bytes())
    (tmp_path / "film.mpg").write_bytes(b"film")
    found, _, left_out = find_photos(tmp_path, 64, 0)
    assert [file.name for file in found] == ["photo.JPG", "scan.tiff", "tall.png"]
    assert [line.split(" ")[0] for line in left_out] == ["page.eps:", "renamed.png"]


def test_a_picture_that_cannot_be_read_is_left_out(photos: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    whole = (photos / "bark.png").read_bytes()
    for number in range(3):  # some are trained on, whatever their names
        (tmp_path / "photos" / f"cut{number}.png").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "a.safetensors"
    train(tmp_path / "photos", out)
    said = capsys.readouterr().out
    assert "7 images to train on" in said and all(f"cut{number}.png cannot be read" in said for number in range(3))
    assert 4 <= int(read_metadata(out)["examples"]) <= 6


def test_as_much_of_a_caption_is_taken_as_the_text_encoder_reads(request: pytest.FixtureRequest) -> None:
    host = load_host(Generation(request.getfixturevalue("sd15")))
    assert fitting(host, "a cat") == "a cat"
    once = host.words("")[0].shape
    for caption in ("ab " * 100, "a" * 300):
        short = fitting(host, caption)
        assert len(short) > 30 and caption.startswith(short)
        assert host.words(short)[0].shape == once != host.words(caption[: len(short) + 1])[0].shape


def test_nothing_in_a_caption_is_syntax(request: pytest.FixtureRequest) -> None:
    host = load_host(Generation(request.getfixturevalue("sd15")))
    for caption in ("a cat (by c (d)) AND e BREAK f", "a cat [by c|d] AND", "a cat <lora:by:1> [e:f:0.5]"):
        assert host.words(fitting(host, caption))[0].shape == host.words("")[0].shape
    assert torch.equal(host.words(fitting(host, "a AND b BREAK c"))[0], host.words("a and b break c")[0])
    assert not torch.equal(host.words(fitting(host, "a (cat:1.5)"))[0], host.words("a (cat:1.5)")[0])


def test_a_head_is_trained_and_an_adapter_in_the_same_file_reads_through_it(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.safetensors"
    quick = ["--accumulate", "1", "--rate", "4e-3", "--steps", "60", "--report-every", "60"]
    train(photos, out, "--head", "--hidden", "16", *quick)
    lines = [json.loads(line) for line in (tmp_path / "both.head-run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert {f"{kind} {layer}" for kind in ("raw", "restored") for layer in (-1, -2, -3)} <= set(lines[-1])
    train(photos, out, "--layer", "4", code=2)
    heads = load_heads(out, "mini", 192)
    assert set(heads) == {-1, -2, -3} and all(0 < float(head.floor[0]) < 1 for head in heads.values())
    train(photos, out)
    assert read_config(out).restored
    for layer, head in load_heads(out, "mini", 192).items():
        assert torch.equal(head.outer.weight, heads[layer].outer.weight)
    settings = Settings(adapter="both", guidance=0.5, guard="report")
    conditioner = Conditioner.load(settings, load_host(Generation()), {"both": out})
    source = Image.open(photos / "fur.png")
    restored = conditioner.features(source, source.size)
    raw = Conditioner.load(Settings(guidance=0.5, guard="report"), load_host(Generation()), {}).features(
        source, source.size
    )
    assert not torch.equal(restored.guidance.features, raw.guidance.features)
    with torch.no_grad():
        expected = heads[-1](feature_field(load_encoder("mini"), to_tensor(source), source.size).features[None])[0]
    assert torch.allclose(restored.adapter.features, expected, atol=1e-3)


@pytest.mark.parametrize(
    "more, says",
    [
        (["--held-out", "7"], "too few with held_out 7"),
        (["--images", "nowhere"], "nowhere is not a folder"),
        (["--out", "adapter.bin"], "has to end with .safetensors"),
        (["--out", "nowhere/a.safetensors"], "there is no folder nowhere"),
        (["--dino", "nowhere"], "nowhere"),
        (["--base", "nowhere.safetensors"], "there is no file nowhere.safetensors"),
        (["--layer", "7"], "has 4 layers"),
        (["--steps", "0"], "steps: 0 is not allowed"),
        (["--scale-low", "4", "--scale-high", "2"], "scale_low: 4 is not allowed with scale_high 2"),
        (["--resume"], "nothing to resume"),
        (["--base", ""], "say which checkpoint"),
        (["--tile", "32"], "tile: 32 is not allowed"),
        *([] if torch.cuda.is_available() else [(["--precision", "fp16"], "fp16 needs a GPU")]),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    train(photos, tmp_path / "a.safetensors", *more, code=2)
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in err and err.startswith("dinotile: ")
    assert not (tmp_path / "a.safetensors").exists()


def test_what_is_there_already_is_not_written_over(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.safetensors"
    shutil.copy(MINI / "unet" / "diffusion_pytorch_model.safetensors", out)
    for more, says in (
        ([], "not a file of dinotile's"),
        (["--head"], "not a file of dinotile's"),
        (["--resume"], "nothing to"),
    ):
        train(photos, out, *more, code=2)
        assert says in capsys.readouterr().err
    shutil.copy(MINI / "adapter.safetensors", out)
    for more in ([], ["--head"]):
        train(photos, out, *more, code=2)
        assert "exists already" in capsys.readouterr().err
    with safe_open(out, "pt") as file, safe_open(MINI / "adapter.safetensors", "pt") as before:
        assert file.metadata() == before.metadata()
