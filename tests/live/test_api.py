"""The routes of its own: what is installed, a plan, and what DINO sees; and the examples of docs/api.md."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import requests
from adapters import ENCODER, FEATURES, Adapters
from client import SCRIPT, WebUI, correlation, decode, difference, encode
from conftest import TILES
from PIL import Image

from lib_dinotile import __version__, presets
from lib_dinotile.engine import flow
from lib_dinotile.settings import AUTOMATIC, NONE, Settings
from lib_dinotile.tiling.plan import TilePlan

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
LISTS = ("version", "adapters", "heads", "encoders")
QUESTIONS = ("plan", "semantic-map")
ROUTES = {**dict.fromkeys(LISTS, "get"), **dict.fromkeys(QUESTIONS, "post")}
CHECKPOINTS = {"sd15": (640, 512, 384), "sd2": (640, 512, 384), "sdxl": (1280, 1024, 768)}
"""By family: (height) of a canvas and the (width, height) of its automatic tiles, where it is as wide as one."""


def told(webui: WebUI, route: str, body: Mapping[str, Any] | None = None) -> Any:
    """What a route answers."""
    response = webui.dinotile(route, body)
    assert response.status_code == 200, f"{response.status_code}: {response.text[:2000]}"
    return response.json()


def refused(webui: WebUI, route: str, body: Any) -> str:
    """The line with which a route refuses a request."""
    return webui.refused(webui.dinotile(route, body))


def sized(source: Image.Image) -> dict[str, int]:
    return {"width": source.width, "height": source.height}


def rectangles(tiles: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: tile[key] for key in ("number", "x", "y", "width", "height")} for tile in tiles]


# What is there ---------------------------------------------------------------------------------------------------


def test_the_version_is_the_packages(webui: WebUI):
    assert told(webui, "version") == {"version": __version__}


def test_adapters_are_told_with_what_their_files_say(webui: WebUI, adapters: Adapters, request: pytest.FixtureRequest):
    good, bad = adapters.random, {adapters.cut_off, adapters.text, adapters.foreign, adapters.mixed_up}
    found = {entry.pop("name"): entry for entry in told(webui, "adapters")}
    assert {good} | bad <= found.keys() and NONE not in found
    assert found[good]["kind"] == "adapter" and found[good]["base"] == request.config.getoption("--base")
    assert (found[good]["encoder"], found[good]["features"]) == (ENCODER, FEATURES)
    assert found[good]["parameters"] > 0 and found[good]["megabytes"] > 0 and "error" not in found[good]
    for name in bad:
        assert found[name].keys() == {"error"} and "\n" not in found[name]["error"]
    assert "tensor outputs.0.weight does not fit its metadata" in found[adapters.mixed_up]["error"]


def test_every_adapter_that_is_listed_is_known_to_the_option(webui: WebUI, small: Image.Image, adapters: Adapters):
    name = adapters.untrained
    line = webui.refusal(small, {**TILES, "adapter": "nope"})
    assert name in line
    for entry in told(webui, "adapters"):
        assert entry["name"] in line


def test_heads_are_told_in_the_same_way(webui: WebUI, request: pytest.FixtureRequest):
    import torch

    from lib_dinotile.dino.head import RestorationHead, save_heads

    folder = request.config.getoption("--models") / "heads"
    there = folder.is_dir()
    folder.mkdir(exist_ok=True)
    good, bad = folder / f"live-tests-{os.getpid()}.safetensors", folder / f"live-tests-{os.getpid()}-bad.safetensors"
    try:
        with torch.random.fork_rng(devices=[]):
            save_heads({-1: RestorationHead(FEATURES, 8)}, good, ENCODER)
        bad.write_bytes(good.read_bytes()[:-4])
        found = {entry["name"]: entry for entry in told(webui, "heads")}
        assert found[good.stem]["kind"] == "restoration heads" and found[good.stem]["encoder"] == ENCODER
        assert found[good.stem]["features"] == FEATURES and found[good.stem]["layers"] == [-1]
        assert found[bad.stem].keys() == {"name", "error"}
    finally:
        good.unlink(missing_ok=True)
        bad.unlink(missing_ok=True)
        if not there:
            folder.rmdir()


def test_encoders_are_those_that_the_option_takes(webui: WebUI, small: Image.Image):
    found = {entry["name"]: entry["installed"] for entry in told(webui, "encoders")}
    assert found[ENCODER] is True and "facebook/dinov2-small" in found and AUTOMATIC not in found
    line = webui.refusal(small, {**TILES, "guard": "report", "encoder": "nope"})
    assert line.endswith("give one of " + ", ".join([AUTOMATIC, *found]))


def test_the_built_in_encoder_comes_calibrated(webui: WebUI):
    found = {entry["name"]: entry for entry in told(webui, "encoders")}
    assert found[ENCODER]["installed"] and found[ENCODER]["calibrated"] == [1.0, 2.0, 4.0]


def test_by_default_a_calibrated_encoder_looks(webui: WebUI, small: Image.Image):
    body = webui.body(small, None, alwayson_scripts={SCRIPT: {"args": [{"enabled": True}]}})
    reply = webui.reply(webui.post("img2img", body))
    automatic = [entry for entry in told(webui, "encoders") if entry["automatic"]]
    assert len(automatic) == 1 and automatic[0]["installed"] and 2.0 in automatic[0]["calibrated"]
    assert reply.fields["DINO Tile encoder"] == automatic[0]["name"]
    assert reply.fields["DINO Tile head"] == "calibrated"
    for notes in (reply.extra["DINO Tile report"][0]["notes"], reply.fields["DINO Tile notes"]):
        assert "restoration head: calibrated" in notes


# The plan --------------------------------------------------------------------------------------------------------

SIZE = {"target": "img2img size"}
PLANS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "scale": ({}, {}),
    "fraction": ({"scale": 1.37}, {}),
    "longest side": ({"target": "longest side", "longest": 200}, {}),
    "linear": ({"order": "linear"}, {}),
    "fused": ({"order": "fused"}, {}),
    "no overlap": ({"overlap": 0}, {}),
    "one tile": ({"tile": 512}, {}),
    "bands": ({"seams": "bands", "seam_width": 16}, {}),
    "half tile": ({"seams": "half tile"}, {}),
    "crossings": ({"seams": "half tile + crossings"}, {}),
    "stretched": (SIZE, {"width": 150, "height": 170, "resize_mode": 0}),
    "cropped": (SIZE, {"width": 150, "height": 170, "resize_mode": 1}),
    "filled": (SIZE, {"width": 150, "height": 170, "resize_mode": 2}),
    "latent": (SIZE, {"width": 150, "height": 170, "resize_mode": 3}),
}


@pytest.mark.parametrize("options, img2img", PLANS.values(), ids=PLANS.keys())
def test_a_plan_is_what_a_run_does(webui: WebUI, source: Image.Image, options, img2img):
    options = {**TILES, **options}
    resize = {"resize_width": img2img.get("width", 0), "resize_height": img2img.get("height", 0)}
    body = {"options": options, **resize, "resize_mode": img2img.get("resize_mode", 0)}
    planned = told(webui, "plan", {**sized(source), **body})
    assert planned == told(webui, "plan", {"image": encode(source), **body})
    job = webui.start(source, options, **img2img)
    totals = [found[1] for look in job.looks() if (found := re.search(r"painting tiles: \d+ of (\d+)", look.text))]
    reply = job.reply()
    assert reply.image.size == (planned["width"], planned["height"])
    assert planned["tiles"] == rectangles(reply.extra["DINO Tile report"][0]["tiles"])
    assert totals[-1] == str(planned["painted"])  # the first may be of the run before
    numbers = [number for wave in planned["waves"] for number in wave]
    assert sorted(numbers) == [tile["number"] for tile in planned["tiles"]]


def test_a_plan_is_the_engines(webui: WebUI):
    """Random sizes and options, those of the seam pass too, none of which is painted."""
    draw = random.Random(0)
    for _ in range(60):
        tile = 8 * draw.randint(8, 100)
        options = {
            "tile": tile,
            "overlap": 8 * draw.randint(0, tile // 16),
            "order": draw.choice(["chess", "linear", "fused"]),
            "seams": draw.choice(["none", "bands", "half tile", "half tile + crossings"]),
            "seam_width": 8 * draw.randint(1, 128),
            "scale": round(draw.uniform(1, 4), 2),
        }
        settings, size = Settings.parse(options), (draw.randint(1, 700), draw.randint(1, 700))
        width, height = flow.canvas_size(size, settings)
        plan = TilePlan(width, height, tile, settings.overlap, 8, settings.order)
        tiles = plan.tiles
        planned = told(webui, "plan", {"width": size[0], "height": size[1], "options": options})
        assert (planned["width"], planned["height"]) == (width, height)
        rects = [(tile["x"], tile["y"], tile["width"], tile["height"]) for tile in planned["tiles"]]
        assert rects == [(tile.x, tile.y, tile.width, tile.height) for tile in tiles]
        assert [[tiles[number - 1] for number in wave] for wave in planned["waves"]] == plan.waves
        assert planned["painted"] == flow.workload(plan, settings)[0]
        assert planned["options"] == {**{row.name: row.default for row in Settings.table()}, **options}


def test_without_tiles_there_are_none(webui: WebUI, source: Image.Image):
    options = {**TILES, "order": "none"}
    planned = told(webui, "plan", {**sized(source), "options": options})
    assert (planned["tiles"], planned["waves"], planned["painted"]) == ([], [], 0)
    assert webui.img2img(source, options).image.size == (planned["width"], planned["height"])
    seams = told(webui, "plan", {**sized(source), "options": {**options, "seams": "bands"}})
    assert seams["tiles"] == [] and seams["painted"] > 0


def test_the_automatic_tile_size_is_the_checkpoints(webui: WebUI, request: pytest.FixtureRequest):
    long, *side = CHECKPOINTS[request.config.getoption("--base")]
    planned = told(webui, "plan", {"width": side[0], "height": long, "options": {"scale": 1}})
    assert planned["options"]["tile"] == 0 and len(planned["tiles"]) == 2
    assert {(tile["width"], tile["height"]) for tile in planned["tiles"]} == {tuple(side)}


def test_a_plan_of_one_pixel_and_of_the_largest_canvas(webui: WebUI):
    assert len(told(webui, "plan", {"width": 1, "height": 1})["tiles"]) == 1
    options = {"scale": 1, "tile": 2048, "overlap": 64}
    largest = told(webui, "plan", {"width": 65536, "height": 65536, "options": options})
    assert len(largest["tiles"]) == 33**2 and largest["width"] == 65536
    long = {"scale": 1, "tile": 64, "overlap": 32, "seams": "bands"}
    assert len(told(webui, "plan", {"width": 65536, "height": 64, "options": long})["tiles"]) == 2047


def test_a_plan_of_a_photo_that_lies_on_its_side(webui: WebUI, source: Image.Image):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    source.save(file, "JPEG", exif=exif)
    planned = told(webui, "plan", {"image": base64.b64encode(file.getvalue()).decode(), "options": {"scale": 2}})
    assert (planned["width"], planned["height"]) == (2 * source.height, 2 * source.width)


def test_images_come_as_data_urls_and_with_line_ends(webui: WebUI, source: Image.Image):
    plain = told(webui, "plan", {"image": encode(source)})
    lines = base64.encodebytes(base64.b64decode(encode(source))).decode()
    assert lines.count("\n") > 1
    for image in (f"data:image/png;base64,{encode(source)}", lines):
        assert told(webui, "plan", {"image": image}) == plain


def test_a_plan_with_the_checkpoint_unloaded(webui: WebUI):
    """Forge loads it again, A1111 has none then; either is an answer."""
    webui.post("unload-checkpoint").raise_for_status()
    try:
        response = webui.dinotile("plan", {"width": 100, "height": 100})
        if response.status_code != 200:
            assert webui.refused(response) == "no checkpoint is loaded: choose one"
    finally:
        webui.post("reload-checkpoint")


def test_a_plan_does_not_wait_for_an_image(webui: WebUI, source: Image.Image):
    job = webui.start(source, {**TILES, "batch": 1, "scale": 3})
    looks = job.looks()
    next(look for look in looks if look.running)
    assert told(webui, "plan", {"width": 1000, "height": 1000})["painted"] > 1
    assert next(looks).running
    job.reply()


# The semantic map ------------------------------------------------------------------------------------------------

MAP = {**TILES, "encoder": ENCODER, "patches": 16}


def test_the_semantic_map_is_the_one_of_a_run(webui: WebUI, source: Image.Image):
    found = told(webui, "semantic-map", {"image": encode(source), "options": MAP})
    picture = decode(found["image"])
    assert picture.format == "PNG" and picture.size == (found["width"], found["height"])
    assert picture.size == (2 * source.width, 2 * source.height)
    run = webui.img2img(source, {**MAP, "maps": "semantic"})
    # A run draws over its own result, this over the source.
    assert run.images[1].size == picture.size and difference(run.images[1], picture) < 160
    again = told(webui, "semantic-map", {"image": encode(source), "options": MAP})
    assert again == found


def test_the_semantic_map_shows_the_image_and_the_tiles(webui: WebUI, source: Image.Image):
    found = told(webui, "semantic-map", {"image": encode(source), "options": MAP})
    mirrored = encode(source.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert told(webui, "semantic-map", {"image": mirrored, "options": MAP})["image"] != found["image"]
    for other in ({"patches": 24}, {"tile": 64}, {"overlap": 48}):
        assert told(webui, "semantic-map", {"image": encode(source), "options": {**MAP, **other}}) != found


@pytest.mark.parametrize("mode", range(4))
def test_the_semantic_map_at_img2img_size(webui: WebUI, source: Image.Image, mode: int):
    body = {"image": encode(source), "options": {**MAP, **SIZE}, "resize_mode": mode}
    found = told(webui, "semantic-map", {**body, "resize_width": 150, "resize_height": 170})
    assert decode(found["image"]).size == (150, 170)
    half = told(webui, "semantic-map", {**body, "resize_width": 150})  # the other side in proportion
    assert decode(half["image"]).size == (150, round(150 * source.height / source.width))


def test_a_semantic_map_is_shown_smaller_than_a_huge_result(webui: WebUI, source: Image.Image):
    options = {**MAP, "target": "longest side", "longest": 8000, "tile": 2048}
    found = told(webui, "semantic-map", {"image": encode(source), "options": options})
    assert decode(found["image"]).size == (2048, round(2048 * source.height / source.width))


def test_a_semantic_map_of_one_pixel(webui: WebUI):
    found = told(webui, "semantic-map", {"image": encode(Image.new("RGB", (1, 1))), "options": {**MAP, "scale": 8}})
    assert (found["width"], found["height"]) == (8, 8)


def test_a_semantic_map_while_an_image_is_made_waits_for_it(webui: WebUI, source: Image.Image):
    before = told(webui, "semantic-map", {"image": encode(source), "options": MAP})
    alone = webui.img2img(source, TILES)
    job = webui.start(source, TILES)
    next(look for look in job.looks() if look.running)
    assert told(webui, "semantic-map", {"image": encode(source), "options": MAP}) == before
    assert difference(job.reply().image, alone.image) == 0


# Refusals --------------------------------------------------------------------------------------------------------


def claimed(width: int, height: int) -> str:
    """A PNG that says that it is so large, and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 2, 0, 0, 0))
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(bytes(16))), chunk(b"IEND", b""))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


