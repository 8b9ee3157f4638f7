"""Calibration: restoration heads for any encoder, in closed form, from some sharp pictures and in seconds.

Ridge regression: from the 3x3 neighbourhood of each token of a degraded picture to what is missing to the token of the
sharp one. Pictures are seen one after the other; only the normal equations are kept. The penalty is chosen by
cross-validation over the pictures. An infinite one is the identity, and it is among the choices: on pictures that it
was not fitted to, a calibrated head is never farther from the sharp picture's tokens than those of the degraded one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lib_dinotile.dino.degradation import degrade
from lib_dinotile.dino.encoder import Facet, PatchEncoder, without_autocast
from lib_dinotile.dino.field import FeatureField, feature_fields, patch_grid
from lib_dinotile.dino.head import Floor, RestorationHead
from lib_dinotile.dino.tile_features import TileFeatures
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.plan import TilePlan

SCALES = (1.0, 2.0, 4.0)
"""There is one file of heads for each: how much finer the encoder would see the sharp picture than the source."""
SEVERITIES = (0.15, 0.5)
"""Every picture is degraded mildly and strongly, as `degrade` has it. The floor is that of the first."""
LAYERS = (-1, -2)
"""Those that guidance and guard look at by default."""
PATCHES = 36
"""Along the longer side of what is seen of a picture, at most: about what DINOv2 was trained with."""
FOLDS = 3
PENALTIES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
"""Of the ridge, as shares of the mean of the normal equations' diagonal."""


class NormalEquations:
    """Sums over tokens from which a ridge regression is solved, float64 and on the CPU; they add up.

    x: neighbourhoods (9 D); r: what is missing to the sharp picture's token (D).
    """

    def __init__(self, features: int) -> None:
        inputs = 9 * features
        self.count, self.rr = 0, 0.0
        self.x, self.r = (torch.zeros(size, dtype=torch.float64) for size in (inputs, features))
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64)
        """Only its upper triangle: the lower one mirrors that."""
        self.xr = torch.zeros(inputs, features, dtype=torch.float64)

    def add(self, source: Tensor, sharp: Tensor) -> None:
        """Tokens (D, h, w) of a degraded picture and of the sharp one."""
        x = F.unfold(F.pad(source[None], (1, 1, 1, 1), mode="replicate"), 3)[0]
        r = (sharp - source).flatten(1)
        self.count += x.shape[1]
        # A picture's products in float32, which GPUs are fast at; only their sums need more.
        for total, part in ((self.x, x.sum(1)), (self.r, r.sum(1)), (self.xr, x @ r.T)):
            total += part.cpu()
        for row in range(0, len(x), len(r)):
            rows = slice(row, row + len(r))
            self.xx[rows, row:] += (x[rows] @ x[row:].T).cpu()
        self.rr += float(r.square().sum())

    def merge(self, other: NormalEquations, sign: int = 1) -> NormalEquations:
        """With the sums of others, or, sign -1, without; in place."""
        self.count += sign * other.count
        self.rr += sign * other.rr
        for mine, theirs in zip((self.x, self.r, self.xx, self.xr), (other.x, other.r, other.xx, other.xr)):
            mine.add_(theirs, alpha=sign)
        return self

    def solve(self, penalty: float) -> tuple[Tensor, Tensor]:
        """(weights (9 D, D), bias (D,)); only the weights are penalised. An infinite penalty makes all of them zero."""
        if math.isinf(penalty):
            return torch.zeros_like(self.xr), torch.zeros_like(self.r)
        x, r = self.x / self.count, self.r / self.count
        covariance = self.xx / self.count - x[:, None] * x
        diagonal = covariance.diagonal()
        diagonal += penalty * diagonal.mean() + torch.finfo(torch.float64).tiny
        factor = torch.linalg.cholesky(covariance, upper=True)
        weights = torch.cholesky_solve(self.xr / self.count - x[:, None] * r, factor, upper=True)
        return weights, r - x @ weights

    def error(self, weights: Tensor, bias: Tensor) -> float:
        """Mean squared error, summed over the features, of a solution on the tokens that were added."""
        total = self.rr + 2 * ((self.xx.triu(1) @ weights) * weights).sum() - 2 * (weights * self.xr).sum()
        total += (self.xx.diagonal()[:, None] * weights.square()).sum()
        total += 2 * (self.x @ weights) @ bias - 2 * bias @ self.r + self.count * bias @ bias
        return float(total) / self.count


