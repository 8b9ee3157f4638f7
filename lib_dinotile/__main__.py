"""python -m lib_dinotile upscale IN OUT"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from lib_dinotile import DinotileError, __version__
from lib_dinotile.condition.conditioner import MINI, Conditioner
from lib_dinotile.engine import UnfinishedError, upscale
from lib_dinotile.images import check_writable, read_image, write_image
from lib_dinotile.settings import NONE, Generation, Options, Settings
from lib_dinotile.tiling.noise import NoiseField


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _add_options(parser: argparse.ArgumentParser, table: type[Options]) -> None:
    for option in table.table():
        if option.name == "enabled":
            continue
        default = f" (default: {option.default})" if option.default != "" else ""
        flags = [f"--{option.flag or option.name}"]
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

    bar = tqdm(unit="tile", disable=None if not arguments.quiet else True)

    def progress(done: int, total: int) -> None:
        bar.total, bar.n = total, done
        bar.refresh()

    host = load_host(generation, progress)
    conditioner = Conditioner.load(settings, host, adapters)
    failures = []
    for source, target in jobs:
        bar.set_description(source.name)
        try:
            image = read_image(source)
            result = upscale(host, image, settings, NoiseField(generation.seed, host.channels), conditioner)
            write_image(result.image, target, _parameters(settings, generation, result.image.size))
            if not arguments.quiet:
                bar.write(f"{target}: {result.image.width}x{result.image.height}, tiles: {result.painted}")
        except UnfinishedError as error:
            if not error.result.painted:
                raise
            kept = target.with_stem(target.stem + "-unfinished")
            write_image(error.result.image, kept, _parameters(settings, generation, error.result.image.size))
            raise UnfinishedError(error.__cause__, error.result, f" (kept in {kept})") from error.__cause__
        except DinotileError as error:
            if len(jobs) == 1:
                raise
            failures.append(f"{source.name}: {error}")
    bar.close()
    if failures:
        raise DinotileError(f"{len(failures)} of {len(jobs)} images were left out: " + "; ".join(failures))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 broken off, 2 bad input, 130 cancelled."""
    parser = Parser(prog="dinotile", description="Upscales images tile by tile, true to what they show.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("upscale", help="upscale an image or a folder of images", allow_abbrev=False)
    command.add_argument("IN", help="an image, or a folder of images")
    command.add_argument("OUT", help="the file to write, or a folder")
    command.add_argument("--quiet", action="store_true", help="say nothing but what goes wrong")
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
