"""What single tiles are told besides the main prompt, or instead of it: by the user, or by an interrogator."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from client import Reply, WebUI, difference, encode, pixels, used
from PIL import Image

from lib_dinotile.tiling.plan import TilePlan

FOUR = {"scale": 2, "tile": 64, "overlap": 0, "batch": 4, "colour": "none"}
"""A source of 64x64 becomes four tiles that touch nowhere."""
ROW = {"scale": 2, "tile": 64, "overlap": 16, "batch": 4, "colour": "none"}
"""A source of 112x32 becomes four tiles side by side."""
LONG = "a photograph of a smiling astronaut in an orange suit in front of a flag and a model of a shuttle, " * 6
"""More than the 75 tokens that make one chunk."""
STRONG = {"cfg_scale": 100, "denoising_strength": 0.6}
"""So that words are seen also where the checkpoint is not trained."""
LINES = "DINO Tile tile prompts"


@pytest.fixture(scope="module")
def square(photo: Image.Image) -> Image.Image:
    return photo.resize((64, 64))


def generate(webui: WebUI, source: Image.Image, options: dict[str, Any], **request: Any) -> Reply:
    return webui.img2img(source, options, **{**STRONG, **request})


def lines(infotext: str) -> str:
    """What PNG info says that the tiles were told, one line each."""
    found = re.search(LINES + r': ("(?:\\.|[^\\"])*"|[^,\n]*)', infotext)
    assert found, f"no {LINES} in {infotext}"
    return json.loads(found[1]) if found[1].startswith('"') else found[1]


def changed(one: Image.Image, other: Image.Image, options: dict) -> list[int]:
    """The numbers of the tiles that differ where no other tile reaches them."""
    plan = TilePlan(*one.size, options["tile"], options["overlap"])
    change = abs(pixels(one) - pixels(other)).max(2)
    alone = np.zeros(change.shape, dtype=int)
    for tile in plan.tiles:
        alone[tile.slices] += 1
    return [
        number
        for number, tile in enumerate(plan.tiles, 1)
        if (change[tile.slices] * (alone[tile.slices] == 1)).max() > 1
    ]


@pytest.mark.parametrize("order", ["chess", "linear", "fused"])
@pytest.mark.parametrize("mode, joined", [("follow", "a photo, a cat"), ("replace", "a cat")])
def test_words_for_all_tiles_are_as_good_as_in_the_main_prompt(
    webui: WebUI, square: Image.Image, order: str, mode: str, joined: str
):
    options = {**FOUR, "order": order}
    told = generate(webui, square, {**options, "tile_prompt": "a cat", "tile_prompt_mode": mode})
    assert difference(told.image, generate(webui, square, options, prompt=joined).image) <= 1
    assert difference(told.image, generate(webui, square, options).image) > 1
    assert told.fields["DINO Tile tile prompt"] == "a cat" and used(told.fields, "tile_prompt_mode") == mode


@pytest.mark.parametrize("number", [1, 4])
def test_a_line_is_for_one_tile(webui: WebUI, square: Image.Image, number: int):
    main = generate(webui, square, FOUR).image
    line = generate(webui, square, {**FOUR, "tile_prompts": f"{number}: a cat"})
    assert changed(main, line.image, FOUR) == [number]
    assert lines(line.infotexts[0]) == f"{number}: a cat"


@pytest.mark.parametrize("order, reached", [("linear", [4]), ("chess", [4]), ("fused", [3, 4])])
def test_a_line_reaches_no_further_than_its_neighbours(webui: WebUI, photo: Image.Image, order: str, reached: list):
    source = photo.resize((112, 32))
    options = {**ROW, "order": order}
    main = generate(webui, source, options).image
    line = generate(webui, source, {**options, "tile_prompts": "4: a cat"}).image
    assert set(changed(main, line, options)) <= set(reached) and 4 in changed(main, line, options)


def test_a_line_comes_with_the_tile_prompt(webui: WebUI, square: Image.Image):
    both = {**FOUR, "tile_prompt": "fur", "tile_prompts": "2: a cat"}
    told = generate(webui, square, both).image
    alone = {"tile_prompts": "1: fur\n2: fur, a cat\n3: fur\n4: fur"}
    assert difference(told, generate(webui, square, {**FOUR, **alone}).image) <= 1


@pytest.mark.parametrize("order", ["chess", "fused"])
@pytest.mark.parametrize("mode", ["follow", "replace"])
def test_long_and_short_ones_go_together(webui: WebUI, square: Image.Image, order: str, mode: str):
    options = {**FOUR, "order": order, "tile_prompt_mode": mode, "tile_prompts": f"1: {LONG}\n3: a cat"}
    one, three, four = (generate(webui, square, {**options, "batch": batch}).image for batch in (1, 3, 4))
    assert difference(one, four) <= 1
    assert difference(one, three) <= 1


@pytest.mark.parametrize(
    "request_",
    [
        {"cfg_scale": 1},
        {"override_settings": {"batch_cond_uncond": False}},
        {"sampler_name": "DPM++ SDE"},
        {"sampler_name": "DDIM", "steps": 10},
        {"negative_prompt": LONG},
        {"prompt": "a [photo:drawing:0.5]"},
    ],
    ids=["cfg 1", "cond and uncond apart", "DPM++ SDE", "DDIM", "long negative", "scheduled"],
)
def test_in_any_batch(webui: WebUI, square: Image.Image, request_):
    options = {**FOUR, "tile_prompts": f"1: {LONG}\n2: a cat\n3: a [dog:bird:0.5]"}
    one, four = (generate(webui, square, {**options, "batch": batch}, **request_).image for batch in (1, 4))
    assert difference(one, four) <= 1


@pytest.mark.parametrize("order", ["chess", "fused"])
def test_and_cuts_a_tiles_prompt_into_parts(webui: WebUI, square: Image.Image, order: str):
    options = {**FOUR, "order": order, "tile_prompts": "2: a cat AND a dog\n3: a tree"}
    one, four = (generate(webui, square, {**options, "batch": batch}).image for batch in (1, 4))
    assert difference(one, four) <= 1
    parted = generate(webui, square, {**options, "tile_prompts": "2: a cat\n3: a tree"}).image
    assert changed(one, parted, options) == [2]


def test_each_image_of_a_batch(webui: WebUI, square: Image.Image):
    options = {**FOUR, "tile_prompts": f"1: {LONG}\n2: a cat"}
    together = generate(webui, square, options, seed=3, batch_size=2)
    for number, image in enumerate(together.images):
        assert difference(image, generate(webui, square, options, seed=3 + number).image) <= 1


def test_png_info_gives_the_image_again(webui: WebUI, square: Image.Image):
    told = {"tile_prompt": 'fur, "soft": 2', "tile_prompt_mode": "replace", "tile_prompts": "1: a cat\n3: x, y: z"}
    first = generate(webui, square, {**FOUR, **told})
    second = webui.img2img(square, infotext=first.infotexts[0], **STRONG)
    assert difference(first.image, second.image) == 0
    assert first.infotexts == second.infotexts


@pytest.mark.parametrize(
    "options, line",
    [
        ({"tile_prompts": "a cat"}, """tile_prompts: 'a cat' is not a line like "3: whiskers\""""),
        ({"tile_prompts": "1: a cat\n0: b"}, """tile_prompts: '0: b' is not a line like "3: whiskers\""""),
        ({"tile_prompts": "one: b"}, """tile_prompts: 'one: b' is not a line like "3: whiskers\""""),
        ({"tile_prompts": "1: a\n1: b"}, "tile_prompts: tile 1 has two lines, give it one"),
        ({"tile_prompts": "4: a\n5: b"}, "tile_prompts: there is no tile 5, this image has 4"),
        ({"tile_prompt_mode": "both"}, "tile_prompt_mode: 'both' is not allowed, give one of follow, replace"),
        ({"captions": "nope"}, "captions: 'nope' is not installed, give one of None.*"),
        ({"tile_prompt": "<lora:x:1>"}, "prompts of tiles .* cannot load networks such as LoRA: .* the main prompt"),
        (
            {"tile_prompts": "1: a <lora:x:1>"},
            "prompts of tiles .* cannot load networks such as LoRA: .* the main prompt",
        ),
    ],
)
def test_what_is_not_allowed_is_refused(webui: WebUI, square: Image.Image, options, line: str):
    refusal = webui.refusal(square, {**FOUR, **options})
    assert re.fullmatch(line, refusal), refusal


