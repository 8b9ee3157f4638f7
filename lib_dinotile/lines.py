"""Prompts of tiles and of regions as text, one line each."""

from __future__ import annotations

import re

from lib_dinotile import DinotileError

LETTERS = "ABCDEFGHIJKL"
"""Names of regions."""
_BREAKS = re.compile(rf"\n|;(?=\s*[{LETTERS}{LETTERS.lower()}]\s*:)")


def parse_tile_prompts(text: str) -> dict[int, str]:
    """Number and prompt of each line of "3: whiskers"; DinotileError for any other line."""
    found = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        number, colon, words = line.partition(":")
        if not colon or not number.strip().isdecimal() or len(number) > 9 or int(number) < 1:
            raise DinotileError(f'tile_prompts: {line[:60]!r} is not a line like "3: whiskers"')
        if int(number) in found:
            raise DinotileError(f"tile_prompts: tile {int(number)} has two lines, give it one")
        found[int(number)] = words.strip()
    return found


def parse_region_prompts(text: str) -> dict[str, str]:
    """Letter and prompt of each line of "A: tabby fur" that has one; DinotileError for any other line.

    Instead of a line break there may be a semicolon in front of a letter with a colon.
    """
    found: dict[str, str] = {}
    for line in filter(None, map(str.strip, _BREAKS.split(text))):
        letter, colon, words = (part.strip() for part in line.partition(":"))
        if not colon or len(letter) != 1 or letter.upper() not in LETTERS:
            raise DinotileError(f'region_prompts: {line[:60]!r} is not a line like "A: tabby fur"')
        if letter.upper() in found:
            raise DinotileError(f"region_prompts: region {letter.upper()} has two lines, give it one")
        found[letter.upper()] = words
    return {letter: words for letter, words in found.items() if words}
