"""What the README says is so."""

import re
from pathlib import Path

import pytest

from lib_dinotile.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def row(option):
    text = f"{option.help} {option.allowed[0].upper()}{option.allowed[1:]}."
    return f"| `{option.name}` | {option.label} | {option.default} | {text.removesuffix(' Text.')} |"


def test_the_table_of_options_is_the_one_in_settings():
    assert "\n".join(row(option) for option in Settings.table()) in README


@pytest.mark.parametrize("heading", ["Try it", "Run the tests"])
def test_a_command_stands_alone_in_one_block(heading):
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```$", section, re.S | re.M)
    assert len(blocks) == 1 and blocks[0].count("\n") == 1


def test_files_that_it_links_to_are_there():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
