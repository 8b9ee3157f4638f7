"""The closed world of benchmarks/semantics.py is what it says, and in it the claim holds in small."""

import json

import numpy as np
import pytest
import torch

from benchmarks import evidence, evidence_plot, judging
from benchmarks.arms import ADAPTER, ADAPTER_OTHER, ALL, BOTH, OTHER, PLAIN, ZERO, interval, ratio_interval
from benchmarks.evidence import UNTRAINED
from benchmarks.world import gates
from benchmarks.world.guard_test import auc, guard_auc
from benchmarks.world.judge import NONE
from benchmarks.world.scenes import NO_LABEL, repainted, scene, wrong_classes


@pytest.fixture(scope="module")
def world():
    with torch.no_grad():
        yield judging.World(judging.QUICK)


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
    found = judging.measure(world, (PLAIN, BOTH, OTHER, ZERO), 2, judging.TUNE_SEED, judging.CHOSEN, say=False)
    rates = {arm: np.mean(values["rate"]) for arm, values in found.items()}
    assert rates[BOTH] < 0.75 * rates[PLAIN]
    assert rates[OTHER] > 0.95 * rates[PLAIN]
    assert found[ZERO]["rate"] == found[PLAIN]["rate"]


@pytest.mark.skipif(not any(evidence.ADAPTERS.glob("*.safetensors")), reason="no trained adapters yet")
def test_a_trained_adapter_brings_the_true_textures_back(world):
    """One training and two images only; `benchmarks/semantics.py --adapter` measures it properly."""
    rows = [row for row in evidence.ROWS if row.name in (PLAIN, ADAPTER, ADAPTER_OTHER, UNTRAINED)]
    found = evidence.collect(world, evidence.Adapters.load().first(), rows, 2, judging.TUNE_SEED).found
    rates = {name: values["rate"].mean() for name, values in found.items()}
    assert rates[ADAPTER] < 0.4 * rates[PLAIN]
    assert rates[ADAPTER_OTHER] > 0.9 * rates[PLAIN]
    assert found[ADAPTER_OTHER]["followed"].mean() > 0.5 > 0.3 > found[PLAIN]["followed"].mean()
    assert found[UNTRAINED]["same"].all() and not found[ADAPTER]["same"].any()


def test_targets_are_told_from_the_figures(tmp_path):
    """Good figures meet all of them; a control that does not fail, or an adapter that does not help, meets them not."""
    shape = {row.name: (3 if row.adapter == evidence.TRAINED else 1, 4) for row in evidence.ROWS}
    good = {ADAPTER: 0.1, ALL: 0.05}
    found = {
        name: {
            "rate": np.full(size, good.get(name, 0.9)),
            "spectral": np.full(size, good.get(name, 0.8)),
            **dict.fromkeys(("garbage", "blank"), np.zeros(size)),
            "followed": np.full(size, 0.8 if "other" in name else 0.1),
            "same": np.full(size, name in (PLAIN, UNTRAINED)),
        }
        for name, size in shape.items()
    }
    measured = evidence.Evidence(["0", "1", "2"], [None] * 4, found)
    figures = evidence.summary(measured)
    assert all(met for _, met in evidence.targets(figures).values())
    assert figures["per_training"][ADAPTER] == {"0": 0.1, "1": 0.1, "2": 0.1}
    assert json.loads(json.dumps(figures)) == figures
    evidence_plot.bars(figures, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 10_000
    found[ADAPTER]["rate"][0] = 0.8
    found[ADAPTER_OTHER]["rate"][:] = 0.7
    found[UNTRAINED]["same"][0, 2] = False
    missed = [name for name, (_, met) in evidence.targets(evidence.summary(measured)).items() if not met]
    assert missed == [list(evidence.TARGETS)[place] for place in (0, 2, 6)]


def test_statistics():
    assert auc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1 and auc(np.arange(9.0), np.arange(9.0) + 20) == 0
    low, high = interval([0.2, 0.4, 0.6, 0.8])
    assert 0.2 <= low < 0.5 < high <= 0.8
    low, high = ratio_interval([1.0, 2.0], [2.0, 4.0])
    assert low == high == 0.5
    # Trainings that differ make it wider, and it goes on being about the same images.
    wide = interval([[0.1] * 4, [0.3] * 4, [0.5] * 4])
    assert wide[0] < 0.2 and wide[1] > 0.4 and interval([[0.3] * 4] * 3) == pytest.approx((0.3, 0.3))
    assert ratio_interval([[1.0, 2.0], [1.0, 2.0]], [[2.0, 4.0]]) == (0.5, 0.5)
    ranked = {arm: {"rate": [rate], "spectral": [rate / 2]} for arm, rate in zip("abcd", (0.9, 0.4, 0.6, 0.2))}
    assert judging.agreement(ranked) == pytest.approx(1)
    ranked["a"]["spectral"] = [0.05]
    assert judging.agreement(ranked) < judging.AGREEMENT
