"""Samplers and schedules of the command line: what k-diffusion and the WebUIs compute, of tiles as of canvases."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from lib_dinotile import DinotileError
from lib_dinotile import __main__ as cli
from lib_dinotile.engine.flow import upscale
from lib_dinotile.engine.prediction import from_x0
from lib_dinotile.hosts import diffusers_solvers as solvers
from lib_dinotile.hosts.diffusers import load_host
from lib_dinotile.hosts.diffusers_solvers import SCHEDULES, SPACINGS, Solver
from lib_dinotile.settings import AUTOMATIC, SAMPLERS, SCHEDULERS, Generation, Settings
from lib_dinotile.tiling.noise import NoiseField, TileNoise
from lib_dinotile.tiling.plan import Rect
from tests.host_contract import batch_of, close, latents_of, sampled
from tests.test_tiling import random_image

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SOURCE = random_image(70, 45)
SPREAD = 0.8
"""Standard deviation of the pictures that `x0` is the ideal denoiser for."""
NAMES = [name for name in SCHEDULERS if name != AUTOMATIC]


def solver(sampler="DPM++ 2M", scheduler="SGM Uniform", **config):
    return Solver(Generation(sampler=sampler, scheduler=scheduler), {**SD, **config})


def noise():
    return TileNoise(NoiseField(3, 4), [Rect(0, 0, 8, 8), Rect(4, 0, 8, 8)])


def ideal_x0(x, level):
    """The mean of normally distributed pictures, given one with noise of this level; x: without the model's scale."""
    return x * SPREAD**2 / (SPREAD**2 + level**2)


def run(one, denoise=1.0, steps=6, start=None):
    """The solver at work with the ideal denoiser of the kind that it expects: (start, end)."""
    drawn, found = noise(), one.begin(denoise, steps)
    x = begun = found[0].alpha * torch.zeros(2, 4, 8, 8) + found[0].sigma * drawn.next() if start is None else start
    for step in found:
        x0 = ideal_x0(x / step.alpha, step.level)
        x = one.step(from_x0(x, x0, step.alpha, step.sigma, one.prediction), step, x, drawn)
    return begun / found[0].alpha, x


# What k-diffusion's samplers of these names compute (sampling.py), in its coordinates: x0 + level * noise.


def euler(x, levels, draw):
    for level, after in itertools.pairwise(levels):
        x = x + (x - ideal_x0(x, level)) / level * (after - level)
    return x


def euler_ancestral(x, levels, draw):
    for level, after in itertools.pairwise(levels):
        up = math.sqrt(after**2 * (level**2 - after**2) / level**2)
        down = math.sqrt(after**2 - up**2)
        x = x + (x - ideal_x0(x, level)) / level * (down - level) + up * draw()
    return x


def dpmpp_2m(x, levels, draw):
    before = last = None
    for level, after in itertools.pairwise(levels):
        x0 = ideal_x0(x, level)
        if after == 0 or before is None:
            mixed = x0
        else:
            ratio = math.log(last / level) / math.log(level / after)
            mixed = (1 + 1 / (2 * ratio)) * x0 - 1 / (2 * ratio) * before
        x, before, last = after / level * x + (1 - after / level) * mixed, x0, level
    return x


def dpmpp_2m_sde(x, levels, draw, kind="midpoint"):
    before = last = None
    for level, after in itertools.pairwise(levels):
        x0 = ideal_x0(x, level)
        if after == 0:
            x = x0
        else:
            h = math.log(level / after)
            x = after / level * math.exp(-h) * x - math.expm1(-2 * h) * x0
            if before is not None:
                ratio = math.log(last / level) / h
                if kind == "midpoint":
                    x = x + 0.5 * -math.expm1(-2 * h) / ratio * (x0 - before)
                else:
                    x = x + (-math.expm1(-2 * h) / (-2 * h) + 1) / ratio * (x0 - before)
            x = x + draw() * after * math.sqrt(-math.expm1(-2 * h))
        before, last = x0, level
    return x


def lcm(x, levels, draw):
    for level, after in itertools.pairwise(levels):
        x = ideal_x0(x, level) + after * draw()
    return x


