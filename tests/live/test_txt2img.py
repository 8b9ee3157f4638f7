"""txt2img, hires fix and DINO Tile in one go: what is generated is upscaled as img2img would do it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client import SLACK, Reply, WebUI, difference, encode, fields
from conftest import PREVIEWS
from conftest import TILES as LARGE
from PIL import Image
from plots import SCRIPT, Plot
from test_faults import TOLD, Case, Faults

from lib_dinotile.settings import Txt2Img

DENOISE = Txt2Img().denoise
TILES = {**LARGE, "scale": 1.5}
"""One tile alone, four after hires fix."""
HIRES: dict[str, Any] = {
    "enable_hr": True,
    "hr_scale": 1.5,
    "hr_upscaler": "Latent",
    "denoising_strength": 0.6,
    "hr_additional_modules": [],  # Forge wants to be told
    "hr_cfg": 7,
}
LATENT, PIXELS = HIRES, {**HIRES, "hr_upscaler": "Lanczos", "hr_second_pass_steps": 3}
EXPLICIT: dict[str, Any] = {
    "enable_hr": False,
    "hr_sampler_name": "Euler",
    "hr_scheduler": "Automatic",
    "hr_additional_modules": [],
    "styles": [],
}
"""What the WebUIs do not get right where it comes from PNG info in a request."""
SAVING = {"save_images": True, "do_not_save_grid": True}


@pytest.fixture(autouse=True)
def generated(webui: WebUI, plain_txt2img: Image.Image) -> Iterator[None]:
    """Whatever a test did: a plain txt2img after it is, bit for bit, what it was before the first."""
    yield
    assert difference(webui.txt2img().image, plain_txt2img) == 0, "a plain generation is no longer what it was"


@pytest.fixture(scope="module")
def plain_txt2img(webui: WebUI) -> Image.Image:
    return webui.txt2img().image


@pytest.fixture(scope="module")
def folder(webui: WebUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the WebUI saves."""
    names = ("outdir_txt2img_samples", "outdir_txt2img_grids")
    present = webui.get("sdapi/v1/options").json()
    made = tmp_path_factory.mktemp("saved")
    webui.post("options", dict.fromkeys(names, str(made))).raise_for_status()
    yield made
    webui.post("options", {name: present[name] for name in names}).raise_for_status()


def saved(folder: Path) -> dict[str, Image.Image]:
    """By the end of their names the images that are there, which are taken away."""
    found = {}
    for file in sorted(each for each in folder.rglob("*") if each.is_file()):
        with Image.open(file) as image:
            image.load()
            found[re.sub(r"^[\d-]+", "", file.stem).lstrip("-")] = image
        file.unlink()
    return found


