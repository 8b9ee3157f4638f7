"""Where, and in which precision, a model of the command line computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lib_dinotile import DinotileError, one_line
from lib_dinotile.settings import AUTO

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""By their names among the options."""
ACCELERATORS = ("cuda", "xpu", "mps")
"""Types of devices that are taken by themselves, the first that is there. ROCm is `cuda` to torch."""


def _count(kind: str) -> int:
    """How many accelerators of a type there are."""
    module = getattr(torch.backends if kind == "mps" else torch, kind, None)  # torch 2.1 has no torch.xpu
    if module is None or not module.is_available():
        return 0
    return 1 if kind == "mps" else module.device_count()


def find_device(name: str, number: int = 0) -> torch.device:
    """The device of a name as torch knows it; `auto`: an accelerator if there is any, else the CPU.

    number: of this process. Where the name has no index, processes spread over all accelerators of that type.
    DinotileError, one line, if it is not there.
    """
    there = [kind for kind in ACCELERATORS if _count(kind)]
    chosen = [*there, "cpu"][0] if name == AUTO else name
    try:
        device = torch.device(chosen)
        if device.index is None and device.type in there:
            device = torch.device(device.type, number % _count(device.type))
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # RuntimeError, AssertionError, NotImplementedError ...
        raise DinotileError(
            f"device: {name!r} is not available ({one_line(error)}), give one of {', '.join((AUTO, *there, 'cpu'))}"
        ) from error
    return device


def find_dtype(precision: str, device: torch.device) -> torch.dtype:
    """One of `DTYPES`; `auto`: half precision on an accelerator, else float32.

    DinotileError, one line, if the device does not compute in it: old versions of torch lack fp16 on a CPU.
    """
    if precision == AUTO:
        return torch.float16 if device.type in ACCELERATORS else torch.float32
    dtype = DTYPES[precision]
    try:
        x = torch.zeros(1, 1, 3, 3, device=device, dtype=dtype)
        F.group_norm(F.conv2d(x, x, padding=1), 1).cpu()
    except Exception as error:
        raise DinotileError(
            f"precision: torch {torch.__version__} does not compute in {precision} on {device}, give fp32"
        ) from error
    return dtype


def precision_of(dtype: torch.dtype) -> str:
    """The name of one of `DTYPES`."""
    return next(name for name, each in DTYPES.items() if each == dtype)


def empty_cache(device: torch.device) -> None:
    """Gives the memory that torch keeps for itself back to the device, where there is such."""
    release = getattr(getattr(torch, device.type, None), "empty_cache", None)
    if release is not None:
        release()
