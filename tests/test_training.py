"""python -m lib_dinotile train: what it writes is an adapter that fits, learns, and goes on where it was broken off."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
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
from lib_dinotile.hosts.diffusers import load_host
from lib_dinotile.settings import Generation, Settings
from lib_dinotile.team import Team
from lib_dinotile.train.adapter import AdapterLoss, AdapterTraining, Tiles, new_adapter, prepared_tiles
from lib_dinotile.train.options import Training
from lib_dinotile.train.pictures import Photos, Prepared, find_photos, hold_out
from lib_dinotile.train.textures import TEXTURES
from tests.test_diffusers import sd15, sdxl  # noqa: F401

_FEW = {"dino": "mini", "tile": 64, "patches": 8, "width": 16, "variants": 1, "held-out": 2, "precision": "no"}
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


def train(photos: Path, out: Path, *more: str, code: int = 0) -> None:
    assert cli.main(["train", "--images", str(photos), "--out", str(out), *QUICK, *more]) == code


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
    assert metadata["steps"] == "4" and metadata["images"] == "4" and "--patches 8" in metadata["options"]
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


def test_resuming_goes_on_to_the_same_adapter(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken off in the middle of a step, some steps after a checkpoint."""
    more = ["--steps", "6", "--save-every", "0", "--cache", str(tmp_path / "cache")]
    train(photos, tmp_path / "whole.safetensors", *more)
    calls, value = [], AdapterLoss.value

    def cancelled(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return value(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterLoss, "value", cancelled)
        train(photos, tmp_path / "parts.safetensors", *more, code=130)
    assert read_metadata(tmp_path / "parts.safetensors")["steps"] == "3"
    train(photos, tmp_path / "parts.safetensors", *more, "--resume")
    first, again = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "parts.safetensors")
    assert first.keys() == again.keys() and any(first[name].any() for name in first if name.startswith("outputs"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def _environment() -> dict[str, str]:
    """One thread: sums of floats depend on their number."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parents[1])}


def test_two_processes_make_the_same_steps_as_one_with_twice_the_batches(photos: Path, tmp_path: Path) -> None:
    flags = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch = ["-m", "accelerate.commands.launch", *flags.split(), "--main_process_port", "0", "-m"]
    for name, start, accumulate in (("one", ["-m"], "2"), ("two", launch, "1")):
        words = ["--images", photos, "--out", tmp_path / f"{name}.safetensors", *QUICK, "--accumulate", accumulate]
        command = [sys.executable, *start, "lib_dinotile", "train", *map(str, words)]
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    assert any(tensor.any() for name, tensor in one.items() if name.startswith("outputs"))
    assert all(torch.allclose(one[name].float(), two[name].float(), atol=1e-4) for name in one)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
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
    host._scheduler.register_to_config(prediction_type=kind)
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
    files, _ = find_photos(photos, 64)
    prepared = Prepared(Photos(files, options, 64, 1), prepared_tiles(host, encoder, options, 64), tmp_path, [])
    prepared.prepare(Team(), "images")
    adapter = new_adapter(host, encoder, options)
    loss, tiles = AdapterLoss(host, options), Tiles(prepared, 64, host.factor, adapter.grid((32, 32)), 0)
    figures = loss.compare(AdapterTraining(adapter), tiles, 4)
    assert figures["right"] == figures["shuffled"] == figures["none"] > 0 and figures["gap"] == 0
    torch.nn.init.normal_(adapter.outputs[0].weight)
    assert loss.compare(AdapterTraining(adapter), tiles, 4)["gap"] != 0


def test_what_was_prepared_is_kept_and_made_again_where_it_is_damaged(photos: Path, tmp_path: Path) -> None:
    options, calls = Training(), []

    def compute(picture):
        calls.append(picture)
        return {"size": torch.tensor(picture.sharp.size).half()}

    files, _ = find_photos(photos, 64)
    for expected in (6, 6):
        prepared = Prepared(Photos(files, options, 64, 1), compute, tmp_path, ["one"])
        prepared.prepare(Team(), "images")
        assert len(calls) == expected
    next(tmp_path.glob("*.safetensors")).write_bytes(b"cut off")
    assert all(prepared[i]["size"].min() >= 64 for i in range(6)) and len(calls) == 7
    Prepared(Photos(files, options, 64, 1), compute, tmp_path, ["another"]).prepare(Team(), "images")
    assert len(calls) == 13


def test_held_out_pictures_are_not_trained_on(photos: Path) -> None:
    files, _ = find_photos(photos, 64)
    trained_on, held_out = hold_out(files, 2)
    assert len(held_out) == 2 and not set(trained_on) & set(held_out)
    assert hold_out(files[::-1], 2) == (trained_on, held_out)


def test_a_head_is_trained_and_an_adapter_in_the_same_file_reads_through_it(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.safetensors"
    train(photos, out, "--head", "--hidden", "16", "--rate", "2e-3", "--steps", "100", "--report-every", "100")
    losses = [line["loss"] for line in log(out) if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert {f"{kind} {layer}" for kind in ("raw", "restored") for layer in (-1, -2, -3)} <= set(log(out)[-1])
    heads = load_heads(out, "mini", 192)
    assert set(heads) == {-1, -2, -3} and all(0 < float(head.floor[0]) < 1 for head in heads.values())
    shutil.rmtree(tmp_path / "both.run")
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
    shutil.copy(MINI / "adapter.safetensors", out)
    for more in ([], ["--head"]):
        train(photos, out, *more, code=2)
        assert "is there already" in capsys.readouterr().err
    with safe_open(out, "pt") as file, safe_open(MINI / "adapter.safetensors", "pt") as before:
        assert file.metadata() == before.metadata()
