"""Samplers and schedules for diffusers' UNets, by the WebUIs' names.

A sampler is one of diffusers' schedulers with settings of our own. Of a checkpoint's scheduler only what the UNet was
trained with is taken over; whether it draws noise, clips x0 or ends at another level is no business of a checkpoint's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from lib_dinotile import DinotileError, one_line
from lib_dinotile.engine.prediction import noise_level, to_x0
from lib_dinotile.settings import AUTOMATIC, Generation
from lib_dinotile.tiling.noise import TileNoise

TRAINED = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
"""Keys of a scheduler's configuration that say how the UNet was trained."""
SPACED = ("timestep_spacing", "steps_offset")
"""Keys that say how its steps are best spaced."""

SCHEDULERS = (
    *("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "PNDM", "LMSDiscrete", "HeunDiscrete", "KDPM2Discrete"),
    *("KDPM2AncestralDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep"),
    *("DPMSolverSinglestep", "DPMSolverSDE", "DEISMultistep", "UniPCMultistep", "SASolver", "LCM", "TCD"),
)
"""Those of diffusers for UNets trained on alpha * x0 + sigma * noise at whole timesteps; neither EDM nor flow."""


SPACINGS = {"leading": "Leading", "linspace": "SGM Uniform", "trailing": "Simple"}
"""By a configuration's `timestep_spacing`, what Automatic stands for."""


def trained(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the configuration of a checkpoint's scheduler says of its UNet's training, defaults for what it leaves out.

    DinotileError, beginning with `name`, if the UNet was trained in another way than the samplers here are for.
    """
    kind = str(config.get("_class_name"))
    if kind.removesuffix("Scheduler") not in SCHEDULERS:
        raise DinotileError(f"{name}: its scheduler {kind} stands for a kind of noise that is not supported")
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
    defaults = {key: parameters[key].default for key in (*TRAINED, *SPACED) if key in parameters}
    found = {**defaults, **{key: config[key] for key in (*TRAINED, *SPACED) if config.get(key) is not None}}
    allowed = {
        "prediction_type": ("epsilon", "v_prediction", "sample"),
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "timestep_spacing": tuple(SPACINGS),
        "timestep_type": ("discrete",),
        "use_flow_sigmas": (False,),
    }
    for key, values in allowed.items():
        value = config.get(key) if config.get(key) is not None else found.get(key, values[0])
        if value not in values:
            raise DinotileError(f"{name}: its scheduler's {key} {value!r} is not supported")
    try:
        known = DPMSolverMultistepScheduler(**found)
        if not bool(noise_level(known.alphas_cumprod).isfinite().all()) or not 0 <= found.get("steps_offset", 0) < 1000:
            raise ValueError("its noise levels are no numbers")
    except Exception as error:  # whatever a wrong type leads to
        raise DinotileError(f"{name}: its scheduler's configuration is damaged: {one_line(error)}") from error
    return found


def coefficients(level: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of a variance-preserving model at a noise level, sigma / alpha as k-diffusion counts it."""
    alpha = 1 / (level**2 + 1) ** 0.5
    return alpha, level * alpha


class LCM:
    """Multistep consistency sampling (arXiv 2310.04378): x0, noised to the next level."""

    def __init__(self, prediction_type: str = "epsilon", **trained: Any) -> None:
        self._prediction = prediction_type
        self.sigmas = torch.zeros(1)
        self._at = 0

    def set_timesteps(self, steps: int) -> None:
        self._at = 0

    def set_begin_index(self, index: int) -> None:
        self._at = index

    def step(self, prediction: Tensor, timestep: Tensor, x: Tensor, variance_noise: Tensor, return_dict: bool) -> Any:
        alpha, sigma = coefficients(self.sigmas[self._at])
        x0 = to_x0(x, prediction, alpha, sigma, self._prediction)
        self._at += 1
        alpha, sigma = coefficients(self.sigmas[self._at])
        return (alpha.to(x) * x0 + sigma.to(x) * variance_noise,)


@dataclass(frozen=True)
class Sampler:
    """How a sampler is made of a scheduler of diffusers."""

    kind: type
    settings: Mapping[str, Any]
    draws: bool = False
    """Whether it adds noise at every step."""


def _dpm(order: int, solver: str = "midpoint", sde: bool = False) -> Sampler:
    """DPM-Solver++ (arXiv 2211.01095), or its SDE form, which adds noise."""
    algorithm = "sde-dpmsolver++" if sde else "dpmsolver++"
    settings = {"algorithm_type": algorithm, "solver_order": order, "solver_type": solver}
    return Sampler(DPMSolverMultistepScheduler, settings, draws=sde)


SAMPLERS: Mapping[str, Sampler] = {
    "DPM++ 2M": _dpm(2),
    "DPM++ 2M SDE": _dpm(2, sde=True),
    "DPM++ 2M SDE Heun": _dpm(2, "heun", sde=True),
    # Of first order it is DDIM (arXiv 2010.02502), which is Euler's method for Karras' sigma (arXiv 2206.00364) ...
    "Euler": _dpm(1),
    # ... and its SDE form is Euler's ancestral method.
    "Euler a": _dpm(1, sde=True),
    "DDIM": _dpm(1),
    # Order 2 and bh2 are what UniPC's authors advise with guidance (arXiv 2302.04867).
    "UniPC": Sampler(UniPCMultistepScheduler, {"solver_order": 2, "solver_type": "bh2", "predict_x0": True}),
    "LCM": Sampler(LCM, {}, draws=True),
}


@dataclass(frozen=True)
class Share:
    """The part of a schedule that is sampled with a denoising strength: `steps` steps from there to the end."""

    denoise: float
    steps: int

    @property
    def left(self) -> np.ndarray:
        """Share of the schedule that is left before each step: the strength at the first one, 0 after the last."""
        return self.denoise * np.arange(self.steps, 0, -1) / self.steps

    @property
    def left_or_none(self) -> np.ndarray:
        """The same, but nothing is left before the last step, unless it is the only one."""
        if self.steps == 1:
            return np.array([self.denoise])
        return self.denoise * np.arange(self.steps - 1, -1, -1) / (self.steps - 1)


class Training:
    """Noise levels that a UNet was trained with."""

    def __init__(self, alphas_cumprod: Tensor, offset: int) -> None:
        """offset: the timestep where diffusers' spacing `leading` begins."""
        self.last, self.offset = len(alphas_cumprod) - 1, offset
        self._logs = noise_level(alphas_cumprod.double()).log().numpy()
        self.ends = float(self._logs[0]), float(self._logs[-1])
        """Logarithms of the least and the largest."""

    def at(self, timesteps: np.ndarray) -> np.ndarray:
        """Noise levels of timesteps, between two of the model's log-linearly as k-diffusion does."""
        return np.exp(np.asarray(np.interp(timesteps, np.arange(self.last + 1), self._logs)))

    def timesteps(self, levels: np.ndarray) -> np.ndarray:
        return np.asarray(np.interp(np.log(levels), self._logs, np.arange(self.last + 1)))


def _uniform(share: Share, training: Training) -> np.ndarray:
    return training.at(training.last * share.left_or_none)


def _karras(share: Share, training: Training, rho: float = 7.0) -> np.ndarray:
    """Equation 5 of arXiv 2206.00364."""
    low, high = (np.exp(end / rho) for end in training.ends)
    return (low + share.left_or_none * (high - low)) ** rho


def _exponential(share: Share, training: Training) -> np.ndarray:
    low, high = training.ends
    return np.exp(low + share.left_or_none * (high - low))


def _sgm_uniform(share: Share, training: Training) -> np.ndarray:
    return training.at(training.last * share.left)


def _simple(share: Share, training: Training) -> np.ndarray:
    return training.at((training.last + 1) * share.left - 1)


def _beta(share: Share, training: Training) -> np.ndarray:
    """arXiv 2407.12173, with the WebUIs' alpha and beta of 0.6."""
    try:
        from scipy.stats import beta
    except ImportError as error:
        raise DinotileError("scheduler: Beta needs scipy: pip install scipy") from error
    return training.at(training.last * beta.ppf(share.left, 0.6, 0.6))


def _leading(share: Share, training: Training) -> np.ndarray:
    """diffusers' spacing of that name (arXiv 2305.08891, table 2); never begins at the last timestep."""
    stride = (training.last + 1) // (round(share.steps / share.denoise, 6) + 1)
    return training.at(np.arange(share.steps, 0, -1) * stride + training.offset)


SCHEDULES: Mapping[str, Callable[[Share, Training], np.ndarray]] = {
    "Uniform": _uniform,
    "Normal": _uniform,
    "Karras": _karras,
    "Exponential": _exponential,
    "SGM Uniform": _sgm_uniform,
    "Simple": _simple,
    "Beta": _beta,
    "Leading": _leading,
}
"""Noise levels at which the model is asked, falling; the step after the last ends at 0."""


@dataclass(frozen=True)
class Step:
    """One step of a sampler."""

    timestep: Tensor
    """(), float32; may lie between two that the model was trained with."""
    alpha: Tensor
    sigma: Tensor
    """(), float32: of the noisy latents, alpha * x0 + sigma * noise."""
    level: float
    """sigma / alpha."""


class Solver:
    """A sampler and a schedule at work on noisy latents alpha * x0 + sigma * noise."""

    def __init__(self, generation: Generation, config: Mapping[str, Any]) -> None:
        """config: of the checkpoint's scheduler, any of those with betas; see `TRAINED`."""
        trained = {name: config[name] for name in TRAINED if config.get(name) is not None}
        sampler = SAMPLERS[generation.sampler]
        known = DPMSolverMultistepScheduler(**trained)
        self.alphas = known.alphas_cumprod
        """(T,): alpha squared at every timestep that the UNet was trained with."""
        self.prediction: str = known.config.prediction_type
        """Prediction type of the UNet: `epsilon`, `v_prediction` or `sample`."""
        self.schedule: str = generation.scheduler
        """Name of the schedule, also where Automatic was chosen."""
        if self.schedule == AUTOMATIC:
            self.schedule = SPACINGS[config.get("timestep_spacing", "linspace")]
        self._draws = sampler.draws
        self._training = Training(self.alphas, config.get("steps_offset", 0))
        self._scheduler: Any = sampler.kind(**trained, **sampler.settings)
        self._levels(Share(1.0, 1))  # says at once if it needs what is not there

    def _levels(self, share: Share) -> np.ndarray:
        return SCHEDULES[self.schedule](share, self._training)

    def begin(self, denoise: float, steps: int) -> Sequence[Step]:
        """The steps from a denoising strength in (0, 1] to the end, however few: they begin at its noise level."""
        levels = self._levels(Share(denoise, steps))
        scheduler = self._scheduler
        scheduler.set_timesteps(steps)  # forgets what it knows of other latents
        scheduler.sigmas = torch.tensor([*levels, 0.0], dtype=torch.float32)
        scheduler.timesteps = torch.tensor(self._training.timesteps(levels), dtype=torch.float32)
        scheduler.set_begin_index(0)
        return [
            Step(timestep, *coefficients(level), float(level))
            for timestep, level in zip(scheduler.timesteps, scheduler.sigmas)
        ]

    def step(self, prediction: Tensor, step: Step, x: Tensor, noise: TileNoise) -> Tensor:
        """The latents before the next step, or at the end without noise; noise: what a sampler adds comes from it."""
        drawn = {"variance_noise": noise.next().to(x)} if self._draws else {}
        return self._scheduler.step(prediction, step.timestep, x, return_dict=False, **drawn)[0]