IMAGES = {
    "not base64": ("no base64!", "image: this is not base64"),
    "half a character": ("\ud800", "image: this is not base64"),
    "empty": ("", "image cannot be read as an image: .*"),
    "not an image": (base64.b64encode(b"<!doctype html>").decode(), "image cannot be read as an image: .*"),
    "a path": ("/etc/hostname", "image.*"),
    "an address": ("http://127.0.0.1:7860/", "image: this is not base64"),
    "claims too much": (claimed(60000, 60000), "image has too many pixels: at most .* are read"),
    "claims more than it holds": (claimed(3000, 3000), "image cannot be read as an image: .*"),
    "number": (7, r"image: .*"),
    "list": (["x"], r"image: .*"),
}
OPTIONS: dict[str, tuple[Any, str]] = {
    "unknown": ({"scal": 2}, r"'scal' is not an option of DINO Tile: did you mean 'scale'\?"),
    "out of range": ({"scale": 9}, "scale: 9 is not allowed, give a number from 1 to 8"),
    "not a number": ({"scale": float("nan")}, "scale: nan is not allowed, give a number from 1 to 8"),
    "text": ({"scale": "2"}, "scale: '2' is not allowed, give a number from 1 to 8"),
    "choice": ({"order": "spiral"}, "order: 'spiral' is not allowed, give one of .*"),
    "two that do not go together": ({"tile": 64, "overlap": 64}, "overlap: 64 is not allowed with tile 64, .*"),
    "with the automatic tile": ({"overlap": 1024}, "overlap: 1024 is not allowed with tile .*"),
    "upscaler": ({"upscaler": "Magic"}, "upscaler: 'Magic' is not installed, give one of .*"),
    "line": ({"tile_prompts": "cat"}, "tile_prompts: 'cat' is not a line like .*"),
    "too many tiles": ({"scale": 8, "tile": 64, "overlap": 32, "target": "scale"}, "tile: makes .* tiles, .*"),
    "no size": (SIZE, "target: no size is given: .*"),
    "list": ([1], "options: .*"),
    "nothing": (None, "options: .*"),
    "half a character": ({"upscaler": "\ud800"}, "upscaler: .* is not allowed, give text"),
    "half a character as a name": ({"\ud800": 1}, ".* is not an option of DINO Tile: .*"),
    "digits": ({"tile": 10**400}, "tile: 1000.* is not allowed, .*"),
}
LOOKING: dict[str, tuple[dict[str, Any], str]] = {
    "adapter": ({"adapter": "nope"}, "adapter: 'nope' is not installed, give one of None.*"),
    "adapter by path": ({"adapter": "../../x"}, r"adapter: '../../x' is not installed, .*"),
    "encoder": ({"encoder": "nope"}, "encoder: 'nope' is not installed in .*"),
    "encoder by path": ({"encoder": "/etc"}, "encoder: '/etc' is not installed in .*"),
    "encoder above": ({"encoder": "../../x"}, r"encoder: '../../x' is not installed in .*"),
    "head": ({"head": "nope"}, "head: 'nope' is not installed, give one of None.*"),
}


