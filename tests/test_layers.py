"""The layout: which part of the program may import which."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lib_dinotile"
ROOT_MODULES = {"__init__", "__main__", "settings", "options", "images", "lines", "presets", "weights"}
BELOW = {
    "tiling": set(),
    "dino": {"tiling"},
    "condition": {"tiling", "dino"},
    "engine": {"tiling", "dino", "condition"},
    "hosts": {"tiling", "dino", "condition", "engine"},
    "webui": {"tiling", "dino", "condition", "engine", "hosts"},
    "train": {"tiling", "dino", "condition", "engine", "hosts"},
    "cli": {"tiling", "dino", "condition", "engine", "hosts", "train"},
}
"""By part those that it may import."""
HOST_PACKAGES = {"modules", "modules_forge", "backend", "ldm_patched"}


def imports(file: Path) -> Iterator[str]:
    """Modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_few_modules_lie_at_the_root():
    assert {file.stem for file in PACKAGE.glob("*.py")} == ROOT_MODULES
    assert {folder.parent.name for folder in PACKAGE.glob("*/__init__.py")} == set(BELOW)


@pytest.mark.parametrize("part", ["", *BELOW])
def test_imports_point_downwards(part):
    allowed = (BELOW[part] | {part} | ROOT_MODULES) if part else {"tiling"}
    for file in (PACKAGE / part).glob("*.py"):
        if file.name == "__main__.py":  # on top of all
            continue
        for name in imports(file):
            parts = name.split(".")
            if parts[0] == "lib_dinotile" and (PACKAGE / parts[1]).is_dir():
                assert parts[1] in allowed, f"{file.name} imports {name}"


@pytest.mark.parametrize("part", BELOW)
def test_only_hosts_and_webui_know_a_webui(part):
    known = {name.split(".")[0] for file in (PACKAGE / part).glob("*.py") for name in imports(file)} & HOST_PACKAGES
    assert not known or part in ("hosts", "webui")
