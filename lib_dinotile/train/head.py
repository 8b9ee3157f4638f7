"""Train restoration heads: from the encoder's tokens of a degraded picture to those of the sharp one; no labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_dinotile.condition.conditioner import to_tensor
from lib_dinotile.dino.calibration import true_distances
from lib_dinotile.dino.encoder import Facet, PatchEncoder
from lib_dinotile.dino.field import feature_fields
from lib_dinotile.dino.head import Floor, RestorationHead
from lib_dinotile.train.loop import Schedule, fit
from lib_dinotile.train.pictures import Picture, Prepared

LAYERS = (-1, -2, -3)
"""Those that adapter, guard and guidance look at by default."""
SQUARE = 16
"""Patches along what is trained on at once."""
MEASURED = 64
"""Held-out squares that a report measures on."""


def prepared_pairs(
    encoder: PatchEncoder, patches: int, layers: Sequence[int] = LAYERS
) -> Callable[[Picture], dict[str, Tensor]]:
    """Tokens of a picture's source and of the picture itself, (D, gh, gw) each: `source.-1`, `sharp.-1` ..."""

    @torch.no_grad()
    def compute(picture: Picture) -> dict[str, Tensor]:
        size = picture.sharp.size
        wanted: list[tuple[int, Facet]] = [(layer, "tokens") for layer in layers]
        return {
            f"{name}.{layer}": field.features
            for name, image in (("source", picture.source), ("sharp", picture.sharp))
            for layer, field in zip(
                layers, feature_fields(encoder, to_tensor(image).to(encoder.device), size, patches, 1, wanted)
            )
        }

    return compute


class Squares(torch.utils.data.Dataset):
    """Endless random squares of `SQUARE` patches; item i is the same in every run. Narrow pictures are continued."""

    def __init__(self, prepared: Prepared, seed: int) -> None:
        self._prepared, self._seed = prepared, seed

    def __len__(self) -> int:
        return 1_000_000_000

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        turn, place = divmod(index, len(self._prepared))
        order = np.random.default_rng((self._seed, turn, 3)).permutation(len(self._prepared))
        whole = self._prepared[int(order[place])]
        rows, columns = next(iter(whole.values())).shape[1:]
        lack = (0, max(0, SQUARE - columns), 0, max(0, SQUARE - rows))
        rng = np.random.default_rng((self._seed, index, 4))
        y, x = (int(rng.integers(max(1, side - SQUARE + 1))) for side in (rows, columns))
        return {
            name: F.pad(tokens.float(), lack, mode="replicate")[:, y : y + SQUARE, x : x + SQUARE]
            for name, tokens in whole.items()
        }


class HeadTraining(nn.Module):
    """The heads of some layers as one model."""

    def __init__(self, features: int, hidden: int, layers: Sequence[int] = LAYERS) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({str(layer): RestorationHead(features, hidden) for layer in layers})

    @property
    def by_layer(self) -> dict[int, RestorationHead]:
        return {int(layer): head for layer, head in self.heads.items()}

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {layer: head(batch[f"source.{layer}"]) for layer, head in self.heads.items()}


def head_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Squared error, and one minus the cosine: what guidance and guard measure; the mean over the layers."""
    total, figures = torch.zeros((), device=next(iter(batch.values())).device), {}
    guesses = model(batch)
    for layer, guess in guesses.items():
        guess, target = guess.float(), batch[f"sharp.{layer}"]
        distance = 1 - F.cosine_similarity(guess, target, dim=1).mean()
        total = total + (F.mse_loss(guess, target) + distance) / len(guesses)
        figures[f"distance {layer}"] = distance.item()
    return total, figures


@torch.no_grad()
def compare(model: HeadTraining, squares: Squares, device: torch.device, count: int = MEASURED) -> dict[str, float]:
    """Distance (one minus cosine) to the sharp picture's tokens, of the degraded picture's own and through the head."""
    found: dict[str, float] = {}
    for number in range(count):
        batch = {name: tokens[None].to(device) for name, tokens in squares[number].items()}
        guesses = model(batch)
        for layer, guess in guesses.items():
            for name, tokens in ((f"raw {layer}", batch[f"source.{layer}"]), (f"restored {layer}", guess)):
                distance = 1 - F.cosine_similarity(tokens.float(), batch[f"sharp.{layer}"], dim=1).mean().item()
                found[name] = found.get(name, 0.0) + distance / count
    return found


@torch.no_grad()
def measure_floor(
    encoder: PatchEncoder, heads: Mapping[int, RestorationHead], pictures: Prepared, patches: int, tile: int
) -> None:
    """Sets the heads' `floor`: how far true patches are from what the head makes of the source, as the guard sees them
    in the blurred canvas, on pictures that it was not trained on."""
    distances: dict[int, list[Tensor]] = {layer: [] for layer in heads}
    for number in range(len(pictures)):
        picture = pictures.picture(number)
        source = to_tensor(picture.source).to(encoder.device)
        wanted: list[tuple[int, Facet]] = [(layer, "tokens") for layer in heads]
        fields = feature_fields(encoder, source, picture.sharp.size, patches, 1, wanted)
        restored = {layer: head(field.features[None])[0] for (layer, head), field in zip(heads.items(), fields)}
        for layer, found in true_distances(encoder, restored, (picture.source, picture.sharp), tile).items():
            distances[layer].append(found)
    for layer, head in heads.items():
        floor = Floor.of(torch.cat(distances[layer]))
        head.floor.copy_(torch.tensor([floor.median, floor.spread]))


def train_heads(
    encoder: PatchEncoder,
    hidden: int,
    schedule: Schedule,
    pictures: tuple[Prepared, Prepared],
    patches: int,
    tile: int,
    on_save: Callable[[Mapping[int, RestorationHead], dict[str, str]], None],
    layers: Sequence[int] = LAYERS,
) -> None:
    """Train on the first of `pictures`, measure on the second; calls `on_save(heads by layer, how they were made)`, the
    heads with averaged weights, at every checkpoint."""
    trained_on, held_out = (Squares(prepared, schedule.seed + number) for number, prepared in enumerate(pictures))
    measured: dict[str, float] = {}

    def report(averaged: nn.Module, step: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        measured.update(compare(averaged, held_out, encoder.device))
        return measured, {}

    def save(averaged: nn.Module, step: int) -> None:
        measure_floor(encoder, averaged.by_layer, pictures[1], patches, tile)
        figures = {f"held out, {name}": f"{value:.5f}" for name, value in measured.items()}
        on_save(averaged.by_layer, {"steps": str(step), **figures})

    fit(HeadTraining(encoder.width, hidden, layers), trained_on, head_loss, schedule, save, report)
