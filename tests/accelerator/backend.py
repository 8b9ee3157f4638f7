"""What makes PyTorch take the pretend accelerator for a device: its slot for one from outside, PrivateUse1."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

from tests.accelerator.memory import memory

AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
"""Whether this torch can have a device that is written in Python."""

NAME = "pretend"
HALVES = (torch.float16, torch.bfloat16)


class Random:
    """The device's random stream, apart from the CPU's: on a GPU the same seed gives other numbers too."""

    def __init__(self) -> None:
        self.seed(0)

    def seed(self, seed: int) -> None:
        self.state = torch.Generator().manual_seed(seed ^ 0x5EED).get_state()

    @contextlib.contextmanager
    def drawn_from(self) -> Iterator[None]:
        """What draws from the CPU's stream draws from this one."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(before)


random = Random()


class _Module:
    """What PyTorch asks the module of a device for. To those that look for a device to use, it is not there."""

    is_available = staticmethod(lambda: False)
    is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_amp_supported_dtype = staticmethod(lambda: list(HALVES))
    manual_seed_all = staticmethod(random.seed)

    @staticmethod
    def get_rng_state(device: Any = None) -> Tensor:
        return random.state

    @staticmethod
    def set_rng_state(state: Tensor, device: Any = None) -> None:
        random.state = state


# PyTorch ends the process if a Python exception passes through its backward pass on a device from Python: on the way
# it asks the device's guard, which is Python too, for a stream. So there an operation that fails returns what is no
# tensor, for which PyTorch raises an exception of its own; outside, the first one is raised in its place.

FAILED = object()
"""What an operation returns in a backward pass if it adds to `failures`."""
failures: list[Exception] = []

_run_backward = torch.autograd._engine_run_backward if AVAILABLE else None


def _run_backward_of_device(*args: Any, **kwargs: Any) -> Any:
    try:
        return _run_backward(*args, **kwargs)
    except Exception:
        if failures:
            raise failures[0] from None
        raise
    finally:
        failures.clear()
        if memory.blocks and torch._C._current_graph_task_id() == -1:
            _wait_for_thread()


def _wait_for_thread() -> None:
    """Let PyTorch's thread for the device drop what it still holds of the last backward pass: it does that late."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(0, device=DEVICE, requires_grad=True)
        y = x * 1
        _run_backward((y,), (x.detach(),), False, False, (x,), allow_unreachable=True, accumulate_grad=False)


if AVAILABLE:

    class _Hook(backend_registration._DummyPrivateUse1Hook):
        def is_available(self) -> bool:
            return False

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=_Hook())
    torch.autograd._engine_run_backward = _run_backward_of_device

DEVICE = torch.device(NAME, 0) if AVAILABLE else torch.device("cpu")
