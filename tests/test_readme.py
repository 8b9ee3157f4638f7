"""What the README says is so."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from options import HEAD, with_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_options_is_the_one_in_settings():
    """Written by tools/options.py."""
    assert HEAD in README and with_table(README) == README


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
