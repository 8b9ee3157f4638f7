"""install.py, as a WebUI runs it at its start: no package that is there changes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.conftest import pins

ROOT = Path(__file__).parents[1]
DINOV2 = tuple(map(int, version("transformers").split(".")[:2])) >= (4, 32)
LAUNCH = """
import subprocess, sys

def run_pip(command, desc=None):
    print("pip", command, flush=True)
    subprocess.run(f'"{sys.executable}" -m pip {command} --prefer-binary', shell=True, check=True)
"""
"""What the WebUIs' `launch.run_pip` does."""


class WebUI:
    """A Python with this one's packages, but for some; pip installs into a place of its own."""

    def __init__(self, folder: Path, *without: str) -> None:
        """without: packages to leave out."""
        packages, host = folder / "packages", folder / "host"
        packages.mkdir()
        for path in {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}:
            for entry in Path(path).iterdir():
                if entry.name.split("-")[0] not in without:
                    (packages / entry.name).symlink_to(entry)
        venv.create(folder / "venv", symlinks=os.name != "nt")
        self._python = folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        site = self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        (Path(site) / "packages.pth").write_text(str(packages))
        host.mkdir()
        (host / "launch.py").write_text(LAUNCH)
        self._host = host

    def run(self, *arguments: str | Path, path: Path = ROOT) -> str:
        """What Python prints; path: where it also looks for modules."""
        environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([self._python, *arguments], env=environment, capture_output=True, text=True)
        if "Failed to establish a new connection" in done.stderr:
            pytest.skip("pip reaches no package index")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self) -> tuple[str, set[str], set[str]]:
        """What install.py gives pip to do, and which packages were there before and are there after it."""
        before = self.run("-m", "pip", "freeze", "--all")
        asked = "".join(line for line in self.run(ROOT / "install.py", path=self._host).splitlines() if "pip " in line)
        return asked, set(before.splitlines()), set(self.run("-m", "pip", "freeze", "--all").splitlines())


def test_nothing_is_installed_beside_what_the_webuis_have(tmp_path):
    asked, before, after = WebUI(tmp_path).install()
    assert asked == "" and before == after
    assert any(line.startswith("torch==") for line in before)


@pytest.mark.skipif(not DINOV2, reason="this transformers has no DINOv2")
def test_nothing_is_installed_where_transformers_has_dinov2(tmp_path):
    asked, before, after = WebUI(tmp_path, "timm").install()
    assert asked == "" and before == after and not any(line.startswith("timm==") for line in before)


def test_timm_alone_comes_where_transformers_has_no_dinov2(tmp_path):
    """With pip from an index, and with what the WebUI pins as it was."""
    webui = WebUI(tmp_path, "timm", *(["transformers"] if DINOV2 else []))
    asked, before, after = webui.install()
    assert asked.startswith("pip install timm==") and asked.endswith(" --no-deps")
    assert before <= after and [line.split("==")[0] for line in after - before] == ["timm"]
    assert webui.install()[0] == ""
    if importlib.util.find_spec("torchvision") is not None:  # the WebUIs have it, and timm wants it
        used = "from lib_dinotile.dino.encoder import load_encoder; print(load_encoder('mini').backend)"
        assert webui.run("-c", used).strip() == "timm"


@pytest.mark.skipif(not pins(), reason="these packages are pinned by no WebUI")
def test_what_is_pinned_is_what_a_webui_finds(tmp_path):
    """So that the other tests say something of it."""
    found = {
        line.lower().replace("_", "-") for line in WebUI(tmp_path).run("-m", "pip", "freeze", "--all").splitlines()
    }
    for package, pinned in pins().items():
        assert any(line.split("+")[0] in (f"{package}=={pinned}".lower(), f"{package}=={pinned}.0") for line in found)