@dataclass
class Calibration:
    """Heads by layer, and how they were made."""

    heads: dict[int, RestorationHead]
    made: dict[str, str] = field(default_factory=dict)
    """For the file's metadata: figures on pictures that a head was not fitted to."""


@dataclass(frozen=True)
class Tokens:
    """Of a degraded picture and of the sharp one, (D, h, w) each."""

    source: Tensor
    sharp: Tensor
    pictures: tuple[Image.Image, Image.Image]
    """The two."""


@dataclass(frozen=True)
class Pairs:
    """Degraded and sharp pictures as an encoder sees them."""

    encoder: PatchEncoder
    pictures: Sequence[Image.Image]
    """Sharp ones, RGB."""
    scale: float
    severities: Sequence[float]
    layers: Sequence[int]

    def tokens(self, number: int) -> list[list[Tokens]]:
        """Of a picture for each severity and layer. It is shrunk until it is not seen enlarged, and degraded in the
        same way each time."""
        picture, patch = self.pictures[number], self.encoder.patch
        patches = max(1, min(PATCHES, max(picture.size) // patch))
        rows, columns = patch_grid(picture.width, picture.height, patches)
        sharp = picture.resize((columns * patch, rows * patch), Image.Resampling.LANCZOS)
        wanted = self._seen(sharp, sharp.size, patches)
        found = []
        for severity in self.severities:
            rng = np.random.default_rng((number, round(1000 * severity)))
            source = degrade(rng, sharp, self.scale, severity)
            seen = zip(self._seen(source, sharp.size, patches), wanted)
            found.append([Tokens(*each, (source, sharp)) for each in seen])
        return found

    def _seen(self, image: Image.Image, size: tuple[int, int], patches: int) -> list[Tensor]:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255).to(self.encoder.device)
        wanted: list[tuple[int, Facet]] = [(layer, "tokens") for layer in self.layers]
        return [field.features for field in feature_fields(self.encoder, pixels, size, patches, 1, wanted)]


def calibrate(
    encoder: PatchEncoder,
    pictures: Sequence[Image.Image],
    scale: float,
    layers: Sequence[int] = LAYERS,
    progress: Callable[[float], None] = lambda share: None,
    severities: Sequence[float] = SEVERITIES,
) -> Calibration:
    """The heads of an encoder for some layers, from at least `FOLDS` sharp RGB pictures.

    scale: how many times finer the encoder sees the sharp picture than the degraded one, at least 1; progress: called
    with the share that is done, in [0, 1]; what it raises ends the calibration.
    """
    if len(pictures) < FOLDS:
        raise ValueError(f"{len(pictures)} pictures are too few to calibrate from, give at least {FOLDS}")
    pairs = Pairs(encoder, pictures, scale, severities, layers)
    held_out = range(0, len(pictures), FOLDS)
    steps = itertools.count()

    def step() -> None:
        progress(next(steps) / (len(pictures) + len(layers) + len(held_out)))

    with torch.inference_mode(False), torch.no_grad(), without_autocast(encoder.device):
        sums = [{layer: NormalEquations(encoder.width) for layer in layers} for _ in range(FOLDS)]
        for number in range(len(pictures)):
            step()
            for by_layer in pairs.tokens(number):
                for layer, each in zip(layers, by_layer):
                    sums[number % FOLDS][layer].add(each.source, each.sharp)
        made = {"pictures": str(len(pictures)), "severities": ", ".join(f"{severity:g}" for severity in severities)}
        heads, tested = {}, {}
        for layer in layers:
            step()
            penalty, heads[layer], tested[layer] = _fit([fold.pop(layer) for fold in sums], encoder.device)
            made[f"penalty {layer}"] = f"{penalty:g}"
        found: dict[str, dict[int, list[Tensor]]] = {
            kind: {layer: [] for layer in layers} for kind in ("raw", "restored", "true")
        }
        for number in held_out:
            step()
            for severity, by_layer in enumerate(pairs.tokens(number)):
                mended = {layer: tested[layer](tokens.source[None])[0] for layer, tokens in zip(layers, by_layer)}
                for layer, tokens in zip(layers, by_layer):
                    found["raw"][layer].append(_distances(tokens.source, tokens.sharp))
                    found["restored"][layer].append(_distances(mended[layer], tokens.sharp))
                if severity == 0:
                    for layer, distances in true_distances(encoder, mended, by_layer[0].pictures).items():
                        found["true"][layer].append(distances)
        for layer, head in heads.items():
            before, after = (float(torch.cat(found[kind][layer]).mean()) for kind in ("raw", "restored"))
            made[f"held out, raw {layer}"], made[f"held out, restored {layer}"] = f"{before:.5f}", f"{after:.5f}"
            if after > before:
                made[f"penalty {layer}"], made[f"held out, restored {layer}"] = "inf", f"{before:.5f}"
                head.outer.weight.zero_(), head.outer.bias.zero_()
                mild = replace(pairs, severities=severities[:1], layers=[layer])
                seen = itertools.chain.from_iterable(itertools.chain(*mild.tokens(number)) for number in held_out)
                found["true"][layer] = [
                    true_distances(encoder, {layer: each.source}, each.pictures)[layer] for each in seen
                ]
            floor = Floor.of(torch.cat(found["true"][layer]))
            head.floor.copy_(torch.tensor([floor.median, floor.spread]))
        progress(1.0)
    return Calibration(heads, made)


def true_distances(
    encoder: PatchEncoder, wanted: Mapping[int, Tensor], pictures: tuple[Image.Image, Image.Image], tile: int = 0
) -> dict[int, Tensor]:
    """One minus the cosine of each patch, (n,), on the CPU, by layer: how far a true result is from what is wanted, as
    the guard sees it: tile by tile in the enlarged source.

    wanted: tokens (D, h, w) by layer; pictures: the source and the sharp one (RGB); tile: its side in pixels, 0 for
    half of `PATCHES`.
    """
    source, sharp = pictures
    plan = TilePlan(sharp.width, sharp.height, tile or PATCHES // 2 * encoder.patch, 0, factor=1)
    blurred, canvas = Canvas(source.resize(sharp.size, Image.Resampling.LANCZOS), plan), Canvas(sharp, plan)
    by_layer = {
        layer: TileFeatures(encoder, FeatureField(tokens, sharp.size), plan.padded) for layer, tokens in wanted.items()
    }
    found: dict[int, list[Tensor]] = {layer: [] for layer in wanted}
    for area in plan.tiles:
        tile_features = next(iter(by_layer.values()))
        windows = tile_features.windows(blurred.crop, [area], canvas.source(area)[None].to(encoder.device))
        patches = tile_features.resized(windows, tile_features.grid(tile_features.window(area)))
        seen = encoder.several(patches, [(layer, "tokens") for layer in by_layer])
        for (layer, tile_features), tokens in zip(by_layer.items(), seen):
            found[layer].append(_distances(tokens[0], tile_features.targets([area])[0], tile_features.own(area)))
    return {layer: torch.cat(distances) for layer, distances in found.items()}


def _distances(seen: Tensor, sharp: Tensor, among: tuple[slice, slice] = (slice(None), slice(None))) -> Tensor:
    """One minus the cosine of each patch, or of those in some rows and columns, (n,), on the CPU."""
    return (1 - F.cosine_similarity(seen, sharp, dim=0))[among].flatten().cpu()


def _fit(folds: list[NormalEquations], device: torch.device) -> tuple[float, RestorationHead, RestorationHead]:
    """(penalty, head fitted to all folds, head fitted to all but the first)."""
    total = NormalEquations(len(folds[0].r))
    for fold in folds:
        total.merge(fold)

    def errors(penalty: float) -> float:
        found = 0.0
        for fold in folds:
            total.merge(fold, -1)
            found += fold.count * fold.error(*total.solve(penalty))
            total.merge(fold)
        return found / total.count

    penalty = _lowest(errors, PENALTIES)
    if not errors(penalty) < errors(math.inf):
        penalty = math.inf
    whole = _head(*total.solve(penalty), device)
    return penalty, whole, _head(*total.merge(folds[0], -1).solve(penalty), device)


def _lowest(value: Callable[[float], float], among: Sequence[float]) -> float:
    """Which of them has the lowest value, going downhill from the middle; each is tried once at most."""
    found: dict[int, float] = {}

    def at(place: int) -> float:
        if place not in found:
            found[place] = value(among[place]) if 0 <= place < len(among) else math.inf
        return found[place]

    place = len(among) // 2
    while min(at(place - 1), at(place + 1)) < at(place):
        place += -1 if at(place - 1) < at(place + 1) else 1
    return among[place]


def _head(weights: Tensor, bias: Tensor, device: torch.device) -> RestorationHead:
    features = len(bias)
    head = RestorationHead(features, 0)
    head.outer.weight.copy_(weights.T.reshape(features, features, 3, 3))
    head.outer.bias.copy_(bias)
    return head.to(device).eval().requires_grad_(False)
