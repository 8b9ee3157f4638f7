"""Prompts of tiles and of regions as text, one line each.

What stands before a colon may come from any keyboard and editor: full-width characters (`３：`, `Ａ：`), Greek and
Cyrillic capitals that look like Latin ones, spaces of all kinds, byte order marks.
"""

from __future__ import annotations

import re
import unicodedata

from lib_dinotile import DinotileError

LETTERS = "ABCDEFGHIJKL"
"""Names of regions."""
ALIKE = dict(zip("АВСЕНІЈКΑΒΕΗΙΚ", "ABCEHIJKABEHIK"))
"""Cyrillic and Greek capitals, and the Latin ones that they look like."""
_TYPED = "".join(ALIKE) + "".join(chr(ord(letter) + 0xFEE0) for letter in LETTERS) + LETTERS
COLON = "[:：﹕︓]"
SPACE = "[\\s\ufeff\u200b-\u200f\u2060]"
"""A space, or what shows nothing at all. As a regular expression, like the others here, for Python and JavaScript."""
LETTER = f"[{_TYPED}{_TYPED.lower()}]"
"""A region's, as it may be typed."""
_BEFORE = f"[;；﹔︔](?={SPACE}*%s{SPACE}*{COLON})"
BREAK = _BEFORE % LETTER
"""What stands for a line break in front of a letter with a colon."""
_TILE_BREAK = _BEFORE % "\\d+"
_ENDS = re.compile(f"^{SPACE}+|{SPACE}+$")


def parse_tile_prompts(text: str) -> dict[int, str]:
    """Number and prompt of each line of "3: whiskers"; DinotileError for any other line.

    Instead of a line break there may be a semicolon in front of a number with a colon.
    """
    found: dict[int, str] = {}
    for line in _lines(text, _TILE_BREAK):
        number, words = _parts(line)
        if words is None or not number.isdecimal() or len(number) > 9 or int(number) < 1:
            raise DinotileError(f'{line[:60]!r} is not a line like "3: whiskers"')
        if int(number) in found:
            raise DinotileError(f"tile {int(number)} has two lines, give it one")
        found[int(number)] = words
    return found


def parse_region_prompts(text: str) -> dict[str, str]:
    """Letter and prompt of each line of "A: tabby fur" that has one; DinotileError for any other line.

    Instead of a line break there may be a semicolon in front of a letter with a colon.
    """
    found: dict[str, str] = {}
    for line in _lines(text, BREAK):
        typed, words = _parts(line)
        letter = "".join(ALIKE.get(each, each) for each in typed.upper())
        if words is None or len(letter) != 1 or letter not in LETTERS:
            raise DinotileError(f'{line[:60]!r} is not a line like "A: tabby fur"')
        if letter in found:
            raise DinotileError(f"region {letter} has two lines, give it one")
        found[letter] = words
    return {letter: words for letter, words in found.items() if words}


def _lines(text: str, ending: str) -> list[str]:
    parts = (_stripped(part) for line in text.splitlines() for part in re.split(ending, line))
    return [part for part in parts if part]


def _stripped(text: str) -> str:
    return _ENDS.sub("", text)


def _parts(line: str) -> tuple[str, str | None]:
    """What is before the first colon, in plain characters, and what is behind it; None if there is no colon."""
    head, *words = re.split(COLON, line, maxsplit=1)
    return unicodedata.normalize("NFKC", _stripped(head)), _stripped(words[0]) if words else None
