"""The colours of a painted tile, brought back to those of its source."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CORRECTIONS = ("none", "AdaIN", "wavelet")
"""What `correct` takes as its method."""

LEVELS = 5
"""Of the wavelet decomposition: what is coarser than some 32 pixels is colour, what is finer is detail."""

HALVINGS = 20
"""Of the bracket that the offset is searched in: an error below 1e-6 on an ordinary tile, 1e-4 at the very worst."""


def correct(pixels: Tensor, source: Tensor, method: str, within: Tensor | None = None) -> Tensor:
    """A painted tile with the colours of its source.

    pixels, source: (3, h, w) in [0, 1], float32, finite, of any size; so is what is returned. Its mean colour is that
    of the source to well below 1/255 in every channel, except with the method "none", which returns `pixels`.
    within: (h, w), true for the pixels that this is about, if not all; what the others become is of no account.
    ValueError for a method that is not in `CORRECTIONS`.
    """
    if method not in CORRECTIONS:
        raise ValueError(f"colour correction {method!r}, not one of {CORRECTIONS}")
    if within is None:
        within = torch.ones(pixels.shape[1:], dtype=torch.bool)
    if method == "none" or not within.any():
        return pixels
    chosen = within.flatten().nonzero()[:, 0]
    # Rows of the n pixels (C, n, 1); one index for all, and none where there is nothing to leave out.
    whole = len(chosen) == within.numel()
    painted, wanted = (
        (image.flatten(1) if whole else image.flatten(1).index_select(1, chosen)).unsqueeze(2)
        for image in (pixels, source)
    )
    if method == "AdaIN":
        painted = _adain(painted, wanted)
    else:
        # Linear, so the detail of one plus the colour of the other takes one decomposition, of what lies between them.
        coarse = _coarse(torch.cat([(source - pixels) * within, within[None].float()]))
        shift = (coarse[:3] / coarse[3:].clamp(min=1e-3)).flatten(1)
        painted = painted + (shift if whole else shift.index_select(1, chosen)).unsqueeze(2)
    corrected = _with_mean(painted, wanted)[..., 0]
    if not whole:
        corrected = pixels.flatten(1).index_copy(1, chosen, corrected)
    return corrected.reshape(pixels.shape)


def _adain(pixels: Tensor, source: Tensor) -> Tensor:
    """Adaptive instance normalisation (arXiv 1703.06868): every channel gets the source's mean and standard deviation.

    The 1e-5 is StableSR's: a tile without any contrast (below a level of 255) is not blown up to the source's.
    """
    (variance, mean), (wanted, aim) = (torch.var_mean(x, (1, 2), keepdim=True, correction=0) for x in (pixels, source))
    return (pixels - mean) * ((wanted + 1e-5) / (variance + 1e-5)).sqrt() + aim


def _coarse(image: Tensor) -> Tensor:
    """What is left of an image (C, h, w) after `LEVELS` steps of the à-trous wavelet decomposition.

    As StableSR does it (arXiv 2305.07015, wavelet colour fix): 3x3 binomial kernels, dilated by 1, 2, 4 and so on, with
    the last pixels repeated beyond the border. The kernel is separable, rows and columns are done one after the other.
    """
    for level in range(LEVELS):
        d = 2**level
        image = F.pad(image, (d, d, d, d), mode="replicate")
        image = (image[:, : -2 * d] + image[:, 2 * d :]).add_(image[:, d:-d], alpha=2).mul_(0.25)
        image = (image[..., : -2 * d] + image[..., 2 * d :]).add_(image[..., d:-d], alpha=2).mul_(0.25)
    return image


def _with_mean(pixels: Tensor, source: Tensor) -> Tensor:
    """Pixels (3, h, w) in [0, 1] with the mean colour of the source, from pixels of any range.

    Cutting off at 0 and 1 shifts the mean, so an offset is added to each channel first: the one, found by bisection,
    with which the mean is right after cutting off. There is one, as the mean rises with it from 0 to 1.
    """
    mean = source.mean((1, 2), keepdim=True)
    low, high = -pixels.amax((1, 2), keepdim=True), 1 - pixels.amin((1, 2), keepdim=True)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        short = (pixels + middle).clamp_(0, 1).mean((1, 2), keepdim=True) < mean
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return (pixels + (low + high) / 2).clamp_(0, 1)
