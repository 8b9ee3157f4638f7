"""Which restoration heads guidance and guard read the source's features through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lib_dinotile import DinotileError
from lib_dinotile.condition.adapter_file import read_metadata
from lib_dinotile.dino.calibrated import Store, scale_class
from lib_dinotile.dino.encoder import PatchEncoder
from lib_dinotile.dino.head import RestorationHead, heads_in
from lib_dinotile.settings import AUTOMATIC, CALIBRATED, NONE, Settings

ByLayer = Mapping[int, RestorationHead]
"""Layers are counted from the end: -1 is the last."""


class Heads(Protocol):
    """Restoration heads for one encoder."""

    @property
    def name(self) -> str:
        """Their name as a value of the option `head`, for PNG info."""

    def of(self, source: tuple[int, int], canvas: tuple[int, int], layers: Sequence[int]) -> ByLayer:
        """Those for some layers, for a source and a canvas of (width, height). DinotileError if they are not to be
        had; `NONE` gives none."""

    @property
    def notes(self) -> list[str]:
        """Notes for the user."""


@dataclass(frozen=True)
class FixedHeads:
    """The same for all sources: trained ones, or none."""

    heads: ByLayer = field(default_factory=dict)
    name: str = NONE

    def of(self, source: tuple[int, int], canvas: tuple[int, int], layers: Sequence[int]) -> ByLayer:
        lacking = [layer for layer in layers if layer not in self.heads]
        if self.heads and lacking:
            there = ", ".join(str(-layer) for layer in sorted(self.heads, reverse=True))
            raise DinotileError(
                f"head: it was not trained for layer {-lacking[0]}, only for {there}: set Guidance layer to one"
            )
        return self.heads

    @property
    def notes(self) -> list[str]:
        return [f"restoration head: {'in the adapter' if self.name == AUTOMATIC else self.name}"] if self.heads else []


@dataclass(frozen=True)
class CalibratedHeads:
    """Those that dinotile has calibrated, or calibrates when they are first asked for."""

    encoder: PatchEncoder
    view: int
    """Pixels along the longer side of what the encoder sees of a source."""
    store: Store
    name: str = CALIBRATED

    def of(self, source: tuple[int, int], canvas: tuple[int, int], layers: Sequence[int]) -> ByLayer:
        return self.store.heads(self.encoder, scale_class(source, canvas, self.view), layers)

    @property
    def notes(self) -> list[str]:
        return [f"restoration head: {self.name}", *self.store.notes]


def heads_for(
    settings: Settings, encoder: PatchEncoder, files: Mapping[str, Path], adapter: Path | None, store: Store
) -> Heads:
    """The heads that `settings` ask for. files: trained ones by name; adapter: the adapter's file, which may have some.

    DinotileError if they are not there or are for another encoder.
    """
    if settings.head == NONE:
        return FixedHeads()
    if settings.head not in (AUTOMATIC, CALIBRATED):
        return FixedHeads(heads_in(chosen("head", settings.head, files), encoder), settings.head)
    if settings.head == AUTOMATIC and adapter is not None and "heads" in read_metadata(adapter):
        return FixedHeads(heads_in(adapter, encoder), AUTOMATIC)
    return CalibratedHeads(encoder, settings.patches * settings.windows * encoder.patch, store)


def chosen(kind: str, name: str, files: Mapping[str, Path]) -> Path:
    """The file of that name. DinotileError if there is none."""
    if name not in files:
        raise DinotileError(
            f"{kind}: {name!r} is not installed, give one of {', '.join(dict.fromkeys((NONE, *files)))}"
        )
    return files[name]
