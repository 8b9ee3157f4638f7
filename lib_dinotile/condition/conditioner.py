"""From names in the settings to a condition for every batch of tiles."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lib_dinotile import DinotileError
from lib_dinotile.condition.adapter import Adapter, AdapterCondition
from lib_dinotile.condition.adapter_file import check_encoder, check_fit, load_adapter, read_config
from lib_dinotile.dino.cache import FeatureCache
from lib_dinotile.dino.encoder import KNOWN, PatchEncoder, installed, load_encoder
from lib_dinotile.dino.field import FeatureField
from lib_dinotile.hosts.base import Host
from lib_dinotile.settings import AUTOMATIC, NONE, Settings
from lib_dinotile.tiling.plan import Rect

MINI = Path(__file__).parents[1] / "mini"
"""The built-in model's folder."""


def installed_adapters(folder: Path) -> dict[str, Path]:
    """Names and files of the adapters in a folder and below it."""
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.safetensors"))}


_features = FeatureCache()


@functools.lru_cache(maxsize=1)
def _adapter(path: Path, modified: float, device: torch.device, dtype: torch.dtype) -> Adapter:
    return load_adapter(path, device, dtype)


@functools.lru_cache(maxsize=1)
def _encoder(name: str, folder: Path | None, modified: float, device: torch.device) -> PatchEncoder:
    return load_encoder(name, folder, device=device)


class Conditioner:
    """Looks at a source once and gives every batch of tiles its condition."""

    def __init__(self, adapter: Adapter, encoder: PatchEncoder, settings: Settings) -> None:
        self._adapter, self._encoder, self._settings = adapter, encoder, settings

    @classmethod
    def load(
        cls,
        settings: Settings,
        host: Host,
        adapters: Mapping[str, Path],
        encoders: Path | None = None,
        trusted: bool = True,
    ) -> Conditioner | None:
        """What `settings` ask for, or None if they ask for no adapter.

        adapters: names and files to choose from; encoders: folder of installed encoders. Unless `trusted`, an encoder
        is one of those or a published one, never a path. DinotileError, before a tile is painted, if the adapter is
        not there or does not fit the host's checkpoint or the encoder.
        """
        name = settings.adapter
        if name == NONE:
            _adapter.cache_clear()
            _encoder.cache_clear()
            return None
        if name not in adapters:
            listed = ", ".join((NONE, *adapters))
            raise DinotileError(f"adapter: {name!r} is not installed, give one of {listed}")
        config = read_config(adapters[name])
        if host.shape is None:
            raise DinotileError(f"adapter {name!r}: this checkpoint's UNet takes no residuals; choose adapter {NONE}")
        check_fit(config, name, host.base, host.shape)
        wanted = config.encoder if settings.encoder == AUTOMATIC else settings.encoder
        choices = [*installed(encoders), *KNOWN]
        if not trusted and wanted not in choices:
            listed = ", ".join([AUTOMATIC, *choices])
            raise DinotileError(f"encoder: {wanted!r} is not installed in {encoders}, give one of {listed}")
        files = encoders.glob("*/model.safetensors") if encoders else ()
        modified = max((file.stat().st_mtime for file in files), default=0.0)
        encoder = _encoder(wanted, encoders, modified, torch.device(host.device))
        check_encoder(config, name, encoder.id, encoder.width)
        modified = adapters[name].stat().st_mtime
        return cls(_adapter(adapters[name], modified, torch.device(host.device), host.dtype), encoder, settings)

    def features(self, source: Image.Image, size: tuple[int, int]) -> FeatureField:
        """The source's (RGB) features as a field over a canvas of (width, height)."""
        pixels = torch.from_numpy(np.array(source)).permute(2, 0, 1).float() / 255
        return _features.field(
            self._encoder,
            pixels,
            size,
            patches=self._settings.patches,
            windows=self._settings.windows,
            layer=self._adapter.config.layer,
        )

    def condition(self, features: FeatureField, tiles: Sequence[Rect], latent: tuple[int, int]) -> AdapterCondition:
        """The condition of a batch of tiles with this latent (h, w)."""
        settings = self._settings
        crops = features.crop(tiles, self._adapter.grid(latent))
        return AdapterCondition(self._adapter, crops, latent, settings.strength, settings.start, settings.end)
