"""The restoration heads of the world's encoder, and the probe that reads classes from its features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.world.scenes import NO_LABEL, PATCH, SIDE, TRAIN_ATLAS, Scene, scene
from lib_dinotile.condition.look import CONTEXT, Look
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.dino.field import FeatureField, feature_field
from lib_dinotile.dino.head import RestorationHead, save_heads
from lib_dinotile.tiling.plan import Rect

LAYERS = (-1, -2, -3)
HIDDEN = 128

TILE = 64
"""Side of what is judged at once, in px."""
TILES = [Rect(x, y, TILE, TILE) for y in range(0, SIDE, TILE) for x in range(0, SIDE, TILE)]


def source_features(encoder: PatchEncoder, made: Scene, layer: int = -1) -> Tensor:
    """(D, 16, 16) of the source as dinotile sees it: the whole at once, one patch for each of the canvas."""
    return feature_field(encoder, made.source, (SIDE, SIDE), patches=SIDE // PATCH, layer=layer).features


def in_windows(
    encoder: PatchEncoder, result: Tensor, blurred: Tensor, layer: int = -1, context: int = CONTEXT
) -> Tensor:
    """(D, 16, 16) of a result (3, SIDE, SIDE): each tile as the guard sees it, in a window of the blurred canvas.

    context: patches around a tile, at least.
    """
    field = FeatureField(result.new_zeros(1, SIDE // PATCH, SIDE // PATCH), (SIDE, SIDE))
    look = Look(encoder, field, (SIDE, SIDE), layer, context=context)
    pixels = torch.stack([result[(slice(None), *tile.slices)] for tile in TILES])
    windows = look.windows(lambda area: blurred[(slice(None), *area.slices)], TILES, pixels)
    features = result.new_empty(encoder.width, SIDE // PATCH, SIDE // PATCH)
    for tile, seen in zip(TILES, look.features(windows, look.grid(look.window(TILES[0])))):
        features[(slice(None), *tile.shrink(PATCH).slices)] = seen[(slice(None), *look.own(tile))]
    return features


@torch.no_grad()
def floor(encoder: PatchEncoder, head: RestorationHead, layer: int, scenes: int, seed: int) -> Tensor:
    """(2,): median and robust deviation of how far true patches are from what the head makes of the source."""
    distances = []
    for i in range(scenes):
        made = scene(np.random.default_rng((seed, i, 13)), TRAIN_ATLAS)
        wanted = head(source_features(encoder, made, layer)[None])[0]
        distances.append(1 - F.cosine_similarity(in_windows(encoder, made.sharp, made.blurred, layer), wanted, dim=0))
    distance = torch.stack(distances)
    median = distance.median()
    return torch.stack([median, 1.4826 * (distance - median).abs().median()])


def _pairs(encoder: PatchEncoder, scenes: int, seed: int) -> dict[int, tuple[Tensor, Tensor]]:
    """For each layer the features of sources and of the sharp pictures, (scenes, D, 16, 16) each, in half precision."""
    pairs: dict[int, tuple[list[Tensor], list[Tensor]]] = {layer: ([], []) for layer in LAYERS}
    for i in range(scenes):
        made = scene(np.random.default_rng((seed, i, 9)), TRAIN_ATLAS)
        for layer, (degraded, sharp) in pairs.items():
            degraded.append(source_features(encoder, made, layer).half())
            sharp.append(encoder(made.sharp[None], layer)[0].half())
    return {layer: (torch.stack(degraded), torch.stack(sharp)) for layer, (degraded, sharp) in pairs.items()}


def train_heads(export: Path, scenes: int = 400, steps: int = 400, batch: int = 16, seed: int = 10) -> None:
    """Regress the sharp picture's tokens from the source's, for each of `LAYERS`; no labels are used."""
    encoder = load_encoder(str(export / "encoder"))
    heads = {}
    for layer, (degraded, sharp) in _pairs(encoder, scenes, seed).items():
        torch.manual_seed(seed)
        head = RestorationHead(encoder.width, HIDDEN)
        optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=1e-2)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
        for _ in range(steps):
            chosen = torch.randint(scenes, (batch,))
            guess, target = head(degraded[chosen].float()), sharp[chosen].float()
            loss = F.mse_loss(guess, target) + 1 - F.cosine_similarity(guess, target, dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
        head.floor.copy_(floor(encoder, head, layer, 30, seed))
        heads[layer] = head
        print(f"layer {layer}: loss {loss.item():.3f}, floor {head.floor.tolist()}")
    save_heads(heads, export / "heads.safetensors", encoder.id, scenes=str(scenes), steps=str(steps))


def train_probe(export: Path, scenes: int = 150, seed: int = 11) -> None:
    """A linear probe (logistic regression) that names a patch's class from the last layer's tokens of the source."""
    from sklearn.linear_model import LogisticRegression

    encoder = load_encoder(str(export / "encoder"))
    tokens, labels = [], []
    for i in range(scenes):
        made = scene(np.random.default_rng((seed, i, 12)), TRAIN_ATLAS)
        label = made.labels.flatten()
        tokens.append(source_features(encoder, made).flatten(1).T[label != NO_LABEL].numpy())
        labels.append(label[label != NO_LABEL])
    probe = LogisticRegression(max_iter=300, C=0.1).fit(np.concatenate(tokens), np.concatenate(labels))
    arrays = {"weight": probe.coef_, "bias": probe.intercept_}
    tensors = {name: torch.from_numpy(array).half().contiguous() for name, array in arrays.items()}
    save_file(tensors, export / "probe.safetensors")


def probed(features: Tensor, weights: Path) -> np.ndarray:
    """Features of the last layer (D, h, w) -> the class that the probe names, (h, w) int64."""
    probe = load_file(weights / "probe.safetensors")
    return (
        torch.einsum("kd,dhw->khw", probe["weight"].float(), features)
        .add_(probe["bias"].float()[:, None, None])
        .argmax(0)
        .numpy()
    )
