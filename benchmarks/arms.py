"""The ways of upscaling that are compared, and the controls that must fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib_dinotile.condition.adapter import Adapter
from lib_dinotile.condition.conditioner import Conditioner, Features
from lib_dinotile.condition.heads import Heads
from lib_dinotile.dino.encoder import PatchEncoder
from lib_dinotile.dino.field import FeatureField
from lib_dinotile.dino.head import RestorationHead
from lib_dinotile.engine.flow import Result, upscale
from lib_dinotile.engine.host import Host
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.noise import NoiseField

PLAIN, GUIDANCE, GUARD, BOTH = "plain", "guidance", "guard", "guidance+guard"
OTHER, SHUFFLED, ZERO = "other_image", "shuffled", "strength_0"
ADAPTER, ALL = "adapter", "all"
ADAPTER_OTHER, ADAPTER_SHUFFLED, ALL_OTHER = "adapter_other_image", "adapter_shuffled", "all_other_image"
ARMS = (PLAIN, GUIDANCE, GUARD, BOTH, OTHER, SHUFFLED, ZERO)
"""Those without an adapter."""


@dataclass(frozen=True)
class Way:
    """The parts that are at work in an arm, and their input."""

    adapter: bool = False
    guidance: bool = False
    guard: bool = False
    zero: bool = False
    """Guidance and guard look, and have nothing to say."""
    other: bool = False
    """The features are those of another image."""
    shuffled: bool = False
    """The patches are in disorder."""


WAYS = {
    PLAIN: Way(),
    GUIDANCE: Way(guidance=True),
    GUARD: Way(guard=True),
    BOTH: Way(guidance=True, guard=True),
    OTHER: Way(guidance=True, guard=True, other=True),
    SHUFFLED: Way(guidance=True, guard=True, shuffled=True),
    ZERO: Way(zero=True),
    ADAPTER: Way(adapter=True),
    ALL: Way(adapter=True, guidance=True, guard=True),
    ADAPTER_OTHER: Way(adapter=True, other=True),
    ADAPTER_SHUFFLED: Way(adapter=True, shuffled=True),
    ALL_OTHER: Way(adapter=True, guidance=True, guard=True, other=True),
}


Values = Sequence[float] | Sequence[Sequence[float]]


class Mistaken(Conditioner):
    """A conditioner that looks at the wrong thing."""

    mistake: Callable[[Features], Features] = staticmethod(lambda features: features)
    instead: Image.Image | None = None
    fields: FeatureField | None = None
    """Given to the adapter in place of features."""

    def features(self, source: Image.Image, size: tuple[int, int]) -> Features:
        features = super().features(self.instead or source, size)
        return self.mistake(replace(features, adapter=self.fields) if self.fields else features)


def shuffle(features: Features) -> Features:
    """The same patches, in another order, the same for all layers."""

    def of(field: FeatureField | None) -> FeatureField | None:
        if field is None:
            return None
        flat = field.features.flatten(1)
        order = torch.from_numpy(np.random.default_rng(0).permutation(flat.shape[1]))
        return FeatureField(flat[:, order].reshape(field.features.shape), field.canvas)

    return Features(*(of(field) for field in (features.adapter, features.guidance, features.guard, features.shown)))


@dataclass(frozen=True)
class Reader:
    """An adapter, and what it reads."""

    adapter: Adapter
    head: RestorationHead | None = None
    """The adapter reads the source's features through it."""
    fields: FeatureField | None = None
    """Given to the adapter in place of them."""


@dataclass(frozen=True)
class Arms:
    """One host, one encoder; `settings` are those of adapter, guidance and guard together."""

    host: Host
    encoder: PatchEncoder
    settings: Settings
    heads: Heads
    """Restoration heads for guidance and guard."""
    reader: Reader | None = None

    def upscale(self, arm: str, source: Image.Image, seed: int, other: Image.Image | None = None) -> Result:
        """The source (RGB) upscaled in that way; other: the image whose features some controls take."""
        way, noise = WAYS[arm], NoiseField(seed, self.host.channels)
        return upscale(self.host, source, self._settings(way), noise, self._conditioner(way, other))

    def _settings(self, way: Way) -> Settings:
        return replace(
            self.settings,
            guidance=self.settings.guidance if way.guidance else 0.0,
            guard="report" if way.zero else self.settings.guard if way.guard else "off",
        )

    def _conditioner(self, way: Way, other: Image.Image | None) -> Conditioner | None:
        if way == Way():
            return None
        reader = self.reader if way.adapter else None
        decoder = self.host.guidance_decoder(self.settings.decoder)
        made = Mistaken(
            self._settings(way),
            self.encoder,
            reader and reader.adapter,
            heads=self.heads,
            decoder=decoder,
            adapter_head=reader and reader.head,
        )
        if way.other:
            made.instead = other
        if way.shuffled:
            made.mistake = shuffle
        made.fields = reader and reader.fields
        return made


def interval(values: Values, draws: int = 4000) -> tuple[float, float]:
    """Between what the mean of the values lies with 95 % confidence: bootstrap percentiles (Efron 1979).

    values: one for each image, or rows of them, one for each training of what is measured. Then trainings are drawn as
    well as images, and all the trainings drawn are seen on the same images (the pigeonhole bootstrap, Owen 2007).
    """
    return tuple(np.percentile(_drawn_means(values, draws), (2.5, 97.5)).tolist())


def ratio_interval(values: Values, base: Values, draws: int = 4000) -> tuple[float, float]:
    """The same for the ratio of two means over the same images."""
    over = _drawn_means(values, draws) / np.maximum(_drawn_means(base, draws), 1e-9)
    return tuple(np.percentile(over, (2.5, 97.5)).tolist())


def _drawn_means(values: Values, draws: int) -> np.ndarray:
    """(draws,); the same images are drawn for all values of as many images."""
    table, rng = np.atleast_2d(values), np.random.default_rng(0)
    trainings, images = table.shape
    image = rng.integers(images, size=(draws, images))
    training = rng.integers(trainings, size=(draws, trainings))
    return table[training[:, :, None], image[:, None]].mean((1, 2))


def auc(good: Sequence[np.ndarray], bad: Sequence[np.ndarray]) -> float:
    """Area under the ROC curve: the probability that a value of `good` is above one of `bad`."""
    from sklearn.metrics import roc_auc_score

    good, bad = np.concatenate(good), np.concatenate(bad)
    return float(roc_auc_score(np.r_[np.ones(len(good)), np.zeros(len(bad))], np.r_[good, bad]))


def to_pixels(image: Image.Image) -> Tensor:
    """RGB -> (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
