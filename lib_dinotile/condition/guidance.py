"""Training-free guidance: the predicted x0 is moved towards what the source shows, at some of its steps.

The gradient is taken with respect to the predicted picture x0, not through the UNet (MPGD, arXiv 2311.16424). As in
FreeDoM (arXiv 2303.09833) the step's length is a share of another one that the sampler takes anyway; there that is
from the negative prompt's picture to the prompt's, here it is from the source's latent to x0, which there is also
without a negative prompt (CFG scale 1, distilled models), and in all hosts. It shrinks with the steps that are left,
as the noise does: late in the sampling the model could no longer make a clean picture of a long step.

A gradient through an encoder of patches is mostly a pattern on their grid that no picture has, and some patches drown
the others. So the grid is shifted from step to step, and from view to view within one; the gradient is made about as
strong everywhere; and it has momentum (Polyak 1964) over the steps: what all shifts agree on adds up, patterns on their
grids do not. benchmarks/world/README.md has figures with and without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_dinotile.condition.steps import first_step, is_between
from lib_dinotile.dino.tile_features import TileFeatures
from lib_dinotile.settings import PATCHES, SELF_SIMILARITY
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.plan import Rect

SCALE = 256.0
"""Of the distance, so that gradients in half precision do not vanish; taken off again."""
CONTEXT = 0
"""Patches around a tile that are seen with it, at least: steering needs fewer than judging."""
LENGTH = 2.8
"""Of the first step at strength 1, as a share of that from the source's latent to x0."""
MOMENTUM = 0.7
"""Share of the last step's direction that is in the next one's."""
NAMED = 0.25
"""Strength where a prompt names what is there: there the model goes the right way by itself, and needs no more."""
WORTH = 2.0
"""How much nearer a step of full length has to bring a patch, by its gradient: one minus the cosine, which would be 2
for what is the opposite."""
SPREAD = (0.7548776662466927, 0.5698402909980532)
"""Steps of the R2 sequence (Roberts 2018), which fills the unit square evenly: shares of a patch."""


@dataclass(frozen=True)
class Guidance:
    """How the tiles of a canvas are guided."""

    tile_features: TileFeatures
    decode: Callable[[Tensor], Tensor]
    """Latents (k, C, h, w) to pixels (k, 3, H, W), about in [0, 1]; gradients work."""
    strength: float
    start: float
    end: float
    """Shares of the steps between which it is at work, in [0, 1]."""
    every: int
    """It is at work at every n-th step."""
    views: int
    """How many shifted views of a tile are taken at each of them."""
    distance: str

    def at_work(self, step: int, total: int) -> bool:
        """Whether a step (from 0) of so many is one of its own."""
        first = first_step(self.start, total)
        return is_between(step / max(total, 1), self.start, self.end) and (step - first) % self.every == 0

    def of(
        self,
        canvas: Canvas,
        tiles: Sequence[Rect],
        source: Callable[[Rect], Tensor],
        note: Callable[[str], None] = lambda line: None,
        named: Sequence[Tensor | None] = (),
    ) -> Guide:
        """For a batch of tiles.

        source: gives a tile's source as latents (C, h, w); note: tells the user; named: by tile (h, w) in [0, 1], how
        much of each latent cell a prompt by region names; None, or none at all: nothing.
        """
        return Guide(self, canvas, tiles, source, note, dict(zip(tiles, named)))


