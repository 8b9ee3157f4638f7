"""Whether there is memory for what is asked."""

from __future__ import annotations


def enough_memory(count: int) -> bool:
    """Whether so many bytes can be taken; True where that is not known.

    Linux promises more than it has, and ends a program that takes it at its word.
    """
    try:
        import psutil  # the WebUIs have it, and accelerate
    except ImportError:
        return True
    return psutil.virtual_memory().available + psutil.swap_memory().free >= count
