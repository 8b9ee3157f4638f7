"""Calibrated heads on disk: made once for an encoder and a scale, then read."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from lib_dinotile import DinotileError, one_line
from lib_dinotile.dino.calibration import LAYERS, SCALES, calibrate
from lib_dinotile.dino.encoder import PatchEncoder
from lib_dinotile.dino.head import RestorationHead, heads_in, save_heads
from lib_dinotile.dino.locks import Progress, locked, models_folder, silent
from lib_dinotile.images import endings, read_image

PHOTOS = Path(__file__).resolve().parents[1] / "photos"
"""The photographs that come with the extension."""
BUILT_IN_HEADS = PHOTOS.parent / "mini" / "heads"
"""The built-in encoder comes calibrated."""
FOLDER = "calibrated"
"""Within the folder of restoration heads."""


def default_folder() -> Path:
    """Where calibrated heads are kept without a WebUI."""
    return models_folder("heads") / FOLDER


def scale_class(source: tuple[int, int], canvas: tuple[int, int], view: int) -> float:
    """Which of `SCALES` is nearest for a source and a canvas of (width, height).

    What counts is how the encoder sees them, `view` pixels along the longer side: what is larger than that is shrunk,
    and then the source looks as sharp as the canvas could.
    """
    finer = min(view, max(canvas)) / min(view, max(source))
    return min(SCALES, key=lambda scale: abs(math.log(max(1.0, finer) / scale)))


class Pictures(Sequence[Image.Image]):
    """The pictures of a folder, RGB, read when they are asked for; those that come with the extension by default."""

    def __init__(self, folder: Path = PHOTOS) -> None:
        """DinotileError if there are none."""
        kinds = endings()
        self._files = sorted(file for file in folder.glob("*") if file.suffix.lower() in kinds and file.is_file())
        if not self._files:
            raise DinotileError(f"there are no pictures in {folder}, to calibrate an encoder from")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Image.Image:  # type: ignore[override]  # no slices
        return read_image(self._files[number])


@dataclass
class Store:
    """The calibrated heads of all encoders, in a folder."""

    folder: Path = field(default_factory=default_folder)
    """Where they are kept; made when there is something to keep."""
    progress: Progress = silent
    notes: list[str] = field(default_factory=list)
    """Notes for the user."""

    def heads(
        self, encoder: PatchEncoder, scale: float, layers: Sequence[int] = LAYERS
    ) -> Mapping[int, RestorationHead]:
        """The heads of an encoder for a scale of `SCALES`, made now if they are not there.

        One process makes them while others wait. DinotileError if that fails.
        """
        found = self.find(encoder, scale, layers)
        if found is not None:
            return found

        def waiting() -> None:
            self.progress(f"waiting for another process that gets to know {encoder.id.split('/')[-1]}", 0.0)

        with locked(self.file(encoder, scale).with_suffix(".lock"), waiting):
            found = self.find(encoder, scale, layers)  # another process may have made them
            return self.make(encoder, scale, layers) if found is None else found

    def find(
        self, encoder: PatchEncoder, scale: float, layers: Sequence[int] = LAYERS
    ) -> Mapping[int, RestorationHead] | None:
        """The heads, if they are there: those in the folder, or those that come with the built-in encoder."""
        kept = self._readable(encoder, scale)
        return next((heads for heads in kept if all(layer in heads for layer in layers)), None)

    def _readable(self, encoder: PatchEncoder, scale: float) -> Iterator[Mapping[int, RestorationHead]]:
        """All heads that there are; what is damaged is passed over, and made again."""
        yield _unsaved.get((encoder.fingerprint, scale), {})
        for file in self._files(encoder, scale):
            with contextlib.suppress(DinotileError):
                yield heads_in(file, encoder)

    def kept(self, encoder: PatchEncoder, scale: float) -> Path | None:
        """The file with the heads, if there is one."""
        return next(iter(self._files(encoder, scale)), None)

    def make(
        self,
        encoder: PatchEncoder,
        scale: float,
        layers: Sequence[int] = LAYERS,
        pictures: Sequence[Image.Image] | None = None,
        file: Path | None = None,
    ) -> Mapping[int, RestorationHead]:
        """Calibrates the encoder and keeps the heads; pictures, file: if not the usual ones.

        Where they cannot be written they are kept in memory, and `notes` say so.
        """
        began, name = time.perf_counter(), encoder.id.split("/")[-1]

        def progress(share: float) -> None:
            self.progress(f"getting to know {name}, once", share)

        there = () if file or pictures else {layer for heads in self._readable(encoder, scale) for layer in heads}
        pictures = Pictures() if pictures is None else pictures
        wanted = sorted({*(LAYERS if encoder.depth >= -min(LAYERS) else ()), *layers, *there}, reverse=True)
        found = calibrate(encoder, pictures, scale, wanted, progress)
        made = {**found.made, "scale": f"{scale:g}", "fingerprint": encoder.fingerprint}
        target = self.file(encoder, scale) if file is None else file
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            save_heads(found.heads, target, encoder.id, **made)
            self.notes.append(f"calibrated {name} for {scale:g}x in {time.perf_counter() - began:.0f} s")
        except OSError as error:
            if file is not None:
                raise DinotileError(f"{target} cannot be written: {one_line(error)}", 500) from error
            _unsaved.clear()
            _unsaved[encoder.fingerprint, scale] = found.heads
            self.notes.append(
                f"calibrated {name} for {scale:g}x; it cannot be kept in {target.parent} ({one_line(error)}), and will "
                "be done again when the program is started anew"
            )
        return found.heads

    def file(self, encoder: PatchEncoder, scale: float) -> Path:
        """Where an encoder's heads for a scale are kept."""
        return self.folder / _name(encoder.id, encoder.fingerprint, scale)

    def scales(self, encoder: str, fingerprint: str) -> list[float]:
        """Those of `SCALES` that there are heads for, of an encoder by its id and fingerprint"""
        return [scale for scale in SCALES if (fingerprint, scale) in _unsaved or self._at(encoder, fingerprint, scale)]

    def _files(self, encoder: PatchEncoder, scale: float) -> list[Path]:
        return self._at(encoder.id, encoder.fingerprint, scale)

    def _at(self, encoder: str, fingerprint: str, scale: float) -> list[Path]:
        """The files that there are; the first one counts."""
        name = _name(encoder, fingerprint, scale)
        return [file for file in (self.folder / name, BUILT_IN_HEADS / name) if file.is_file()]


def _name(encoder: str, fingerprint: str, scale: float) -> str:
    return f"{encoder.replace('/', '--')}-{fingerprint[:12]}-{scale:g}x.safetensors"


_unsaved: dict[tuple[str, float], Mapping[int, RestorationHead]] = {}
"""Heads that could not be written, by the encoder's fingerprint and the scale; those of one encoder and scale."""