K_DIFFUSION = {
    "DPM++ 2M": dpmpp_2m,
    "DPM++ 2M SDE": dpmpp_2m_sde,
    "DPM++ 2M SDE Heun": lambda *given: dpmpp_2m_sde(*given, kind="heun"),
    "Euler": euler,
    "DDIM": euler,
    "Euler a": euler_ancestral,
    "LCM": lcm,
}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["Karras", "SGM Uniform"])
@pytest.mark.parametrize("sampler", K_DIFFUSION)
def test_a_sampler_computes_what_k_diffusion_s_of_that_name_does(sampler, schedule, kind):
    one = solver(sampler, schedule, prediction_type=kind)
    for denoise, steps in ((1.0, 8), (0.4, 3), (0.2, 1)):
        start, found = run(one, denoise, steps)
        drawn = noise()
        drawn.next()
        levels = [step.level for step in one.begin(denoise, steps)] + [0.0]
        wanted = K_DIFFUSION[sampler](start.double(), levels, lambda drawn=drawn: drawn.next().double())
        assert torch.allclose(found.double(), wanted, atol=2e-4 * max(1, float(wanted.abs().max())))


def test_unipc_is_nearer_to_the_exact_end_than_euler():
    def off(sampler):
        one = solver(sampler, "Karras")
        start, end = run(one, steps=12)
        level = one.begin(1.0, 12)[0].level
        return float((end - start * SPREAD / math.hypot(SPREAD, level)).abs().max())

    assert off("UniPC") < off("Euler") / 3


# Schedules -----------------------------------------------------------------------------------------------------------


def test_the_table_of_options_has_them_all():
    assert tuple(solvers.SAMPLERS) == SAMPLERS and (AUTOMATIC, *SCHEDULES) == SCHEDULERS


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 150])
@pytest.mark.parametrize("schedule", NAMES)
def test_noise_falls_from_the_denoising_strength_s_level_to_none(schedule, steps):
    one, before = solver(scheduler=schedule), 0.0
    least, largest = (float(level) for level in solvers.noise_level(one.alphas)[[0, -1]])
    for denoise in (0.02, 0.1, 0.3, 0.31, 0.5, 0.75, 0.9, 1.0):
        found = one.begin(denoise, count := max(1, round(steps * denoise)))
        levels = [step.level for step in found]
        assert len(levels) == count and all(a > b > 0 for a, b in itertools.pairwise(levels))
        assert least * 0.999 <= min(levels) and max(levels) <= largest * 1.001
        assert levels[0] > before, f"a strength of {denoise} begins where less does"
        before = levels[0]
        for step in found:
            assert float(step.alpha**2 + step.sigma**2) == pytest.approx(1)
            assert float(step.sigma / step.alpha) == pytest.approx(step.level, rel=1e-5)
            assert float(one._training.at(np.array(float(step.timestep)))) == pytest.approx(step.level, rel=1e-3)
    if schedule != "Leading":
        assert before == pytest.approx(largest, rel=1e-5)


