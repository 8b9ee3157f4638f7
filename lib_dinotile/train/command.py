"""`python -m lib_dinotile train`: an adapter, or a restoration head, from a folder of photos."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError

from lib_dinotile import DinotileError, __version__
from lib_dinotile.condition.adapter import Adapter
from lib_dinotile.condition.adapter_file import FORMAT, read_metadata, save_adapter
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.dino.head import RestorationHead, load_heads, save_heads
from lib_dinotile.hosts.diffusers import DiffusersHost, load_host
from lib_dinotile.sampling import is_out_of_memory
from lib_dinotile.settings import Generation
from lib_dinotile.team import Team, make_team
from lib_dinotile.train.adapter import prepared_tiles, schedule, tile_size, train_adapter
from lib_dinotile.train.head import LAYERS, prepared_pairs, train_heads
from lib_dinotile.train.options import Training
from lib_dinotile.train.pictures import Photos, Prepared, find_photos, hold_out

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
LEFT_OUT_SHOWN = 5
"""Lines about images that are left out."""


def train(options: Training, images: Path, out: Path, head_only: bool, resume: bool) -> None:
    """Train what the options say and write it to `out` at every checkpoint.

    Logs, the checkpoint and, if the options name no other folder, the cache lie beside it. DinotileError, one line,
    before any work is lost.
    """
    if options.precision == "fp16" and not torch.cuda.is_available():
        raise DinotileError("precision: fp16 needs a GPU, give bf16 or no")
    _check_out(out)
    found = _already_there(out, head_only, resume)
    team = make_team()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    encoder = load_encoder(options.encoder, device=device)
    if options.layer > encoder.depth:
        raise DinotileError(f"layer: encoder {encoder.id!r} has {encoder.depth} layers, give at most that")
    heads = load_heads(out, encoder.id, encoder.width, device) if found and not head_only else {}
    host = None
    if not head_only:
        host = load_host(
            Generation(model=options.base, config=options.config), number=team.rank, dtype=DTYPES[options.precision]
        )
    tile = tile_size(options, host.base if host else "")
    files, left_out = find_photos(images, tile)
    if team.rank == 0:
        for line in left_out[:LEFT_OUT_SHOWN]:
            print(f"left out: {line}")
        if len(left_out) > LEFT_OUT_SHOWN:
            print(f"left out: {len(left_out) - LEFT_OUT_SHOWN} more")
    trained_on, held_out = hold_out(files, options.held_out)
    pictures = Photos(trained_on, options, tile, options.variants), Photos(held_out, options, tile, 1)
    if team.rank == 0:
        print(f"{len(trained_on)} images to train on, {len(held_out)} held out; logs: {_beside(out, 'run')}")
    made = {
        "dinotile": __version__,
        "made for": options.base if host else "any checkpoint",
        "images": str(len(trained_on)),
        "options": _told(options),
    }
    set_seed(options.seed)  # the new model's parameters
    try:
        if host is None:
            _train_heads(encoder, options, pictures, out, tile, resume, team, made)
        else:
            _train_adapter(host, encoder, options, pictures, out, tile, resume, team, made, heads)
    except DinotileError:
        raise
    except FileNotFoundError as error:  # no checkpoint
        raise DinotileError(str(error)) from error
    except FloatingPointError as error:
        raise DinotileError(f"{error}: --resume goes on from the last checkpoint, try a lower --rate", 500) from error
    except Exception as error:
        if is_out_of_memory(error):
            message = (
                "out of memory: --resume goes on, with a smaller --batch and more --accumulate, or --checkpointing true"
            )
            raise DinotileError(message, 500) from error
        if isinstance(error, (OSError, SafetensorError)):
            raise DinotileError(f"{out} or what lies beside it cannot be written: {error}", 500) from error
        raise
    if team.rank == 0:
        print(f"{out}: done; look at it with: python -m lib_dinotile info {out}")


def _prepared(
    pictures: tuple[Photos, Photos], compute: Any, recipe: Any, options: Training, out: Path, team: Team
) -> tuple[Prepared, Prepared]:
    folder = Path(options.cache) if options.cache else _beside(out, "cache")
    made = tuple(Prepared(each, compute, folder, recipe) for each in pictures)
    for each, what in zip(made, ("images", "held-out images")):
        each.prepare(team, what)
    return made


def _train_heads(
    encoder: PatchEncoder,
    options: Training,
    photos: tuple[Photos, Photos],
    out: Path,
    tile: int,
    resume: bool,
    team: Team,
    made: Mapping[str, str],
) -> None:
    layers = [layer for layer in LAYERS if layer >= -encoder.depth]
    recipe = ["pairs", encoder.id, encoder.fingerprint, options.patches, layers]
    pictures = _prepared(photos, prepared_pairs(encoder, options.patches, layers), recipe, options, out, team)

    def save(heads: Mapping[int, RestorationHead], figures: Mapping[str, str]) -> None:
        part = out.with_suffix(".part")
        save_heads(heads, part, encoder.id, **made, **figures)
        part.replace(out)

    plan = schedule(options, _beside(out, "run"), resume)
    train_heads(encoder, options.hidden, plan, pictures, options.patches, tile, save, layers)


def _train_adapter(
    host: DiffusersHost,
    encoder: PatchEncoder,
    options: Training,
    photos: tuple[Photos, Photos],
    out: Path,
    tile: int,
    resume: bool,
    team: Team,
    made: Mapping[str, str],
    heads: Mapping[int, RestorationHead],
) -> None:
    head = heads.get(-options.layer)
    recipe = ["tiles", options.base, _stamp(options.base), encoder.id, encoder.fingerprint]
    recipe += [options.layer, options.patches, options.precision, tile, str(head and head.outer.weight.sum().item())]
    pictures = _prepared(photos, prepared_tiles(host, encoder, options, tile, head), recipe, options, out, team)

    def save(adapter: Adapter, figures: Mapping[str, str]) -> None:
        part = out.with_suffix(".part")
        save_adapter(adapter, part, heads=heads, **made, **figures)
        part.replace(out)

    train_adapter(host, encoder, options, schedule(options, _beside(out, "run"), resume), pictures, tile, save, head)


def _beside(out: Path, what: str) -> Path:
    return out.with_suffix(f".{what}")


def _check_out(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise DinotileError(f"out: {out} has to end with .safetensors")
    if not out.parent.is_dir():
        raise DinotileError(f"out: there is no folder {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise DinotileError(f"out: the folder {out.parent} is not writable")


def _already_there(out: Path, head_only: bool, resume: bool) -> bool:
    """Whether there is a file with heads, that an adapter is to read through."""
    if not out.exists():
        return False
    metadata = read_metadata(out)
    kind = "an adapter" if metadata.get("format") == FORMAT else "a restoration head"
    if not resume and (head_only or kind == "an adapter"):
        raise DinotileError(f"out: {out} is there already, {kind}: --resume goes on with it, or give another name")
    if head_only and kind == "an adapter":
        raise DinotileError(f"out: {out} is an adapter: a head is trained first, and into a new file")
    return "heads" in metadata


def _stamp(name: str) -> Any:
    """Sizes and times of a checkpoint's files; None if it is no path."""
    path = Path(name)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()] or None


def _told(options: Training) -> str:
    """The options that are not as by default, as on the command line."""
    return " ".join(
        f"--{row.flag or row.name.replace('_', '-')} {getattr(options, row.name)}"
        for row in options.table()
        if getattr(options, row.name) != row.default and row.name != "cache"
    )