@pytest.mark.parametrize("route", QUESTIONS)
@pytest.mark.parametrize("image, line", IMAGES.values(), ids=IMAGES.keys())
def test_images_that_are_none(webui: WebUI, route: str, image, line: str):
    if (route, image) == ("plan", IMAGES["claims more than it holds"][0]):
        assert webui.dinotile(route, {"image": image}).json()["width"] == 6000  # it only reads the size
        return
    found = refused(webui, route, {"image": image})
    assert re.fullmatch(line, found), found


@pytest.mark.parametrize("route", QUESTIONS)
@pytest.mark.parametrize("options, line", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_that_are_not_allowed(webui: WebUI, route: str, options, line: str):
    found = refused(webui, route, {"image": encode(Image.new("RGB", (500, 500))), "options": options})
    assert re.fullmatch(line, found), found


@pytest.mark.parametrize("options, line", LOOKING.values(), ids=LOOKING.keys())
def test_what_looks_is_not_there(webui: WebUI, small: Image.Image, options, line: str):
    found = refused(webui, "semantic-map", {"image": encode(small), "options": {**TILES, **options}})
    assert re.fullmatch(line, found), found


def test_adapters_that_cannot_be_read(webui: WebUI, small: Image.Image, adapters: Adapters):
    for name in (adapters.cut_off, adapters.text, adapters.foreign):
        line = refused(webui, "semantic-map", {"image": encode(small), "options": {**TILES, "adapter": name}})
        assert line.startswith(f"{Path(name).name}.safetensors ")
    line = refused(webui, "semantic-map", {"image": encode(small), "options": {"adapter": adapters.other_encoder}})
    assert line.endswith("reads encoder 'no-such-encoder': install it, and choose that encoder")


def test_sizes_that_are_not_allowed(webui: WebUI, small: Image.Image):
    both = "image: give an image, or a width and a height, not both"
    assert refused(webui, "plan", {"image": encode(small), "width": 64}) == both
    for body in ({}, {"width": 64}, {"height": 64}, {"image": None}):
        assert refused(webui, "plan", body) == "image: give an image, or a width and a height"
    for name in ("width", "height", "resize_width", "resize_height", "resize_mode"):
        for value in (-1, 65537, "wide", 1e400, float("nan"), [64], {}):
            line = refused(webui, "plan", {"width": 64, "height": 64, "options": SIZE, name: value})
            assert line.startswith(f"{name}: "), line
    assert "at most 65536 pixels a side" in refused(webui, "plan", {"width": 65536, "height": 9})


def test_a_source_is_not_filled_without_end(webui: WebUI):
    body = {"image": encode(Image.new("RGB", (10, 9000))), "options": SIZE, "resize_mode": 2}
    size = {"resize_width": 65536, "resize_height": 8}
    for route in QUESTIONS:
        assert "give a size closer to its proportions" in refused(webui, route, {**body, **size})


def test_fields_that_are_not_known(webui: WebUI, small: Image.Image):
    for route in QUESTIONS:
        line = refused(webui, route, {"image": encode(small), "option": {}})
        assert line.startswith("option: ")


@pytest.mark.parametrize("route", QUESTIONS)
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b"null", b'{"image": "\xff"}', b"[" * 100_000], ids=repr)
def test_bodies_that_are_no_request(webui: WebUI, route: str, body: bytes):
    response = webui.dinotile(route, body)
    assert 400 <= response.status_code < 500
    line = response.json()["detail"]
    assert isinstance(line, str) and line and "\n" not in line and len(line) <= 300


