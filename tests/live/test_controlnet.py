"""ControlNet sees of the control image what the tile shows, and works together with the adapter."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from adapters import Adapters
from client import WebUI, difference, encode
from PIL import Image

from lib_dinotile.tiling.plan import TilePlan

WEIGHT = 0.1
"""Enough to be seen, also where the ControlNet is not trained."""
ONE_TILE = {"scale": 2, "tile": 256, "overlap": 0}
"""The whole canvas in one tile, which gets the whole control image."""
MANY = {"scale": 2, "tile": 128, "overlap": 16, "order": "linear"}
FOUR = {"scale": 1, "upscaler": "None", "tile": 64, "overlap": 0, "colour": "none"}
"""A source of 128x128 becomes four tiles of it that touch nowhere."""
NO_NOISE = {"initial_noise_multiplier": 0}
"""What a tile becomes depends on nothing but what it shows, and what ControlNet and prompt say to it."""

GRIDS = [pytest.param(ONE_TILE, id="one tile"), pytest.param(MANY, id="many tiles")]


@pytest.fixture(scope="module")
def unit(webui: WebUI, request: pytest.FixtureRequest, source: Image.Image) -> dict[str, Any]:
    """A unit that shows the ControlNet the source."""
    model = request.config.getoption("--controlnet")
    if not model:
        pytest.skip("no ControlNet is named: give --controlnet MODEL")
    answer = webui.get("controlnet/model_list")
    if answer.status_code != 200:
        pytest.skip("this WebUI has no ControlNet")
    names = answer.json()["model_list"]
    found = next((name for name in names if name == model or name.split(" [")[0] == model), None)
    assert found, f"--controlnet {model!r} is none of {', '.join(names)}"
    modules = webui.get("controlnet/module_list").json()["module_list"]
    none = next(name for name in modules if name.lower() == "none")
    return {"enabled": True, "image": encode(source), "module": none, "model": found, "weight": WEIGHT}


@pytest.fixture(scope="module")
def large(photo: Image.Image) -> Image.Image:
    return photo.resize((128, 128))


@pytest.fixture(scope="module")
def specks() -> Image.Image:
    """A control image that is another in every tile, of the size of `large`."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def plan() -> TilePlan:
    """The tiles of `large` in `FOUR`."""
    return TilePlan(128, 128, FOUR["tile"])


def controlled(
    webui: WebUI, source: Image.Image, units: dict[str, Any] | list[dict], options: dict[str, Any] | None, **request
) -> Image.Image:
    """The image alone: what follows it are the units' own pictures."""
    units = units if isinstance(units, list) else [units]
    return webui.img2img(source, options, alwayson_scripts={"ControlNet": {"args": units}}, **request).images[0]


def unit_fields(webui: WebUI) -> dict[str, Any]:
    scripts = webui.get("sdapi/v1/script-info").json()
    return next(script["args"] for script in scripts if script["name"] == "controlnet")[0]["value"] or {}


def cut(image: Image.Image, tile) -> Image.Image:
    return image.crop((tile.x, tile.y, tile.right, tile.bottom))


@pytest.mark.parametrize("grid", GRIDS)
def test_both_have_their_effect(webui: WebUI, source: Image.Image, unit, adapters: Adapters, grid):
    adapted = {**grid, "adapter": adapters.random}
    images = {
        "neither": webui.img2img(source, grid).image,
        "the adapter": webui.img2img(source, adapted).image,
        "ControlNet": controlled(webui, source, unit, grid),
        "both": controlled(webui, source, unit, adapted),
    }
    for one, other in itertools.combinations(images, 2):
        assert difference(images[one], images[other]) > 1, f"{one} and {other} make the same image"


@pytest.mark.parametrize("grid", GRIDS)
def test_an_untrained_adapter_changes_nothing(webui: WebUI, source: Image.Image, unit, adapters: Adapters, grid):
    alone = controlled(webui, source, unit, grid)
    assert difference(controlled(webui, source, unit, {**grid, "adapter": adapters.untrained}), alone) == 0


