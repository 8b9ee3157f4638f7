"""What the WebUI may be set to that does not go together with tiles: refused before anything is done."""

from __future__ import annotations

from typing import Any

from modules import extra_networks, shared

from lib_dinotile import DinotileError
from lib_dinotile.settings import Settings

RIVALS = (
    "sd upscale",
    "ultimate sd upscale",
    "poor man's outpainting",
    "outpainting mk2",
    "img2img alternative test",
)
"""Scripts that hand img2img parts of the image, or something else in its place."""
SWITCHES = {
    "multidiffusion integrated": "cuts the image into tiles, too",
    "tiled diffusion": "cuts the image into tiles, too",
    "demofusion": "cuts the image into tiles, too",
    "stylealign integrated": "makes the tiles of a batch look alike",
    "pid integrated": "decodes latents, but dinotile gives it pixels",
}
"""Always-on scripts that do not go together with tiles, and why."""

HYPERTILE = ("hypertile_enable_unet", "hypertile_enable_vae")
"""Settings that switch A1111's HyperTile on."""


def _switched_on(p: Any, title: str) -> str:
    """The title of the always-on script, here in lower case, if its switch is on: the first of its arguments.

    The scripts take whatever is true for that, and a request may say 1 or "True".
    """
    for script in p.scripts.alwayson_scripts if p.scripts else ():
        has_switch = script.args_from is not None and script.args_from < script.args_to
        if script.title().lower() == title and has_switch and p.script_args[script.args_from]:
            return script.title()
    return ""


def _setting(p: Any, name: str) -> Any:
    """A setting of the WebUI as it will be for this job: those for the job alone are not in force yet.

    False if the WebUI has none of that name; its config.json may come from another that has.
    """
    return name in shared.opts.data_labels and p.override_settings.get(name, getattr(shared.opts, name))


def _selected(p: Any) -> str:
    """The title of the script that is chosen under Script, or nothing."""
    chosen = p.script_args[0] if p.scripts and p.script_args else 0
    if isinstance(chosen, str):  # that is how PNG info in a request says it
        return chosen
    return p.scripts.selectable_scripts[chosen - 1].title() if chosen else ""


def check_tiles_can_follow(p: Any, settings: Settings) -> None:
    """DinotileError for what no tab can have together with tiles."""
    hires = getattr(p, "enable_hr", False)  # after it, tiles are sampled as its second pass was
    if p.refiner_checkpoint not in (None, "", "None", "none"):
        raise DinotileError("DINO Tile does not support the Refiner: set Refiner to None")
    for title, why in SWITCHES.items():
        if found := _switched_on(p, title):
            raise DinotileError(f"{found} {why}: switch off one of the two")
    if any(_setting(p, name) for name in HYPERTILE) or (hires and _setting(p, "hypertile_enable_unet_secondpass")):
        raise DinotileError("HyperTile does not work with DINO Tile: switch it off in the settings")
    if _setting(p, "dynamic_clip_skip_enabled"):
        raise DinotileError(
            "Dynamic clip skip ramp would mix up the prompts of tiles: switch it off in the settings, or DINO Tile"
        )
    if _setting(p, "tiling") if p.tiling is None else p.tiling:
        raise DinotileError("Tiling would make every tile seamless, not the image: switch off Tiling or DINO Tile")
    for text in (settings.tile_prompt, settings.tile_prompts, settings.region_prompts):
        if extra_networks.parse_prompt(text)[1]:
            raise DinotileError(
                "prompts of tiles and regions cannot load networks such as LoRA: write them into the main prompt"
            )


def check_img2img(p: Any, settings: Settings) -> None:
    """DinotileError for what img2img cannot have together with tiles."""
    if not p.init_images or None in p.init_images:
        raise DinotileError("there is no image to upscale: drop one into the img2img tab")
    check_tiles_can_follow(p, settings)
    if _selected(p).lower() in RIVALS:
        raise DinotileError(
            f"{_selected(p)} and DINO Tile both replace img2img: set Script to None, or switch DINO Tile off"
        )
    if p.seed_resize_from_w > 0 and p.seed_resize_from_h > 0:
        raise DinotileError(
            "Resize seed: DINO Tile draws noise for the size of the result, not for another: set Resize seed from "
            "width and height to 0"
        )
    if p.image_mask is not None and _switched_on(p, "soft inpainting"):
        raise DinotileError("Soft inpainting does not work with tiles: switch it off and use Mask blur")
    if len({image.size for image in p.init_images}) != 1:
        raise DinotileError("all images of a batch must have one size: upscale the others by themselves")
    if len(p.init_images) > p.batch_size:
        count = len(p.init_images)
        raise DinotileError(f"batch size {p.batch_size} is too small for {count} images: make it {count}")
    if p.image_mask is not None and p.inpaint_full_res and settings.region_words:
        raise DinotileError(
            "prompts per region do not work with Only masked, where DINO sees a part of the image: set Inpaint area to "
            "Whole picture, or Regions to 0"
        )