@pytest.fixture(scope="module")
def captioned(webui: WebUI, square: Image.Image) -> Reply:
    """Four tiles that the WebUI's DeepBooru has looked at."""
    answer = webui.post("img2img", webui.body(square, {**FOUR, "captions": "DeepBooru"}, **STRONG))
    if answer.status_code == 422 and "DeepBooru cannot be loaded" in answer.text:
        pytest.skip("this WebUI has no weights for DeepBooru")
    if answer.status_code == 422 and "'DeepBooru' is not installed" in answer.text:
        pytest.skip("this WebUI has no interrogators")
    return webui.reply(answer)


def test_captions_are_what_the_interrogator_says(webui: WebUI, square: Image.Image, captioned: Reply):
    told = dict(line.split(": ", 1) for line in lines(captioned.infotexts[0]).splitlines())
    assert told and set(told) <= set("1234")
    assert captioned.fields["DINO Tile captions"] == "DeepBooru"
    assert changed(generate(webui, square, FOUR).image, captioned.image, FOUR) == sorted(map(int, told))


def test_captions_can_be_sent_back(webui: WebUI, square: Image.Image, captioned: Reply):
    again = generate(webui, square, {**FOUR, "tile_prompts": lines(captioned.infotexts[0])})
    assert difference(again.image, captioned.image) == 0
    assert "DINO Tile captions" not in again.fields


