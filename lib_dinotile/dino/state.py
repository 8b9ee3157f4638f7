"""The state of encoders: installed or not, calibrated or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lib_dinotile import DinotileError, one_line
from lib_dinotile.dino import hub
from lib_dinotile.dino.calibrated import Store
from lib_dinotile.dino.checkpoint import (
    BUILT_IN,
    CONFIG,
    KNOWN,
    SIZES,
    WEIGHTS,
    automatic_encoder,
    encoders,
    fingerprint,
    installed,
    locate,
    size_class,
)

FIRST = KNOWN[0]
"""The DINOv2 that is offered where there is none."""
_DINOV2 = (88, 346, 1218)
_DINOV3 = (86, 115, 343, 1213)
MEGABYTES = dict(zip(KNOWN, (*_DINOV2, *_DINOV2, *_DINOV3, *_DINOV3)))
"""Of the published encoders' `model.safetensors`, as https://huggingface.co/facebook/dinov2-small/tree/main and the
other repositories' pages have them: four bytes for each of 22, 87 and 304 million weights (DINOv2), of 22, 29, 86 and
303 million (DINOv3)."""


@dataclass(frozen=True)
class EncoderState:
    """An encoder's state, found without loading it."""

    name: str
    installed: bool
    """If not, it is one of the published ones, which are downloaded."""
    calibrated: Sequence[float]
    """The scales that there are calibrated heads for."""
    automatic: bool
    """Whether Automatic stands for it now."""
    missing: str = ""
    """What to do, in a line, if it is neither installed nor published."""

    @property
    def line(self) -> str:
        """It in a few words."""
        name = "the small built-in encoder" if self.name == BUILT_IN else self.name.split("/")[-1]
        if not self.installed:
            return f"{name}, not installed yet: it is downloaded at the first run"
        return f"{name}, calibrated" if self.calibrated else f"{name}, not calibrated yet: done once, at the first run"


def megabytes(name: str) -> int:
    """To download of a published encoder."""
    return MEGABYTES[name]


def _is_here(name: str, folder: Path) -> bool:
    """Whether an encoder needs no download."""
    return name in installed(folder) or hub.cached(name, (CONFIG, WEIGHTS)) is not None


def marked(name: str, folder: Path) -> str:
    """An encoder in a list of them: whether it is on this machine, and how large the download is if not."""
    short = name.split("/")[-1] if name in MEGABYTES else name
    if name == BUILT_IN:
        return f"{short} (built in)"
    return f"{short} (installed)" if _is_here(name, folder) else f"{short} (download, {megabytes(name)} MB)"


def summary(folder: Path) -> str:
    """The same of all encoders, in two short sentences."""
    here = [name.split("/")[-1] for name in encoders(folder) if _is_here(name, folder)]
    sizes = []
    for number, word in enumerate(SIZES):
        found = [megabytes(name) for name in KNOWN if size_class(name) == number]
        sizes.append(f"{word} {min(found)} to {max(found)} MB")
    return f"Installed: {', '.join(here)}. Downloads: {', '.join(sizes)}."


def state_of(name: str, folder: Path, store: Store) -> EncoderState:
    """Of the built-in encoder, one in a folder or in Hugging Face's cache, or a published one."""
    try:
        identity, place = locate(name, folder, download=False)
        scales = store.scales(identity, fingerprint(place))
    except (DinotileError, OSError) as error:  # the reason is shown when it is used
        return EncoderState(name, False, [], False, "" if name in MEGABYTES else one_line(error))
    return EncoderState(name, True, scales, name == automatic_encoder(folder))


def states(folder: Path, store: Store) -> list[EncoderState]:
    """Of all encoders that can be chosen."""
    return [state_of(name, folder, store) for name in encoders(folder)]
