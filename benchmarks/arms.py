"""The ways of upscaling that are compared, and the controls that must fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib_dinotile.condition.conditioner import Conditioner, Features
from lib_dinotile.dino.encoder import PatchEncoder
from lib_dinotile.dino.field import FeatureField
from lib_dinotile.dino.head import RestorationHead
from lib_dinotile.engine import Result, upscale
from lib_dinotile.hosts.base import Host
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.noise import NoiseField

PLAIN, GUIDANCE, GUARD, BOTH = "plain", "guidance", "guard", "guidance+guard"
OTHER, SHUFFLED, ZERO = "other_image", "shuffled", "strength_0"
ARMS = (PLAIN, GUIDANCE, GUARD, BOTH, OTHER, SHUFFLED, ZERO)
"""`other_image` and `shuffled` are guidance and guard with features that are not those of the place: of another image,
or with the patches in disorder. `strength_0` has guidance and guard at work, but nothing to say."""


class Mistaken(Conditioner):
    """A conditioner that looks at the wrong thing."""

    mistake: Callable[[Features], Features] = staticmethod(lambda features: features)
    instead: Image.Image | None = None

    def features(self, source: Image.Image, size: tuple[int, int]) -> Features:
        return self.mistake(super().features(self.instead or source, size))


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
class Arms:
    """One host, one encoder; `settings` are those of guidance and guard together."""

    host: Host
    encoder: PatchEncoder
    settings: Settings
    heads: Mapping[int, RestorationHead] | None = None

    def upscale(self, arm: str, source: Image.Image, seed: int, other: Image.Image | None = None) -> Result:
        """The source (RGB) upscaled in that way; other: the image whose features `other_image` takes."""
        noise = NoiseField(seed, self.host.channels)
        return upscale(self.host, source, self._settings(arm), noise, self._conditioner(arm, other))

    def _settings(self, arm: str) -> Settings:
        guided, guarded = arm not in (PLAIN, GUARD, ZERO), arm not in (PLAIN, GUIDANCE)
        return replace(
            self.settings,
            guidance=self.settings.guidance if guided else 0.0,
            guard="report" if arm == ZERO else self.settings.guard if guarded else "off",
        )

    def _conditioner(self, arm: str, other: Image.Image | None) -> Conditioner | None:
        if arm == PLAIN:
            return None
        decoder = self.host.guidance_decoder(self.settings.decoder)
        made = Mistaken(self._settings(arm), self.encoder, heads=self.heads, decoder=decoder)
        if arm == OTHER:
            made.instead = other
        if arm == SHUFFLED:
            made.mistake = shuffle
        return made


def interval(values: Sequence[float], draws: int = 4000) -> tuple[float, float]:
    """Between what the mean of the values lies with 95 % confidence: bootstrap percentiles (Efron 1979)."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), (draws, len(values)))
    return tuple(np.percentile(drawn.mean(1), (2.5, 97.5)).tolist())


def ratio_interval(values: Sequence[float], base: Sequence[float], draws: int = 4000) -> tuple[float, float]:
    """The same for the ratio of two means over the same images."""
    index = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    over = np.asarray(values)[index].mean(1) / np.maximum(np.asarray(base)[index].mean(1), 1e-9)
    return tuple(np.percentile(over, (2.5, 97.5)).tolist())


def to_pixels(image: Image.Image) -> Tensor:
    """RGB -> (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
