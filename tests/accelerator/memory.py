"""The memory of the pretend accelerator: what is alive in it, and when it is full."""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor


class Block:
    """A storage on the device. It is counted for as long as a tensor of it lives: every such tensor holds this."""

    __slots__ = ("__weakref__", "key", "made_for", "size", "storage")

    def __init__(self, storage: torch.UntypedStorage, made_for: str) -> None:
        self.storage, self.key, self.made_for = storage, storage._cdata, made_for
        self.size = 0

    def __del__(self) -> None:
        if memory is None:  # the interpreter is shutting down
            return
        with memory.lock:
            del memory.blocks[self.key]
            memory.alive -= self.size


class Memory:
    """All blocks, and how much of them there can be."""

    def __init__(self) -> None:
        self.alive = self.peak = 0
        self.capacity = math.inf
        self.blocks: dict[int, weakref.ref[Block]] = {}
        # Held, it can be asked for again: memory that is taken may run the garbage collector, which frees blocks.
        self.lock = threading.RLock()

    def find(self, data: Tensor) -> Block | None:
        """The block of the storage of `data`, if that is on the device."""
        reference = self.blocks.get(data.untyped_storage()._cdata)
        return reference() if reference else None

    def block(self, data: Tensor) -> Block:
        """The block of the storage of `data`, made if need be; torch.OutOfMemoryError if there is no room for it."""
        with self.lock:
            block = self.find(data)
            if block is None:
                block = Block(data.untyped_storage(), f"{str(data.dtype).removeprefix('torch.')} {tuple(data.shape)}")
                self.blocks[block.key] = weakref.ref(block)
            more = block.storage.nbytes() - block.size
            if more:
                if self.alive + more > self.capacity:
                    total, free = _readable(self.capacity), _readable(max(self.capacity - self.alive, 0))
                    raise torch.OutOfMemoryError(
                        f"CUDA out of memory. Tried to allocate {_readable(more)}. "
                        f"GPU 0 has a total capacity of {total} of which {free} is free."
                    )
                block.size += more
                self.alive += more
                self.peak = max(self.peak, self.alive)
        return block


memory = Memory()


def _readable(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def alive_bytes() -> int:
    """Bytes that live tensors take on the device; views of a tensor take none of their own."""
    return memory.alive


def alive() -> list[str]:
    """Dtype and shape of what takes memory, sorted, one entry per storage, as its first tensor had them."""
    with memory.lock:
        blocks = [reference() for reference in memory.blocks.values()]
    return sorted(block.made_for for block in blocks if block and block.size)


def peak() -> int:
    """The most bytes that were alive at once since `reset`."""
    return memory.peak


def reset() -> None:
    """Forget the peak."""
    memory.peak = memory.alive


@contextlib.contextmanager
def limit(size: int) -> Iterator[None]:
    """Within, the device has `size` bytes in all; what does not fit raises torch.OutOfMemoryError."""
    before, memory.capacity = memory.capacity, size
    try:
        yield
    finally:
        memory.capacity = before
