"""Features of images seen before."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor

from lib_dinotile.dino.encoder import PatchEncoder
from lib_dinotile.dino.field import FeatureField, feature_field


class FeatureCache:
    """Feature fields by image, encoder and how it looks, the least recently used given up first. Thread-safe.

    Features are kept in main memory, and given out on the encoder's device. An encoder is known by its name, its
    weights' fingerprint and dtype, so that loading it again does not make it another.
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
        facet: Literal["tokens", "keys"] = "tokens",
    ) -> FeatureField:
        """`feature_field` of the same arguments, from memory if it was made before, for whatever canvas.

        The features may be the very tensor that is kept: not to be written into.
        """
        encoder_key = (encoder.id, encoder.fingerprint, encoder.dtype)
        key = (_digest(source), encoder_key, patches, windows, layer, facet)
        with self._lock:
            features = self._kept.get(key)
            if features is not None:
                self._kept.move_to_end(key)
        if features is not None:
            # A copy made under inference mode could not take part in a gradient.
            with torch.inference_mode(False):
                return FeatureField(features.to(encoder.device), canvas)
        field = feature_field(encoder, source, canvas, patches, windows, layer, facet)
        with torch.inference_mode(False):
            self._keep(key, field.features.cpu())
        return field

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
    """What tells an image from any other: its values' SHA-256, and its shape."""
    values = image.detach().float().cpu().contiguous()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest(), tuple(image.shape)
