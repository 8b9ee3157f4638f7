"""Processes beside the tests: programs as users start them, alone or as two that work together."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 600
"""Seconds."""

# Each imports PyTorch and diffusers, for seconds. On Linux one process does it, and the others begin as copies of it.
_CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    _CONTEXT.set_forkserver_preload(
        ["lib_dinotile.hosts.diffusers", "lib_dinotile.cli.upscale", "lib_dinotile.train.adapter", "accelerate"]
    )


@dataclass(frozen=True)
class Ended:
    """A process that came to its end."""

    returncode: int
    """0 is success; below 0 the signal that ended it."""
    stdout: str
    stderr: str


class Running:
    """A function at work in a process of its own."""

    def __init__(
        self,
        function: Callable[..., int],
        *arguments: Any,
        variables: Mapping[str, object] | None = None,
        **more: Any,
    ) -> None:
        """function: of a module, returns the exit status; variables: of the environment, besides those that there
        are."""
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        environment = {**os.environ, **{name: str(value) for name, value in (variables or {}).items()}}
        given = self._files, environment, functools.partial(function, *arguments, **more)
        self._process = _CONTEXT.Process(target=_work, args=given, daemon=True)
        self._process.start()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> Ended:
        """One that does not end is killed."""
        self._process.join(PATIENCE)
        self.kill()
        self._process.join()
        with self._folder:
            return Ended(self._process.exitcode, *(file.read_text(encoding="utf-8") for file in self._files))


def _work(files: list[Path], environment: Mapping[str, str], work: Callable[[], int]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, (file, name) in enumerate(zip(files, ("stdout", "stderr")), 1):
        with file.open("wb") as opened:
            os.dup2(opened.fileno(), number)
        setattr(sys, name, open(number, "w", encoding="utf-8", buffering=1, closefd=False))  # noqa: SIM115
    sys.exit(work())


def command(*words: object, limit: int | None = None) -> int:
    """The command line's exit status. limit: no file can be written beyond so many bytes, as on a disk that is full."""
    from lib_dinotile import __main__ as cli

    if limit is not None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return cli.main(list(map(str, words)))


def run_two(*words: object) -> Ended:
    """The command line in two processes with the environment that a launcher gives them; they speak over gloo.

    All that they print; the exit status is that of the first which did not succeed.
    """
    found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    running = [Running(command, *words, variables={**found, "RANK": rank, "LOCAL_RANK": rank}) for rank in range(2)]
    ended = [each.wait() for each in running]
    code = next((each.returncode for each in ended if each.returncode), 0)
    return Ended(code, *("".join(texts) for texts in zip(*((each.stdout, each.stderr) for each in ended))))


def launch_two(*words: object) -> subprocess.CompletedProcess[str]:
    """Python with these words in two processes that `accelerate launch` starts, as users do."""
    flags = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch = [sys.executable, "-m", "accelerate.commands.launch", *flags.split(), "--main_process_port", _free_port()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        list(map(str, (*launch, *words))), env=environment, capture_output=True, text=True, timeout=PATIENCE
    )


def _free_port() -> int:
    with socket.socket() as free:  # by itself only newer torch finds one
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
