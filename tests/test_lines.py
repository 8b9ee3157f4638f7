"""Lines of prompts, as keyboards and editors write them."""

import pytest

from lib_dinotile import DinotileError
from lib_dinotile.lines import LETTERS, parse_region_prompts, parse_tile_prompts

PLAIN = {1: "fur, an ear: soft", 12: "wall"}


@pytest.mark.parametrize(
    "text",
    [
        "1: fur, an ear: soft\n12: wall",
        "1：fur, an ear: soft\n12：wall",  # a Japanese or Chinese keyboard
        "１： fur, an ear: soft\n１２：\u3000wall",
        "١: fur, an ear: soft\n١٢: wall",  # an Arabic one
        "1﹕fur, an ear: soft\n12︓wall",
        "1: fur, an ear: soft; 12: wall",
        "１：fur, an ear: soft； １２：wall",
        "\ufeff1: fur, an ear: soft\r\n12: wall\r\n",  # a file of Windows's Notepad
        "1\u00a0: fur, an ear: soft\u00a0\n\u00a012 :\u202fwall",  # a word processor
        "\u200b1\u200b:\u200bfur, an ear: soft\u200b\u202812: wall\u2029",  # a web page
        "\n\u3000\n1: fur, an ear: soft\x0b\n\n12: wall\n\ufeff",
    ],
)
def test_lines_of_tiles_are_read_as_they_are_typed_anywhere(text):
    assert parse_tile_prompts(text) == PLAIN


@pytest.mark.parametrize(
    "text",
    [
        "A: fur; it is soft\nC: wall: grey",
        "a: fur; it is soft; c: wall: grey",
        "Ａ：fur; it is soft；ｃ：wall: grey",
        "А: fur; it is soft; С: wall: grey",  # Cyrillic
        "\ufeffA: fur; it is soft\r\nC: wall: grey\r\n",
        "A\u00a0: fur; it is soft ;\u00a0C\u00a0: wall: grey",
        "A:\u200bfur; it is soft\u2028\u3000C:\u3000wall: grey",
    ],
)
def test_lines_of_regions_are_read_as_they_are_typed_anywhere(text):
    assert parse_region_prompts(text) == {"A": "fur; it is soft", "C": "wall: grey"}


def test_every_letter_may_be_full_width():
    text = "；".join(f"{chr(ord(letter) + 0xFEE0)}：{letter}" for letter in LETTERS)
    assert parse_region_prompts(text) == {letter: letter for letter in LETTERS}


def test_the_words_stay_as_they_are():
    assert parse_tile_prompts("3: stone; 2 cats; (a: 2)") == {3: "stone; 2 cats; (a: 2)"}
    words = "猫、ひげ：（柔らかい）；1.5 👩‍🎨"
    assert parse_tile_prompts(f"3：{words}") == {3: words} and parse_region_prompts(f"Ｂ：{words}") == {"B": words}


@pytest.mark.parametrize(
    "line", ["3", "3 fur", "fur: 3", "0: fur", "３、fur", "-1: fur", "1 2: fur", "1.5: fur", ": fur"]
)
def test_other_lines_are_refused_with_the_line_as_it_is(line):
    with pytest.raises(DinotileError, match="is not a line like") as error:
        parse_tile_prompts(f"7: fur\n{line}")
    assert repr(line) in str(error.value)
