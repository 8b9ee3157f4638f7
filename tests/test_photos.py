"""The photographs that dinotile ships: how many, how large, and under which licence each."""

import re
from pathlib import Path

import pytest
from PIL import Image

FOLDER = Path(__file__).parents[1] / "lib_dinotile" / "photos"
FILES = sorted(file for file in FOLDER.iterdir() if file.name != "README.md")
LICENCES = {"CC0-1.0", "CC-BY-2.0", "CC-BY-4.0", "MIT", "LicenseRef-Public-Domain"}


def listed() -> dict[str, list[str]]:
    """The other columns of README.md, by the file in the first."""
    rows = re.findall(r"^\| `([\w-]+\.\w+)` \| (.+) \|$", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M)
    assert len({file for file, _ in rows}) == len(rows), "a file is listed twice"
    return {file: [cell.strip() for cell in cells.split("|")] for file, cells in rows}


def test_count_and_size():
    assert len(FILES) >= 40
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 6_000_000


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_photo(file):
    with Image.open(file) as image:
        assert image.mode == "RGB"
        assert max(image.size) >= 512
        assert not {"exif", "icc_profile", "comment", "photoshop"} & set(image.info)
        image.load()


def test_readme_lists_every_photo_with_its_licence():
    table = listed()
    assert sorted(table) == [file.name for file in FILES]
    for file, (shows, author, original, licence, changes) in table.items():
        assert shows and author and original and changes, file
        assert licence in LICENCES, file