def test_the_other_method_is_not_allowed(webui: WebUI):
    for route, method in ROUTES.items():
        other = webui.dinotile(route, {} if method == "get" else None)
        assert other.status_code == 405


def test_a_refusal_changes_nothing(webui: WebUI, source: Image.Image):
    body = {"image": encode(source), "options": MAP}
    plan, picture = told(webui, "plan", body), told(webui, "semantic-map", body)
    for route in QUESTIONS:
        refused(webui, route, {**body, "options": {**MAP, "scale": 9}})
        refused(webui, route, {**body, "image": "?"})
    assert told(webui, "plan", body) == plan and told(webui, "semantic-map", body) == picture


# As the WebUI's own ----------------------------------------------------------------------------------------------


def test_the_page_of_the_api_has_them(webui: WebUI):
    assert webui.get("docs").status_code == 200
    page = webui.get("openapi.json").json()
    for route, method in ROUTES.items():
        operations = page["paths"][f"/dinotile/v1/{route}"]
        assert operations.keys() == {method}
        operation = operations[method]
        assert operation["description"] and operation["tags"] == ["DINO Tile"]
        assert operation["responses"].keys() == {"200", "4XX"}
        refusal = operation["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"]
        assert page["components"]["schemas"][refusal.split("/")[-1]]["properties"]["detail"]["type"] == "string"