def test_png_info_with_captions_gives_the_image_again(webui: WebUI, square: Image.Image, captioned: Reply):
    again = webui.img2img(square, infotext=captioned.infotexts[0], **STRONG)
    assert difference(again.image, captioned.image) == 0
    assert again.fields == captioned.fields


def test_a_line_comes_in_place_of_a_caption(webui: WebUI, square: Image.Image, captioned: Reply):
    first = lines(captioned.infotexts[0]).split(": ")[0]
    mixed = generate(webui, square, {**FOUR, "captions": "DeepBooru", "tile_prompts": f"{first}: a cat"})
    assert lines(mixed.infotexts[0]).startswith(f"{first}: a cat")
    assert changed(mixed.image, captioned.image, FOUR) == [int(first)]


def test_each_image_of_a_batch_has_its_own_captions(webui: WebUI, square: Image.Image, captioned: Reply):
    turned = square.transpose(Image.Transpose.ROTATE_180)
    options = {**FOUR, "captions": "DeepBooru"}
    both = generate(webui, square, options, init_images=[encode(square), encode(turned)], batch_size=2)
    assert lines(both.infotexts[0]) == lines(captioned.infotexts[0])
    assert lines(both.infotexts[1]) == lines(generate(webui, turned, options).infotexts[0])


def test_progress_goes_on_after_the_interrogator(webui: WebUI, square: Image.Image, captioned: Reply):
    job = webui.start(square, {**FOUR, "captions": "DeepBooru", "batch": 1}, steps=20)
    looks = list(job.looks())
    assert difference(job.reply().image, square.resize((128, 128))) > 1
    asked = [n for n, look in enumerate(looks) if re.match("DINO Tile: DeepBooru looks at tile", look.text)]
    painted = [n for n, look in enumerate(looks) if look.tiles]
    assert asked and painted and max(asked) < min(painted)
    assert all(look.running for look in looks[min(asked) : max(painted)])


@pytest.mark.parametrize("captions", ["None", "DeepBooru"])
def test_interrupt_reaches_the_run(webui: WebUI, square: Image.Image, captioned: Reply, captions: str):
    """While the interrogator is at work, or right after it."""
    text = "looks at tile" if captions != "None" else "painting tiles"
    job = webui.start(square, {**FOUR, "captions": captions, "batch": 1}, steps=20)
    next(look for look in job.looks() if text in look.text)
    webui.post("interrupt")
    painted, _, total = job.reply().fields["DINO Tile painted"].partition(" of ")
    assert int(painted) < int(total) == 4


def test_clip_says_what_it_sees_or_fails_in_one_line(webui: WebUI, square: Image.Image):
    answer = webui.post("img2img", webui.body(square, {**FOUR, "captions": "CLIP"}))
    if answer.status_code == 200:
        assert lines(webui.reply(answer).infotexts[0])
        return
    line = webui.refused(answer)
    assert line.startswith(("captions: 'CLIP' is not installed", "captions: CLIP cannot be loaded: ")), line


@pytest.mark.parametrize("name", ["CLIP", "DeepBooru"])
def test_regions_are_named_or_refused_in_one_line(webui: WebUI, square: Image.Image, name: str):
    answer = webui.dinotile("regions", {"image": encode(square), "interrogator": name})
    if answer.status_code != 200:
        line = webui.refused(answer)
        assert line.startswith((f"interrogator: '{name}' is not", f"captions: {name} cannot be loaded: ")), line
