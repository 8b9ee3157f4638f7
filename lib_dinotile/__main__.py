"""python -m lib_dinotile upscale IN OUT"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image, PngImagePlugin

from lib_dinotile import DinotileError, __version__
from lib_dinotile.condition.conditioner import MINI, Conditioner
from lib_dinotile.engine import UnfinishedError, canvas_size, upscale
from lib_dinotile.images import check_writable, read_image, write_image
from lib_dinotile.journal import open_journal
from lib_dinotile.report import Report
from lib_dinotile.settings import NONE, Generation, Options, Settings
from lib_dinotile.team import Team, make_team
from lib_dinotile.tiling.noise import NoiseField

RECIPE = "dinotile recipe"
"""Key in a PNG for what tells whether an image is the one that is asked for."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _add_options(parser: argparse.ArgumentParser, table: type[Options]) -> None:
    for option in table.table():
        if option.name == "enabled":
            continue
        default = f" (default: {option.default})" if option.default != "" else ""
        flags = [f"--{option.flag or option.name.replace('_', '-')}"]
        text = f"{option.help} {option.allowed.capitalize()}{default}".replace("%", "%%")
        parser.add_argument(*flags, dest=option.name, metavar=option.type.__name__.upper(), help=text)


def _options(table: type[Options], arguments: argparse.Namespace) -> Any:
    given = {option.name: getattr(arguments, option.name, None) for option in table.table()}
    return table.parse({name: table.option(name).parse(text) for name, text in given.items() if text is not None})


def _jobs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """Pairs of files to read and to write: one, or one for every image in a folder."""
    if not source.is_dir():
        if not source.is_file():
            raise DinotileError(f"{source} is not there")
        check_writable(target)
        return [(source, target)]
    endings = Image.registered_extensions()
    files = sorted(file for file in source.iterdir() if file.suffix.lower() in endings)
    if not files:
        raise DinotileError(f"the folder {source} has no images")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DinotileError(f"{target} cannot be made a folder of images: {error.strerror}") from error
    if target.samefile(source):
        raise DinotileError(f"{target} is where the images come from; give another folder")
    stems = Counter(file.stem for file in files)
    return [(file, target / f"{file.stem if stems[file.stem] == 1 else file.name}.png") for file in files]


def _parameters(settings: Settings, generation: Generation, size: tuple[int, int]) -> str:
    """What the WebUIs write into a PNG, in their form."""
    values = {
        "Steps": generation.steps,
        "Sampler": "DPM++ 2M",
        "CFG scale": generation.cfg,
        "Seed": generation.seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": generation.model,
        "Denoising strength": generation.denoise,
        **settings.infotext,
    }
    quoted = {key: json.dumps(str(v)) if any(c in str(v) for c in ",:\n") else v for key, v in values.items()}
    listed = ", ".join(f"{key}: {value}" for key, value in quoted.items())
    return f"{generation.prompt}\nNegative prompt: {generation.negative}\n{listed}"


def _stamp(name: str) -> Any:
    """Sizes and times of a file, or of all files of a folder; None if it is neither."""
    path = Path(name)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()] or None


def _recipe(settings: Settings, generation: Generation, source: Path) -> dict[str, Any]:
    """Everything that an image depends on."""
    options = {**asdict(settings), **asdict(generation)}
    del options["enabled"], options["batch"]
    names = {"source": str(source), **{key: options[key] for key in ("mask", "model", "config", "adapter", "encoder")}}
    stamps = {f"{key}'s files": _stamp(name) for key, name in names.items() if name}
    return {"version": __version__, **options, **stamps}


