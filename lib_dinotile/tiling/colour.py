"""The colours of a painted tile, brought back to those of its source."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

CORRECTIONS = ("none", "AdaIN", "wavelet")
"""Methods of `correct`."""

BLOCK = 8
"""Side of the squares, in pixels, whose means the coarse levels are made from."""

REACH = 31
"""Of the triangular kernel that blurs these means, in pixels.

Five levels of the wavelet decomposition make a triangle of 2**5 = 32, so what is coarser than some 32 pixels is colour,
what is finer is detail. Blocks blur as well; with 31 the variance is the same in all: 31**2 - 1 + 8**2 - 1 = 32**2 - 1.
"""

TOLERANCE = 5e-5
"""Of the mean colour: some hundredth of a level of 255."""

STEPS = 64
"""At most, in search of the offset; one or two are the rule."""

CHUNK = 2**15
"""Pixels that are added up at once: weighted sums in float32 become inexact with many more."""


def correct(pixels: Tensor, source: Tensor, method: str, within: Tensor | None = None) -> Tensor:
    """A painted tile with the colours of its source.

    pixels, source: (3, h, w) in [0, 1], float32, finite, of any size; so is what is returned. Its mean colour is that
    of the source to well below 1/255 in every channel, except with the method "none", which returns `pixels`.
    within: (h, w), true for the pixels that this is about, if not all; what the others become is of no account.
    ValueError for a method that is not in `CORRECTIONS`.
    """
    if method not in CORRECTIONS:
        raise ValueError(f"colour correction {method!r}, not one of {CORRECTIONS}")
    if method == "none":
        return pixels
    weight = None
    if within is not None:
        weight = within.float()
        weight /= weight.sum().clamp(min=1)
    aim = _mean(source, weight)
    if method == "AdaIN":
        moved = _adain(pixels, source, aim, weight)
    else:
        # Linear, so the detail of one plus the colour of the other takes one decomposition, of what lies between them.
        moved = _coarse(source, pixels, weight)
        moved += pixels
    return _with_mean(moved, aim, weight)


def _mean(image: Tensor, weight: Tensor | None) -> Tensor:
    """Mean (3, 1, 1) of an image (3, h, w), by weights (h, w) that add up to 1."""
    if weight is None:
        return image.mean((1, 2), keepdim=True)
    chunks = zip(image.flatten(1).split(CHUNK, 1), weight.flatten().split(CHUNK))
    return torch.stack([part @ share for part, share in chunks]).sum(0)[:, None, None]


def _adain(pixels: Tensor, source: Tensor, aim: Tensor, weight: Tensor | None) -> Tensor:
    """Adaptive instance normalisation (arXiv 1703.06868): every channel gets the source's mean and standard deviation.

    aim: the source's mean. The 1e-5 is StableSR's: a tile without any contrast (below a level of 255) is not blown up
    to the source's.
    """
    mean = _mean(pixels, weight)
    variance, wanted = (_mean((x - m).square_(), weight) for x, m in ((pixels, mean), (source, aim)))
    gain = ((wanted + 1e-5) / (variance + 1e-5)).sqrt()
    return (pixels * gain).add_(aim - mean * gain)


def _coarse(source: Tensor, pixels: Tensor, weight: Tensor | None) -> Tensor:
    """Coarse levels of `source - pixels` (3, h, w), what its à-trous wavelet decomposition in five levels leaves.

    That is StableSR's (arXiv 2305.07015, wavelet colour fix): 3x3 binomial kernels, dilated by 1, 2, 4 and so on, with
    the last pixels repeated beyond the border; with weights, a normalised convolution. All five together are a
    triangular kernel for the rows and one for the columns. Here they blur means of blocks, hardly a difference so wide.
    """
    shift = source - pixels
    if weight is None:
        means = _block_means(shift)
    else:
        means = torch.cat([_block_means(shift.mul_(weight)), _block_means(weight[None])])
    down, across = (_blur(length).to(source.device) for length in source.shape[1:])
    coarse = down @ means @ across.T
    if weight is None:
        return coarse
    return coarse[:3].div_(coarse[3:].clamp_(min=torch.finfo(coarse.dtype).tiny))


def _block_means(image: Tensor) -> Tensor:
    """Means (C, ceil(h / BLOCK), ceil(w / BLOCK)) of an image (C, h, w), its last pixels repeated to fill a block."""
    height, width = image.shape[1:]
    if height % BLOCK or width % BLOCK:
        image = F.pad(image, (0, -width % BLOCK, 0, -height % BLOCK), mode="replicate")
    # Whole rows are added up fast, and leave little to add up for the columns.
    return image.unflatten(1, (-1, BLOCK)).sum(2).unflatten(2, (-1, BLOCK)).sum(3) / BLOCK**2


@functools.lru_cache(maxsize=8)
def _blur(length: int) -> Tensor:
    """Matrix (length, blocks) from the means of the blocks along an axis to its pixels, blurred by the triangle."""
    triangle = 1 - torch.arange(1 - REACH, REACH).abs() / REACH
    blocks = torch.eye(-(-length // BLOCK)).repeat_interleave(BLOCK, 1)[:, None]
    padded = F.pad(blocks, (REACH - 1, REACH - 1), mode="replicate")
    blurred = F.conv1d(padded, triangle[None, None] / REACH)
    return blurred[:, 0, :length].T.contiguous()


def _with_mean(pixels: Tensor, aim: Tensor, weight: Tensor | None) -> Tensor:
    """Pixels (3, h, w) in [0, 1] with the mean colour `aim` (3, 1, 1), from pixels of any range.

    Cutting off at 0 and 1 shifts the mean, so an offset is added to each channel first: the one with which the mean is
    right after cutting off. There is one, as the mean rises with it from 0 to 1. The secant method finds it, kept
    within a bracket; every third step is a bisection, for images where secants do not help.
    """
    before = offset = aim - _mean(pixels, weight)
    last = aim
    result = torch.empty_like(pixels)
    for step in range(STEPS):
        torch.add(pixels, offset, out=result).clamp_(0, 1)
        short = aim - _mean(result, weight)
        done = short.abs() < TOLERANCE
        # On other devices some steps too many cost less than to wait for an answer after each.
        if (step > 1 or pixels.device.type == "cpu") and done.all():
            break
        if step == 0:
            low, high = -pixels.amax(), 1 - pixels.amin()
            # How fast the mean rises where the search begins, by every eighth row.
            few = (pixels[:, ::8] + (offset + short)).clamp_(0, 1)
            rise = (few - result[:, ::8]).mean((1, 2), keepdim=True) / short
        else:
            rise = (last - short) / (offset - before)
        low, high = torch.where(short > 0, offset, low), torch.where(short < 0, offset, high)
        guess = offset + short / rise
        secant = (guess > low) & (guess < high) & (step % 3 < 2)
        before, last = offset, short
        offset = torch.where(done, offset, torch.where(secant, guess, (low + high) / 2))
    return result
