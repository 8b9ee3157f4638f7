"""Painted tiles are kept in files until the image is done, so that a run that broke off can be taken up again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lib_dinotile import DinotileError, one_line
from lib_dinotile.engine.team import Team
from lib_dinotile.tiling.plan import Rect
from lib_dinotile.weights import open_tensors

RECIPE = "recipe.json"


class Journal:
    """A folder with a file for every tile that is painted. Written by one process, read by all."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any], resume: bool, writes: bool = True) -> None:
        """recipe: everything that the image depends on, as JSON. resume: go on with what the folder holds.

        Changes nothing yet: the tiles of an earlier run give way when the first is painted. DinotileError if those to
        go on with were painted by another recipe, if those of this recipe are not gone on with, or if the folder holds
        other files.
        """
        self._folder, self._writes = folder, writes
        self._recipe = json.loads(json.dumps(recipe))
        self._begun = False
        try:
            before = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
            before = before if isinstance(before, dict) else None
        except (OSError, ValueError):
            before = None  # not there, or cut off when the machine went down
        if before is not None and resume:
            self._check(before, self._recipe)
            self._begun = True
        if before == self._recipe and not resume:
            raise DinotileError(
                f"{folder} holds painted tiles of this image: --resume goes on with them; to start anew, delete it"
            )
        if before is None and os.path.lexists(folder) and not _holds_only_ours(folder):
            raise DinotileError(f"{folder} holds other files, painted tiles are kept there: move it away")

    def _unusable(self, error: Exception) -> DinotileError:
        return DinotileError(f"{self._folder}, where painted tiles are kept, cannot be used: {one_line(error)}", 500)

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        other = [name for name in {**now, **before} if before.get(name) != now.get(name)]
        if other:
            values = before.get(other[0]), now.get(other[0])
            shown = "" if any(isinstance(value, list) for value in values) else " ({!r}, now {!r})".format(*values)
            raise DinotileError(
                f"--resume: {self._folder} was painted with another {other[0]}{shown}: give the same, or start anew "
                "without --resume"
            )

    def _file(self, step: str, tile: Rect) -> Path:
        return self._folder / f"pass{step}-x{tile.x}-y{tile.y}.safetensors"

    def get(self, step: str, tiles: Sequence[Rect]) -> tuple[list[tuple[Tensor, Tensor]], list[str]] | None:
        """The tiles (change, latents) as they were painted in that step of the run, and the notes; None if not all are
        there."""
        if not self._begun:
            return None
        painted, notes = [], {}
        try:
            for tile in tiles:
                with open_tensors(self._file(step, tile)) as file:
                    painted.append((file.get_tensor("change").clone(), file.get_tensor("latents").clone()))
                    notes.update(dict.fromkeys(json.loads(file.metadata()["notes"])))
        except (OSError, SafetensorError, TypeError, KeyError):  # not there, cut off, or of an older kind
            return None
        return painted, list(notes)

    def put(self, step: str, tile: Rect, change: Tensor, latents: Tensor, notes: Sequence[str]) -> None:
        """Keep a painted tile: its change (3, H, W), its latents (C, h, w), and what there was to say then.

        DinotileError if the disk is full.
        """
        if not self._writes:
            return
        file = self._file(step, tile)
        try:
            if not self._begun:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder.mkdir()
                recipe = self._folder / RECIPE
                recipe.with_suffix(".part").write_text(json.dumps(self._recipe, indent=1), encoding="utf-8")
                os.replace(recipe.with_suffix(".part"), recipe)
                self._begun = True
            tensors = {"change": change.contiguous(), "latents": latents.contiguous()}
            save_file(tensors, file.with_suffix(".part"), {"notes": json.dumps(list(notes))})
            os.replace(file.with_suffix(".part"), file)
        except (OSError, SafetensorError) as error:
            raise self._unusable(error) from error

    @property
    def kept(self) -> str:
        """Words for a run that broke off: where its tiles are, if there are any."""
        return f" (painted tiles are kept in {self._folder}; --resume goes on with them)" if self._begun else ""

    def close(self) -> None:
        """The image is done: the tiles are no longer needed."""
        if self._writes and self._begun:
            shutil.rmtree(self._folder, ignore_errors=True)


def _holds_only_ours(folder: Path) -> bool:
    return folder.is_dir() and all(map(_is_ours, folder.glob("*")))


def _is_ours(file: Path) -> bool:
    return file.name == RECIPE or file.suffix == ".part" or fnmatch(file.name, "pass*-x*-y*.safetensors")


def open_journal(target: Path, recipe: Mapping[str, Any], resume: bool, team: Team) -> Journal:
    """The journal beside an image that is to be written; the first process of the team writes it."""
    return Journal(target.with_name(target.name + ".tiles"), recipe, resume, writes=team.rank == 0)