@pytest.mark.parametrize("tile", [64, 96])
def test_any_batch_gives_the_same_image(webui: WebUI, source: Image.Image, unit, adapters: Adapters, tile: int):
    options = {"scale": 2, "tile": tile, "overlap": 0, "adapter": adapters.random}
    one, four = (controlled(webui, source, unit, {**options, "batch": batch}) for batch in (1, 4))
    assert difference(one, four) <= 1


@pytest.mark.parametrize("order", ["chess", "linear", "fused"])
def test_any_batch_gives_the_same_image_in_every_order(webui: WebUI, large: Image.Image, unit, specks, order: str):
    options = {**FOUR, "overlap": 16, "order": order}
    shown = {**unit, "image": encode(specks)}
    one, four = (controlled(webui, large, shown, {**options, "batch": batch}) for batch in (1, 4))
    assert difference(one, four) <= 1


def test_a_tile_gets_its_own_part_of_the_control_image(webui: WebUI, photo: Image.Image, unit):
    """Where the control image changes, the tiles there change, and no others."""
    source = photo.resize((112, 64))  # two tiles side by side
    control = source.copy()
    control.paste((0, 0, 0), (source.width - 32, 0, source.width, source.height))
    one, other = (
        controlled(webui, source, {**unit, "image": encode(image)}, {**MANY, "overlap": 0, "colour": "none"})
        for image in (source, control)
    )
    near, far = (0, 0, 80, one.height), (one.width - 64, 0, one.width, one.height)
    assert difference(one.crop(near), other.crop(near)) == 0
    assert difference(one.crop(far), other.crop(far)) > 1


@pytest.fixture(scope="module")
def by_hand(webui: WebUI, large: Image.Image, unit, specks: Image.Image, plan: TilePlan) -> list[Image.Image]:
    """What the WebUI, without DINO Tile, makes of each tile of the source and of the control image cut by hand."""
    return [
        controlled(webui, cut(large, tile), {**unit, "image": encode(cut(specks, tile))}, None, **NO_NOISE)
        for tile in plan.tiles
    ]


@pytest.mark.parametrize("order, batch", [("chess", 4), ("linear", 1), ("fused", 1), ("fused", 4)])
def test_a_tile_is_what_its_crops_give_by_hand(
    webui: WebUI, large: Image.Image, unit, specks: Image.Image, plan: TilePlan, by_hand, order: str, batch: int
):
    options = {**FOUR, "order": order, "batch": batch}
    image = controlled(webui, large, {**unit, "image": encode(specks)}, options, **NO_NOISE)
    for tile, alone in zip(plan.tiles, by_hand):
        assert difference(cut(image, tile), alone) <= 1, tile
    assert difference(image, webui.img2img(large, options, **NO_NOISE).image) > 1


def test_two_units_at_once(webui: WebUI, large: Image.Image, unit, specks: Image.Image, plan: TilePlan):
    turned = specks.transpose(Image.Transpose.ROTATE_90)

    def units(tile=None) -> list[dict[str, Any]]:
        images = [image if tile is None else cut(image, tile) for image in (specks, turned)]
        return [{**unit, "image": encode(images[0])}, {**unit, "image": encode(images[1]), "weight": 2 * WEIGHT}]

    image = controlled(webui, large, units(), {**FOUR, "batch": 4}, **NO_NOISE)
    for tile in plan.tiles:
        assert difference(cut(image, tile), controlled(webui, cut(large, tile), units(tile), None, **NO_NOISE)) <= 1


def test_it_fits_a_canvas_of_any_size(webui: WebUI, large: Image.Image, unit, specks: Image.Image):
    """Forge Neo rounds the size of what it is to make to a multiple of 64, before ControlNet scales its image to it."""
    box, first, corner = (0, 0, 96, 96), (0, 0, 64, 64), (0, 0, 32, 32)  # what the first of four tiles shares with none
    source, control = large.crop(box), specks.crop(box)
    image = controlled(webui, source, {**unit, "image": encode(control)}, FOUR, **NO_NOISE)
    assert image.size == source.size
    shown = {**unit, "image": encode(control.crop(first))}
    alone = controlled(webui, source.crop(first), shown, None, **NO_NOISE)
    assert difference(image.crop(corner), alone.crop(corner)) <= 1


