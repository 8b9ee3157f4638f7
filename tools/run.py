"""Runs a module of this repository in an environment of its own, made or brought up to date first.

    python3 tools/run.py ENVIRONMENT MODULE [ARGUMENT ...]

ENVIRONMENT is one of
    cli, train, test    .venv, with current packages and that one of pyproject.toml's optional dependencies;
    a1111, forge, neo   .venv-a1111, ..., with the packages that this WebUI pins (tests/pins) and those of test.

Needs Python 3.10 to 3.14 and nothing else; for what a WebUI pins the Python that its file names, or 3.11 where there is
none. On Linux without an NVIDIA GPU the .venv gets a CPU build of torch, never one for CUDA.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = {path.stem: path for path in sorted((ROOT / "tests" / "pins").glob("*.txt"))}
"""By the WebUI's name what it pins, and so the environments with those packages."""
EXTRAS = ("cli", "train", "test")
NO_DEPS = ROOT / "tests" / "requirements-no-deps.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class Environment:
    """A virtual environment: the .venv, or one with the packages that a WebUI pins."""

    def __init__(self, name: str) -> None:
        """name: as on the command line."""
        self.name, self.pins = name, PINS.get(name)
        self.folder = ROOT / (f".venv-{name}" if self.pins else ".venv")
        self.python = self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def command(self, module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
        """The command line, and its environment variables."""
        variables = {**os.environ, "PYTHONPATH": str(ROOT)}
        variables.pop("DINOTILE_PINS", None)
        if self.pins:
            variables["DINOTILE_PINS"] = str(self.pins)
        return [str(self.python), "-m", module, *arguments], variables

    def prepare(self) -> None:
        """The packages, unless they are up to date. SystemExit with one line if they cannot be had."""
        base = webui_python(self.pins) if self.pins else sys.executable
        version = subprocess.check_output([base, "-VV"], text=True)
        recipe = [ROOT / "pyproject.toml", Path(__file__), NO_DEPS, *([self.pins] if self.pins else [])]
        digest = hashlib.sha256(b"\0".join([version.encode(), *(path.read_bytes() for path in recipe)])).hexdigest()
        stamp, known = self.folder / f"ready-{self.name}", self.folder / "python"
        if stamp.is_file() and stamp.read_text() == digest:
            return
        print(f"Setting up {self.folder} (once; a few minutes) ...", file=sys.stderr, flush=True)
        # What is pinned is made anew: nothing of earlier pins is left.
        if self.pins or not (self.python.is_file() and known.is_file() and known.read_text() == version):
            if subprocess.run([base, "-m", "venv", "--clear", self.folder]).returncode:
                fail("this Python cannot make virtual environments; on Debian: apt install python3-venv")
            known.write_text(version)
            self._pip("--upgrade", "pip")  # that of an old Python takes twice as long
        self._install_torch()
        # As the WebUIs do: gradio first, whatever then takes the place of what it wants.
        pinned = pinned_lines(self.pins) if self.pins else []
        first = [line for line in pinned if line.startswith("gradio")]
        extra = ["-e", f".[{'test' if self.pins else self.name}]", *(line for line in pinned if line not in first)]
        if (first and not self._pip(*first, quiet=False)) or not self._pip(*extra, quiet=False):
            fail(f"pip could not install the {self.name} packages, see above")
        if (self.pins or self.name == "test") and not self._pip("--no-deps", "-r", str(NO_DEPS), quiet=False):
            fail("pip could not install what the tests need, see above")
        stamp.write_text(digest)

    def _pip(self, *arguments: str, quiet: bool = True) -> bool:
        """Runs pip; whether it succeeded. It compiles nothing: most modules are never imported."""
        flags = ("--disable-pip-version-check", "install", "-qq", "--no-compile")
        command: list[str | Path] = [self.python, "-m", "pip", *flags, *arguments]
        return subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL if quiet else None).returncode == 0

    def _install_torch(self) -> None:
        """torch, and torchvision if it is pinned, unless torch is there; SystemExit if no fitting build can be had."""
        if subprocess.run([self.python, "-c", "import torch"], cwd=ROOT, capture_output=True).returncode == 0:
            return
        lines = pinned_lines(self.pins) if self.pins else ["torch"]
        wanted = [line for line in lines if line.startswith("torch")]
        if sys.platform == "linux" and not shutil.which("nvidia-smi"):
            # A wheel in one of pip's own --find-links folders, else PyTorch's index of CPU builds.
            index = ("--retries", "1", "--timeout", "20", "--index-url", CPU_INDEX)
            if self._pip("--no-index", "--no-deps", *wanted) or self._pip("--no-deps", *index, *wanted):
                return  # what it depends on comes with everything else
            if not self.pins:  # a current build for CUDA takes 6 GB, a pinned one 5 and is the one that counts
                fail(
                    f"no CPU build of torch for this Python could be had (tried pip's local folders and {CPU_INDEX}); "
                    f"install one into {self.folder} and run this again"
                )
        if not self._pip(*wanted, quiet=False):
            fail("pip could not install torch, see above")


def pinned_lines(pins: Path) -> list[str]:
    """The requirements in a file of pins, without its comments."""
    return [line for line in pins.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def webui_python(pins: Path) -> str:
    """A Python for what a WebUI pins: its own, which its file names first, from the PATH or pyenv, else this one if it
    is 3.11."""
    version = pins.read_text(encoding="utf-8").split()[2]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    installed = map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}")))
    found = [sys.executable, shutil.which(f"python{version}"), *installed]
    for python in filter(None, found):
        code = "import ensurepip, sys; print('%s.%s' % sys.version_info[:2])"
        told = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if told.stdout.strip() == version:
            return python
    if sys.version_info[:2] != (3, 11):
        fail(f"what {pins.stem} pins needs Python {version} or 3.11: install one of them")
    return sys.executable


def fail(line: str) -> None:
    sys.exit(f"tools/run.py: {line}")


def main() -> int:
    """The exit code of the module."""
    if len(sys.argv) < 3 or sys.argv[1] not in (*EXTRAS, *PINS):
        sys.exit(__doc__)
    if not (3, 10) <= sys.version_info[:2] <= (3, 14):
        fail(f"needs Python 3.10 to 3.14, this is {sys.version.split()[0]}")
    environment = Environment(sys.argv[1])
    environment.prepare()
    command, variables = environment.command(*sys.argv[2:])
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: None)  # the module gets it, too, and saves what it has
    return subprocess.run(command, env=variables).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
