"""img2img through the API comes out larger, to the pixel, and shows what the source shows."""

from __future__ import annotations

import pytest
from client import Reply, WebUI, correlation, difference, encode, fields, pixels
from conftest import TILES
from PIL import Image

from lib_dinotile.settings import Settings

ONE_TILE = {**TILES, "tile": 128}
"""`small` upscaled is one tile of these."""


def test_twice_as_large_it_looks_like_the_source(webui: WebUI, photo: Image.Image):
    image = webui.img2img(photo, {"scale": 2, "tile": 192, "overlap": 32}, denoising_strength=0.25).image
    enlarged = photo.resize((512, 384), Image.Resampling.LANCZOS)
    assert image.size == (512, 384)
    assert correlation(image, enlarged) > 0.8
    assert abs(pixels(image) - pixels(enlarged)).mean() < 32


def test_without_denoising_it_is_the_upscaled_source(webui: WebUI, source: Image.Image):
    image = webui.img2img(source, TILES, denoising_strength=0).image
    assert correlation(image, source.resize(image.size, Image.Resampling.LANCZOS)) > 0.9


@pytest.mark.parametrize(
    "size, scale, expected",
    [
        ((101, 67), 1.7, (172, 114)),
        ((125, 93), 1.5, (188, 140)),
        ((144, 96), 1, (144, 96)),
        ((40, 24), 2, (80, 48)),  # smaller than a tile
        ((9, 7), 1, (9, 7)),
        ((300, 16), 1.05, (315, 17)),
    ],
)
def test_the_size_is_exact(webui: WebUI, photo: Image.Image, size, scale, expected):
    reply = webui.img2img(photo.resize(size), {**TILES, "scale": scale})
    assert reply.image.size == expected
    assert reply.fields["Size"] == "{}x{}".format(*expected)


def test_the_same_request_gives_the_same_image(webui: WebUI, source: Image.Image, tiled: Reply):
    assert difference(webui.img2img(source, TILES).image, tiled.image) == 0


def test_another_seed_gives_another_image(webui: WebUI, source: Image.Image, tiled: Reply):
    assert difference(webui.img2img(source, TILES, seed=2).image, tiled.image) > 1


def test_png_info_says_how_it_was_made(webui: WebUI, tiled: Reply):
    expected = {
        "Steps": "4",
        "Sampler": "Euler",
        "CFG scale": "7.0",
        "Seed": "1",
        "Size": "224x160",
        "Denoising strength": "0.4",
        "DINO Tile": "1",
        "DINO Tile tile size": "96",
        "DINO Tile overlap": "16",
    }
    assert expected.items() <= tiled.fields.items()
    automatic = {"DINO Tile guidance decoder", "DINO Tile head", "DINO Tile encoder", "DINO Tile notes"}
    switched_off = {"DINO Tile guidance", "DINO Tile guard"}
    assert {key for key in tiled.fields if key.startswith("DINO Tile")} <= {*expected, *automatic, *switched_off}
    assert "DINO Tile painted" not in tiled.fields
    read = webui.post("png-info", {"image": encode_with_info(tiled)}).json()
    assert expected.items() <= fields(read["info"]).items()


def encode_with_info(reply: Reply) -> str:
    """The reply's image with the PNG info that came with it."""
    import base64
    import io

    from PIL.PngImagePlugin import PngInfo

    info, file = PngInfo(), io.BytesIO()
    info.add_text("parameters", reply.image.info["parameters"])
    reply.image.save(file, "PNG", pnginfo=info)
    return base64.b64encode(file.getvalue()).decode()


def test_arguments_by_position_are_those_by_name(webui: WebUI, small: Image.Image):
    as_by_default = {"guidance": 1.0, "guard": "retry"}
    named = webui.img2img(small, {**TILES, "order": "linear", **as_by_default})
    row = [True, "scale", 2, 2048, "Lanczos", 96, 16, 4, "linear"]
    placed = webui.img2img(small, alwayson_scripts={"DINO Tile": {"args": row}})
    assert difference(named.image, placed.image) == 0
    assert named.infotexts == placed.infotexts


