"""Where the size of the result comes from, and what makes the canvas."""

from __future__ import annotations

from pathlib import Path

import pytest
from client import Reply, WebUI, correlation, difference, encode, pixels, used
from conftest import TILES
from PIL import Image, ImageOps

from lib_dinotile.settings import Settings

UNPAINTED = {**TILES, "order": "none"}
"""Takes no time, and shows what the tiles would be painted on."""
STRETCH, CROP, FILL, LATENT = range(4)
"""img2img's Resize modes as the API counts them."""
SIZES = [
    ((720, 405), {"scale": 2}, (1440, 810)),
    ((720, 405), {"scale": 1.37}, (986, 555)),
    ((101, 67), {"target": "longest side", "longest": 333}, (333, 221)),
    ((67, 101), {"target": "longest side", "longest": 333}, (221, 333)),
    ((101, 67), {"target": "longest side", "longest": 101}, (101, 67)),
    ((101, 67), {"target": "longest side", "longest": 50}, (50, 33)),
    ((101, 67), {"target": "longest side", "longest": 1500}, (1500, 995)),
    ((300, 2), {"target": "longest side", "longest": 400}, (400, 3)),
    ((9, 7), {"scale": 8}, (72, 56)),
]


def check_size(reply: Reply, size: tuple[int, int]) -> None:
    assert reply.image.size == size
    assert reply.fields["Size"] == "{}x{}".format(*size)


@pytest.mark.parametrize("size, options, expected", SIZES, ids=str)
def test_the_size_is_exact(webui: WebUI, photo: Image.Image, size, options, expected):
    source = photo.resize(size)
    reply = webui.img2img(source, {**UNPAINTED, **options}, width=64, height=64)
    check_size(reply, expected)
    assert difference(reply.image, source.resize(expected, Image.Resampling.LANCZOS)) == 0
    target = options.get("target", "scale")
    assert used(reply.fields, "target") == target
    for name, its in (("scale", "scale"), ("longest", "longest side")):
        assert used(reply.fields, name) == str(vars(Settings.parse(options if target == its else {}))[name])


@pytest.mark.parametrize("order", ["chess", "fused"])
@pytest.mark.parametrize("options", [{"target": "longest side", "longest": 151}, {"target": "img2img size"}], ids=str)
def test_painted_the_size_is_exact_too(webui: WebUI, photo: Image.Image, options, order: str):
    source = photo.resize((75, 51))
    reply = webui.img2img(source, {**TILES, **options, "order": order}, width=151, height=103)
    check_size(reply, (151, 103))
    assert correlation(reply.image, source.resize((151, 103), Image.Resampling.LANCZOS)) > 0.6


@pytest.mark.parametrize("size", [(333, 222), (101, 203), (57, 91)], ids=str)
@pytest.mark.parametrize("mode", [STRETCH, CROP, FILL, LATENT])
def test_img2img_size_with_every_resize_mode(webui: WebUI, photo: Image.Image, mode: int, size: tuple[int, int]):
    source, (width, height) = photo.resize((101, 67)), size
    request = {"width": width, "height": height, "resize_mode": mode}
    reply = webui.img2img(source, {**UNPAINTED, "target": "img2img size"}, **request)
    check_size(reply, size)
    if mode == CROP:
        assert correlation(reply.image, ImageOps.fit(source, size, Image.Resampling.LANCZOS)) > 0.97
    elif mode == FILL:
        inner = ImageOps.contain(source, size, Image.Resampling.LANCZOS)
        left, top = (width - inner.width) // 2, (height - inner.height) // 2
        cut = reply.image.crop((left, top, left + inner.width, top + inner.height))
        assert correlation(cut, inner) > 0.97
        border = pixels(reply.image)
        if top > 2:
            assert abs(border[0] - border[top - 2]).max() <= 24  # the picture's own edge, drawn out
        if left > 2:
            assert abs(border[:, 0] - border[:, left - 2]).max() <= 24
    else:
        assert difference(reply.image, source.resize(size, Image.Resampling.LANCZOS)) == 0


def test_every_source_of_a_batch_gets_the_size(webui: WebUI, small: Image.Image):
    sources = [small, small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    options = {**UNPAINTED, "target": "img2img size"}
    request = {"init_images": [encode(s) for s in sources], "batch_size": 2, "width": 90, "height": 90}
    images = webui.img2img(small, options, resize_mode=CROP, **request).images
    assert [image.size for image in images] == [(90, 90)] * 2
    flipped = images[1].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert correlation(images[0], flipped) > 0.99


def test_png_info_gives_the_size_again(webui: WebUI, small: Image.Image):
    """Scripts' options are taken from PNG info, img2img's own size from the request."""
    for options in ({"target": "longest side", "longest": 151}, {"target": "img2img size"}):
        first = webui.img2img(small, {**UNPAINTED, **options}, width=131, height=77)
        again = webui.img2img(small, infotext=first.infotexts[0], width=131, height=77)
        assert difference(first.image, again.image) == 0 and first.infotexts == again.infotexts


def test_a_size_that_is_too_large_is_refused(webui: WebUI, small: Image.Image):
    options = {"target": "longest side", "longest": 70000}
    assert webui.refusal(small, {**TILES, **options}).startswith("longest: 70000 is not allowed, give a whole number")
    long = small.resize((9000, 8))
    assert "at most 65536 pixels a side" in webui.refusal(long, {**TILES, "scale": 8})


def model(webui: WebUI) -> str:
    """An upscaler with a model; without one there is nothing to test."""
    upscalers = webui.get("sdapi/v1/upscalers").json()
    name = next((u["name"] for u in upscalers if u["model_path"] and Path(u["model_path"]).is_file()), None)
    if name is None:
        pytest.skip("this WebUI has no upscaler with a model")
    return name


@pytest.mark.parametrize("size, target", [((50, 34), 101), ((23, 17), 331)], ids=str)
@pytest.mark.parametrize("name", ["None", "Nearest", "Lanczos", "a model"])
def test_upscalers_of_the_webui_to_exact_sizes(webui: WebUI, photo: Image.Image, name: str, size, target: int):
    """331 is more than a model gives in the three runs that the WebUI allows it, if it doubles."""
    if name == "a model":
        name = model(webui)
    source = photo.resize(size)
    reply = webui.img2img(source, {**UNPAINTED, "upscaler": name, "target": "longest side", "longest": target})
    check_size(reply, (target, round(size[1] * target / size[0])))
    assert used(reply.fields, "upscaler") == name
    near = source.resize(reply.image.size, Image.Resampling.LANCZOS)
    assert correlation(reply.image, near) > 0.9
    assert (difference(reply.image, near) == 0) == (name in ("None", "Lanczos"))


def test_what_a_model_made_is_kept_for_its_own_source_and_size_alone(webui: WebUI, photo: Image.Image):
    options = {**UNPAINTED, "upscaler": model(webui)}
    source, other = photo.resize((40, 30)), photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((40, 30))

    def upscaled(image: Image.Image, seed: int, **more: float) -> Image.Image:
        return webui.img2img(image, {**options, **more}, seed=seed).image

    first = upscaled(source, 1)
    assert difference(upscaled(source, 2), first) == 0  # kept
    assert upscaled(source, 1, scale=1.5).size == (60, 45)
    turned = upscaled(other, 1)
    assert correlation(turned.transpose(Image.Transpose.FLIP_LEFT_RIGHT), first) > 0.9 > correlation(turned, first)
    assert difference(upscaled(source, 1), first) == 0  # made anew
