"""`python -m lib_dinotile train`: an adapter, or a restoration head, from a folder of photos."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorboard  # noqa: F401  accelerate would do without, and say nothing
import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError

from lib_dinotile import DinotileError, __version__
from lib_dinotile.condition.adapter import Adapter
from lib_dinotile.condition.adapter_file import FORMAT, read_metadata, save_adapter
from lib_dinotile.dino.checkpoint import BUILT_IN
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.dino.head import FORMAT as HEAD_FORMAT
from lib_dinotile.dino.head import RestorationHead, load_heads, save_heads
from lib_dinotile.engine.memory import is_out_of_memory
from lib_dinotile.engine.team import Team, make_team
from lib_dinotile.hosts.diffusers import DiffusersHost, load_host
from lib_dinotile.settings import AUTOMATIC, Generation
from lib_dinotile.train.adapter import make_schedule, prepared_tiles, tile_size, train_adapter
from lib_dinotile.train.head import LAYERS, prepared_pairs, train_heads
from lib_dinotile.train.loop import CheckpointError, Schedule, check_resume, last_checkpoint
from lib_dinotile.train.options import DEFAULT_ENCODER, Training
from lib_dinotile.train.pictures import Photos, Prepared, find_photos, say_left_out
from lib_dinotile.weights import check_out, stamp

KINDS = {FORMAT: "an adapter", HEAD_FORMAT: "a restoration head"}
LASTING = ("base", "prediction", "encoder", "layer", "patches", "tile", "batch", "accumulate", "seed")
ADAPTERS = ("width", "blocks")
HEADS = ("hidden",)
"""Options that must be the same when a run is resumed."""


@dataclass(frozen=True)
class Job:
    """The job as the command line gives it."""

    options: Training
    images: Path
    out: Path
    head: bool
    """Whether only the restoration head is trained."""
    resume: bool
    team: Team

    @property
    def schedule(self) -> Schedule:
        names = (*LASTING, *(HEADS if self.head else ADAPTERS))
        recipe = {name: getattr(self.options, name) for name in names}
        recipe |= {"trains": "heads" if self.head else "adapter", "processes": self.team.size}
        return make_schedule(self.options, self.run, self.resume, recipe)

    @property
    def run(self) -> Path:
        """Folder of the checkpoint and of the logs."""
        return self.out.with_suffix(".head-run" if self.head else ".run")

    def say(self, text: str) -> None:
        if self.team.rank == 0:
            print(text, flush=True)

    def prepared(self, compute: Any, recipe: Any, tile: int) -> tuple[Prepared, Prepared]:
        """Pictures for training, and for measuring."""
        options = self.options
        trained_on, held_out, left_out = find_photos(self.images, tile, options.held_out)
        photos = (
            Photos(self.images, trained_on, options, tile, options.variants),
            Photos(self.images, held_out, options, tile, 1),
        )
        folder = Path(options.cache) if options.cache else self.out.with_suffix(".cache")
        both = Prepared(photos[0], compute, folder, recipe), Prepared(photos[1], compute, folder, recipe)
        self.say(f"{len(trained_on)} images to train on, {len(held_out)} held out; logs: {self.run}")
        for each, what in zip(both, ("images", "held-out images")):
            left_out += each.prepare(self.team, what)
            if not len(each):
                raise DinotileError(f"images: none of the {what} can be read")
        if self.team.rank == 0:
            say_left_out(left_out)
        return both

    def write(self, save: Callable[[Path, dict[str, str]], None], figures: Mapping[str, str], examples: int) -> None:
        """Write `out` by way of another file, so that it is whole whenever a run is killed."""
        made = {"dinotile": __version__, "examples": str(examples), "options": self.arguments, **figures}
        part = self.out.with_suffix(".part")
        try:
            save(part, made)
            part.replace(self.out)
        finally:
            part.unlink(missing_ok=True)

    @property
    def arguments(self) -> str:
        """The options that are not as by default, as on the command line; of paths only the last part."""
        chosen = {row: getattr(self.options, row.name) for row in self.options.table() if row.name != "cache"}
        return " ".join(
            f"--{row.flag or row.name.replace('_', '-')} {_named(value)}"
            for row, value in chosen.items()
            if value != row.default
        )


def train(options: Training, images: Path, out: Path, head: bool, resume: bool) -> None:
    """Train what the options say and write it to `out` at every checkpoint.

    Logs, the checkpoint and, if the options name no other folder, the cache lie beside it. DinotileError, one line,
    before any work is lost.
    """
    _check_precision(options.precision)
    check_out(out)
    if options.encoder == AUTOMATIC:
        options = dataclasses.replace(options, encoder=BUILT_IN if options.base == "mini" else DEFAULT_ENCODER)
    job = Job(options, images, out, head, resume, make_team())
    try:
        check_resume(job.schedule)
        kind = _already_there(job)
        _train(job, kind)
    except CheckpointError as error:
        raise DinotileError(str(error)) from error
    except FloatingPointError as error:
        raise DinotileError(f"{error}: --resume continues from the last checkpoint, try a lower --rate", 500) from error
    except DinotileError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            message = "out of memory: give a smaller --batch and more --accumulate, or --checkpointing true"
            raise DinotileError(message, 500) from error
        if isinstance(error, (OSError, SafetensorError)):
            raise DinotileError(f"{out} or what lies beside it cannot be written: {error}", 500) from error
        raise
    job.say(f"{out}: done; look at it with: python -m lib_dinotile info {out}")


def _train(job: Job, kind: str) -> None:
    options = job.options
    number = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", number) if torch.cuda.is_available() else torch.device("cpu")
    if not job.head and not options.base:
        raise DinotileError("base: say which checkpoint the adapter is for")
    generation = Generation(
        model=options.base,
        config=options.config,
        prediction=options.prediction,
        device=str(device),
        precision="fp32" if options.precision == "no" else options.precision,
    )
    host = None if job.head else load_host(generation)
    encoder = load_encoder(options.encoder, device=device)
    if options.layer > encoder.depth:
        raise DinotileError(f"layer: encoder {encoder.id!r} has {encoder.depth} layers, give at most that")
    set_seed(options.seed)  # the new model's parameters
    if host is None:
        return _train_heads(job, encoder)
    heads = load_heads(job.out, encoder.id, encoder.width, device) if "head" in kind else {}
    if heads and -options.layer not in heads:
        there = ", ".join(str(-layer) for layer in sorted(heads, reverse=True))
        raise DinotileError(f"layer: {job.out} has heads for the layers {there}, give one of them")
    job.say(f"base {options.base}: {host.base}, predicts {host.prediction}")
    return _train_adapter(job, encoder, host, heads)


def _train_heads(job: Job, encoder: PatchEncoder) -> None:
    options, layers = job.options, [layer for layer in LAYERS if layer >= -encoder.depth]
    tile = tile_size(options, "")
    recipe = ["pairs", encoder.id, encoder.fingerprint, options.patches, layers]
    pictures = job.prepared(prepared_pairs(encoder, options.patches, layers), recipe, tile)

    def save(heads: Mapping[int, RestorationHead], figures: Mapping[str, str]) -> None:
        job.write(lambda path, made: save_heads(heads, path, encoder.id, **made), figures, len(pictures[0]))

    train_heads(encoder, options.hidden, job.schedule, pictures, options.patches, tile, save, layers)


def _train_adapter(job: Job, encoder: PatchEncoder, host: DiffusersHost, heads: Mapping[int, RestorationHead]) -> None:
    options, head, tile = job.options, heads.get(-job.options.layer), tile_size(job.options, host.base)
    recipe: list[object] = ["tiles", options.base, stamp(options.base), options.config, encoder.id, encoder.fingerprint]
    recipe += [options.layer, options.patches, options.precision, tile, head and _digest(head)]
    pictures = job.prepared(prepared_tiles(host, encoder, options, tile, head), recipe, tile)

    def save(adapter: Adapter, figures: Mapping[str, str]) -> None:
        figures = {**figures, "prediction": host.prediction}
        job.write(lambda path, made: save_adapter(adapter, path, heads=heads, **made), figures, len(pictures[0]))

    train_adapter(host, encoder, options, job.schedule, pictures, tile, save, head)


def _named(value: Any) -> Any:
    """Of a path only the last part."""
    return Path(value).name if isinstance(value, str) and Path(value).exists() else value


def _digest(head: RestorationHead) -> str:
    """Identity of a head."""
    weights = b"".join(tensor.cpu().numpy().tobytes() for tensor in head.state_dict().values())
    return hashlib.sha256(weights).hexdigest()


def _check_precision(precision: str) -> None:
    if not torch.cuda.is_available():
        if precision == "fp16":
            raise DinotileError("precision: fp16 needs a GPU, give bf16 or no")
    elif precision == "bf16" and torch.version.cuda and torch.cuda.get_device_capability()[0] < 8:
        raise DinotileError("precision: this GPU has no bf16, give fp16")


def _already_there(job: Job) -> str:
    """Heads or adapter that are in the file already and may be trained further or added to, if any."""
    kind = ""
    if job.out.exists():
        metadata = read_metadata(job.out)
        kind = KINDS.get(metadata.get("format", ""), "")
        if not kind:
            raise DinotileError(f"out: {job.out} exists already and is not a file of dinotile's: give another name")
        if job.head and kind == "an adapter":
            raise DinotileError(f"out: {job.out} exists already and is an adapter: train a head first, into a new file")
        if not job.resume and (job.head or kind == "an adapter"):
            raise DinotileError(
                f"out: {job.out} exists already and is {kind}: --resume continues, or give another name"
            )
        kind += " with a head" if "heads" in metadata else ""
    if not job.resume and last_checkpoint(job.run) is not None:
        raise DinotileError(
            f"out: the checkpoint of another run is in {job.run}: --resume continues with it, or give another name"
        )
    return kind