def test_switched_off_it_has_no_part_in_the_image(webui: WebUI, small: Image.Image):
    plain, off = webui.img2img(small), webui.img2img(small, {**TILES, "enabled": False})
    assert difference(plain.image, off.image) == 0
    assert plain.infotexts == off.infotexts


@pytest.mark.parametrize("upscaler", ["None", "Nearest", "Lanczos"])
def test_upscalers_of_the_webui_make_the_canvas(webui: WebUI, small: Image.Image, upscaler: str):
    reply = webui.img2img(small, {**ONE_TILE, "upscaler": upscaler})
    assert reply.image.size == (128, 96)
    assert reply.fields.get("DINO Tile upscaler", Settings().upscaler) == upscaler


def test_a_transparent_source_is_laid_on_the_background(webui: WebUI, small: Image.Image):
    transparent = small.convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(small.size))
    flat = Image.new("RGBA", small.size, "#ffffff")
    flat.alpha_composite(transparent)
    white = {"img2img_background_color": "#ffffff"}
    images = [webui.img2img(s, ONE_TILE, override_settings=white).image for s in (transparent, flat.convert("RGB"))]
    assert difference(*images) <= 1


@pytest.mark.parametrize("mode", ["P", "L", "1"])
def test_a_source_of_another_mode_is_taken_for_its_colours(webui: WebUI, small: Image.Image, mode: str):
    converted = small.convert(mode)
    images = [webui.img2img(s, ONE_TILE).image for s in (converted, converted.convert("RGB"))]
    assert images[0].mode == "RGB" and difference(*images) == 0


def test_colour_correction_pulls_the_colours_to_the_source(webui: WebUI, small: Image.Image):
    def distance(image: Image.Image) -> float:
        return float(abs(pixels(image).mean((0, 1)) - pixels(small).mean((0, 1))).sum())

    plain = webui.img2img(small, ONE_TILE)
    corrected = webui.img2img(small, ONE_TILE, override_settings={"img2img_color_correction": True})
    assert corrected.image.size == (128, 96)
    assert difference(plain.image, corrected.image) > 1
    assert distance(corrected.image) < max(distance(plain.image), 6)


def test_variation_goes_from_the_seeds_image_to_that_of_the_variation_seed(webui: WebUI, small: Image.Image):
    def vary(strength: float) -> Image.Image:
        return webui.img2img(small, ONE_TILE, seed=1, subseed=5, subseed_strength=strength).image

    seed, variation = (webui.img2img(small, ONE_TILE, seed=seed).image for seed in (1, 5))
    assert difference(vary(0), seed) == 0
    assert difference(vary(1), variation) <= 1
    between = vary(0.5)
    assert difference(between, seed) > 1 and difference(between, variation) > 1


@pytest.mark.parametrize("strength", [0, 0.3])
@pytest.mark.parametrize("counts", [{"batch_size": 2}, {"n_iter": 2}])
def test_every_image_of_a_batch_is_that_of_its_own_seed(webui: WebUI, small: Image.Image, counts, strength: float):
    seeds = {"seed": 3, "subseed": 8, "subseed_strength": strength}
    together = webui.img2img(small, TILES, **seeds, **counts)
    assert len(together.images) == len(together.infotexts) == 2
    for number, (image, infotext) in enumerate(zip(together.images, together.infotexts)):
        # As the WebUI counts: the variation seed where there is one, else the seed.
        own = {**seeds, "seed": 3 + (number if strength == 0 else 0), "subseed": 8 + number}
        alone = webui.img2img(small, TILES, **own)
        assert difference(image, alone.image) <= 1
        assert fields(infotext)["Seed"] == alone.fields["Seed"]
    assert difference(*together.images) > 1


def test_every_source_of_a_batch_is_upscaled(webui: WebUI, small: Image.Image):
    sources = [small, small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    together = webui.img2img(small, TILES, init_images=[encode(s) for s in sources], batch_size=2, seed=3)
    assert len(together.images) == 2
    for number, (image, alone) in enumerate(zip(together.images, sources)):
        assert difference(image, webui.img2img(alone, TILES, seed=3 + number).image) <= 1
