"""python -m lib_dinotile upscale IN OUT, and other commands"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image, PngImagePlugin

from lib_dinotile import DinotileError, __version__, one_line, printable
from lib_dinotile.cli import calibrate, encoders, info, quiet_transformers
from lib_dinotile.condition.conditioner import MINI, Conditioner
from lib_dinotile.dino.calibrated import Store
from lib_dinotile.engine import UnfinishedError, analyze, canvas_size, upscale
from lib_dinotile.images import MAX_PIXELS, check_writable, endings, read_image, read_mask, write_image
from lib_dinotile.journal import open_journal
from lib_dinotile.once import models_folder
from lib_dinotile.settings import AUTOMATIC, BOTH, CALIBRATED, NONE, SEMANTIC, Generation, Options, Settings
from lib_dinotile.team import Team, make_team
from lib_dinotile.tiling.noise import NoiseField
from lib_dinotile.train.options import Training
from lib_dinotile.weights import stamp

LOOKING = ("scale", "tile", "overlap", "encoder", "patches", "windows", "head", "guard_strictness")
"""Options that maps of an image depend on."""
RECIPE = "dinotile recipe"
"""Key in a PNG for what tells whether an image is the one that is asked for."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)}\n")


def _add_options(parser: argparse.ArgumentParser, table: type[Options], names: Sequence[str] | None = None) -> None:
    for option in table.table():
        if option.name == "enabled" or (names is not None and option.name not in names):
            continue
        default = f" (default: {option.default})" if option.default != "" else ""
        flags = [f"--{option.flag or option.name.replace('_', '-')}"]
        allowed = f" {option.allowed[0].upper()}{option.allowed[1:]}" if option.allowed != "text" else ""
        text = f"{option.help}{allowed}{default}".replace("%", "%%")
        parser.add_argument(*flags, dest=option.name, metavar=option.type.__name__.upper(), help=text)


def _options(table: type[Options], arguments: argparse.Namespace) -> Any:
    given = {option.name: getattr(arguments, option.name, None) for option in table.table()}
    return table.parse({name: table.option(name).parse(text) for name, text in given.items() if text is not None})


def _jobs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """Pairs of files to read and to write: one, or one for every image in a folder."""
    if not os.path.isdir(source):
        if not os.path.isfile(source):
            raise DinotileError(f"{source} is no file" if os.path.lexists(source) else f"{source} is not there")
        check_writable(target)
        return [(source, target)]
    kinds = endings()
    try:
        files = sorted(file for file in source.iterdir() if file.suffix.lower() in kinds and not file.is_dir())
    except OSError as error:
        raise DinotileError(f"the folder {source} cannot be read: {error.strerror}") from error
    if not files:
        raise DinotileError(f"the folder {source} has no images")
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
    """What the WebUIs write into a PNG, in their form; notes: what there is to say of the tiles."""
    values = {
        "Steps": generation.steps,
        "Sampler": "DPM++ 2M",
        "CFG scale": generation.cfg,
        "Seed": generation.seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": generation.model,
        "Denoising strength": generation.denoise,
        **settings.infotext,
        **({"DINO Tile notes": "; ".join(notes)} if notes else {}),
    }
    quoted = {key: json.dumps(str(v)) if any(c in str(v) for c in ",:\n") else v for key, v in values.items()}
    listed = ", ".join(f"{key}: {value}" for key, value in quoted.items())
    return f"{generation.prompt}\nNegative prompt: {generation.negative}\n{listed}"


def _recipe(settings: Settings, generation: Generation, source: Path) -> dict[str, Any]:
    """Everything that an image depends on."""
    options = {**dataclasses.asdict(settings), **dataclasses.asdict(generation)}
    del options["enabled"], options["batch"], options["maps"]
    names = {
        "source": str(source),
        **{key: options[key] for key in ("mask", "model", "config", "adapter", "encoder", "head")},
    }
    stamps = {f"{key}'s files": stamp(name) for key, name in names.items() if name}
    return {"version": __version__, **options, **stamps}


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


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """What C libraries write of damaged files to the process's stderr goes nowhere: one line of ours says it."""
    if sys.stderr is None:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _read_mask(name: str, size: tuple[int, int]) -> Image.Image | None:
    if not name:
        return None
    with _one_voice():
        mask = read_mask(Path(name))
    if mask.size != size:
        raise DinotileError(f"mask: {name} is {mask.width}x{mask.height}, the image is {size[0]}x{size[1]}")
    if mask.getbbox() is None:
        raise DinotileError(f"mask: {name} is all black, nothing would change")
    return mask