@pytest.mark.parametrize("order", ["chess", "fused"])
def test_an_effective_region_is_cut_too(
    webui: WebUI, large: Image.Image, unit, specks: Image.Image, plan: TilePlan, by_hand, order: str
):
    """A mask that is black over the two tiles on the left, and white over those on the right."""
    mask = Image.new("RGB", large.size)
    mask.paste("white", (64, 0, 128, 128))
    name = "mask_image" if "mask_image" in unit_fields(webui) else "effective_region_mask"
    masked = {**unit, "image": encode(specks), name: encode(mask)}
    plain = [controlled(webui, large, each, None, **NO_NOISE) for each in (masked, {**unit, "image": encode(specks)})]
    if difference(*plain) == 0:
        pytest.skip("this WebUI takes a region and does nothing with it")
    options = {**FOUR, "batch": 4, "order": order}
    image = controlled(webui, large, masked, options, **NO_NOISE)
    without = webui.img2img(large, options, **NO_NOISE).image
    for tile, alone in zip(plan.tiles, by_hand):
        expected = alone if tile.x else cut(without, tile)
        assert difference(cut(image, tile), expected) <= 1, tile


def test_it_hears_the_tiles_prompts(webui: WebUI, large: Image.Image, unit, specks: Image.Image, plan: TilePlan):
    """ControlNet gets the prompt of the tile along with its part of the control image, in batches of any size."""
    strong = {"cfg_scale": 100, **NO_NOISE}
    shown, told = {**unit, "image": encode(specks)}, {"tile_prompts": "2: a cat\n3: " + "a tree on a hill, " * 30}
    one, four = (controlled(webui, large, shown, {**FOUR, **told, "batch": batch}, **strong) for batch in (1, 4))
    assert difference(one, four) <= 1
    part = {**unit, "image": encode(cut(specks, plan.tiles[1]))}
    alone = controlled(webui, cut(large, plan.tiles[1]), part, None, prompt="a photo, a cat", **strong)
    assert difference(cut(four, plan.tiles[1]), alone) <= 1


def test_only_masked_it_is_cut_to_the_mask(webui: WebUI, photo: Image.Image, unit):
    """A source that is wide, a mask that is square: the part of the control image is that of the mask."""
    source, box = photo.resize((192, 96)), (64, 16, 128, 80)
    control = Image.fromarray(np.random.default_rng(1).integers(0, 256, (96, 192, 3), dtype=np.uint8))
    mask = Image.new("L", source.size)
    mask.paste(255, box)
    masked = {"mask": encode(mask), "mask_blur": 0, "inpainting_fill": 1}
    only = {**masked, "inpaint_full_res": True, "inpaint_full_res_padding": 0}
    image = controlled(webui, source, {**unit, "image": encode(control)}, FOUR, **only, **NO_NOISE)
    alone = controlled(webui, source.crop(box), {**unit, "image": encode(control.crop(box))}, FOUR, **NO_NOISE)
    assert difference(image.crop(box), alone) <= 1


@pytest.mark.parametrize("module", ["tile_colorfix", "reference_only", "inpaint_only"])
def test_a_preprocessor_that_looks_at_the_whole_image(webui: WebUI, source: Image.Image, unit, module: str):
    """A1111's gets by with the parts of the tiles."""
    if "effective_region_mask" in unit_fields(webui):
        pytest.skip("this is sd-webui-controlnet")
    units = {"ControlNet": {"args": [{**unit, "module": module}]}}
    line = f"the ControlNet preprocessor {module} looks at the whole image and does not work with tiles: choose another"
    assert webui.refusal(source, MANY, alwayson_scripts=units) == line


def test_every_image_of_a_loop_is_painted_from_its_own_source(webui: WebUI, source: Image.Image, unit):
    """One processing object is for all of them, as in the tab *Batch*, and ControlNet hooks into it every time."""
    options, more = {"scale": 1, "upscaler": "None", "tile": 64, "overlap": 16}, {"denoising_strength": 0.5}
    looped = {"script_name": "Loopback", "script_args": [2, 0.5, "Linear", "None"], "seed": 5, **more}
    units = {"ControlNet": {"args": [unit]}}
    first, second = webui.img2img(source, options, alwayson_scripts=units, **looped).images[-2:]
    assert difference(second, controlled(webui, first, unit, options, seed=6, **more)) == 0
    assert difference(first, second) > 1
