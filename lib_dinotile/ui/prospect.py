"""What can be told of an image before anything is painted: its tiles, and what DINO sees in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from modules import devices, images, processing, sd_models, shared
from PIL import Image, ImageOps

from lib_dinotile import DinotileError, engine
from lib_dinotile.condition.conditioner import Conditioner, installed_weights
from lib_dinotile.hosts import folders
from lib_dinotile.hosts.area import Area
from lib_dinotile.hosts.base import check_name
from lib_dinotile.hosts.webui import base_of
from lib_dinotile.settings import OFF, SEMANTIC, Settings
from lib_dinotile.tiling.plan import TilePlan


def loaded() -> Any:
    """The WebUI's model if it is loaded now, else None."""
    data = sd_models.model_data
    if hasattr(data, "forge_loading_parameters") and data.forge_hash != str(data.forge_loading_parameters):
        return None  # another one is chosen, Forge loads it when it is first used
    return data.sd_model


def checkpoint() -> Any:
    """The WebUI's model, loaded if it is not yet. DinotileError if there is none."""
    if not hasattr(sd_models, "forge_model_reload"):
        model = shared.sd_model
    elif sd_models.model_data.forge_loading_parameters.get("checkpoint_info"):
        model = sd_models.forge_model_reload()[0]
    else:
        model = None
    if model is None:
        raise DinotileError("no checkpoint is loaded: choose one")
    return model


def flat(image: Image.Image) -> Image.Image:
    """As img2img takes it: turned as its EXIF says, RGB, on the WebUI's own background."""
    return images.flatten(ImageOps.exif_transpose(image), shared.opts.img2img_background_color)


class Prospect:
    """An image as it would be upscaled with these settings, and img2img's own size and resize mode."""

    settings: Settings
    """With the tile size that belongs to the checkpoint, where it is automatic."""
    plan: TilePlan

    def __init__(
        self, size: tuple[int, int], settings: Settings, model: Any, given: tuple[int, int] = (0, 0), resize: int = 0
    ) -> None:
        """size, given: (width, height) of the image and of img2img's `Resize to`. DinotileError as in a run."""
        self.settings = settings = settings.for_base(base_of(model))
        check_name("upscaler", settings.upscaler, [upscaler.name for upscaler in shared.sd_upscalers])
        img2img = SimpleNamespace(width=given[0], height=given[1], resize_mode=resize, image_mask=None)
        self._area = Area(img2img, settings, size)
        self.plan = TilePlan(*self._area.canvas, settings.tile, settings.overlap, processing.opt_f, settings.order)

    @property
    def workload(self) -> tuple[int, int]:
        """(tiles, pixels of all of them)."""
        return engine.workload(self.plan, self.settings)

    def semantic_map(self, image: Image.Image) -> Image.Image:
        """What DINO sees in the image (RGB), with the tiles. DinotileError if an encoder or adapter is not there."""
        device = torch.device(devices.device)
        conditioner = Conditioner.without_model(
            dataclasses.replace(self.settings, maps=SEMANTIC, guard=OFF),
            folders.trained_heads(),
            device,
            devices.dtype if device.type == "cuda" else torch.float32,
            installed_weights(folders.adapters()),
            folders.encoders(),
            trusted=False,
        )
        return engine.preview(conditioner, self._area.cut(image), self.plan)


def waves(plan: TilePlan) -> Sequence[Sequence[int]]:
    """The numbers of the tiles, counted from 1 row by row, in their order; those of a wave together."""
    numbers = {tile: number for number, tile in enumerate(plan.tiles, 1)}
    return [] if plan.order == "none" else [[numbers[tile] for tile in wave] for wave in plan.waves]
