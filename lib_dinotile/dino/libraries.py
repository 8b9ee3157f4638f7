"""The libraries that have the transformer blocks of an encoder, and whether the host's are recent enough."""

from __future__ import annotations

import inspect
from typing import Any

from lib_dinotile import DinotileError, one_line
from lib_dinotile.dino.architecture import Architecture
from lib_dinotile.dino.dinov3 import DINOv3

Family = type[Architecture] | type[DINOv3]

NAMES = ("auto", "transformers", "timm")


class _LibraryMissing(Exception):
    """The library is not installed, too old or does not import; the message says which."""


def transformers_classes(family: Family) -> tuple[Any, Any, Any]:
    """(transformers, class of the model, class of its configuration)."""
    try:
        import transformers

        return transformers, *(getattr(transformers, f"{family.model}{kind}") for kind in ("Model", "Config"))
    # transformers 4 turns an ImportError inside into a RuntimeError
    except (ImportError, RuntimeError, AttributeError) as error:
        raise _LibraryMissing(f"no {family.model}Model from transformers ({one_line(error)})") from error


def timm_block(family: Family) -> Any:
    """Class of timm's blocks."""
    try:
        if family is Architecture:
            from timm.models.vision_transformer import Block

            return Block
        from timm.models.eva import EvaBlock
    except Exception as error:  # also what comes of a torchvision that does not fit torch
        raise _LibraryMissing(f"timm does not import ({one_line(error)})") from error
    if "rotate_half" not in inspect.signature(EvaBlock).parameters:
        raise _LibraryMissing("this timm has no DINOv3")
    return EvaBlock


def check_library(family: Family, backend: str = "auto") -> str:
    """Name of the library that runs DINOv2 or DINOv3; DinotileError with one line if there is none."""
    lacks = []
    for name, find in (("transformers", transformers_classes), ("timm", timm_block)):
        if backend not in ("auto", name):
            continue
        try:
            find(family)
            return name
        except _LibraryMissing as error:
            lacks.append(str(error))
    raise DinotileError(f"{family.family} needs {family.needs}: {'; '.join(lacks)}")
