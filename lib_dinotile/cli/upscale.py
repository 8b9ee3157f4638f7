"""python -m lib_dinotile upscale IN OUT"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from lib_dinotile import DinotileError, __version__, presets
from lib_dinotile.cli.common import adapter_files, add_options, head_files, parse_tables, quiet_transformers, silenced
from lib_dinotile.cli.files import add_report, check_files, check_given, check_report, is_reported
from lib_dinotile.condition.conditioner import Conditioner
from lib_dinotile.dino.calibrated import Store
from lib_dinotile.dino.locks import models_folder
from lib_dinotile.engine.flow import UnfinishedError, canvas_size, upscale
from lib_dinotile.engine.journal import open_journal
from lib_dinotile.engine.team import Team, make_team
from lib_dinotile.images import check_writable, endings, read_image, read_mask, unread, write_image
from lib_dinotile.settings import MAPS, Generation, Settings
from lib_dinotile.tiling.noise import NoiseField
from lib_dinotile.weights import stamp

RECIPE = "dinotile recipe"
"""Key in a PNG for what tells whether an image is the one that is asked for."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    command.add_argument("IN", help="an image, or a folder of images")
    command.add_argument("OUT", help="the file to write, or a folder")
    command.add_argument("--quiet", action="store_true", help="print nothing but errors")
    command.add_argument("--resume", action="store_true", help="go on with what an earlier run has painted")
    command.add_argument(
        "--report", metavar="FILE", help="add what became of every tile to this file, as a line of JSON"
    )
    names = ", ".join(presets.NAMES)
    command.add_argument(
        "--preset", metavar="NAME", help=f"settings to start from, which other options change: {names}"
    )
    add_options(command, Settings)
    add_options(command, Generation)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Upscales an image, or all images of a folder."""
    from tqdm import tqdm

    from lib_dinotile.cli.checks import check_generation, target_of
    from lib_dinotile.hosts.devices import precision_of
    from lib_dinotile.hosts.diffusers import load_host
    from lib_dinotile.hosts.diffusers_addons import added_files
    from lib_dinotile.hosts.diffusers_pipelines import is_hub_id

    named = {name: getattr(arguments, name) for name in ("report", "mask", "config", "lora", "vae", "controlnet")}
    check_given(IN=arguments.IN, OUT=arguments.OUT, **named)
    quiet_transformers()
    default = {"adapter": "mini"} if arguments.model in (None, "mini") else {}
    settings, generation = parse_tables((Settings, Generation), arguments, default)
    settings = dataclasses.replace(settings, target=target_of(arguments, settings))
    check_generation(generation, settings)
    jobs = _jobs(Path(arguments.IN), Path(arguments.OUT))
    reads = {name: [Path(path)] for name, path in _named_files(settings, generation).items()}
    reads |= {"IN": [source for source, _ in jobs], **added_files(generation)}
    report = Path(arguments.report) if arguments.report else None
    written = [("OUT", file) for _, target in jobs for file in (*_written(target, settings), _unfinished(target))]
    check_files(reads, [*written, *([("report", report)] if report else [])])
    adapters = adapter_files(settings)
    if report:
        check_report(report)

    team = make_team()
    folder = os.path.isdir(arguments.IN)  # then every process has images of its own
    mine, sharing = (jobs[team.rank :: team.size], Team()) if folder else (jobs, team)
    quiet = arguments.quiet or (team.rank > 0 and not folder)
    bar = tqdm(
        total=1.0,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        smoothing=0,  # a tile takes long: its speed alone says little of the rest
        disable=None if not quiet else True,
        position=team.rank,
    )

    def say(*lines: str) -> None:
        for line in lines if not quiet else ():
            bar.write(line)

    if folder and team.rank == 0:
        say(*(f"left out: {line}" for line in [unread(Path(arguments.IN).iterdir())] if line))

    def progress(done: float, text: str) -> None:
        bar.set_postfix_str(text, refresh=False)
        bar.n = max(bar.n, done)  # a batch that ran out of memory begins again
        bar.refresh()

    if is_hub_id(generation.model):
        say(f"looking for {generation.model} on the Hugging Face Hub")
    host = load_host(generation, progress, team.rank)
    # What auto and Automatic stood for.
    generation = dataclasses.replace(generation, precision=precision_of(host.dtype), scheduler=host.schedule)
    settings.tile_sides(host.base)  # an overlap that is too wide is said before anything else is loaded

    def getting_ready(text: str, share: float) -> None:
        bar.set_description(f"{text} ({share:.0%})")

    conditioner = Conditioner.load(
        settings, host, adapters, models_folder("encoders"), head_files(settings), store=Store(progress=getting_ready)
    )
    resolved = conditioner.resolved if conditioner else settings

    def make(source: Path, target: Path) -> None:
        notes: list[str] = []
        with silenced():
            image = read_image(source, tell=notes.append)
        say(*(f"{source.name} {line}" for line in notes))
        size = canvas_size(image.size, settings, (generation.width, generation.height))
        check_writable(target, size)
        recipe = _recipe(resolved, generation, source, conditioner.encoder.fingerprint if conditioner else None)
        unfinished, partly = _unfinished(target), {**recipe, "unfinished": True}
        if arguments.resume and _is_done(target, recipe):
            with contextlib.suppress(DinotileError):  # tiles of another recipe are not this image's
                open_journal(target, recipe, True, sharing).close()
            lacking = [file.name for file in _written(target, settings) if not os.path.isfile(file)]
            if report and not is_reported(report, source):
                lacking.append(f"a line in {report.name}")
            hint = f", without {' and '.join(lacking)}: delete it to have it made again" if lacking else ""
            say(f"{target}: is there already{hint}")
            return
        mask = _read_mask(generation.mask, image.size)
        journal = open_journal(target, recipe, arguments.resume, sharing)
        noise = NoiseField(generation.seed, host.channels)
        try:
            result = upscale(
                host, image, settings, noise, conditioner, size=size, mask=mask, journal=journal, team=sharing
            )
        except UnfinishedError as error:
            say(*(f"{source.name}: {line}" for line in error.result.report.lines))
            where, cause = "", error.__cause__ or error
            if error.result.painted and sharing.rank == 0:
                where = journal.kept
                with contextlib.suppress(DinotileError):  # for want of space, say, and that is said already
                    parameters = _parameters(resolved, generation, size, error.result.report.lines)
                    write_image(error.result.image, unfinished, {"parameters": parameters, RECIPE: _digest(partly)})
                    where = f" (kept in {unfinished}; --resume continues with it)"
            if isinstance(cause, KeyboardInterrupt):
                done = f"{error.result.painted} of {error.result.total} tiles"
                raise DinotileError(f"cancelled after {done}{where}", 500) from cause
            raise UnfinishedError(cause, error.result, where) from cause
        if sharing.rank == 0:
            try:  # the image last: once it is there --resume makes nothing any more
                for name, picture in result.maps.items():
                    write_image(picture, _map_file(target, name), {})
                parameters = _parameters(resolved, generation, size, result.report.lines)
                write_image(result.image, target, {"parameters": parameters, RECIPE: _digest(recipe)})
            except DinotileError as error:
                raise DinotileError(f"{error}{journal.kept}", error.status_code) from error
            if _is_done(unfinished, partly):
                unfinished.unlink(missing_ok=True)
        journal.close()
        if report and sharing.rank == 0:
            add_report(report, source, result.report.json())
        say(*(f"{source.name}: {line}" for line in result.report.lines))
        tile = result.report.tiles[0].area
        count = f"{result.painted} tile{'s' * (result.painted != 1)}"
        say(f"{target}: {size[0]}x{size[1]}, {count} of up to {tile.width}x{tile.height}")

    failures: list[tuple[str, int]] = []
    for source, target in mine:
        bar.reset()
        bar.set_description(source.name)
        try:
            make(source, target)
        except DinotileError as error:
            if not folder or isinstance(error.__cause__, KeyboardInterrupt):
                raise
            if arguments.debug:
                traceback.print_exc()
            failures.append((f"{source.name}: {error}", error.status_code))
    bar.close()
    # Before all are done none may end with an error: launchers stop the others then.
    failures = [failure for each in team.gather(failures) for failure in each]
    team.close()
    if failures and team.rank == 0:
        lines, codes = zip(*failures)
        raise DinotileError(f"{len(lines)} of {len(jobs)} images failed: " + "; ".join(lines), max(codes))


def _jobs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """Pairs of files to read and to write: one, or one for every image in a folder."""
    if not os.path.isdir(source):
        if not os.path.isfile(source):
            raise DinotileError(f"{source} is not a file" if os.path.lexists(source) else f"{source} does not exist")
        check_writable(target)
        return [(source, target)]
    kinds = endings()
    try:
        files = sorted(file for file in source.iterdir() if file.suffix.lower() in kinds and not file.is_dir())
    except OSError as error:
        raise DinotileError(f"the folder {source} cannot be read: {error.strerror}") from error
    if not files:
        others = unread(source.iterdir())
        raise DinotileError(f"the folder {source} has no images" + (f"; {others}" if others else ""))
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DinotileError(f"{target} cannot be made a folder of images: {error.strerror}") from error
    if target.samefile(source):
        raise DinotileError(f"{target} is where the images come from; give another folder")
    if not os.access(target, os.W_OK):
        raise DinotileError(f"the folder {target} is not writable")
    stems = Counter(file.stem.casefold() for file in files)
    names = [file.stem if stems[file.stem.casefold()] == 1 else file.name for file in files]
    if len({name.casefold() for name in names}) < len(names):
        names = [file.name for file in files]
    return [(file, target / f"{name}.png") for file, name in zip(files, names)]


def _parameters(settings: Settings, generation: Generation, size: tuple[int, int], notes: Sequence[str]) -> str:
    """PNG info in the WebUIs' form; notes: on the tiles."""
    from lib_dinotile.cli.parameters import added_parameters, model_name, prompt_with_loras

    values = {
        "Steps": generation.steps,
        "Sampler": generation.sampler,
        "Schedule type": generation.scheduler,
        "CFG scale": generation.cfg,
        "Seed": generation.seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": model_name(generation),
        "Denoising strength": generation.denoise,
        **added_parameters(generation),
        "Precision": generation.precision,
        **settings.infotext,
        **({"DINO Tile notes": "; ".join(notes)} if notes else {}),
    }
    quoted = {key: json.dumps(str(v)) if any(c in str(v) for c in ",:\n") else v for key, v in values.items()}
    listed = ", ".join(f"{key}: {value}" for key, value in quoted.items())
    return f"{prompt_with_loras(generation)}\nNegative prompt: {generation.negative}\n{listed}"


