"""Several processes at work on one canvas. Each of them has the whole of it; they share out the batches."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch

from lib_dinotile import DinotileError

T = TypeVar("T")
R = TypeVar("R")

SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes they started; those that accelerate knows."""
PATIENCE = timedelta(days=30)
"""How long a process waits for the others: one may have done its images of a folder long before them."""
GRACE = 1.0
"""Seconds between the last that processes tell each other and their end."""


class Team:
    """One process alone."""

    rank = 0
    """This process's number, from 0."""
    size = 1
    """Number of processes."""

    def share(self, items: Sequence[T], work: Callable[[T], R]) -> list[R]:
        """`work` on each of at most `size` items, one a process; all processes get all results, in order."""
        mine: Any = None
        errors: list[Exception] = []
        if self.rank < len(items):
            try:
                mine = work(items[self.rank])
            except Exception as caught:
                if self.size == 1:
                    raise
                errors.append(caught)
        results = self.gather((mine, errors))
        failed = [error for _, theirs in results for error in theirs]
        if not failed:
            return [result for result, _ in results[: len(items)]]
        try:
            raise failed[0]
        finally:  # an error has this frame: what it keeps alive would stay if the frame had the error
            del results, errors, failed

    def gather(self, mine: Any) -> list[Any]:
        """The results of all processes, in the order of their numbers."""
        return [mine]

    def close(self) -> None:
        """All are done: none goes while another still listens to it."""


class Processes(Team):
    """The processes that a launcher started. Tensors travel as they are, by way of the CPU."""

    def __init__(self, state: Any) -> None:
        """state: accelerate's PartialState."""
        self.rank, self.size, self._state = state.process_index, state.num_processes, state

    def gather(self, mine: Any) -> list[Any]:
        from accelerate.utils import gather_object, send_to_device

        # A tensor on a GPU would arrive on the sender's.
        return gather_object([send_to_device(mine, "cpu")])

    def close(self) -> None:
        torch.distributed.barrier()
        # gloo's threads give back the last tensors, for which they need the interpreter; so does what ends them, and
        # while it waits for them it does not let go.
        time.sleep(GRACE)
        torch.distributed.destroy_process_group()


def make_team() -> Team:
    """The processes that a launcher (accelerate's, torchrun, mpirun) started this one among, or this one alone."""
    count = max(int(os.environ.get(name, "1")) for name in SIZES)
    if count == 1:
        return Team()
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    if state.num_processes != count:
        raise DinotileError(f"{count} processes were started, but they cannot connect to each other", 500)
    return Processes(state)
