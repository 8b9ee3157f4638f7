"""Runs a module of this repository in its own .venv, made or brought up to date first.

    python3 tools/run.py EXTRA MODULE [ARGUMENT ...]

EXTRA is one of pyproject.toml's optional dependencies: cli, train or test. Needs Python 3.10 to 3.13 and nothing else.
On a machine without an NVIDIA GPU it takes a CPU build of torch, never the one with gigabytes of CUDA.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
NO_DEPS = ROOT / "tests" / "requirements-no-deps.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def pip(*arguments: str, quiet: bool = True) -> bool:
    """Runs pip in the .venv; whether it succeeded."""
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "-q", *arguments]
    return subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL if quiet else None).returncode == 0


def has_torch() -> bool:
    return subprocess.run([PYTHON, "-c", "import torch"], cwd=ROOT, capture_output=True).returncode == 0


def install_torch() -> None:
    """torch into the .venv, if it is not there; exits with one line if no fitting build can be had."""
    if has_torch():
        return
    if sys.platform != "linux" or shutil.which("nvidia-smi"):
        if not pip("torch", quiet=False):
            sys.exit("tools/run.py: pip could not install torch, see above")
        return
    # Linux without a GPU: a wheel in one of pip's own --find-links folders, else PyTorch's index of CPU builds.
    if pip("--no-index", "--no-deps", "torch") or pip(
        "--no-deps", "--retries", "1", "--timeout", "20", "--index-url", CPU_INDEX, "torch"
    ):
        version = subprocess.check_output(
            [PYTHON, "-c", "from importlib.metadata import version; print(version('torch'))"], text=True
        )
        if pip(f"torch=={version.strip()}", quiet=False) and has_torch():  # now what it depends on
            return
    sys.exit(
        f"tools/run.py: no CPU build of torch for Python {platform.python_version()} on {platform.machine()} could be "
        f"had (tried pip's local folders and {CPU_INDEX}); install one into {VENV} and run this again"
    )


def prepare(extra: str) -> None:
    """The .venv with the project and `extra`, unless it is up to date."""
    recipe = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "tools/run.py")] + [NO_DEPS.read_bytes()]
    digest = hashlib.sha256(b"\0".join([sys.version.encode(), *recipe])).hexdigest()
    stamp = VENV / f"ready-{extra}"
    if stamp.is_file() and stamp.read_text() == digest:
        return
    print(f"Setting up {VENV} (once; a few minutes) ...", file=sys.stderr, flush=True)
    same = PYTHON.is_file() and (VENV / "python").is_file() and (VENV / "python").read_text() == sys.version
    if not same:
        try:
            venv.create(VENV, with_pip=True, clear=VENV.exists())
        except subprocess.CalledProcessError:
            sys.exit("tools/run.py: this Python cannot make virtual environments; on Debian: apt install python3-venv")
        (VENV / "python").write_text(sys.version)
    install_torch()
    if not pip("-e", f".[{extra}]", quiet=False):
        sys.exit(f"tools/run.py: pip could not install the {extra} packages, see above")
    if extra == "test" and not pip("--no-deps", "-r", str(NO_DEPS), quiet=False):
        sys.exit("tools/run.py: pip could not install what the tests need, see above")
    stamp.write_text(digest)


def main() -> int:
    if len(sys.argv) < 3:
        sys.exit("usage: python3 tools/run.py EXTRA MODULE [ARGUMENT ...]")
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"tools/run.py: needs Python 3.10 to 3.13, this is {platform.python_version()}")
    prepare(sys.argv[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([PYTHON, "-m", *sys.argv[2:]], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
