"""The last upscaled image is kept, and given only for what it was made of."""

import pytest
from PIL import Image

from tests.stand_in import stand_in
from tests.test_tiling import random_image

with stand_in("modules"):
    from lib_dinotile.hosts.upscalers import Upscaled, is_resampled

SOURCE, LARGE, SIZE = random_image(12, 8), random_image(24, 16), (24, 16)
RECIPE = ("ESRGAN", [["model.pth", 10, 1]], ("ESRGAN_tile", "192"))


@pytest.fixture
def upscaled():
    kept = Upscaled()
    kept.keep(SOURCE, SIZE, RECIPE, LARGE)
    return kept


def test_what_is_kept_is_given_to_the_bit_and_again(upscaled):
    for _ in range(2):
        assert upscaled.get(SOURCE.copy(), SIZE, RECIPE).tobytes() == LARGE.tobytes()


def test_another_source_size_or_recipe_is_given_nothing(upscaled):
    other = SOURCE.copy()
    other.putpixel((3, 3), tuple(level ^ 1 for level in other.getpixel((3, 3))))
    turned = Image.frombytes("RGB", SOURCE.size[::-1], SOURCE.tobytes())
    for source in (other, turned):
        assert upscaled.get(source, SIZE, RECIPE) is None
    assert upscaled.get(SOURCE, (24, 17), RECIPE) is None
    for recipe in (
        ("SwinIR", *RECIPE[1:]),
        ("ESRGAN", [["model.pth", 10, 2]], RECIPE[2]),
        (*RECIPE[:2], ("ESRGAN_tile", "0")),
        None,
    ):
        assert upscaled.get(SOURCE, SIZE, recipe) is None


def test_writing_into_what_was_given_or_taken_changes_nothing():
    taken, kept = LARGE.copy(), Upscaled()
    kept.keep(SOURCE, SIZE, RECIPE, taken)
    taken.paste(0, (0, 0, 9, 9))
    given = kept.get(SOURCE, SIZE, RECIPE)
    given.paste(0, (0, 0, 9, 9))
    assert kept.get(SOURCE, SIZE, RECIPE).tobytes() == LARGE.tobytes()


def test_only_the_last_is_kept_and_none_that_cannot_be_told_or_is_too_large(upscaled):
    upscaled.keep(LARGE, SIZE, RECIPE, LARGE)
    assert upscaled.get(SOURCE, SIZE, RECIPE) is None and upscaled.get(LARGE, SIZE, RECIPE) is not None
    upscaled.keep(SOURCE, SIZE, None, LARGE)
    assert upscaled.get(SOURCE, SIZE, None) is None and upscaled.get(LARGE, SIZE, RECIPE) is None
    least = 24 * 16 * 4
    for limit in (least - 1, least):
        small = Upscaled(limit)
        small.keep(SOURCE, SIZE, RECIPE, LARGE)
        assert (small.get(SOURCE, SIZE, RECIPE) is None) == (limit < least)


@pytest.mark.parametrize("size", [(12, 8), (24, 16), (31, 20)])
def test_a_model_that_did_nothing_is_known_by_its_result(size):
    plain = SOURCE.resize(size, Image.Resampling.LANCZOS)
    made = plain.copy()
    made.putpixel((5, 5), tuple(level ^ 1 for level in made.getpixel((5, 5))))
    assert is_resampled(SOURCE, plain) and not is_resampled(SOURCE, made)
    grey = Image.new("RGB", SOURCE.size, "grey")
    assert not is_resampled(grey, grey.resize(size))
