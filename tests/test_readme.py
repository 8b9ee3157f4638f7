"""What README.md and docs say is so."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from options import HEAD, PAGE, with_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONGEST = 250
"""Lines that a user may be asked to read."""


def test_the_table_of_options_is_the_one_in_settings():
    """Written by tools/options.py."""
    page = PAGE.read_text(encoding="utf-8")
    assert HEAD in page and with_table(page) == page


@pytest.mark.parametrize("heading", ["Try it", "Run the tests"])
def test_a_command_stands_alone_in_one_block(heading):
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```$", section, re.S | re.M)
    assert len(blocks) == 1 and blocks[0].count("\n") == 1


def test_the_readme_is_short():
    assert README.count("\n") <= LONGEST


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_links_to_are_there(page: Path):
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        assert (page.parent / link).exists(), link


def test_every_page_is_reached_from_the_readme():
    links = [link for page in PAGES for link in re.findall(r"\]\(([\w/.-]+\.md)\)", page.read_text(encoding="utf-8"))]
    assert {page.name for page in PAGES[1:]} <= {Path(link).name for link in links}
