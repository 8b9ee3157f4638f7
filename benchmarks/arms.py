"""The ways of upscaling that are compared, and the controls that must fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from lib_dinotile.condition.adapter import Adapter
from lib_dinotile.condition.conditioner import Conditioner, Features
from lib_dinotile.condition.heads import Heads
from lib_dinotile.dino.encoder import PatchEncoder
from lib_dinotile.dino.field import FeatureField
from lib_dinotile.dino.head import RestorationHead
from lib_dinotile.engine.flow import Result, upscale
from lib_dinotile.engine.host import Host
from lib_dinotile.settings import CALIBRATED, Settings
from lib_dinotile.tiling.noise import NoiseField

TRAINED, FIRST, UNTRAINED, SHARP, ONE_HOT = "trained", "first", "untrained", "sharp", "onehot"
"""Adapters: each training; only the first of them; one without a training; and two that read the truth, the features of
the sharp picture or the class of each cell."""


NAMED, MISNAMED, WHOLE = "named", "misnamed", "whole"
"""Names of regions: each its commonest class; that of another region; for all the commonest class of the picture."""


@dataclass(frozen=True)
class Arm:
    """The parts that are at work, and their input."""

    guidance: bool = False
    guard: bool = False
    adapter: str = ""
    """One of those above, or none."""
    heads: str = CALIBRATED
    """Restoration heads for guidance and guard: CALIBRATED or TRAINED."""
    zero: bool = False
    """Guidance and guard look, and have nothing to say."""
    other: bool = False
    """The features are those of another image."""
    shuffled: bool = False
    """The patches are in disorder."""
    words: str = ""
    """How the regions are named: NAMED, MISNAMED, WHOLE, or not at all."""

    @property
    def control(self) -> bool:
        """Whether the model is shown, or told, something else than there is."""
        return self.other or self.words in (MISNAMED, WHOLE)


PLAIN, GUIDANCE, GUARD, BOTH = "plain", "guidance", "guard", "guidance+guard"
OTHER, SHUFFLED, ZERO, TRAINED_HEADS = "other_image", "shuffled", "strength_0", "trained_heads"
ADAPTER, ALL = "adapter", "all"
WORDS, WORDS_BOTH, WORDS_ADAPTER, WORDS_ALL = "words", "words+guid.+guard", "words+adapter", "words+all"
WORDS_SHUFFLED, WORDS_WHOLE = "words_shuffled", "words_one_region"
ADAPTER_OTHER, ADAPTER_SHUFFLED, ALL_OTHER = "adapter_other_image", "adapter_shuffled", "all_other_image"
ARMS = {
    PLAIN: Arm(),
    GUIDANCE: Arm(guidance=True),
    GUARD: Arm(guard=True),
    BOTH: Arm(guidance=True, guard=True),
    OTHER: Arm(guidance=True, guard=True, other=True),
    SHUFFLED: Arm(guidance=True, guard=True, shuffled=True),
    ZERO: Arm(zero=True),
    TRAINED_HEADS: Arm(guidance=True, guard=True, heads=TRAINED),
    WORDS: Arm(words=NAMED),
    WORDS_BOTH: Arm(words=NAMED, guidance=True, guard=True),
    WORDS_SHUFFLED: Arm(words=MISNAMED),
    WORDS_WHOLE: Arm(words=WHOLE),
    ADAPTER: Arm(adapter=TRAINED),
    WORDS_ADAPTER: Arm(words=NAMED, adapter=TRAINED),
    ALL: Arm(guidance=True, guard=True, adapter=TRAINED),
    WORDS_ALL: Arm(words=NAMED, guidance=True, guard=True, adapter=TRAINED),
    ADAPTER_OTHER: Arm(adapter=TRAINED, other=True),
    ALL_OTHER: Arm(guidance=True, guard=True, adapter=FIRST, other=True),  # all its tiles are painted again: slow
    ADAPTER_SHUFFLED: Arm(adapter=TRAINED, shuffled=True),
    UNTRAINED: Arm(adapter=UNTRAINED),
    SHARP: Arm(adapter=SHARP),
    ONE_HOT: Arm(adapter=ONE_HOT),
}
"""All at the default settings."""


@dataclass(frozen=True)
class Reader:
    """An adapter, and what it reads."""

    adapter: Adapter
    head: RestorationHead | None = None
    """The adapter reads the source's features through it."""
    fields: FeatureField | None = None
    """Given to the adapter in place of them."""