def _digest(recipe: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


def _is_done(target: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether the image is there, made by this recipe."""
    try:
        with PngImagePlugin.PngImageFile(target) as file:  # Image.open refuses large ones, but we have made it
            return file.info.get(RECIPE) == _digest(recipe)
    except (OSError, SyntaxError):
        return False


def _read_mask(name: str, size: tuple[int, int]) -> Image.Image | None:
    if not name:
        return None
    mask = read_image(Path(name)).convert("L")
    if mask.size != size:
        raise DinotileError(f"mask: {name} is {mask.width}x{mask.height}, the image is {size[0]}x{size[1]}")
    if mask.getbbox() is None:
        raise DinotileError(f"mask: {name} is all black, nothing would change")
    return mask


def _upscale(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm
    from transformers.utils import logging

    from lib_dinotile.hosts.diffusers import load_host

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    if arguments.model in (None, "mini") and arguments.adapter is None:
        arguments.adapter = "mini"
    settings, generation = _options(Settings, arguments), _options(Generation, arguments)
    jobs = _jobs(Path(arguments.IN), Path(arguments.OUT))
    adapters = {"mini": MINI / "adapter.safetensors"}
    if settings.adapter not in (NONE, *adapters):
        adapters[settings.adapter] = Path(settings.adapter)
    if settings.adapter in adapters and not adapters[settings.adapter].is_file():
        raise DinotileError(f"adapter: there is no file {adapters[settings.adapter]}")

    team, alone = make_team(), Team()
    if Path(arguments.IN).is_dir():  # every process has images of its own
        jobs, sharing = jobs[team.rank :: team.size], alone
    else:
        sharing = team
    quiet = arguments.quiet or (sharing is team and team.rank > 0)
    bar = tqdm(unit="tile", disable=None if not quiet else True, position=team.rank)

    def tell(source: Path, report: Report) -> None:
        for line in report.lines if not quiet else []:
            bar.write(f"{source.name}: {line}")

    def progress(done: int, total: int) -> None:
        bar.total, bar.n = total, done
        bar.refresh()

    host = load_host(generation, progress, team.rank)
    conditioner = Conditioner.load(settings, host, adapters)
    failures = []
    for source, target in jobs:
        bar.set_description(source.name)
        try:
            image = read_image(source)
            size = canvas_size(image.size, settings, (generation.width, generation.height))
            parameters = _parameters(settings, generation, size)
            recipe = _recipe(settings, generation, source)
            if arguments.resume and _is_done(target, recipe):
                bar.write(f"{target}: is there already")
                continue
            mask = _read_mask(generation.mask, image.size)
            journal = open_journal(target, recipe, arguments.resume, sharing)
            noise = NoiseField(generation.seed, host.channels)
            result = upscale(
                host, image, settings, noise, conditioner, size=size, mask=mask, journal=journal, team=sharing
            )
            if sharing.rank == 0:
                write_image(result.image, target, {"parameters": parameters, RECIPE: _digest(recipe)})
                if arguments.report:
                    _write_report(Path(arguments.report), source, result.report)
            journal.close()
            tell(source, result.report)
            if not quiet:
                bar.write(f"{target}: {result.image.width}x{result.image.height}, tiles: {result.painted}")
        except UnfinishedError as error:
            tell(source, error.result.report)
            if not error.result.painted or sharing.rank > 0:
                raise
            kept = target.with_stem(target.stem + "-unfinished")
            write_image(error.result.image, kept, {"parameters": parameters})
            where = f" (kept in {kept}; --resume goes on with it)"
            raise UnfinishedError(error.__cause__, error.result, where) from error.__cause__
        except DinotileError as error:
            if len(jobs) == 1:
                raise
            failures.append(f"{source.name}: {error}")
    bar.close()
    if failures:
        raise DinotileError(f"{len(failures)} of {len(jobs)} images were left out: " + "; ".join(failures))


def _write_report(path: Path, source: Path, report: Report) -> None:
    """One line of JSON for every image, added to the file."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"image": str(source), **report.json()}) + "\n")
    except OSError as error:
        raise DinotileError(f"report: {path} cannot be written: {error}", 500) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 broken off, 2 bad input, 130 cancelled."""
    parser = Parser(prog="dinotile", description="Upscales images tile by tile, true to what they show.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("upscale", help="upscale an image or a folder of images", allow_abbrev=False)
    command.add_argument("IN", help="an image, or a folder of images")
    command.add_argument("OUT", help="the file to write, or a folder")
    command.add_argument("--quiet", action="store_true", help="say nothing but what goes wrong")
    command.add_argument("--resume", action="store_true", help="go on with what an earlier run has painted")
    command.add_argument(
        "--report", metavar="FILE", help="add what became of every tile to this file, as a line of JSON"
    )
    _add_options(command, Settings)
    _add_options(command, Generation)
    command.set_defaults(run=_upscale)
    parsed = parser.parse_args(arguments)
    try:
        parsed.run(parsed)
    except DinotileError as error:
        print(f"dinotile: {error}", file=sys.stderr)
        if isinstance(error.__cause__, KeyboardInterrupt):
            return 130
        return 2 if error.status_code < 500 else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
