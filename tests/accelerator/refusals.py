"""What the pretend accelerator refuses and the CPU takes, in the words of CUDA or, for what that lacks, of MPS."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_lacks: set[str] = set()


@contextlib.contextmanager
def lacking(*features: str) -> Iterator[None]:
    """Within, the device lacks some of `float64` and `antialias` (antialiased interpolation), as Apple's MPS does."""
    if unknown := set(features) - {"float64", "antialias"}:
        raise ValueError(f"not a feature: {unknown}")
    before = set(_lacks)
    _lacks.update(features)
    try:
        yield
    finally:
        _lacks.intersection_update(before)


def refuse_dtype(dtype: torch.dtype) -> None:
    """TypeError for a dtype that the device lacks."""
    if dtype == torch.float64 and "float64" in _lacks:
        raise TypeError(
            "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
            "Please use float32 instead."
        )


def _antialias(_: Any) -> None:
    if "antialias" in _lacks:
        raise NotImplementedError(
            "The operator 'aten::_upsample_bicubic2d_aa.out' is not currently implemented for the MPS device."
        )


_SCALARS = {
    torch.float16: ("Half", "c10::Half"),
    torch.bfloat16: ("BFloat16", "c10::BFloat16"),
    torch.float32: ("Float", "float"),
    torch.float64: ("Double", "double"),
    torch.int32: ("Int", "int"),
    torch.int64: ("Long", "long"),
}


def _name(tensor: Tensor, in_cpp: bool = False) -> str:
    return _SCALARS.get(tensor.dtype, (str(tensor.dtype),) * 2)[in_cpp]


def _integers(tensor: Tensor) -> None:
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        raise NotImplementedError(f"\"addmm_cuda\" not implemented for '{_name(tensor)}'")


def _product(count: int) -> Callable[[Any], None]:
    def check(args: Any) -> None:
        first = args[0]
        for other in args[1:count]:
            if other.dtype != first.dtype:
                names = f"{_name(first)} and {_name(other)}"
                raise RuntimeError(f"mat1 and mat2 must have the same dtype, but got {names}")
        _integers(first)

    return check


def _convolution(args: Any) -> None:
    for name, other in zip(("weight", "bias"), args[1:3]):
        if other is not None and other.dtype != args[0].dtype:
            dtypes = _name(args[0], True), _name(other, True)
            raise RuntimeError(f"Input type ({dtypes[0]}) and {name} type ({dtypes[1]}) should be the same")
    _integers(args[0])


def _normalization(*places: int) -> Callable[[Any], None]:
    def check(args: Any) -> None:
        for other in (args[i] for i in places):
            if other is not None and other.dtype != args[0].dtype:
                raise RuntimeError(f"expected scalar type {_name(args[0])} but found {_name(other)}")

    return check


REFUSALS: dict[str, Callable[[Any], None]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot"), _product(2)),
    **dict.fromkeys(("addmm", "addmv", "addbmm", "baddbmm"), _product(3)),
    "convolution": _convolution,
    "native_layer_norm": _normalization(2, 3),
    "native_group_norm": _normalization(1, 2),
    **dict.fromkeys(("_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa"), _antialias),
}
"""Checks by the name of an operation; they are given its arguments."""
