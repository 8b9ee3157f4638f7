"""Samplers with the faults of real ones, as functions of k-diffusion's kind, for the stand-ins of the WebUIs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Model = Callable[..., Tensor]


def _euler(x: Tensor, x0: Tensor, sigma: Tensor, after: Tensor) -> Tensor:
    return x + (x - x0) / sigma * (after - sigma)


def two_steps(model: Model, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: bool) -> Tensor:
    """As DPM++ 2M SDE in k-diffusion: what only a step that is not the last makes is used after the last, too."""
    for sigma, after in itertools.pairwise(sigmas):
        x0 = model(x, sigma, **extra_args)
        callback({"i": 0})
        if after > 0:
            h = sigma.log() - after.log()
        x = _euler(x, x0, sigma, after)
        h_last = h  # noqa: F841
    return x


def order_three(model: Model, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: bool) -> Tensor:
    """As UniPC."""
    assert len(sigmas) > 3, "UniPC order must be < sampling steps"
    for sigma, after in itertools.pairwise(sigmas):
        x = _euler(x, model(x, sigma, **extra_args), sigma, after)
    return x


def one_step_less(model: Model, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: bool) -> Tensor:
    """As DDIM in the WebUIs, which takes none at all where it has but one, and leaves the noise in."""
    for sigma, after in itertools.pairwise([*sigmas[:-2], sigmas[-1]]):
        x = _euler(x, model(x, sigma, **extra_args), sigma, after)
    return x


def not_finite(model: Model, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: bool) -> Tensor:
    """With a single step it divides by zero."""
    x = order_one(model, x, sigmas, extra_args, callback, disable)
    return x / (1 if len(sigmas) > 2 else 0)


def order_one(model: Model, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: bool) -> Tensor:
    for sigma, after in itertools.pairwise(sigmas):
        x = _euler(x, model(x, sigma, **extra_args), sigma, after)
    return x


def draws(draw: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A sampler that adds noise of its own."""

    def sample(model: Model, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: bool) -> Tensor:
        for sigma, after in itertools.pairwise(sigmas):
            x = _euler(x, model(x, sigma, **extra_args), sigma, after) + draw(x) * after / 2
        return x

    return sample


def brownian(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Any,
    callback: Any,
    disable: bool,
    noise_sampler: Any = None,
) -> Tensor:
    """As reForge's SDE samplers: without a noise sampler a tree of the whole batch."""
    tree = torch.Generator().manual_seed(4)
    flat = lambda *_: torch.randn(x.numel(), generator=tree).view(x.shape)  # noqa: E731
    noise_sampler = noise_sampler or flat
    return draws(lambda x: noise_sampler(0, 1))(model, x, sigmas, extra_args, callback, disable)


def adaptive(model: Model, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: bool) -> Tensor:
    """As DPM adaptive: the length of its steps depends on all of the batch."""
    sigma = sigmas[0]
    while sigma > 1e-2:
        x0 = model(x, sigma, **extra_args)
        after = sigma / (1.5 + (x0.abs().mean() % 1))
        x, sigma = _euler(x, x0, sigma, after), after
    return x


def each_alone(model: Model, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: bool) -> Tensor:
    """As reForge's ODE samplers: the model is asked for one image of the batch after the other."""
    return torch.cat([order_one(model, one, sigmas, extra_args, callback, disable) for one in x.split(1)])


NEEDED = {
    "DPM++ 2M SDE": (two_steps, 2),
    "UniPC": (order_three, 3),
    "PLMS": (one_step_less, 2),
    "Odd": (not_finite, 2),
    "LMS": (order_one, 1),
}
"""Samplers, and the steps that they need at least."""
DRAWN = {
    "Euler Negative": draws(torch.randn_like),
    "ER SDE": draws(lambda x: torch.randn(x.size(), dtype=x.dtype, generator=torch.Generator().manual_seed(3))),
    "Side by side": draws(lambda x: torch.randn(*x.shape)),
    "DPM++ SDE Comfy": brownian,
}
"""Samplers that draw noise of their own."""
MIXED = {"DPM adaptive": adaptive, "ODE": each_alone}
"""Samplers that cannot take a batch."""
ODD = {name: function for name, (function, _) in NEEDED.items()} | DRAWN | MIXED