def test_the_page_of_the_api_has_every_option(webui: WebUI):
    page = webui.get("openapi.json").json()
    for name in ("PlanRequest", "MapRequest"):
        schema = page["components"]["schemas"][name]
        assert schema["additionalProperties"] is False
        for field, described in schema["properties"].items():
            assert described.get("description"), field
        options = schema["properties"]["options"]
        assert options["additionalProperties"] is False
        assert list(options["properties"]) == ["preset", *(row.name for row in Settings.table())]
        assert options["properties"]["preset"]["enum"] == list(presets.NAMES)
        for row in Settings.table():
            told_of = options["properties"][row.name]
            assert told_of["default"] == row.default and told_of["description"].startswith(row.help)
            assert told_of.get("enum") == (list(row.choices) if row.choices else None)


def test_the_example_of_the_page_works(webui: WebUI):
    page = webui.get("openapi.json").json()
    for route in QUESTIONS:
        operation = page["paths"][f"/dinotile/v1/{route}"]["post"]
        example = operation["requestBody"]["content"]["application/json"]["example"]
        assert told(webui, route, example)["width"] == 16


def test_they_are_behind_the_authentication_of_the_webui(webui: WebUI, request: pytest.FixtureRequest):
    given = request.config.getoption("--api-auth")
    if not given:
        pytest.skip("needs a WebUI that was started with --api-auth, and the same option here")
    url, user = request.config.getoption("--webui").rstrip("/"), given.partition(":")[0]
    with requests.Session() as session:
        session.trust_env = False
        for route, method in ROUTES.items():
            for auth in (None, (user, "not the password"), ("nobody", "nothing")):
                answer = session.request(method, f"{url}/dinotile/v1/{route}", json={}, auth=auth, timeout=60)
                assert answer.status_code == 401
                assert isinstance(answer.json()["detail"], str)
    page = webui.get("openapi.json").json()
    for route, method in ROUTES.items():
        assert page["paths"][f"/dinotile/v1/{route}"][method]["security"]


