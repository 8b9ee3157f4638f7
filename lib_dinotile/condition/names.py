"""Names of what is installed: each is checked, also where it has no part in the image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lib_dinotile import DinotileError
from lib_dinotile.condition.heads import chosen
from lib_dinotile.dino.checkpoint import encoders, find
from lib_dinotile.settings import AUTOMATIC, CALIBRATED, NONE, Settings


def check_names(
    settings: Settings, adapters: Mapping[str, Path], heads: Mapping[str, Path], folder: Path | None, trusted: bool
) -> None:
    """DinotileError for an adapter, a head or an encoder that is not there.

    adapters, heads: names and files to choose from; folder: of installed encoders. Unless `trusted`, an encoder is one
    of those or a published one, never a path.
    """
    if settings.adapter != NONE:
        chosen("adapter", settings.adapter, adapters)
    if settings.head not in (AUTOMATIC, CALIBRATED, NONE):
        chosen("head", settings.head, heads)
    if settings.encoder != AUTOMATIC and trusted:
        find(settings.encoder, folder)
    elif settings.encoder not in (names := [AUTOMATIC, *encoders(folder)]):
        raise DinotileError(
            f"encoder: {settings.encoder!r} is not installed in {folder}, give one of {', '.join(names)}"
        )