def test_whole_schedules_are_those_of_the_webuis():
    one = solver()
    levels = solvers.noise_level(one.alphas.double()).numpy()
    low, high, n, T = levels[0], levels[-1], 20, 1000
    ramp = np.linspace(0, 1, n)

    def t_to_sigma(t):
        return np.exp(np.interp(t, np.arange(T), np.log(levels)))

    wanted = {
        "Karras": (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7,
        "Exponential": np.exp(np.linspace(np.log(high), np.log(low), n)),
        "Uniform": t_to_sigma(np.linspace(T - 1, 0, n)),
        "Normal": t_to_sigma(np.linspace(T - 1, 0, n)),
        "SGM Uniform": t_to_sigma(np.linspace(T - 1, 0, n + 1)[:-1]),
        "Simple": np.array([levels[-(1 + int(i * T / n))] for i in range(n)]),
    }
    for name, each in wanted.items():
        found = [step.level for step in solver(scheduler=name).begin(1.0, n)]
        assert np.allclose(found, each, rtol=1e-4), name


def test_automatic_spaces_the_steps_as_the_configuration_says_and_diffusers_does():
    for spacing, name in SPACINGS.items():
        config = {**SD, "timestep_spacing": spacing, "steps_offset": 5}
        one = solver(scheduler=AUTOMATIC, **config)
        assert one.schedule == name
        theirs = solvers.DPMSolverMultistepScheduler(**config)
        theirs.set_timesteps(20)
        found = [float(step.timestep) for step in one.begin(1.0, 20)]
        assert np.abs(np.array(found) - theirs.timesteps.numpy()).max() <= 1
        part = [float(step.timestep) for step in one.begin(0.35, 7)]
        assert np.abs(np.array(part) - theirs.timesteps.numpy()[13:]).max() <= 1


def test_a_schedule_that_needs_what_is_not_installed_is_refused_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(DinotileError, match="scheduler: Beta needs scipy: pip install scipy"):
        solver(scheduler="Beta")


def test_nothing_but_the_training_is_taken_over_from_a_checkpoint_s_scheduler():
    odd = {
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 3,
        "solver_type": "heun",
        "thresholding": True,
        "clip_sample": True,
        "final_sigmas_type": "sigma_min",
        "euler_at_final": True,
        "lower_order_final": False,
        "use_karras_sigmas": True,
        "use_dynamic_shifting": True,
        "lambda_min_clipped": -1.0,
        "variance_type": "learned",
        "sigma_max": 1.0,
        "flow_shift": 3.0,
    }
    for sampler in SAMPLERS:
        assert torch.equal(run(solver(sampler, **odd))[1], run(solver(sampler))[1])
    other = run(solver("DPM++ 2M", beta_end=0.02))[1]
    assert not torch.allclose(other, run(solver("DPM++ 2M"))[1], atol=1e-3)


def test_a_schedule_with_zero_terminal_snr_begins_at_next_to_no_picture():
    config = DDIMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction").config
    for sampler in SAMPLERS:
        one = solver(sampler, **{key: config[key] for key in ("rescale_betas_zero_snr", "prediction_type")})
        assert one.begin(1.0, 5)[0].level > 4000
        assert run(one)[1].isfinite().all()


# In the host ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_tiles_sampled_together_are_those_sampled_alone_and_what_a_mask_keeps_stays(sampler):
    host, state = load_host(Generation(steps=6, denoise=0.6, sampler=sampler)), torch.get_rng_state()
    with torch.no_grad():
        latents = latents_of(host)
        together = sampled(host, batch_of(range(3), guided=True), latents)
        alone = [sampled(host, batch_of([n], guided=True), latents[n : n + 1]) for n in range(3)]
        close(together, torch.cat(alone))
        assert torch.equal(sampled(host, batch_of(range(3)), latents, mask=torch.zeros(3, 1, 32, 32)), latents)
    assert torch.equal(torch.get_rng_state(), state)


def painted(batch=4, order="chess", **generation):
    host = load_host(Generation(**{"steps": 4, "denoise": 0.5, "seed": 1, **generation}))
    settings = Settings(tile=64, overlap=16, scale=2.0, guidance=0.0, guard="off", batch=batch, order=order)
    return np.asarray(upscale(host, SOURCE, settings, NoiseField(1, host.channels)).image).astype(int)


@pytest.mark.parametrize("order", ["chess", "fused"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_image_is_the_same_in_any_batch_and_every_time(sampler, order):
    torch.manual_seed(1)
    first = painted(4, order, sampler=sampler)
    torch.manual_seed(2)
    assert (painted(4, order, sampler=sampler) == first).all()
    assert abs(painted(1, order, sampler=sampler) - first).max() <= 1


@pytest.mark.parametrize("order", ["chess", "fused"])
def test_every_sampler_and_schedule_paints_its_own_image(order):
    more = {"order": order, "steps": 10}
    seen = [painted(**more, sampler=sampler) for sampler in SAMPLERS if sampler != "DDIM"]
    seen += [painted(**more, scheduler=name) for name in NAMES if name not in ("Normal", "Leading")]
    assert all((one != other).any() for one, other in itertools.combinations(seen, 2))
    # In other coordinates the same.
    assert (painted(**more, sampler="DDIM") == painted(**more, sampler="Euler")).all()


def test_at_one_step_more_denoising_strength_changes_more():
    plain = np.asarray(SOURCE.resize((140, 90), Image.Resampling.LANCZOS)).astype(int)
    for scheduler in (AUTOMATIC, "Karras"):
        change = [
            abs(painted(steps=1, denoise=denoise, scheduler=scheduler) - plain).mean()
            for denoise in (0.05, 0.2, 0.4, 0.7, 1.0)
        ]
        assert change == sorted(change) and len(set(change)) == len(change)


def test_png_info_says_the_sampler_and_what_automatic_stood_for(tmp_path, capsys):
    SOURCE.save(tmp_path / "in.png")
    quick = ["--steps=2", "--tile=64", "--overlap=16", "--guidance=0", "--guard=off", "--adapter=None", "--quiet"]
    for more, says in (
        ([], "Sampler: DPM++ 2M, Schedule type: Leading,"),
        (["--sampler=Euler a", "--scheduler=Karras"], "Sampler: Euler a, Schedule type: Karras,"),
    ):
        assert cli.main(["upscale", str(tmp_path / "in.png"), str(tmp_path / "out.png"), *quick, *more]) == 0
        assert says in Image.open(tmp_path / "out.png").text["parameters"]
    code = cli.main(["upscale", str(tmp_path / "in.png"), str(tmp_path / "out.png"), *quick, "--sampler=DPM++ 3M"])
    assert code == 2
    assert "sampler: 'DPM++ 3M' is not allowed, give one of DPM++ 2M, DPM++ 2M SDE" in capsys.readouterr().err
