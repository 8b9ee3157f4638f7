"""x0 from a prediction and back: exact enough in every precision, and what diffusers' own schedulers compute."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from lib_dinotile.engine.prediction import KINDS, coefficients, from_x0, noise_level, timestep_to_sigma, to_x0

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
ALPHAS = DDIMScheduler(**SCHEDULE).alphas_cumprod
kinds, seeds = st.sampled_from(KINDS), st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def scales(kind: str, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma of a kind's own schedule."""
    noise = torch.tensor(sigma)
    return (1 - noise if kind == "flow" else (1 - noise.square()).sqrt()), noise


def latents(seed: int, count: int = 2) -> list[torch.Tensor]:
    """`count` tensors of two latents each."""
    return list(torch.randn(count, 2, 4, 3, 5, generator=torch.Generator().manual_seed(seed)))


@given(kinds, dtypes, seeds, st.floats(0.02, 0.98))
def test_there_and_back_gives_the_same_in_its_own_precision(kind, dtype, seed, sigma):
    x, x0 = (each.to(dtype) for each in latents(seed))
    alpha, sigma = scales(kind, sigma)
    prediction = from_x0(x, x0, alpha, sigma, kind)
    back = to_x0(x, prediction, alpha, sigma, kind)
    assert prediction.dtype == back.dtype == dtype
    # A prediction is rounded once; by what it is multiplied with, so is its error.
    amplified = sigma / alpha if kind == "epsilon" else 1.0
    allowed = torch.finfo(dtype).eps * (2 + 2 * float(amplified) * float(prediction.abs().max()))
    assert (back - x0).abs().max() <= allowed + torch.finfo(dtype).eps * float(x0.abs().max())


@given(kinds, seeds, st.floats(0.02, 0.98))
def test_the_truth_at_noised_latents_is_what_each_kind_says(kind, seed, sigma):
    x0, noise = latents(seed)
    alpha, sigma = scales(kind, sigma)
    x = alpha * x0 + sigma * noise
    truth = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0, "flow": noise - x0}[kind]
    torch.testing.assert_close(to_x0(x, truth, alpha, sigma, kind), x0, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(from_x0(x, x0, alpha, sigma, kind), truth, rtol=1e-3, atol=1e-3)


@given(st.sampled_from(["epsilon", "v_prediction", "sample"]), seeds, st.integers(0, 999))
def test_x0_is_that_of_diffusers_ddim(kind, seed, timestep):
    x, prediction = latents(seed)
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type=kind)
    scheduler.set_timesteps(1000)
    theirs = scheduler.step(prediction, timestep, x).pred_original_sample
    ours = to_x0(x, prediction, *coefficients(ALPHAS, torch.tensor(timestep)), kind)
    torch.testing.assert_close(ours, theirs)


@given(seeds, st.integers(0, 9))
def test_flow_is_that_of_diffusers_flow_matching(seed, step):
    """Its last step, to sigma 0, gives x0: so does any step, gone on with in a straight line."""
    x0, noise = latents(seed)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    timestep, sigma = scheduler.timesteps[step], scheduler.sigmas[step]
    x = scheduler.scale_noise(x0, timestep[None], noise)
    prediction = from_x0(x, x0, 1 - sigma, sigma, "flow")
    torch.testing.assert_close(prediction, noise - x0, rtol=1e-3, atol=1e-3)
    after = scheduler.step(prediction, timestep, x).prev_sample
    share = scheduler.sigmas[step + 1] / sigma
    torch.testing.assert_close(after, torch.lerp(to_x0(x, prediction, 1 - sigma, sigma, "flow"), x, share))


@given(kinds, dtypes, dtypes, seeds)
def test_the_dtype_is_that_of_x_and_it_is_computed_in_float32(kind, dtype, other, seed):
    x, given = latents(seed)
    x, given = x.to(dtype), given.to(other)
    alpha, sigma = scales(kind, 0.3)
    for function in (to_x0, from_x0):
        found = function(x, given, alpha, sigma, kind)
        assert found.dtype == dtype
        assert torch.equal(found, function(x.float(), given.float(), alpha, sigma, kind).to(dtype))


@given(kinds, seeds)
def test_at_the_ends_of_the_schedule(kind, seed):
    x, other = latents(seed)
    zero, one = torch.zeros(()), torch.ones(())
    # Nothing but noise, the zero terminal SNR of arXiv 2305.08891: only the noise itself tells nothing of x0.
    prediction = from_x0(x, other, zero, one, kind)
    assert prediction.isfinite().all()
    if kind == "epsilon":
        assert torch.equal(prediction, x)
    else:
        torch.testing.assert_close(to_x0(x, prediction, zero, one, kind), other, rtol=1e-5, atol=1e-5)
    # Nothing but the picture, whatever is predicted.
    if kind != "sample":
        assert torch.equal(to_x0(x, other, one, zero, kind), x)


def test_zero_terminal_snr_of_diffusers():
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    alpha, sigma = coefficients(scheduler.alphas_cumprod, torch.tensor([999, 0]))
    assert alpha[0] == 0 and sigma[0] == 1
    x0, noise = latents(0)
    x = alpha * x0 + sigma * noise
    prediction = from_x0(x, x0, alpha, sigma, "v_prediction")
    torch.testing.assert_close(prediction[0], -x0[0])
    torch.testing.assert_close(to_x0(x, prediction, alpha, sigma, "v_prediction"), x0)


def test_every_latent_has_its_own_timestep():
    x, prediction = latents(0)
    t = torch.tensor([10, 900])
    both = to_x0(x, prediction, *coefficients(ALPHAS, t), "epsilon")
    for number in range(2):
        one = to_x0(
            x[number : number + 1], prediction[number : number + 1], *coefficients(ALPHAS, t[number]), "epsilon"
        )
        assert torch.equal(both[number], one[0])


def test_alpha_and_sigma_are_as_large_as_the_schedule_says():
    alpha, sigma = coefficients(ALPHAS.double(), torch.tensor([0, 500, 999]))
    assert alpha.shape == sigma.shape == (3, 1, 1, 1) and alpha.dtype == sigma.dtype == torch.float32
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(3, 1, 1, 1))
    torch.testing.assert_close((sigma / alpha).flatten(), noise_level(ALPHAS)[[0, 500, 999]])


@given(st.floats(-1, 1001))
def test_noise_levels_between_timesteps_are_log_linear(timestep):
    levels = noise_level(ALPHAS)
    found = timestep_to_sigma(ALPHAS, timestep)
    low, high = min(max(int(timestep), 0), 999), min(max(int(timestep), 0) + 1, 999)
    share = min(max(timestep - low, 0.0), 1.0)
    assert found == pytest.approx(float(levels[low]) ** (1 - share) * float(levels[high]) ** share, rel=1e-4)


@pytest.mark.parametrize("function", [to_x0, from_x0])
def test_another_kind_is_refused(function):
    x, other = latents(0)
    with pytest.raises(ValueError, match="'noise', but one of epsilon, v_prediction, sample, flow"):
        function(x, other, *scales("epsilon", 0.5), "noise")
