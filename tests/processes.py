"""Two processes that work together, as users start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 600
"""Seconds."""


def environment() -> dict[str, str]:
    """So that they find this repository."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run_two(*words: object) -> subprocess.CompletedProcess[str]:
    """What `accelerate launch` makes of these words, with two processes on the CPU that speak over gloo."""
    flags = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    with socket.socket() as free:  # by itself only newer torch finds one
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *flags.split(), "--main_process_port", port]
    command = list(map(str, (*launch, *words)))
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
