"""From names in the settings to a condition for every batch of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lib_dinotile import DinotileError
from lib_dinotile.condition.adapter import Adapter, AdapterCondition
from lib_dinotile.condition.adapter_file import check_encoder, check_fit, load_adapter, read_config
from lib_dinotile.dino.cache import FeatureCache
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.dino.field import FeatureField, feature_field
from lib_dinotile.hosts.base import Host
from lib_dinotile.settings import AUTOMATIC, NONE, Settings
from lib_dinotile.tiling.plan import Rect

MINI = Path(__file__).parents[1] / "mini"
"""The built-in model's folder."""


def installed_adapters(folder: Path | None) -> dict[str, Path]:
    """Names and files of the adapters there are: those in `folder` and the built-in model's."""
    files = sorted(folder.rglob("*.safetensors")) if folder else []
    found = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    return {"mini": MINI / "adapter.safetensors", **found}


