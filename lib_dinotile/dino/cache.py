"""Features of images seen before."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from lib_dinotile.dino.encoder import Facet, PatchEncoder
from lib_dinotile.dino.field import FeatureField, feature_fields


class FeatureCache:
    """Feature fields by image, encoder and how it looks, the least recently used given up first. Thread-safe.

    Features are kept in main memory, and given out on the encoder's device. An encoder is known by its name, its
    weights' fingerprint, dtype and kind of device, so that loading it again does not make it another.
    """

    def __init__(self, limit: int = 256 << 20) -> None:
        """`limit`: bytes of features to keep at most; what is larger by itself is not kept."""
        self.limit = limit
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
        self._size = 0

    def field(
        self,
        encoder: PatchEncoder,
        source: Tensor,
        canvas: tuple[int, int],
        patches: int = 64,
        windows: int = 1,
        layer: int = -1,
    ) -> FeatureField:
        """`feature_field` of the same arguments, from memory if it was made before, for whatever canvas."""
        return self.fields(encoder, source, canvas, patches, windows, [(layer, "tokens")])[0]

    def fields(
        self,
        encoder: PatchEncoder,
        source: Tensor,
        canvas: tuple[int, int],
        patches: int,
        windows: int,
        wanted: Sequence[tuple[int, Facet]],
    ) -> list[FeatureField]:
        """`feature_fields` of the same arguments, from memory as far as they were made before, for whatever canvas.

        The features may be the very tensors that are kept: not to be written into.
        """
        look = _digest(source), (encoder.id, encoder.fingerprint, encoder.dtype, encoder.device.type), patches, windows
        found: dict[tuple[int, Facet], FeatureField] = {}
        for each in wanted:
            with self._lock:
                features = self._kept.get((look, each))
                if features is not None:
                    self._kept.move_to_end((look, each))
            if features is not None:
                # A copy made under inference mode could not take part in a gradient.
                with torch.inference_mode(False):
                    found[each] = FeatureField(features.to(encoder.device), canvas)
        missing = [each for each in dict.fromkeys(wanted) if each not in found]
        if missing:
            made = feature_fields(encoder, source, canvas, patches, windows, missing)
            with torch.inference_mode(False):
                for each, field in zip(missing, made):
                    found[each] = field
                    self._keep((look, each), field.features.cpu())
        return [found[each] for each in wanted]

    def _keep(self, key: tuple[object, ...], features: Tensor) -> None:
        size = features.nbytes
        with self._lock:
            if size > self.limit or key in self._kept:
                return
            self._kept[key] = features
            self._size += size
            while self._size > self.limit:
                self._size -= self._kept.popitem(last=False)[1].nbytes

    @property
    def size(self) -> int:
        """Bytes of features kept now."""
        return self._size

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Give up everything that is kept."""
        with self._lock:
            self._kept.clear()
            self._size = 0


def _digest(image: Tensor) -> tuple[object, ...]:
    """An image's key: the SHA-256 of its values, and its shape."""
    return hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest(), tuple(image.shape)
