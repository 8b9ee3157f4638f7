"""Two processes that work together, as users start them."""

from __future__ import annotations

import socket
import sys


def launch_two() -> list[str]:
    """`accelerate launch` for two processes on the CPU, which speak over gloo; what they are to run goes behind."""
    flags = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    with socket.socket() as free:  # by itself only newer torch finds one
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [sys.executable, "-m", "accelerate.commands.launch", *flags.split(), "--main_process_port", str(port)]
