"""Painted tiles are kept in files until the image is done, so that a run that broke off can be taken up again."""

from __future__ import annotations

import contextlib
import json
import os
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

RECIPE, TILES = "recipe.json", "pass*-x*-y*.safetensors"
MOST = 3
"""How many differences from another run's settings are named."""


class Journal:
    """A folder with a file for every tile that is painted. Written by one process, read by all."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any], resume: bool, writes: bool = True) -> None:
        """recipe: everything that the image depends on, as JSON. resume: go on with what the folder holds.

        Changes nothing yet. DinotileError if the folder holds tiles that were painted by another recipe, or by this one
        and are not gone on with, or if it holds other files.
        """
        self._folder, self._writes = folder, writes
        self._recipe = json.loads(json.dumps(recipe))
        before = self._recipe_before()
        if before is not None and any(folder.glob(TILES)):
            self._check(before, resume)
        elif os.path.lexists(folder) and not _holds_only_ours(folder):
            raise DinotileError(
                f"{folder} is where painted tiles are kept, but it is not a folder of tiles: move it away"
            )
        self._begun = resume and before == self._recipe

    def _recipe_before(self) -> dict[str, Any] | None:
        """The recipe in the folder; None without one: tiles without a recipe are of no use to anybody."""
        try:
            before = json.loads((self._folder / RECIPE).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            return None  # not there, or cut off when the machine went down
        except OSError as error:  # that passes, perhaps, and the tiles are good
            raise self._unusable(error) from error
        return before if isinstance(before, dict) else None

    def _unusable(self, error: Exception) -> DinotileError:
        return DinotileError(f"{self._folder}, where painted tiles are kept, cannot be used: {one_line(error)}", 500)

    def _check(self, before: Mapping[str, Any], resume: bool) -> None:
        """DinotileError unless the painted tiles are of this recipe and to be gone on with."""
        now = self._recipe
        other = [name for name in {**now, **before} if before.get(name) != now.get(name)]
        if other:
            differing = [_difference(name, before.get(name), now.get(name)) for name in other[:MOST]]
            more = f" and {len(other) - MOST} more" if len(other) > MOST else ""
            raise DinotileError(
                f"{self._folder} holds tiles painted with another {', '.join(differing)}{more}: --resume with the same "
                "settings goes on with them; to start over, delete it or give another OUT"
            )
        if not resume:
            raise DinotileError(
                f"{self._folder} holds painted tiles of this image: --resume continues with them; to start over, "
                "delete it"
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
                self._folder.mkdir(exist_ok=True)
                self._clear()  # of a run without a recipe or without a tile
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
        return f" (painted tiles are kept in {self._folder}; --resume continues with them)" if self._begun else ""

    def close(self) -> None:
        """The image is done: the tiles are no longer needed."""
        if self._writes and self._begun:
            with contextlib.suppress(OSError):
                self._clear()
                self._folder.rmdir()

    def _clear(self) -> None:
        """Remove our files from the folder; others stay."""
        for file in filter(_is_ours, list(self._folder.iterdir())):
            file.unlink()


def _holds_only_ours(folder: Path) -> bool:
    return folder.is_dir() and all(map(_is_ours, folder.glob("*")))


def _is_ours(file: Path) -> bool:
    return file.name == RECIPE or file.suffix == ".part" or fnmatch(file.name, TILES)


def _difference(name: str, before: Any, now: Any) -> str:
    """A part of a recipe in words, with both values where they can be read."""
    return name if isinstance(before, list) or isinstance(now, list) else f"{name} ({before!r:.40}, now {now!r:.40})"


def open_journal(target: Path, recipe: Mapping[str, Any], resume: bool, team: Team) -> Journal:
    """The journal beside an image that is to be written; the first process of the team writes it."""
    return Journal(target.with_name(target.name + ".tiles"), recipe, resume, writes=team.rank == 0)