class Guide:
    """Guidance at work on one batch of tiles."""

    def __init__(
        self,
        guidance: Guidance,
        canvas: Canvas,
        tiles: Sequence[Rect],
        source: Callable[[Rect], Tensor],
        note: Callable[[str], None],
        named: Mapping[Rect, Tensor | None],
    ) -> None:
        self._guidance, self._canvas, self._tiles, self._source = guidance, canvas, tiles, source
        self._note, self._named = note, named
        self._directions: dict[Rect, Tensor] = {}
        """By tile, of the last step, (C, h, w)."""

    def __call__(self, x0: Tensor, step: int, total: int, chosen: Sequence[int] | None = None) -> Tensor | None:
        """The x0 (k, C, h, w) predicted at a step (from 0) of so many, moved; None where it is left as it is.

        chosen: the tiles of the batch that it is about, if not all. Runs under inference mode, too.
        """
        guidance = self._guidance
        if guidance.strength == 0 or not guidance.at_work(step, total):
            return None
        tiles = self._tiles if chosen is None else [self._tiles[number] for number in chosen]
        with torch.inference_mode(False), torch.enable_grad():
            # Convolutions on a CPU are a third faster so; on MPS their gradients may be wrong
            # (pytorch/pytorch#140902).
            layout = torch.channels_last if x0.device.type in ("cpu", "cuda") else torch.contiguous_format
            x = x0.detach().float().clone(memory_format=layout).requires_grad_()
            (gradient,) = torch.autograd.grad(self._distance(x, tiles, step), x)
        known = gradient.isfinite()
        if not known.all():
            if x.isfinite().all():
                self._note("guidance was left out where its decoder or encoder returned NaN")
            if not known.any():
                return None
        with torch.no_grad():
            before = x0.float()
            start = torch.stack([self._source(tile) for tile in tiles])
            length = LENGTH * (1 - step / max(total, 1)) * guidance.strength * _rms(before - start)
            length = length * torch.stack([self._share(tile, before) for tile in tiles])
            moved = before - self._step(gradient, tiles, length)
            return torch.where(moved.isfinite(), moved, before).to(x0.dtype)

    def _share(self, tile: Rect, x0: Tensor) -> Tensor:
        """(1, h, w): the share of the strength with which a tile is guided at each place of x0 (k, C, h, w)."""
        named, share = self._named.get(tile), x0.new_ones(1, *x0.shape[2:])
        return share if named is None else share - (1 - NAMED) * named.to(x0)

    def _step(self, gradient: Tensor, tiles: Sequence[Rect], length: Tensor) -> Tensor:
        """The step that x0 is moved by, (k, C, h, w); length (k, 1, h, w): its root mean square, where it is worth all
        of it.

        That is where, going by the gradient, it would bring a patch nearer by `WORTH`; where it would do less, it is
        shorter with the square of that. So what looks right already stays, and so does what the encoder is blind to.
        (Self-similarity has no such unit.)
        """
        tile_features, views = self._guidance.tile_features, self._guidance.views
        gradient = torch.where(gradient.isfinite(), gradient, 0.0) / (SCALE * views)
        factor = tiles[0].width / gradient.shape[3]
        current = _unit(_even(gradient, factor, tile_features.cell))
        direction = current.clone()
        for number, tile in enumerate(tiles):
            if tile in self._directions:
                direction[number] += MOMENTUM * self._directions[tile]
            self._directions[tile] = direction[number].clone()
        step = _unit(direction) * length
        if self._guidance.distance == SELF_SIMILARITY:
            return step
        patch = (tile_features.cell / factor) ** 2
        gain = patch * _around((gradient * current).sum(1, keepdim=True), factor, tile_features.cell)
        return step * (gain * length / WORTH).clamp(0, 1) ** 2

    def _distance(self, x: Tensor, tiles: Sequence[Rect], step: int) -> Tensor:
        """Summed over patches and tiles, which do not see each other: each has its own gradient."""
        tile_features, views = self._guidance.tile_features, self._guidance.views
        measure = _patches if self._guidance.distance == PATCHES else _self_similarity
        pixels, total = self._guidance.decode(x), 0.0
        for view in range(step * views, (step + 1) * views):
            shifted = tile_features.shifted(*(view * share % 1 for share in SPREAD))
            with torch.no_grad():
                targets = shifted.targets(tiles).clone()
                shares = [shifted.share(tile).to(targets) for tile in tiles]
            features = shifted.features(shifted.windows(self._canvas.crop, tiles, pixels), targets.shape[2:])
            total = total + sum(measure(*each) for each in zip(features, targets, shares))
        return SCALE * total


def _unit(values: Tensor) -> Tensor:
    """(k, C, h, w), each of a root mean square of one, or zero."""
    return values / _rms(values).clamp(min=torch.finfo(torch.float32).tiny)


def _rms(values: Tensor) -> Tensor:
    """(k, 1, 1, 1)."""
    return values.square().mean((1, 2, 3), keepdim=True).sqrt()


def _even(gradient: Tensor, factor: float, cell: float) -> Tensor:
    """The gradient (k, C, h, w) about as strong everywhere: weighed by its strength around, over a patch's breadth.

    factor: pixels per latent cell; cell: pixels per patch. What is weak compared to the rest stays weaker.
    """
    around = _around(gradient.square().mean(1, keepdim=True), factor, cell).sqrt()
    return gradient / (around + around.mean((2, 3), keepdim=True)).clamp(min=torch.finfo(torch.float32).tiny)


def _around(values: Tensor, factor: float, cell: float) -> Tensor:
    """The mean of values (k, 1, h, w) over about a patch."""
    width = 2 * max(1, round(cell / factor / 2)) + 1
    return F.avg_pool2d(values, width, 1, width // 2, count_include_pad=False)


def _patches(seen: Tensor, wanted: Tensor, share: Tensor) -> Tensor:
    """share (h, w): how much of each patch counts."""
    return ((1 - F.cosine_similarity(seen, wanted, dim=0)) * share).sum()


def _self_similarity(seen: Tensor, wanted: Tensor, share: Tensor) -> Tensor:
    chosen = share.flatten() > 0.5
    own, aim = (F.normalize(features.flatten(1)[:, chosen], dim=0) for features in (seen, wanted))
    return (own.T @ own - aim.T @ aim).square().mean() * own.shape[1]
