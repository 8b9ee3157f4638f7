"""The closed world of benchmarks/semantics.py is what it says, and in it the claim holds in small."""

import json

import numpy as np
import pytest
import torch

from benchmarks import arms, evidence, evidence_plot, judging
from benchmarks.arms import ADAPTER, ADAPTER_OTHER, ALL, BOTH, ONE_HOT, OTHER, PLAIN, SHARP, UNTRAINED, ZERO
from benchmarks.world import gates
from benchmarks.world.gates import auc, guard_auc
from benchmarks.world.host import SETTINGS
from benchmarks.world.judges import NONE
from benchmarks.world.scenes import NO_LABEL, SIDE, evaluation_scenes, repainted, scene
from lib_dinotile import DinotileError
from lib_dinotile.condition.heads import CalibratedHeads, FixedHeads
from lib_dinotile.dino.calibrated import Store
from lib_dinotile.settings import CALIBRATED, Settings


@pytest.fixture(scope="module")
def world():
    with torch.no_grad():
        yield judging.World(judging.QUICK)


def test_scenes_are_the_same_by_seed_and_their_source_does_not_hold_the_texture():
    first, again = (scene(np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(first.sharp, again.sharp) and (first.labels == again.labels).all()
    rng = np.random.default_rng(4)
    wrong = repainted(rng, first)
    assert ((wrong.labels != first.labels) | (first.labels == NO_LABEL)).all()
    assert (wrong.sharp - first.sharp).abs().mean() > 0.05
    shrunk = [torch.nn.functional.avg_pool2d(each.sharp[None], 4) for each in (first, wrong)]
    assert (shrunk[0] - shrunk[1]).abs().mean() < 0.02


def test_the_judges_know_every_texture_and_the_lack_of_one(world):
    for made in evaluation_scenes(3, seed=5):
        known = made.labels != NO_LABEL
        for verdict in (world.judge.verdict(made.sharp), world.spectral.verdict(made.sharp)):
            assert (verdict == made.labels)[known].mean() > 0.97
        assert (world.judge.verdict(made.blurred) == NONE).mean() > 0.97


def test_the_guard_prefers_the_true_texture(world):
    assert guard_auc(world.encoder, world.heads[CALIBRATED], 4, seed=5) > 0.9
    without = FixedHeads(dict.fromkeys((-1, -2), torch.nn.Identity()))
    assert guard_auc(world.encoder, without, 4, seed=5) < 0.95


def test_gates_are_cheap_to_check_and_hold(world):
    figures = gates.cheap_gates(world, 4, seed=5)
    gates.check({**figures, "told_rate": 0.05})
    with pytest.raises(DinotileError, match="a gate does not hold"):
        gates.check({**figures, "told_rate": 0.2})


def test_the_denoiser_draws_the_texture_that_it_is_told(world):
    assert gates.told_rate(world, 1, seed=5) < 0.1


def test_the_world_has_the_default_settings_and_calibrated_heads(world):
    """But for the geometry, which the world dictates."""
    changed = {name for name in vars(SETTINGS) if getattr(SETTINGS, name) != getattr(Settings(), name)}
    assert changed == {"scale", "tile", "overlap", "batch", "patches"}
    assert {arm.heads for name, arm in arms.ARMS.items() if name != arms.TRAINED_HEADS} == {CALIBRATED}
    assert isinstance(world.heads[CALIBRATED], CalibratedHeads)


def test_a_new_encoder_is_calibrated_on_pictures_of_the_world(world, tmp_path, monkeypatch):
    """Not on the photographs that dinotile would take."""
    monkeypatch.setattr(judging, "CALIBRATION_PICTURES", 2)
    given = []
    monkeypatch.setattr(Store, "make", lambda store, encoder, scale, layers, pictures: given.extend(pictures))
    judging.calibrated_heads(world.encoder)
    assert not given
    judging.calibrated_heads(world.encoder, tmp_path)
    assert [picture.size for picture in given] == [(SIDE, SIDE)] * 2


def test_guidance_and_guard_and_a_trained_adapter_bring_the_true_textures_back(world):
    """One image and one training only; `benchmarks/semantics.py --adapter` measures it properly."""
    names = (PLAIN, BOTH, OTHER, ZERO, ADAPTER, ADAPTER_OTHER, UNTRAINED, SHARP, ONE_HOT)
    adapters = evidence.read_adapters(evidence.ADAPTERS)
    given = {name: adapters[name] for name in ("0", SHARP, ONE_HOT)}
    found = evidence.collect(world, names, 1, judging.TUNE_SEED, given).found
    rates = {name: values["rate"].mean() for name, values in found.items()}
    assert rates[PLAIN] > 0.5
    assert rates[BOTH] < 0.75 * rates[PLAIN]
    assert rates[OTHER] > 0.95 * rates[PLAIN]
    assert found[ZERO]["same"].all() and not found[BOTH]["same"].any()
    assert rates[ADAPTER] < 0.4 * rates[PLAIN]
    assert rates[ADAPTER_OTHER] > 0.9 * rates[PLAIN]
    assert found[ADAPTER_OTHER]["followed"].mean() > 0.5 > 0.3 > found[PLAIN]["followed"].mean()
    assert found[UNTRAINED]["same"].all() and not found[ADAPTER]["same"].any()
    assert max(rates[SHARP], rates[ONE_HOT]) < 0.4 * rates[PLAIN]


def test_tiles_that_are_told_their_regions_names_show_them(world):
    names = (PLAIN, arms.WORDS, arms.WORDS_SHUFFLED, arms.WORDS_WHOLE)
    found = evidence.collect(world, names, 1, judging.TUNE_SEED).found
    rates = {name: values["rate"].mean() for name, values in found.items()}
    assert rates[arms.WORDS] < 0.35 * rates[PLAIN]
    assert rates[arms.WORDS_SHUFFLED] >= rates[PLAIN] and found[arms.WORDS_SHUFFLED]["followed"].mean() > 0.5
    assert rates[arms.WORDS_WHOLE] >= 0.95 * rates[PLAIN]


@pytest.fixture
def measured():
    """Figures that meet all targets, as if they had been measured."""
    good = {BOTH: 0.3, arms.TRAINED_HEADS: 0.25, ADAPTER: 0.1, ALL: 0.05, arms.WORDS: 0.2}
    good |= {arms.WORDS_BOTH: 0.1, arms.WORDS_ADAPTER: 0.1, arms.WORDS_ALL: 0.05}
    found = {}
    for name, arm in arms.ARMS.items():
        size = (3 if arm.adapter == arms.TRAINED else 1, 4)
        found[name] = {
            "rate": np.full(size, good.get(name, 0.9)),
            "spectral": np.full(size, good.get(name, 0.8)),
            **dict.fromkeys(("garbage", "blank", "all"), np.zeros(size)),
            "followed": np.full(size, 0.8 if arm.control else 0.1),
            "same": np.full(size, name in (PLAIN, ZERO, UNTRAINED)),
        }
    return evidence.Evidence(["0", "1", "2"], [None] * 4, found)


def test_figures_say_how_they_were_measured(world, measured, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(evidence, "collect", lambda *_, **__: measured)
    _, figures = evidence.prove(world, {}, 4, judging.REPORT_SEED, guard_auc=0.95)
    assert (figures["settings"], figures["heads"], figures["encoder"]) == ("defaults", "calibrated", "encoder")
    assert figures["per_training"][ADAPTER] == {"0": 0.1, "1": 0.1, "2": 0.1}
    assert json.loads(json.dumps(figures)) == figures
    printed = capsys.readouterr().out
    assert "(at most 0.5): met" in printed and "NOT MET" not in printed
    evidence_plot.bars(figures, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 10_000


def test_targets_are_told_from_the_figures(measured):
    """A control that does not fail, or what does not help, meets them not; few steps meet what few steps can."""

    def missed(auc=0.95, quick=False):
        figures = {**evidence.summary(measured), "guard_auc": auc}
        return [name for name, target in evidence.targets(figures, quick).items() if not target["met"]]

    names = list(evidence.TARGETS)
    assert missed() == [] and missed(auc=0.8) == [names[4]]
    measured.found[BOTH]["rate"][:] = 0.5
    assert missed() == [names[0]] and missed(quick=True) == []
    measured.found[ADAPTER]["rate"][0] = 0.8
    measured.found[ADAPTER_OTHER]["rate"][:] = 0.7
    measured.found[UNTRAINED]["same"][0, 2] = False
    assert missed(quick=True) == [names[place] for place in (5, 7, 11)]
    measured.found[arms.WORDS]["rate"][:] = 0.08
    measured.found[arms.WORDS_SHUFFLED]["rate"][:] = 0.8
    assert missed(quick=True) == [names[place] for place in (5, 7, 11, 13, 15, 16)]
    measured.found[arms.WORDS]["rate"][:] = 0.2
    measured.found[arms.WORDS_SHUFFLED]["rate"][:] = 0.9
    for name, arm in arms.ARMS.items():
        if arm.adapter:
            del measured.found[name]
    assert missed(quick=True) == []


def test_statistics():
    assert auc([np.array([3.0]), np.array([4.0])], [np.array([1.0, 2.0])]) == 1
    assert auc([np.arange(9.0)], [np.arange(9.0) + 20]) == 0 and auc([np.ones(3)], [np.ones(2)]) == 0.5
    low, high = arms.interval([0.2, 0.4, 0.6, 0.8])
    assert 0.2 <= low < 0.5 < high <= 0.8
    low, high = arms.ratio_interval([1.0, 2.0], [2.0, 4.0])
    assert low == high == 0.5
    # Trainings that differ make it wider, and it goes on being about the same images.
    wide = arms.interval([[0.1] * 4, [0.3] * 4, [0.5] * 4])
    assert wide[0] < 0.2 and wide[1] > 0.4 and arms.interval([[0.3] * 4] * 3) == pytest.approx((0.3, 0.3))
    assert arms.ratio_interval([[1.0, 2.0], [1.0, 2.0]], [[2.0, 4.0]]) == (0.5, 0.5)
    ranked = {arm: {"rate": [rate], "spectral": [rate / 2]} for arm, rate in zip("abcd", (0.9, 0.4, 0.6, 0.2))}
    assert evidence.agreement(ranked) == pytest.approx(1)
    ranked["a"]["spectral"] = [0.05]
    assert evidence.agreement(ranked) < gates.GATES["agreement"][1]
