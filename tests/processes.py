"""Two processes that work together, as users start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 240
"""Seconds; it takes a tenth of that."""


def environment() -> dict[str, str]:
    """One thread: sums of floats depend on their number."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_two(*words: object) -> subprocess.CompletedProcess[str]:
    """What `accelerate launch` makes of these words, with two processes on the CPU that speak over gloo.

    They meet at a port that was free a moment before. If somebody else has it by then they wait for each other for
    good: then once more, at another.
    """
    flags = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    for _ in range(2):
        with socket.socket() as free:  # by itself only newer torch finds one
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch = [sys.executable, "-m", "accelerate.commands.launch", *flags.split(), "--main_process_port", port]
        with _started([*launch, *words]) as process:
            try:
                out, error = process.communicate(timeout=PATIENCE)
                return subprocess.CompletedProcess(process.args, process.returncode, out, error)
            except subprocess.TimeoutExpired:
                process.terminate()  # and it ends those that it has started
    raise AssertionError("two processes have not found each other")


def _started(words: Sequence[object]) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, words)), env=environment(), **pipes)