class Mistaken(Conditioner):
    """A conditioner that looks at what an arm says, which may be the wrong thing."""

    arm = Arm()
    other: Image.Image | None = None
    fields: FeatureField | None = None
    """Given to the adapter in place of features."""

    def features(self, source: Image.Image, size: tuple[int, int]) -> Features:
        features = super().features(self.other if self.arm.other and self.other else source, size)
        if self.fields:
            features = replace(features, adapter=self.fields)
        return shuffle(features) if self.arm.shuffled else features


def shuffle(features: Features) -> Features:
    """The same patches, in another order, the same for all layers."""
    fields = features.adapter, features.guidance, features.guard, features.shown
    adapter, guidance, guard, shown = map(_shuffled, fields)
    return Features(adapter, guidance, guard, shown)


def _shuffled(field: FeatureField | None) -> FeatureField | None:
    if field is None:
        return None
    flat = field.features.flatten(1)
    order = torch.from_numpy(np.random.default_rng(0).permutation(flat.shape[1]))
    return FeatureField(flat[:, order].reshape(field.features.shape), field.canvas)


@dataclass(frozen=True)
class Upscaler:
    """One host, one encoder; `settings` are those of adapter, guidance and guard together."""

    host: Host
    encoder: PatchEncoder
    settings: Settings
    heads: Mapping[str, Heads]
    """By the arms' names for them."""

    def upscale(
        self,
        arm: Arm,
        source: Image.Image,
        seed: int,
        other: Image.Image,
        reader: Reader | None = None,
        words: str = "",
    ) -> Result:
        """The source (RGB) upscaled in that way; other: the image whose features some controls take; words: of its
        regions."""
        guard = "report" if arm.zero else self.settings.guard if arm.guard else "off"
        guidance = self.settings.guidance if arm.guidance else 0.0
        settings = replace(self.settings, guidance=guidance, guard=guard, region_prompts=words)
        conditioner = None
        if arm != Arm():
            conditioner = Mistaken(
                settings,
                self.encoder,
                reader.adapter if reader else None,
                self.heads[arm.heads],
                self.host.guidance_decoder(settings.decoder),
                reader.head if reader else None,
            )
            conditioner.arm, conditioner.other, conditioner.fields = arm, other, reader.fields if reader else None
        return upscale(self.host, source, settings, NoiseField(seed, self.host.channels), conditioner)


Values = Sequence[float] | Sequence[Sequence[float]] | np.ndarray


def interval(values: Values, draws: int = 4000) -> tuple[float, float]:
    """Between what the mean of the values lies with 95 % confidence: bootstrap percentiles (Efron 1979).

    values: one for each image, or rows of them, one for each training of what is measured. Then trainings are drawn as
    well as images, and all the trainings drawn are seen on the same images (the pigeonhole bootstrap, Owen 2007).
    """
    return _percentiles(_drawn_means(values, draws))


def ratio_interval(values: Values, base: Values, draws: int = 4000) -> tuple[float, float]:
    """The same for the ratio of two means over the same images."""
    return _percentiles(_drawn_means(values, draws) / np.maximum(_drawn_means(base, draws), 1e-9))


def _drawn_means(values: Values, draws: int) -> np.ndarray:
    """(draws,); the same images are drawn for all values of as many images."""
    table, rng = np.atleast_2d(values), np.random.default_rng(0)
    trainings, images = table.shape
    image = rng.integers(images, size=(draws, images))
    training = rng.integers(trainings, size=(draws, trainings))
    return table[training[:, :, None], image[:, None]].mean((1, 2))


def _percentiles(drawn: np.ndarray) -> tuple[float, float]:
    return float(np.percentile(drawn, 2.5)), float(np.percentile(drawn, 97.5))
