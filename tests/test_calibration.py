"""Calibration: restoration heads in closed form, made once and kept by the encoder's fingerprint."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib_dinotile import __main__ as cli
from lib_dinotile.dino import calibrated, calibration
from lib_dinotile.dino.calibrated import Store
from lib_dinotile.dino.calibration import NormalEquations, _fit, calibrate
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.dino.head import RestorationHead
from lib_dinotile.dino.state import state_of
from tests.processes import Running
from tests.test_encoder import TINY, TINY3, dinov3_runs, write_checkpoint


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def folds(weights: torch.Tensor | None, features: int = 4) -> list[NormalEquations]:
    """Random tokens; what is missing to the sharp ones is linear in them, or noise without weights."""
    found = []
    for seed in range(3):
        sums = NormalEquations(features)
        source = torch.randn(features, 12, 12, generator=draw(seed))
        if weights is None:
            missing = torch.randn(features, 12, 12, generator=draw(9 + seed))
        else:
            missing = torch.einsum("of,fhw->ohw", weights, source)
        sums.add(source, source + missing)
        found.append(sums)
    return found


@torch.no_grad()
def test_a_linear_relation_is_recovered():
    weights = 0.3 * torch.randn(4, 4, generator=draw(1))
    _, head, _ = _fit(folds(weights), torch.device("cpu"))
    tokens = torch.randn(1, 4, 8, 8, generator=draw(5))
    assert torch.allclose(head(tokens), tokens + torch.einsum("of,nfhw->nohw", weights, tokens), atol=0.05)


@torch.no_grad()
def test_where_there_is_nothing_to_learn_the_head_is_the_identity():
    penalty, head, _ = _fit(folds(None), torch.device("cpu"))
    tokens = torch.randn(1, 4, 8, 8, generator=draw(5))
    assert penalty == float("inf") and torch.equal(head(tokens), tokens)


def test_the_solution_is_that_of_ridge_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    source, sharp = (torch.randn(3, 9, 9, generator=draw(seed)) for seed in (0, 1))
    sums, penalty = NormalEquations(3), 0.1
    sums.add(source, sharp)
    padded = torch.nn.functional.pad(source[None], (1, 1, 1, 1), mode="replicate")
    x = torch.nn.functional.unfold(padded, 3)[0].T.double().numpy()
    y = (sharp - source).flatten(1).T.double().numpy()
    scale = len(x) * penalty * float(np.var(x, axis=0).mean())
    theirs = linear_model.Ridge(alpha=scale).fit(x, y)
    weights, bias = sums.solve(penalty)
    assert np.allclose(weights.numpy(), theirs.coef_.T, atol=1e-4)
    assert np.allclose(bias.numpy(), theirs.intercept_, atol=1e-4)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three small pictures in place of those that come with the extension."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((84, 84), Image.Resampling.BICUBIC).save(folder / f"{seed}.png")
    monkeypatch.setattr(calibrated.Pictures.__init__, "__defaults__", (folder,))
    return folder


@pytest.fixture
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> PatchEncoder:
    architecture = getattr(request, "param", TINY)
    if architecture is TINY3 and not dinov3_runs():
        pytest.skip("no library has DINOv3")
    return load_encoder(str(write_checkpoint(tmp_path / "encoders" / "tiny", architecture)))


both_families = pytest.mark.parametrize("encoder", [TINY, TINY3], ids=["dinov2", "dinov3"], indirect=True)


@both_families
def test_heads_are_made_once_and_then_read(photos, encoder, tmp_path):
    store = Store(tmp_path / "heads")
    first = store.heads(encoder, 2.0)
    assert [file.name for file in store.folder.iterdir()] == [store.file(encoder, 2.0).name]
    again = Store(tmp_path / "heads")
    second = again.heads(encoder, 2.0)
    assert again.notes == [] and sorted(second) == sorted(first)
    assert state_of("tiny", tmp_path / "encoders", store).calibrated == [2.0]


def test_the_hosts_autocast_changes_nothing(photos, encoder):
    pictures = calibrated.Pictures(photos)
    plain = calibrate(encoder, pictures, 2.0, [-1]).heads[-1].state_dict()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = calibrate(encoder, pictures, 2.0, [-1]).heads[-1].state_dict()
    assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_one_more_layer_leaves_the_others_in_the_file(photos, encoder, tmp_path):
    store = Store(tmp_path / "heads")
    store.heads(encoder, 2.0, [-2])
    store.heads(encoder, 2.0, [0])
    assert sorted(Store(store.folder).find(encoder, 2.0, [-1, -2, 0])) == [-2, -1, 0]


def test_a_head_that_is_no_gain_is_dropped_and_its_floor_is_that_of_the_plain_tokens(photos, encoder, monkeypatch):
    pictures = calibrated.Pictures(photos)
    assert calibrate(encoder, pictures, 2.0, [-1]).heads[-1].outer.weight.any()
    fit = calibration._fit

    def worse(*given):
        penalty, head, tested = fit(*given)
        tested.outer.bias += 100
        return penalty, head, tested

    monkeypatch.setattr(calibration, "_fit", worse)
    dropped = calibrate(encoder, pictures, 2.0, [-1])
    monkeypatch.setattr(calibration, "_fit", lambda *given: (math.inf, identity(encoder), identity(encoder)))
    plain = calibrate(encoder, pictures, 2.0, [-1])
    assert dropped.made["penalty -1"] == "inf" and not dropped.heads[-1].outer.weight.any()
    assert torch.equal(dropped.heads[-1].floor, plain.heads[-1].floor)


def identity(encoder: PatchEncoder) -> RestorationHead:
    return RestorationHead(encoder.width, 0).eval().requires_grad_(False)


def test_another_encoder_of_the_same_name_gets_its_own(photos, encoder, tmp_path):
    store = Store(tmp_path / "heads")
    store.heads(encoder, 2.0)
    other = load_encoder(str(write_checkpoint(tmp_path / "others" / "tiny", seed=1)))
    assert other.id == encoder.id and store.find(other, 2.0) is None


def test_a_damaged_file_is_made_again(photos, encoder, tmp_path):
    store = Store(tmp_path / "heads")
    store.heads(encoder, 2.0)
    store.file(encoder, 2.0).write_bytes(b"damaged")
    assert store.find(encoder, 2.0) is None
    store.heads(encoder, 2.0)
    assert Store(store.folder).find(encoder, 2.0) is not None


def test_interrupted_it_leaves_nothing(photos, encoder, tmp_path):
    def stop(text: str, share: float) -> None:
        if share > 0.3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path / "heads", stop).heads(encoder, 2.0)
    assert list((tmp_path / "heads").iterdir()) == []
    assert Store(tmp_path / "heads").heads(encoder, 2.0)


def test_what_cannot_be_written_is_used_from_memory_and_said(photos, encoder, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(calibrated, "save_heads", full)
    monkeypatch.setattr(calibrated, "_unsaved", {})
    store = Store(tmp_path / "heads")
    assert store.heads(encoder, 2.0) and store.find(encoder, 2.0) is not None
    assert "cannot be kept in" in store.notes[-1] and "no space left" in store.notes[-1]


@both_families
def test_the_command_writes_a_file_that_says_its_gain(photos, encoder, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    words = ["calibrate", "--dino", str(tmp_path / "encoders" / "tiny"), "--images", str(photos), "--out", str(out)]
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    assert str(out) in told and "gain:" in told and "%" in told
    assert cli.main(["info", str(out)]) == 0
    assert ["encoder:", "tiny"] in [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    "words, says",
    [
        (["--dino", "nonsense"], "no DINO encoder 'nonsense'"),
        (["--images", "nowhere"], "nowhere is not a folder"),
        (["--out", "nowhere/x.safetensors"], "there is no folder nowhere"),
        (["--out", "x.png"], "has to end with .safetensors"),
    ],
)
def test_bad_input_is_one_line(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["calibrate", *words]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def _calibrates(encoder: Path, photos: Path, folder: Path) -> int:
    """The number of times that this process had to."""
    calibrated.Pictures.__init__.__defaults__ = (photos,)
    store = Store(folder)
    store.heads(load_encoder(str(encoder)), 2.0)
    return len(store.notes)


def test_two_processes_calibrate_once(photos, encoder, tmp_path):
    given = tmp_path / "encoders" / "tiny", photos, tmp_path / "heads"
    running = [Running(_calibrates, *given) for _ in range(2)]
    made = sorted(process.wait().returncode for process in running)
    assert made == [0, 1] and len(list((tmp_path / "heads").iterdir())) == 1