# The examples in docs/api.md --------------------------------------------------------------------------------------

BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.S | re.M)


@pytest.fixture
def run_example(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Runs code of that page beside a small photo.png, against this WebUI; what it prints."""
    with Image.open(ROOT / "examples" / "photo.png") as photo:
        photo.convert("RGB").resize((112, 74)).save(tmp_path / "photo.png")
    url = urlparse(request.config.getoption("--webui"))

    def run(code: str) -> str:
        there = code.replace("127.0.0.1", url.hostname).replace("7860", str(url.port))
        assert there.count(str(url.port)) == code.count("7860") == 1
        environment = {**os.environ, "NO_PROXY": url.hostname, "no_proxy": url.hostname}
        done = subprocess.run(
            [sys.executable, "-c", there], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def check_upscaled(folder: Path) -> None:
    with Image.open(folder / "photo.png") as photo, Image.open(folder / "photo-2x.png") as result:
        enlarged = photo.resize((224, 148), Image.Resampling.LANCZOS)
        assert result.size == (224, 148)  # and not the 512x512 that img2img makes by itself
        assert 0.6 < correlation(enlarged, result) < 1


@pytest.mark.parametrize("client", ["requests", "webuiapi"])
def test_the_example_of_a_client(client: str, run_example, tmp_path: Path, request: pytest.FixtureRequest):
    if request.config.getoption("--api-auth"):
        pytest.skip("the examples are for a WebUI without a password")
    pytest.importorskip(client)
    found = [block for block in BLOCKS if re.search(rf"^import .*\b{client}\b", block, re.M) and "photo-2x" in block]
    assert len(found) == 1
    run_example(found[0])
    check_upscaled(tmp_path)


def test_the_example_of_a_route(run_example, request: pytest.FixtureRequest):
    if request.config.getoption("--api-auth"):
        pytest.skip("the examples are for a WebUI without a password")
    found = [block for block in BLOCKS if "/dinotile/v1/plan" in block]
    assert len(found) == 1
    assert json.loads(run_example(found[0])) == [902, 600, 4]
