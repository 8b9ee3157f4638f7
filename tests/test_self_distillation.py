"""The world's encoder trained without labels: none is used, and an interrupted run goes on as it would have."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers.models.dinov2", reason="the encoder's training wants transformers 4.32")
pytest.importorskip("accelerate")

from benchmarks.world.encoder import ENCODER_CONFIG, GRID, Paintings
from benchmarks.world.self_distillation import (
    FOLDER,
    PROTOTYPES,
    SelfDistillation,
    blocks,
    distillation_loss,
    effective_rank,
    histograms,
    recoloured,
    sinkhorn,
    train_unlabelled_encoder,
)
from lib_dinotile.dino.encoder import load_encoder
from lib_dinotile.train.loop import Schedule, step_generator


def untrained(steps: int) -> SelfDistillation:
    torch.manual_seed(0)
    return SelfDistillation(steps, torch.rand(PROTOTYPES, 36))


def test_a_resumed_run_gives_the_same_encoder(tmp_path):
    short = Schedule(tmp_path / "broken", steps=2, schedule_steps=4, batch=2, precision="no")
    for schedule in (replace(short, out=tmp_path / "whole", steps=4), short, replace(short, steps=4, resume=True)):
        torch.manual_seed(0)
        train_unlabelled_encoder(schedule, schedule.out)
    once, resumed = (load_encoder(str(tmp_path / run / FOLDER)) for run in ("whole", "broken"))
    assert once.fingerprint == resumed.fingerprint
    assert (once.width, once.depth) == (ENCODER_CONFIG["hidden_size"], ENCODER_CONFIG["num_hidden_layers"])
    assert once(torch.rand(1, 3, 256, 256)).shape == (1, once.width, GRID, GRID)


@pytest.mark.parametrize("step, loss_of", [(0, "code"), (55, "patch"), (90, "patch")])
def test_labels_are_not_used_and_only_the_student_descends(step, loss_of):
    pixels = torch.utils.data.default_collate([Paintings(0)[i] for i in range(2)])[0]
    model = untrained(100)
    model.step.fill_(step)
    loss, figures = distillation_loss(model, (pixels, None), step_generator(0, 0))
    loss.backward()
    assert loss.isfinite() and figures[loss_of] > 0
    assert step == 0 or (figures["rank"] > 2 and figures["deviation"] > 0.1)
    assert all(each.grad is None for each in model.teacher.parameters())
    assert model.student.encoder.embeddings.patch_embeddings.projection.weight.grad.abs().sum() > 0


def test_the_teacher_follows_the_student():
    model = untrained(10)
    with torch.no_grad():
        model.student.patch_head.prototypes.add_(1.0)
        before = model.teacher.patch_head.prototypes.clone()
    model.follow()
    moved = model.teacher.patch_head.prototypes - before
    assert 0 < moved.mean() < 0.5 and model.step == 1


def test_sinkhorn_uses_all_prototypes():
    shares = sinkhorn(torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) + torch.arange(8.0))
    assert torch.allclose(shares.sum(1), torch.ones(500), atol=1e-5)
    assert (shares.mean(0) - 1 / 8).abs().max() < 0.01


def test_views_keep_shapes_and_masks_are_rectangles():
    generator = torch.Generator().manual_seed(0)
    grey = torch.rand(4, 1, 32, 32, generator=generator).expand(-1, 3, -1, -1)
    seen = recoloured(grey, generator).mean(1)
    correlation = torch.corrcoef(torch.cat([seen.flatten(1), grey[:, 0].flatten(1)]))[:4, 4:].diag()
    assert correlation.min() > 0.95
    masks = blocks(64, 10, generator).unflatten(1, (10, 10))
    assert 0.3 < masks.any(2).any(1).float().mean() < 0.7
    for mask in masks[masks.any(2).any(1)]:
        assert mask.sum() == mask.any(0).sum() * mask.any(1).sum()


def test_collapsed_tokens_have_rank_one():
    direction, scale = torch.randn(1, 16), torch.randn(200, 1)
    assert effective_rank(scale * direction) < 1.1 < effective_rank(torch.randn(200, 16))


def test_histograms_tell_the_direction_of_stripes():
    stripes = (torch.arange(32.0) * 1.5).sin().expand(1, 3, 32, -1)
    upright, lying = histograms(stripes)[0], histograms(stripes.transpose(2, 3))[0]
    assert upright.shape == (4, 36) and torch.allclose(upright.norm(dim=-1), torch.ones(4))
    assert (upright * lying).sum(-1).max() < 0.1
