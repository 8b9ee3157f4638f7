"""A diffusion model's prediction and the clean latents x0, each from the other.

A noisy latent is x = alpha * x0 + sigma * noise. Variance-preserving models (Stable Diffusion) have
alpha^2 + sigma^2 = 1, rectified flow (arXiv 2209.03003) has alpha + sigma = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("epsilon", "v_prediction", "sample", "flow")


def coefficients(alphas_cumprod: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of a variance-preserving schedule (DDPM, arXiv 2006.11239), float32, on the timestep's device.

    alphas_cumprod: (T,); timestep: (), or (k,) for k latents, whole numbers in [0, T). Both are (1, 1, 1, 1), or
    (k, 1, 1, 1).
    """
    alpha = alphas_cumprod.to(timestep.device)[timestep.long()].float().view(-1, 1, 1, 1)
    return alpha.sqrt(), (1 - alpha).sqrt()


def noise_level(alphas_cumprod: Tensor) -> Tensor:
    """sigma / alpha of a variance-preserving schedule, of its shape: the noise level as k-diffusion counts it."""
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


def timestep_to_sigma(alphas_cumprod: Tensor, timestep: float) -> float:
    """Noise level of a timestep, between two of the model's log-linearly as k-diffusion does (t_to_sigma)."""
    # On the CPU: not every device has float64.
    log_sigmas = noise_level(alphas_cumprod).log().cpu()
    low = min(max(int(timestep), 0), len(log_sigmas) - 1)
    high = min(low + 1, len(log_sigmas) - 1)
    share = min(max(timestep - low, 0.0), 1.0)
    return float(torch.lerp(log_sigmas[low].double(), log_sigmas[high].double(), share).exp())


def to_x0(x: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """The clean latents that a prediction at the noisy latents x (k, C, h, w) stands for.

    alpha, sigma: see above, of a shape that spreads to x's. kind: one of `KINDS`.

    - `epsilon`, the noise: x0 = (x - sigma * prediction) / alpha; not finite where alpha is 0
    - `v_prediction`, alpha * noise - sigma * x0 (arXiv 2202.00512): x0 = alpha * x - sigma * prediction
    - `sample`, x0 itself
    - `flow`, noise - x0 (arXiv 2209.03003): x0 = x - sigma * prediction

    Computed in float32, given back in x's dtype. ValueError for any other kind.
    """
    noisy, predicted = x.float(), prediction.to(x.device).float()
    alpha, sigma = alpha.to(noisy), sigma.to(noisy)
    if kind == "epsilon":
        x0 = (noisy - sigma * predicted) / alpha
    elif kind == "v_prediction":
        x0 = alpha * noisy - sigma * predicted
    elif kind == "sample":
        x0 = predicted
    elif kind == "flow":
        x0 = noisy - sigma * predicted
    else:
        raise ValueError(f"a model does not predict {kind!r}, but one of {', '.join(KINDS)}")
    return x0.to(x.dtype)


def from_x0(x: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """The prediction at the noisy latents x (k, C, h, w) for which x0 would be the clean ones.

    The inverse of `to_x0`, which has the formulae; with x0 it is noise = (x - alpha * x0) / sigma, and so, but for
    `sample`, not finite where sigma is 0. Computed in float32, given back in x's dtype. ValueError for any other kind.
    """
    noisy, clean = x.float(), x0.to(x.device).float()
    alpha, sigma = alpha.to(noisy), sigma.to(noisy)
    if kind == "epsilon":
        prediction = (noisy - alpha * clean) / sigma
    elif kind == "v_prediction":
        prediction = alpha * ((noisy - alpha * clean) / sigma) - sigma * clean
    elif kind == "sample":
        prediction = clean
    elif kind == "flow":
        prediction = (noisy - clean) / sigma
    else:
        raise ValueError(f"a model does not predict {kind!r}, but one of {', '.join(KINDS)}")
    return prediction.to(x.dtype)
