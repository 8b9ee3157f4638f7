"""What is replaced on a processing object of the WebUI, and put back.

The WebUI takes one object for all the images of a folder, and other extensions may keep it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from modules import errors

from lib_dinotile import DinotileError, one_line

UNDO = "_dinotile_undo"
"""Where what a processing object had of its own waits on it: (its attributes, those that take their place)."""
FOUND = "_dinotile_found"
"""Where reports and maps wait on it for the gallery: (report, maps) of each image, None without tiles."""


def replace(p: Any, **values: Any) -> None:
    """Set attributes of a processing object, until `undo`."""
    before = {name: p.__dict__[name] for name in values if name in p.__dict__}
    setattr(p, UNDO, (before, values))
    for name, value in values.items():
        setattr(p, name, value)


def own(p: Any, name: str) -> Callable[..., Any]:
    """A method of the processing object as it was before `replace`."""
    return getattr(p, UNDO)[0].get(name) or getattr(type(p), name).__get__(p)


def undo(p: Any) -> None:
    """The processing object as it was."""
    before, values = p.__dict__.pop(UNDO, ({}, {}))
    for name in values:
        if name in before:
            setattr(p, name, before[name])
        else:
            p.__dict__.pop(name, None)
    # ControlNet keeps the `sample` of a folder's first image, and would paint that again for all the others.
    ours = [value for value in values.values() if callable(value)]
    for name in [name for name, value in vars(p).items() if callable(value) and value in ours]:
        delattr(p, name)
    if values:
        forget_samples(p)
    p.__dict__.pop(FOUND, None)


def forget_samples(p: Any) -> None:
    """Forge keeps what `sample` has returned, for as long as the object is used: ours are whole images."""
    p.__dict__.get("latents_after_sampling", []).clear()


def refuse(p: Any, error: Exception, called: Callable[[str], str] = str) -> None:
    """Let the job fail with this error. The WebUI only logs what a script's hook raises, and would go on without it.

    called: makes of a refusal what the user reads.
    """
    if not isinstance(error, DinotileError):
        errors.report("DINO Tile: a job could not be begun", exc_info=True)
    # Not the error itself: its frames know p, and p would have it.
    line, code, job = called(one_line(error)), getattr(error, "status_code", 500), weakref.ref(p)

    def fail(*_: Any, **__: Any) -> None:
        undo(job())
        raise DinotileError(line, code)

    undo(p)
    replace(p, init=fail)