def _named_files(settings: Settings, generation: Generation) -> dict[str, str]:
    """What options name that may be a file or a folder, by option."""
    names = {name: getattr(generation, name) for name in ("mask", "model", "config")}
    names |= {name: getattr(settings, name) for name in ("adapter", "encoder", "head")}
    return {key: name for key, name in names.items() if name}


def _written(target: Path, settings: Settings) -> list[Path]:
    """The files that an image and its maps are written to."""
    return [target, *(_map_file(target, name) for name in MAPS[settings.maps])]


def _map_file(target: Path, name: str) -> Path:
    return target.with_name(f"{target.stem}-{name}.png")


def _unfinished(target: Path) -> Path:
    """Where goes what is painted if a run breaks off. A PNG, which says of itself what it is."""
    return target.with_name(f"{target.stem}-unfinished.png")


def _recipe(settings: Settings, generation: Generation, source: Path, encoder: str | None) -> dict[str, Any]:
    """Everything that an image depends on. generation: its precision is known; encoder: fingerprint of its weights."""
    options = {**dataclasses.asdict(settings), **dataclasses.asdict(generation)}
    del options["enabled"], options["batch"], options["maps"], options["device"]
    from lib_dinotile.hosts.diffusers_addons import added_files

    names = {"source": str(source), **_named_files(settings, generation)}
    stamps: dict[str, Any] = {f"{key}'s files": stamp(name) for key, name in names.items()}
    stamps |= {f"{key}'s files": [stamp(file) for file in files] for key, files in added_files(generation).items()}
    return {"version": __version__, **options, **stamps, "encoder's weights": encoder}


def _digest(recipe: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


def _is_done(target: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether the image is there, made by this recipe."""
    if not os.path.isfile(target):  # a pipe would be waited for
        return False
    try:
        with PngImagePlugin.PngImageFile(target) as file:  # Image.open refuses large ones, but we have made it
            return file.info.get(RECIPE) == _digest(recipe)
    except Exception:  # decoders of damaged files raise whatever they like
        return False


def _read_mask(name: str, size: tuple[int, int]) -> Image.Image | None:
    if not name:
        return None
    with silenced():
        mask = read_mask(Path(name), f"mask: {name}")
    if mask.size != size:
        raise DinotileError(f"mask: {name} is {mask.width}x{mask.height}, the image is {size[0]}x{size[1]}")
    if mask.getbbox() is None:
        raise DinotileError(f"mask: {name} is all black, nothing would change")
    return mask
