"""A pretend accelerator: tensors hold their data in the machine's memory and behave like those of a GPU.

They are on a device of their own, do not mix with CPU tensors or with other dtypes where CUDA refuses that, have a
random stream of their own, and what they take of the device's memory is counted and can be limited.

A tensor is a subclass with `__torch_dispatch__`; the functions that make tensors from none, `torch.zeros` and the like,
are registered here. The device is there for the whole process, but nobody finds it who looks for a device to use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.accelerator.backend import AVAILABLE, DEVICE, NAME
from tests.accelerator.memory import alive, alive_bytes, limit, peak, reset
from tests.accelerator.refusals import lacking
from tests.accelerator.tensor import DeviceTensor, Operation

__all__ = ["AVAILABLE", "DEVICE", "NAME", "DeviceTensor", "alive", "alive_bytes", "lacking", "limit", "peak", "reset"]


def _factories() -> Iterator[Any]:
    """Operations that make a tensor on a device from none."""
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("aten::") or any(word in name for word in ("sparse", "quantized", "nested", "mkldnn")):
            continue
        packet, _, overload = name.removeprefix("aten::").partition(".")
        try:
            func = getattr(getattr(torch.ops.aten, packet), overload or "default")
        except (AttributeError, RuntimeError):
            continue
        arguments = func._schema.arguments
        if any(argument.name == "device" for argument in arguments) and not any(
            "Tensor" in str(argument.type) for argument in arguments
        ):
            yield func


def _fill(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    return _copy(target, source)


if AVAILABLE:
    # Registrations live as long as this does.
    _library = torch.library.Library("aten", "IMPL")
    for _func in _factories():
        _library.impl(_func, Operation(_func).__call__, "PrivateUse1")
    # `torch.tensor` fills the new tensor with this, past `__torch_dispatch__`.
    _copy = Operation(torch.ops.aten.copy_.default)
    _library.impl("_copy_from", _fill, "PrivateUse1")