@pytest.mark.parametrize("hires", [{}, LATENT, PIXELS], ids=["alone", "latent", "pixels"])
def test_it_is_what_img2img_makes_of_the_image(webui: WebUI, hires: dict[str, Any]):
    before = webui.txt2img(**hires).image
    large = webui.txt2img(TILES, **hires)
    assert before.size in ([(96, 96), (128, 128)] if hires else [(64, 64)])  # Forge Neo rounds it up
    assert large.image.size == (before.width * 3 // 2, before.height * 3 // 2)
    assert difference(large.image, webui.img2img(before, TILES, denoising_strength=DENOISE).image) == 0
    assert large.fields["Size"] == "64x64" and large.fields["DINO Tile denoise"] == str(DENOISE)
    assert large.fields.get("Denoising strength") == ("0.6" if hires else None)


def test_it_has_a_denoising_strength_and_steps_of_its_own(webui: WebUI):
    before, own = webui.txt2img().image, {**TILES, "denoise": 0.6, "steps": 7}
    large = webui.txt2img(own)
    assert difference(large.image, webui.img2img(before, TILES, denoising_strength=0.6, steps=7).image) == 0
    assert (large.fields["Steps"], large.fields["DINO Tile steps"]) == ("4", "7")
    untouched = webui.txt2img({**own, "denoise": 0, "colour": "none"}).image
    assert difference(untouched, large.image) > 1


def test_words_that_come_at_a_step_come_at_those_of_the_tiles(webui: WebUI):
    words = {"prompt": "a [cat:dog:0.5]", "cfg_scale": 12}
    before = webui.txt2img(**words).image
    large = webui.txt2img({**TILES, "denoise": 0.9, "steps": 8}, **words)
    assert difference(large.image, webui.img2img(before, TILES, denoising_strength=0.9, steps=8, **words).image) == 0


def test_tiles_have_the_main_prompt_and_sampler(webui: WebUI):
    """Hires fix may have others."""
    others = {**LATENT, "hr_prompt": "a red house", "hr_negative_prompt": "a cat", "hr_sampler_name": "Euler a"}
    more = {"prompt": "a photo", "cfg_scale": 12}
    options = {**TILES, "denoise": 0.7}
    before = webui.txt2img(**others, **more).image
    large = webui.txt2img(options, **others, **more)
    assert difference(large.image, webui.img2img(before, TILES, denoising_strength=0.7, **more).image) == 0
    assert large.fields["Hires sampler"] == "Euler a"


@pytest.mark.parametrize("more", [{}, LATENT], ids=["alone", "hires"])
def test_png_info_gives_the_image_again(webui: WebUI, more: dict[str, Any]):
    options = {**TILES, "denoise": 0.45, "steps": 6, "guard": "report", "guidance": 0.5}
    first = webui.txt2img(options, **more)
    again = webui.txt2img(infotext=first.infotexts[0], **{**EXPLICIT, **more})
    assert difference(first.image, again.image) == 0 and first.infotexts == again.infotexts
    assert webui.txt2img().image.size == (64, 64), "it stays on"


def test_png_info_of_img2img_leaves_it_off(webui: WebUI, small: Image.Image, plain: Image.Image):
    info = webui.img2img(small, TILES).infotexts[0]
    assert webui.txt2img(infotext=info, **EXPLICIT).image.size == (64, 64)
    assert webui.img2img(small, infotext=webui.txt2img(TILES).infotexts[0]).image.size == plain.size


def test_switched_off_it_has_no_part_in_the_image(webui: WebUI):
    for more in ({}, LATENT):
        plain, off = webui.txt2img(**more), webui.txt2img({**TILES, "enabled": False}, **more)
        assert difference(plain.image, off.image) == 0 and plain.infotexts == off.infotexts


@pytest.mark.parametrize("strength", [0, 0.3])
def test_every_image_of_a_batch_is_that_of_its_own_seed(webui: WebUI, strength: float):
    seeds = {"seed": 3, "subseed": 8, "subseed_strength": strength}
    together = webui.txt2img(TILES, **seeds, n_iter=2, batch_size=2)
    assert len(together.images) == len(together.infotexts) == 4
    assert [image.size for image in together.images] == [(96, 96)] * 4
    for number in (0, 3):
        own = {**seeds, "seed": 3 + (number if strength == 0 else 0), "subseed": 8 + number}
        alone = webui.txt2img(TILES, **own)
        # Of a batch of two the WebUI's own images may differ in the last digit.
        assert difference(together.images[number], alone.image) <= 2
        assert fields(together.infotexts[number])["Seed"] == alone.fields["Seed"]


def test_other_extensions_see_the_large_image(webui: WebUI):
    """As ADetailer does; of the job they see what the user has set."""
    if webui.get("dinotile-faults/seen").status_code != 200:
        pytest.skip("this WebUI has no dinotile-faults, see README.md")
    size = [side * 3 // 2 for side in webui.txt2img(**LATENT).image.size]
    webui.txt2img(TILES, **LATENT, batch_size=2)
    assert webui.get("dinotile-faults/seen").json() == [{"size": size, "job": [64, 64], "denoise": 0.6}] * 2


@pytest.mark.parametrize("hires", [{}, LATENT], ids=["alone", "hires"])
def test_both_images_are_saved(webui: WebUI, folder: Path, hires: dict[str, Any]):
    before = webui.txt2img(**hires).image
    option = "save_images_before_highres_fix"
    large = webui.txt2img(TILES, **hires, **SAVING, override_settings={option: True})
    found = saved(folder)
    assert sorted(found) == sorted(["", "before-dinotile", *(["before-highres-fix"] if hires else [])])
    assert difference(found["before-dinotile"], before) == 0 and difference(found[""], large.image) == 0
    told = fields(found["before-dinotile"].info["parameters"])
    assert told["Size"] == "64x64" and told["DINO Tile scale"] == "1.5"
    webui.txt2img(TILES, **hires, **SAVING, override_settings={option: False})
    assert list(saved(folder)) == [""], "only where the WebUI is set to save what is before hires fix"


def test_a_grid_is_made_of_the_large_images(webui: WebUI, folder: Path):
    webui.txt2img(TILES, batch_size=2, save_images=True, override_settings={"grid_save": True, "return_grid": True})
    assert (192, 96) in [image.size for image in saved(folder).values()]


@pytest.mark.parametrize("how", ["interrupt", "skip"])
def test_stopped_amid_the_tiles_it_keeps_those_that_are_painted(webui: WebUI, how: str):
    options = {**LARGE, "tile": 64, "batch": 1, "order": "linear", "denoise": 0.9, "steps": 12}
    job = webui.start_txt2img(options)
    next(look for look in job.looks() if look.tiles)
    webui.post(how)
    reply = job.reply()
    painted, total = map(int, reply.fields["DINO Tile painted"].split(" of "))
    assert reply.image.size == (128, 128) and 0 < painted < total


@pytest.mark.parametrize("hires", [{}, {**LATENT, "hr_second_pass_steps": 30}], ids=["alone", "hires"])
def test_stopped_before_the_first_tile_it_gives_what_is_generated(webui: WebUI, hires: dict[str, Any]):
    job = webui.start_txt2img(TILES, **{**hires, "steps": 60})
    next(look for look in job.looks() if look.running and look.share > 0.02)
    webui.post("interrupt")
    reply = job.reply()
    assert reply.image.size in ((64, 64), (96, 96)) and (hires or reply.image.size == (64, 64))
    painted, total = map(int, reply.fields["DINO Tile painted"].split(" of "))
    assert painted == 0 < total


def test_the_batch_after_a_skipped_one_is_whole(webui: WebUI):
    job = webui.start_txt2img(TILES, steps=40, n_iter=2)
    next(look for look in job.looks() if look.running and look.share > 0.01)
    webui.post("skip")
    first, second = job.reply().infotexts
    assert fields(first)["DINO Tile painted"].startswith("0 of ") and "DINO Tile painted" not in fields(second)


@pytest.mark.parametrize("hires", [{}, LATENT], ids=["alone", "hires"])
def test_progress_grows_from_the_first_step_to_the_last_tile(webui: WebUI, hires: dict[str, Any]):
    options = {**TILES, "tile": 64, "batch": 1, "order": "linear", "steps": 12}
    job = webui.start_txt2img(options, **{**hires, "steps": 20}, n_iter=2, **PREVIEWS)
    seen = [look for look in job.looks() if look.running]
    assert len(job.reply().images) == 2
    shares = [look.share for look in seen]
    assert all(later >= earlier - SLACK for earlier, later in itertools.pairwise(shares)), shares
    assert max(shares) <= 1 and shares[-1] > 0.8
    generating = [look.share for look in seen if look.tiles is None]
    assert len({round(share, 3) for share in generating}) > 5, "it stands still while the image is generated"
    assert seen[0].jobs[1] == seen[-1].jobs[1] and seen[-1].jobs[0] <= seen[-1].jobs[1]


def test_an_error_is_told_in_a_line_and_the_image_is_kept(webui: WebUI, folder: Path, request: pytest.FixtureRequest):
    faults = Faults(request.config.getoption("--webui"))
    if not faults.there:
        pytest.skip("this WebUI has no dinotile-faults, see README.md")
    options = {**LARGE, "tile": 64, "overlap": 0, "batch": 1, "order": "linear"}
    before, large = webui.txt2img(), webui.txt2img(options)
    for stage, after, line in (
        ("upscale", 0, "stopped before the first tile: "),
        ("sampler", 2, r"stopped after 2 of 4 tiles \(kept in .+-unfinished.png\): "),
    ):
        webui.txt2img(options)
        clean = faults.disarm()[1]
        faults.arm(Case(stage, after=after))
        answer = webui.post("txt2img", webui.txt2img_body(options, **SAVING))
        fired, left = faults.disarm()
        line = rf"{line}{TOLD}; the image before upscaling is saved in .+-before-dinotile\.png"
        assert fired and answer.status_code == 500 and re.fullmatch(line, answer.json()["detail"]), answer.text[:2000]
        assert difference(saved(folder)["before-dinotile"], before.image) == 0
        assert {**left, "tensors": 0, "bytes": 0} == {**clean, "tensors": 0, "bytes": 0}
        assert left["tensors"] <= clean["tensors"] and left["bytes"] <= clean["bytes"]
    assert difference(webui.txt2img(options).image, large.image) == 0


def test_an_error_of_the_webui_itself_stays_its_own(webui: WebUI, request: pytest.FixtureRequest):
    faults = Faults(request.config.getoption("--webui"))
    if not faults.there:
        pytest.skip("this WebUI has no dinotile-faults, see README.md")
    faults.arm(Case("unet", after=1))
    answer = webui.post("txt2img", webui.txt2img_body(TILES))
    assert faults.disarm()[0] and answer.status_code == 500 and "dinotile" not in answer.text.lower()


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "the size of img2img": (
        {"target": "img2img size"},
        {},
        "target: 'img2img size' is not allowed, give one of scale, longest side",
    ),
    "too much denoise": ({"denoise": 1.5}, {}, "denoise: 1.5 is not allowed, give a number from 0 to 1"),
    "too many steps": (
        {"steps": 151},
        {},
        r"steps: 151 is not allowed, give 0 \(the image's\) or a whole number from 1 to 150",
    ),
    "unknown adapter": ({"adapter": "nope"}, {}, "adapter: 'nope' is not installed, give one of None.*"),
    "too large": ({"scale": 8}, {"width": 16384, "height": 64}, "scale: the result would be 131072x512, .*"),
    "networks": (
        {"tile_prompt": "<lora:cat:1>"},
        {},
        "prompts of tiles and regions cannot load networks such as LoRA: .*",
    ),
}


@pytest.mark.parametrize("options, more, line", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_generated(webui: WebUI, options, more, line: str):
    refusal = webui.refused(webui.post("txt2img", webui.txt2img_body({**TILES, **options}, **more)))
    assert re.fullmatch(line, refusal), refusal


@pytest.mark.parametrize("name", ["refiner_checkpoint", "hr_checkpoint_name"])
def test_other_checkpoints_are_refused(webui: WebUI, name: str):
    checkpoint = webui.get("sdapi/v1/sd-models").json()[0]["title"]
    body = webui.txt2img_body(TILES, **{**LATENT, name: checkpoint, "refiner_switch_at": 0.5})
    words = {"refiner_checkpoint": "set Refiner to None", "hr_checkpoint_name": "leave Hires checkpoint"}
    assert words[name] in webui.refused(webui.post("txt2img", body))


@pytest.mark.parametrize("name", ["denoise", "steps"])
def test_img2img_has_its_own_denoising_strength_and_steps(webui: WebUI, small: Image.Image, name: str):
    line = webui.refusal(small, {**TILES, name: 1})
    assert line == f"{name}: only txt2img has this option: leave it out, and use img2img's own"


def test_a_plot_over_its_options(webui: WebUI):
    plot = Plot(webui, img2img=False)
    assert {"Denoising strength", "Steps", "Scale"} <= set(plot.axes)
    assert not {"Denoising strength", "Steps"} & set(Plot(webui).axes)
    args = plot.args(x=("Scale", [1, 1.5]), y=("Denoising strength", [0.2, 0.5]))
    _, *cells = webui.txt2img({**TILES, "enabled": False}, script_name=SCRIPT, script_args=args).images
    assert [cell.size for cell in cells] == [(64, 64), (96, 96)] * 2
    expected = [(scale, denoise) for denoise in (0.2, 0.5) for scale in (1, 1.5)]
    for cell, (scale, denoise) in zip(cells, expected):
        assert difference(cell, webui.txt2img({**TILES, "scale": scale, "denoise": denoise}).image) == 0
    args = plot.args(x=("Tile size", [64, 96]), y=("Tile overlap", [16, 48]))
    refusal = webui.refused(webui.post("txt2img", webui.txt2img_body(TILES, script_name=SCRIPT, script_args=args)))
    assert refusal.startswith("overlap: 48 is not allowed with tile 64"), refusal
    args = plot.args(x=("Target size", ["img2img size"]))
    refusal = webui.refused(webui.post("txt2img", webui.txt2img_body(TILES, script_name=SCRIPT, script_args=args)))
    assert refusal.startswith("Target size: 'img2img size' is not allowed"), refusal


def test_a_plot_of_both_tabs_plots_the_options_of_both(webui: WebUI, plot: Plot, small: Image.Image):
    args = plot.args(x=("Scale", [1.5]))
    assert [image.size for image in webui.img2img(small, TILES, script_name=SCRIPT, script_args=args).images] == [
        (96, 72)
    ] * 2


def test_prompts_of_a_matrix(webui: WebUI):
    known = {entry["name"]: entry for entry in webui.get("sdapi/v1/script-info").json() if not entry["is_img2img"]}
    if "prompt matrix" not in known:
        pytest.skip("this WebUI has no prompt matrix")
    row = [argument["value"] for argument in known["prompt matrix"]["args"]]
    reply = webui.txt2img(TILES, script_name="prompt matrix", script_args=row, prompt="a photo|a cat")
    assert [image.size for image in reply.images].count((96, 96)) == 2


@pytest.fixture(scope="module")
def unit(webui: WebUI, request: pytest.FixtureRequest) -> dict[str, Any]:
    """A unit of ControlNet, without its image."""
    model = request.config.getoption("--controlnet")
    answer = webui.get("controlnet/model_list")
    if not model or answer.status_code != 200:
        pytest.skip("this WebUI has no ControlNet, or none is named: give --controlnet MODEL")
    names = answer.json()["model_list"]
    found = next((name for name in names if name == model or name.split(" [")[0] == model), None)
    assert found, f"--controlnet {model!r} is none of {', '.join(names)}"
    modules = webui.get("controlnet/module_list").json()["module_list"]
    none = next(name for name in modules if name.lower() == "none")
    return {"enabled": True, "module": none, "model": found, "weight": 0.1}


def controlled(webui: WebUI, unit: dict[str, Any], options: dict[str, Any] | None, **more: Any) -> Image.Image:
    """The image alone: what follows it are the unit's own."""
    return webui.txt2img(options, alwayson_scripts={"ControlNet": {"args": [unit]}}, **more).images[0]


@pytest.mark.parametrize("hires", [{}, LATENT], ids=["alone", "hires"])
def test_controlnet_shows_every_tile_its_part_of_the_control_image(webui: WebUI, unit, hires: dict[str, Any]):
    """Of an image of one colour the hint is the same whatever its size, and so img2img's."""
    control = Image.new("RGB", (64, 64), "#4080c0")
    shown = {**unit, "image": encode(control)}
    before = controlled(webui, shown, None, **hires)
    large = controlled(webui, shown, TILES, **hires)
    scripts = {"ControlNet": {"args": [shown]}}
    alike = webui.img2img(before, TILES, denoising_strength=DENOISE, alwayson_scripts=scripts).images[0]
    without = webui.img2img(before, TILES, denoising_strength=DENOISE).image
    assert difference(large, alike) == 0 and difference(large, without) > 1


@pytest.mark.parametrize("option, tiles", [("Low res only", False), ("High res only", True), ("Both", True)])
def test_controlnet_counts_the_tiles_to_the_high_resolution(webui: WebUI, unit, option: str, tiles: bool):
    shown = {**unit, "image": encode(Image.new("RGB", (64, 64), "#4080c0")), "hr_option": option}
    before = controlled(webui, shown, None, **LATENT)
    large = controlled(webui, shown, TILES, **LATENT)
    scripts = {"ControlNet": {"args": [{**shown, "hr_option": "Both"}]}} if tiles else {}
    alike = webui.img2img(before, TILES, denoising_strength=DENOISE, alwayson_scripts=scripts).images[0]
    assert difference(large, alike) == 0


def test_a_tile_gets_its_own_part_of_the_control_image(webui: WebUI, unit):
    """Where it is like another one, tiles are what img2img makes of them with that one."""
    options = {**LARGE, "tile": 64, "overlap": 0, "colour": "none", "denoise": 0.6}
    control = Image.new("RGB", (64, 64), "#4080c0")
    half = control.copy()
    half.paste((0, 0, 0), (40, 0, 64, 64))
    before, large = (controlled(webui, {**unit, "image": encode(half)}, each) for each in (None, options))
    scripts = {"ControlNet": {"args": [{**unit, "image": encode(control)}]}}
    own = {name: value for name, value in options.items() if name != "denoise"}
    other = webui.img2img(before, own, denoising_strength=0.6, alwayson_scripts=scripts).images[0]
    left, right = (0, 0, 64, 128), (64, 0, 128, 128)
    assert difference(large.crop(left), other.crop(left)) == 0
    assert difference(large.crop(right), other.crop(right)) > 1


def test_maps_and_report(webui: WebUI):
    reply: Reply = webui.txt2img({**TILES, "maps": "both", "guard": "report"})
    assert [image.size for image in reply.images][:2] == [(96, 96)] * 2 and len(reply.images) == 3
    assert len(reply.extra["DINO Tile report"]) == 1 and reply.extra["DINO Tile report"][0]["tiles"]
