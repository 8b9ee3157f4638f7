"""Patching, undone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def patched(target: Any, **values: Any) -> Iterator[None]:
    """Attributes of an object set for a while; put back, or taken away again, whatever happens."""
    before = {name: target.__dict__[name] for name in values if name in target.__dict__}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name in values:
            if name in before:
                setattr(target, name, before[name])
            elif name in target.__dict__:
                delattr(target, name)


@contextlib.contextmanager
def in_float32(modules: Sequence[nn.Module], quantized: bool = True) -> Iterator[None]:
    """The modules' weights in float32 for a while; then in the precision that each of them had, with the same bits.

    quantized: also those of a byte each, which may mean something only together with a scale. Weights in formats of
    their own, as of a GGUF file, are left alone.
    """
    least = 1 if quantized else 2
    # Places, not weights: the WebUIs put others there where they move a model, or take a LoRA out.
    before = [
        (weights, name, weight.dtype)
        for module in modules
        for owner in module.modules()
        for weights in (owner._parameters, owner._buffers)
        for name, weight in weights.items()
        if weight is not None
        and nn.Parameter not in type(weight).__mro__[1:]
        and weight.dtype.is_floating_point
        and weight.element_size() >= least
    ]
    try:
        for weights, name, _ in before:
            weight = weights[name]
            full = weight.data.float() if weight.dtype != torch.float32 else weight.data
            if type(full) is type(weight.data):  # else it was more than a number each
                weight.data = full
        yield
    finally:
        for weights, name, dtype in before:
            weight = weights.get(name)
            if weight is not None and weight.dtype != dtype:
                weight.data = weight.data.to(dtype)


@contextlib.contextmanager
def seeded(device: torch.device, seed: int = 0) -> Iterator[None]:
    """torch's generators for the CPU and for a device seeded for a while; then in the state that they were in.

    Those of other devices are left alone; `torch.manual_seed` would seed them, too.
    """
    module: Any = getattr(torch, device.type, None)
    # None of its own, or none that can be put back.
    if device.type == "cpu" or not all(hasattr(module, name) for name in ("get_rng_state", "manual_seed")):
        module = None
    one = device.type == "mps"  # there is but one, and older versions of torch take no number
    place = () if one else (device,)
    cpu, own = torch.default_generator.get_state(), module and module.get_rng_state(*place)
    try:
        torch.default_generator.manual_seed(seed)
        if module is not None:
            with contextlib.nullcontext() if one else module.device(device):
                module.manual_seed(seed)
        yield
    finally:
        torch.default_generator.set_state(cpu)
        if module is not None:
            module.set_rng_state(own, *place)
