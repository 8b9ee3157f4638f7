"""python -m lib_dinotile analyze IN OUT"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from PIL import Image

from lib_dinotile.cli.common import adapter_files, add_options, head_files, parse_options, quiet_transformers, silenced
from lib_dinotile.cli.files import check_files, check_given
from lib_dinotile.condition.conditioner import Conditioner
from lib_dinotile.dino.locks import models_folder
from lib_dinotile.engine.flow import analyze, canvas_size, draw_regions, plan_tiles
from lib_dinotile.engine.prompts import check_letters
from lib_dinotile.images import check_writable, read_image, write_image
from lib_dinotile.settings import BOTH, CONSISTENCY, NO_REGIONS, SEMANTIC, Settings

OPTIONS = (
    "scale",
    "tile",
    "overlap",
    "adapter",
    "encoder",
    "patches",
    "windows",
    "head",
    "guard_strictness",
    "regions",
    "region_prompts",
)
"""Those that maps of an image depend on."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    command.add_argument("IN", help="the source image")
    command.add_argument(
        "OUT",
        help="the semantic map to write; beside it, with -consistency and -regions in their names, go the consistency "
        "map and that of the regions",
    )
    command.add_argument(
        "--result", metavar="FILE", help="the upscaled image to compare; without it the plain enlarged source is"
    )
    add_options(command, Settings, OPTIONS)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Maps of one image, without a diffusion model."""
    check_given(IN=arguments.IN, OUT=arguments.OUT, result=arguments.result)
    quiet_transformers()
    settings = dataclasses.replace(parse_options(Settings, arguments), maps=BOTH)
    target = Path(arguments.OUT)
    check_writable(target)
    files = {name: _file(target, name) for name in (SEMANTIC, CONSISTENCY, "regions")}
    reads = [Path(path) for path in (arguments.IN, arguments.result) if path]
    check_files({"IN or --result": reads}, [("OUT", file) for file in files.values()])
    with silenced():
        source = read_image(Path(arguments.IN))
        result = read_image(Path(arguments.result)) if arguments.result else None
    size: tuple[int, int] = canvas_size(source.size, settings) if result is None else result.size
    conditioner = Conditioner.without_model(
        settings, head_files(settings), adapters=adapter_files(settings), encoders=models_folder("encoders")
    )
    print(f"encoder: {conditioner.encoder.id}")
    drawn: dict[str, Image.Image] = {}
    if settings.regions != NO_REGIONS:
        plan = plan_tiles(size, settings, "sd15")
        regions = conditioner.regions(source, plan.size)
        check_letters(regions, settings.region_words)
        drawn["regions"] = draw_regions(source, regions, plan, settings.region_words)
        listed = ", ".join(f"{letter} {share:.0%}" for letter, share in zip(regions.letters, regions.areas))
    for name, picture in {**analyze(conditioner, source, settings, size, result), **drawn}.items():
        write_image(picture, files[name], {})
        print(f"{files[name]}: " + (f"regions: {listed}" if name in drawn else f"{name} map"))


def _file(target: Path, name: str) -> Path:
    """Where the map of that name goes."""
    return target if name == SEMANTIC else target.with_name(f"{target.stem}-{name}{target.suffix}")
