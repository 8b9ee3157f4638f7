"""Runs a module of this repository in an environment of its own, made or brought up to date first.

    python3 tools/run.py ENVIRONMENT MODULE [ARGUMENT ...]

ENVIRONMENT is one of
    cli, train, test    .venv, with current packages and that one of pyproject.toml's optional dependencies;
    a1111, forge        .venv-a1111, .venv-forge, with the packages that this WebUI pins (tests/pins) and those of test;
    all                 test, a1111 and forge, two at a time; exit code 0 only if all give 0.

Needs Python 3.10 to 3.13 and nothing else; for what the WebUIs pin 3.10, or 3.11 where there is none. On a machine
without an NVIDIA GPU it looks for a CPU build of torch first.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = {path.stem: path for path in sorted((ROOT / "tests" / "pins").glob("*.txt"))}
"""By the WebUI's name what it pins, and so the environments with those packages."""
NO_DEPS = ROOT / "tests" / "requirements-no-deps.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

_one_at_a_time = threading.Lock()
"""Environments are made one after the other: builds of this project share a folder."""


class Environment:
    """A virtual environment: the .venv, or one with the packages that a WebUI pins."""

    def __init__(self, name: str) -> None:
        """name: as on the command line, but not all."""
        self.name, self.pins = name, PINS.get(name)
        self.folder = ROOT / (f".venv-{name}" if self.pins else ".venv")
        self.python = self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def command(self, module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
        """What to run, and with which environment variables."""
        variables = {**os.environ, "PYTHONPATH": str(ROOT)}
        variables.pop("DINOTILE_PINS", None)
        if self.pins:
            variables["DINOTILE_PINS"] = str(self.pins)
        return [str(self.python), "-m", module, *arguments], variables

    def prepare(self) -> None:
        """The packages, unless they are up to date. SystemExit with one line if they cannot be had."""
        base = webui_python() if self.pins else sys.executable
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
        self._install_torch()
        extra = ["-e", f".[{'test' if self.pins else self.name}]"]
        if not self._pip(*extra, *(["-r", str(self.pins)] if self.pins else []), quiet=False):
            fail(f"pip could not install the {self.name} packages, see above")
        if (self.pins or self.name == "test") and not self._pip("--no-deps", "-r", str(NO_DEPS), quiet=False):
            fail("pip could not install what the tests need, see above")
        stamp.write_text(digest)

    def _pip(self, *arguments: str, quiet: bool = True) -> bool:
        """Runs pip; whether it succeeded."""
        command = [self.python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *arguments]
        return subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL if quiet else None).returncode == 0

    def _has_torch(self) -> bool:
        return subprocess.run([self.python, "-c", "import torch"], cwd=ROOT, capture_output=True).returncode == 0

    def _install_torch(self) -> None:
        """torch, and torchvision if it is pinned, unless torch is there; SystemExit if no fitting build can be had."""
        if self._has_torch():
            return
        lines = self.pins.read_text().splitlines() if self.pins else ["torch"]
        wanted = [line for line in lines if line.startswith("torch")]
        if sys.platform == "linux" and not shutil.which("nvidia-smi"):
            # A wheel in one of pip's own --find-links folders, else PyTorch's index of CPU builds.
            index = ("--retries", "1", "--timeout", "20", "--index-url", CPU_INDEX)
            if self._pip("--no-index", "--no-deps", *wanted) or self._pip("--no-deps", *index, *wanted):
                found = "from importlib.metadata import version; print(version('torch'))"
                version = subprocess.check_output([self.python, "-c", found], text=True).strip()
                if self._pip(f"torch=={version}", quiet=False) and self._has_torch():  # now what it depends on
                    return
            if not self.pins:  # a current build for CUDA takes 6 GB, a pinned one 5 and is the one that counts
                fail(
                    f"no CPU build of torch for this Python could be had (tried pip's local folders and {CPU_INDEX}); "
                    f"install one into {self.folder} and run this again"
                )
        if not self._pip(*wanted, quiet=False):
            fail("pip could not install torch, see above")


def webui_python() -> str:
    """A Python for what the WebUIs pin: theirs, 3.10, from the PATH or pyenv, else this one if it is 3.11."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [sys.executable, shutil.which("python3.10"), *sorted(pyenv.glob("versions/3.10.*/bin/python3.10"))]
    for python in filter(None, found):
        told = subprocess.run([python, "-c", "import ensurepip, sys; print(sys.version_info[:2])"], capture_output=True)
        if told.stdout.strip() == b"(3, 10)":
            return str(python)
    if sys.version_info[:2] != (3, 11):
        fail("what the WebUIs pin needs Python 3.10 or 3.11: install one, or run `test` in place of `all`")
    return sys.executable


def fail(line: str) -> None:
    sys.exit(f"tools/run.py: {line}")


def run_one(name: str, *arguments: str) -> int:
    """The exit code of a module run in one environment."""
    environment = Environment(name)
    environment.prepare()
    command, variables = environment.command(*arguments)
    return subprocess.run(command, env=variables).returncode


def run_all(*arguments: str) -> int:
    """... in all environments that tests are run in, two at a time, the output of each when it is done."""
    jobs: list[Callable[[], int]] = [partial(_run_aside, name, *arguments) for name in ("test", *PINS)]
    with ThreadPoolExecutor(2) as pool:
        return max(pool.map(lambda job: job(), jobs))


def _run_aside(name: str, *arguments: str) -> int:
    environment, began = Environment(name), time.monotonic()
    with _one_at_a_time:
        environment.prepare()
    ready = time.monotonic()
    command, variables = environment.command(*arguments)
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    variables = {"OMP_NUM_THREADS": threads, **variables}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    took = f"ready after {ready - began:.0f} s, run in {time.monotonic() - ready:.0f} s"
    print(f"\n== {name}: {took}, exit code {done.returncode}\n{done.stdout}", end="", flush=True)
    return done.returncode


def main() -> int:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        fail(f"needs Python 3.10 to 3.13, this is {sys.version.split()[0]}")
    return run_all(*sys.argv[2:]) if sys.argv[1] == "all" else run_one(*sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
