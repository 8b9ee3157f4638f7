"""Options of `upscale` that contradict each other, or cannot be read: said before a model is loaded."""

from __future__ import annotations

import argparse
import os

from lib_dinotile import DinotileError
from lib_dinotile.hosts.diffusers_addons import check_added
from lib_dinotile.hosts.diffusers_pipelines import is_hub_id
from lib_dinotile.hosts.diffusers_prompts import parse_prompt
from lib_dinotile.lines import parse_tile_prompts
from lib_dinotile.options import Options
from lib_dinotile.settings import Generation, Settings

SIZES = {"scale": ("scale",), "longest side": ("longest",), "img2img size": ("width", "height")}
"""By target size, the options that give it."""
UNUSED = (
    *("prompt", "negative", "cfg", "clip_skip", "prediction", "config"),
    *("lora", "vae", "controlnet", "controlnet_strength"),
)
"""Options that the built-in model has no use for."""


def target_of(arguments: argparse.Namespace, settings: Settings) -> str:
    """The target size: that of the options given, if none is named. DinotileError for a size that would not count."""
    given = {name: target for target, names in SIZES.items() for name in names if getattr(arguments, name) is not None}
    target = settings.target if arguments.target is not None or not given else next(iter(given.values()))
    for name, own in given.items():
        if own != target:
            named = f"--target {target!r}" if arguments.target is not None else f"--{next(iter(given))}"
            raise DinotileError(f"{name}: has no effect with {named}: leave one of them out")
    return target


def check_generation(generation: Generation, settings: Settings) -> None:
    """DinotileError for options without effect, files that are not there, and prompts that cannot be read."""
    _check_unused(generation, settings)
    check_added(generation)
    if generation.mask and not os.path.isfile(generation.mask):
        raise DinotileError(f"mask: there is no file {generation.mask}")
    if generation.model != "mini":  # which reads none
        _check_prompts(generation, settings)


def _check_unused(generation: Generation, settings: Settings) -> None:
    def refuse(name: str, reason: str, table: Options = generation) -> None:
        if getattr(table, name) != table.option(name).default:
            raise DinotileError(f"{name}: {reason}")

    if generation.model == "mini":
        reason = "the built-in model mini has no use for it: leave it out, or give a --model"
        for name in UNUSED:
            refuse(name, reason)
        for name in ("tile_prompt", "tile_prompts", "region_prompts"):
            refuse(name, reason, settings)
    if not generation.controlnet:
        refuse("controlnet_strength", "there is no ControlNet: leave it out, or give a --controlnet")
    if os.path.isdir(generation.model) or is_hub_id(generation.model):
        refuse("config", f"only a checkpoint file needs it, {generation.model} has its own: leave it out")


def _check_prompts(generation: Generation, settings: Settings) -> None:
    prompts = {
        "prompt": [generation.prompt],
        "negative": [generation.negative],
        "tile_prompt": [settings.tile_prompt],
        "tile_prompts": parse_tile_prompts(settings.tile_prompts).values(),
        "region_prompts": settings.region_words.values(),
    }
    for name, texts in prompts.items():
        for text in texts:
            parse_prompt(text, name)
