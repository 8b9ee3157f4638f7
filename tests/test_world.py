"""The closed world of benchmarks/semantics.py is what it says, and in it the claim holds in small."""

import numpy as np
import pytest
import torch

from benchmarks import semantics
from benchmarks.arms import BOTH, OTHER, PLAIN, ZERO, interval, ratio_interval
from benchmarks.world import gates
from benchmarks.world.guard_test import auc, guard_auc
from benchmarks.world.judge import NONE
from benchmarks.world.scenes import NO_LABEL, repainted, scene, wrong_classes


@pytest.fixture(scope="module")
def world():
    with torch.no_grad():
        yield semantics.World(semantics.QUICK)


def test_scenes_are_the_same_by_seed_and_their_source_does_not_hold_the_texture():
    first, again = (scene(np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(first.sharp, again.sharp) and (first.labels == again.labels).all()
    rng = np.random.default_rng(4)
    wrong = repainted(rng, first, wrong_classes(rng, first))
    assert ((wrong.labels != first.labels) | (first.labels == NO_LABEL)).all()
    assert (wrong.sharp - first.sharp).abs().mean() > 0.05
    shrunk = [torch.nn.functional.avg_pool2d(each.sharp[None], 4) for each in (first, wrong)]
    assert (shrunk[0] - shrunk[1]).abs().mean() < 0.02


def test_the_judges_know_every_texture_and_the_lack_of_one(world):
    for made in gates.evaluation_scenes(3, seed=5):
        known = made.labels != NO_LABEL
        for verdict in (world.judge.verdict(made.sharp[None])[0].numpy(), world.spectral.verdict(made.sharp)):
            assert (verdict == made.labels)[known].mean() > 0.97
        assert (world.judge.verdict(made.blurred[None]) == NONE).float().mean() > 0.97


def test_the_guard_prefers_the_true_texture(world):
    assert guard_auc(world.encoder, world.heads, 4, seed=5) > 0.9
    assert guard_auc(world.encoder, dict.fromkeys(world.heads, torch.nn.Identity()), 4, seed=5) < 0.95


def test_gates_are_cheap_to_check_and_hold():
    figures = gates.cheap_gates(4, seed=5)
    assert gates.holds({**figures, "told_rate": 0.05})
    assert not gates.holds({**figures, "told_rate": 0.2})


def test_guidance_and_guard_bring_the_true_textures_back(world):
    """Two images only; `benchmarks/semantics.py` measures it properly."""
    found = semantics.measure(world, (PLAIN, BOTH, OTHER, ZERO), 2, semantics.TUNE_SEED, semantics.CHOSEN, say=False)
    rates = {arm: np.mean(values["rate"]) for arm, values in found.items()}
    assert rates[BOTH] < 0.75 * rates[PLAIN]
    assert rates[OTHER] > 0.95 * rates[PLAIN]
    assert found[ZERO]["rate"] == found[PLAIN]["rate"]


def test_statistics():
    assert auc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1 and auc(np.arange(9.0), np.arange(9.0) + 20) == 0
    low, high = interval([0.2, 0.4, 0.6, 0.8])
    assert 0.2 <= low < 0.5 < high <= 0.8
    low, high = ratio_interval([1.0, 2.0], [2.0, 4.0])
    assert low == high == 0.5
    ranked = {arm: {"rate": [rate], "spectral": [rate / 2]} for arm, rate in zip("abcd", (0.9, 0.4, 0.6, 0.2))}
    assert semantics.agreement(ranked) == pytest.approx(1)
    ranked["a"]["spectral"] = [0.05]
    assert semantics.agreement(ranked) < semantics.AGREEMENT
