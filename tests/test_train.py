"""Training: what it learns from is what it says, and a run that was interrupted goes on as if it had not been."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers.models.dinov2", reason="the built-in encoder's training wants transformers 4.32")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from lib_dinotile.condition.conditioner import MINI
from tools.mini import mini
from tools.mini.encoder import NO_LABEL, mosaic
from tools.mini.images import HELD_OUT, PHOTOS, Pool, RestorePairs, degrade, package_roots, read_photo
from tools.mini.objective import alphas_cumprod, restoration_inputs, restoration_loss
from tools.mini.textures import TEXTURES, texture_atlas


@pytest.fixture(scope="module")
def pool() -> Pool:
    """Textures only, so that the tests need no photographs."""
    atlas = [image for group in texture_atlas(1, 128) for image in group]
    return Pool(atlas, np.full(len(atlas), 1 / len(atlas)), [])


@pytest.mark.parametrize("factor", [None, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("size", [(64, 64), (41, 70)])
def test_degrading_keeps_size_range_and_mean(factor: float | None, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    blurred = degrade(np.random.default_rng(1), image, factor)
    assert blurred.shape == image.shape and blurred.dtype == np.uint8
    assert abs(blurred.mean() - image.mean()) < 3
    assert blurred.std() < image.std()


def test_textures_are_the_same_for_the_same_seed() -> None:
    for painter in TEXTURES.values():
        first, again = (painter(np.random.default_rng(5), 48) for _ in range(2))
        assert first.shape == (48, 48, 3) and first.dtype == np.uint8
        assert np.array_equal(first, again)
        assert not np.array_equal(first, painter(np.random.default_rng(6), 48))


def test_mosaic_names_the_texture_of_a_patch() -> None:
    flat = tuple((np.full((300, 300, 3), 20 * label, np.uint8),) for label in range(4))
    image, labels = mosaic(np.random.default_rng(3), flat, 112)
    assert image.shape == (112, 112, 3) and labels.shape == (8, 8)
    assert set(np.unique(labels)) <= {NO_LABEL, 0, 1, 2, 3} and (labels != NO_LABEL).any()


def test_held_out_photographs_are_not_trained_on() -> None:
    assert not {photo.path for photo in PHOTOS} & {photo.path for photo in HELD_OUT}
    assert len({photo.path for photo in HELD_OUT}) == 6
    assert all(photo.licence for photo in (*PHOTOS, *HELD_OUT))
    assert read_photo(HELD_OUT[0], package_roots()) is not None


def test_pairs_are_the_same_in_every_run(pool: Pool) -> None:
    first, again = (RestorePairs(pool, 4, size=32)[3] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(part.shape == (3, 32, 32) and part.abs().max() <= 1 for part in first)


def test_loss_is_zero_for_the_true_velocity() -> None:
    generator = torch.Generator().manual_seed(0)
    sharp, degraded = torch.rand(6, 12, 8, 8) - 0.5, torch.rand(6, 12, 8, 8) - 0.5
    x, _, a, s = restoration_inputs(degraded, sharp, alphas_cumprod(), generator)
    loss, _ = restoration_loss((a * x - sharp) / s, x, a, s, sharp)
    assert loss.item() < 1e-5


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, pool: Pool) -> None:
    monkeypatch.setitem(mini.UNET_CONFIG, "block_out_channels", (16, 16, 16))
    monkeypatch.setattr(mini.Pool, "load", lambda roots: pool)


def losses(folder: Path) -> dict[int, float]:
    return {
        (line := json.loads(text))["step"]: line["loss"] for text in (folder / "log.jsonl").read_text().splitlines()
    }


def train(out: Path, steps: int, *more: str) -> None:
    common = ["--batch", "2", "--bank", "6", "--precision", "no", "--log-every", "1", "--schedule-steps", "8"]
    mini.main(["unet", "--out", str(out), "--export", str(out / "mini"), "--steps", str(steps), *common, *more])


def test_resuming_goes_on_at_the_same_step_with_the_same_losses(tiny: None, tmp_path: Path) -> None:
    train(tmp_path / "whole", 6)
    train(tmp_path / "parts", 3)
    train(tmp_path / "parts", 6, "--resume")
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert list(whole) == list(parts) == [1, 2, 3, 4, 5, 6]
    assert parts == pytest.approx(whole, rel=1e-4)
    assert (tmp_path / "parts/mini/unet/diffusion_pytorch_model.safetensors").is_file()


def test_nothing_to_resume_is_said(tiny: None, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing to resume"):
        train(tmp_path, 3, "--resume")


@pytest.mark.skipif(not MINI.is_dir(), reason="the built-in model is not trained yet")
def test_the_mini_is_whole_and_small() -> None:
    files = [file for file in MINI.rglob("*") if file.is_file()]
    names = {file.relative_to(MINI).as_posix() for file in files}
    assert {"README.md", "adapter.safetensors", "encoder/model.safetensors", "scheduler/scheduler_config.json"} <= names
    assert sum(file.stat().st_size for file in files) <= 20e6
    card = (MINI / "README.md").read_text(encoding="utf-8")
    rows = [f"| {photo.name} | {photo.package} | {photo.licence} |" for photo in (*PHOTOS, *HELD_OUT)]
    assert all(row in card for row in rows)
