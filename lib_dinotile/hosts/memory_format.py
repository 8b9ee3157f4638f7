"""The memory layout in which convolutions are fastest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def fast(x: Tensor) -> Tensor:
    """The same values (k, C, h, w), on a CPU with the channels next to each other.

    Convolutions keep that layout for all that follows, whatever the layout of their weights. On a GPU it costs as often
    as it pays, and is left to the WebUI's own settings.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" and x.ndim == 4 else x


@contextlib.contextmanager
def fast_input(module: nn.Module | None) -> Iterator[None]:
    """While open, the module's first argument, or `x`, comes in the fastest layout. None: nothing is done."""
    if module is None:
        yield
        return

    def lay_out(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (fast(args[0]), *args[1:]), kwargs
        return args, {name: fast(value) if name == "x" else value for name, value in kwargs.items()}

    handle = module.register_forward_pre_hook(lay_out, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