def _upscale(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from lib_dinotile.hosts.diffusers import load_host

    quiet_transformers()
    if arguments.model in (None, "mini") and arguments.adapter is None:
        arguments.adapter = "mini"
    settings, generation = _options(Settings, arguments), _options(Generation, arguments)
    jobs = _jobs(Path(arguments.IN), Path(arguments.OUT))
    adapters = {"mini": MINI / "adapter.safetensors"}
    if settings.adapter not in (NONE, *adapters):
        adapters[settings.adapter] = Path(settings.adapter)
    if settings.adapter in adapters and not os.path.isfile(adapters[settings.adapter]):
        raise DinotileError(f"adapter: there is no file {adapters[settings.adapter]}")
    if arguments.report:
        _add_line(Path(arguments.report), "")

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

    def progress(done: float, text: str) -> None:
        bar.set_postfix_str(text, refresh=False)
        bar.n = max(bar.n, done)  # a batch that ran out of memory begins again
        bar.refresh()

    host = load_host(generation, progress, team.rank)
    settings = settings.for_base(host.base)

    def getting_ready(text: str, share: float) -> None:
        bar.set_description(f"{text} ({share:.0%})")

    conditioner = Conditioner.load(
        settings, host, adapters, models_folder("encoders"), _heads(settings), store=Store(progress=getting_ready)
    )
    used = conditioner.used if conditioner else settings

    def make(source: Path, target: Path) -> None:
        told: list[str] = []
        with _one_voice():
            image = read_image(source, tell=told.append)
        say(*(f"{source.name} {line}" for line in told))
        size = canvas_size(image.size, settings, (generation.width, generation.height))
        check_writable(target, size)
        recipe = _recipe(used, generation, source)
        if arguments.resume and _is_done(target, recipe):
            with contextlib.suppress(DinotileError):  # tiles of another recipe are not this image's
                open_journal(target, recipe, True, sharing).close()
            say(f"{target}: is there already")
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
            if not error.result.painted or sharing.rank > 0:
                raise
            where, kept = journal.kept, target.with_stem(target.stem + "-unfinished")
            with contextlib.suppress(DinotileError):  # for want of space, say, and that is told already
                parameters = _parameters(used, generation, size, error.result.report.lines)
                write_image(error.result.image, kept, {"parameters": parameters})
                where = f" (kept in {kept}; --resume goes on with it)"
            raise UnfinishedError(error.__cause__, error.result, where) from error.__cause__
        if sharing.rank == 0:
            try:  # the image last: once it is there --resume makes nothing any more
                for name, picture in result.maps.items():
                    write_image(picture, target.with_name(f"{target.stem}-{name}.png"), {})
                parameters = _parameters(used, generation, size, result.report.lines)
                write_image(result.image, target, {"parameters": parameters, RECIPE: _digest(recipe)})
            except DinotileError as error:
                raise DinotileError(f"{error}{journal.kept}", error.status_code) from error
        journal.close()
        if arguments.report and sharing.rank == 0:
            line = json.dumps({"image": str(source), **result.report.json()})
            _add_line(Path(arguments.report), line + "\n")
        say(*(f"{source.name}: {line}" for line in result.report.lines))
        say(f"{target}: {result.image.width}x{result.image.height}, tiles: {result.painted}")

    failures: list[tuple[str, int]] = []
    for source, target in mine:
        bar.reset()
        bar.set_description(source.name)
        try:
            make(source, target)
        except DinotileError as error:
            if not folder or isinstance(error.__cause__, KeyboardInterrupt):
                raise
            failures.append((f"{source.name}: {error}", error.status_code))
    bar.close()
    # Before all are done none may end with an error: launchers stop the others then.
    failures = [failure for each in team.gather(failures) for failure in each]
    team.close()
    if failures and team.rank == 0:
        lines, codes = zip(*failures)
        raise DinotileError(f"{len(lines)} of {len(jobs)} images were left out: " + "; ".join(lines), max(codes))


def _heads(settings: Settings) -> dict[str, Path]:
    """The restoration head: on the command line its name is that of its file."""
    if settings.head in (NONE, AUTOMATIC, CALIBRATED):
        return {}
    if not os.path.isfile(settings.head):
        raise DinotileError(f"head: there is no file {settings.head}")
    return {settings.head: Path(settings.head)}


def _analyze(arguments: argparse.Namespace) -> None:
    """Maps of one image, without a diffusion model."""
    quiet_transformers()
    settings = dataclasses.replace(_options(Settings, arguments), maps=BOTH, adapter=NONE)
    target = Path(arguments.OUT)
    check_writable(target)
    with _one_voice():
        source = read_image(Path(arguments.IN))
        result = read_image(Path(arguments.result)) if arguments.result else None
    size = canvas_size(source.size, settings) if result is None else result.size
    conditioner = Conditioner.without_model(settings, _heads(settings), encoders=models_folder("encoders"))
    for name, picture in analyze(conditioner, source, settings, size, result).items():
        file = target if name == SEMANTIC else target.with_name(f"{target.stem}-{name}{target.suffix}")
        write_image(picture, file, {})
        print(f"{file}: {name} map")


def _train(arguments: argparse.Namespace) -> None:
    try:
        from lib_dinotile.train.command import train
    except ModuleNotFoundError as error:
        raise DinotileError(f"training needs {error.name}: pip install '.[train]'") from error

    quiet_transformers()
    train(_options(Training, arguments), Path(arguments.images), Path(arguments.out), arguments.head, arguments.resume)


def _add_line(path: Path, line: str) -> None:
    """Add to the file of reports: one line of JSON for every image."""
    try:
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            with contextlib.suppress(OSError):  # half a line is no JSON
                os.truncate(path, size)
            raise
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
    command = commands.add_parser(
        "analyze", help="show what DINO sees in an image, and how well a result agrees with it", allow_abbrev=False
    )
    command.add_argument("IN", help="the source image")
    command.add_argument(
        "OUT", help="the semantic map to write; the consistency map goes beside it, with -consistency in its name"
    )
    command.add_argument(
        "--result", metavar="FILE", help="the upscaled image to compare; without it the plain enlarged source is"
    )
    _add_options(command, Settings, LOOKING)
    command.set_defaults(run=_analyze)
    command = commands.add_parser("train", help="train an adapter or a restoration head", allow_abbrev=False)
    command.add_argument(
        "--images", required=True, metavar="FOLDER", help="photos, with captions in .txt files or none"
    )
    command.add_argument("--out", required=True, metavar="FILE", help="the .safetensors file to write")
    command.add_argument(
        "--head",
        action="store_true",
        help="train only the restoration head; an adapter trained into FILE reads through it",
    )
    command.add_argument("--resume", action="store_true", help="go on from the checkpoint beside FILE")
    _add_options(command, Training)
    command.set_defaults(run=_train)
    for module, text in (
        (calibrate, "make an encoder's restoration heads"),
        (encoders, "show which encoders there are, and which are calibrated"),
        (info, "show what a file of weights says of itself"),
    ):
        name = module.__name__.split(".")[-1]
        module.add_arguments(commands.add_parser(name, help=text, description=module.run.__doc__, allow_abbrev=False))
    parsed = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name must not be what a run breaks off at
            stream.reconfigure(errors="backslashreplace")
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # the files are the user's own: more than Pillow reads unasked
    warnings.filterwarnings("ignore", module="PIL")
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # what is to be said of a file, one line says
    try:
        parsed.run(parsed)
    except KeyboardInterrupt:
        print("dinotile: cancelled", file=sys.stderr)
        return 130
    except DinotileError as error:
        print(f"dinotile: {error}", file=sys.stderr)
        if isinstance(error.__cause__, KeyboardInterrupt):
            return 130
        return 2 if error.status_code < 500 else 1
    except Exception as error:
        print(f"dinotile: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
