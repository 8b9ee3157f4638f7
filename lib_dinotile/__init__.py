"""dinotile: a tiled upscaler that keeps every tile true to the picture with DINOv2 features."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

__version__ = "0.1.0"

SHOWN_AS = "DINO Tile"
"""The name of our errors' classes: the WebUIs show it in front of the message, and their API answers it as `error`."""
LONGEST = 2000
"""Longest message to a user, in characters."""


def one_line(error: BaseException) -> str:
    """The message of an exception on one line and, unless it is one of ours, cut to a length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 or isinstance(error, DinotileError) else text[:197] + "..."


class DinotileError(Exception):
    """A mistake of the user's, or something that is missing, in one line that says what to do about it.

    It stays one line whatever the names of files in it: what cannot be printed is written as in Python's strings.
    """

    def __init__(self, message: str, status_code: int = 422) -> None:
        message = printable(message)
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
        super().__init__(message)
        # The WebUIs' API reads these two off any exception and answers with them.
        self.status_code = status_code
        self.detail = message

    def __init_subclass__(cls) -> None:
        cls.__name__ = SHOWN_AS


DinotileError.__name__ = SHOWN_AS


class Handling:
    """`with Handling(handle):` gives an error of the block to `handle`, which raises another, or returns whether the
    error is dealt with.

    A class, since with a generator of contextlib's the new error is part of a reference cycle from Python 3.12 on, and
    all that the block's frames hold stays alive until the garbage collector comes.
    """

    def __init__(self, handle: Callable[[Exception], bool]) -> None:
        self._handle = handle

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> bool:
        return isinstance(error, Exception) and self._handle(error)


def printable(text: str) -> str:
    """Text on one line, with line ends, control characters and halves of characters spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
