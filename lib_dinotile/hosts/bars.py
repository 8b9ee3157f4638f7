"""The WebUI's progress bars, in the page, in its API and in the console, and its buttons that stop a job."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from modules import shared

from lib_dinotile.engine.progress import Progress
from lib_dinotile.hosts.patched import patched

JOBS = 10_000
"""To the WebUI, whose bars show what share of its jobs is done, every image is so many of them. That is far more than
there are batches: what it adds itself for the steps of the current job is nothing to see."""
PASS = JOBS // 4
"""So many are what the WebUI itself does for an image before: a pass of txt2img."""


def stopped() -> bool:
    """Whether the user has stopped the job, with any of the buttons for that."""
    state = shared.state
    return bool(state.interrupted or state.skipped or state.stopping_generation)


def expect(batches: int, images: int, passes: int = 0) -> None:
    """There will be so many batches of images; where a script has said how many, that many.

    passes: of the WebUI's own for each batch before that.
    """
    state = shared.state
    if not state.processing_has_refined_job_count:  # once: it may be one image of many, or a cell of a plot
        state.job_count = max(state.job_count, batches) * images * (JOBS + passes * PASS)
        state.processing_has_refined_job_count = True
    shared.total_tqdm.updateTotal(state.job_count)


def _move(job: int, count: Callable[[], Any]) -> None:
    """To that job, if they are not there yet; count: of the console's bar."""
    for _ in range(shared.state.job_no, job):
        count()
    shared.state.job_no = max(shared.state.job_no, job)


@contextlib.contextmanager
def passing(jobs: int, steps: int) -> Iterator[None]:
    """While open, the WebUI's own sampling, of so many steps in all, moves the bars on by so many jobs."""
    first, count, taken = shared.state.job_no, shared.total_tqdm.update, itertools.count(1)

    def step() -> None:
        _move(first + jobs * min(next(taken), steps) // steps, count)

    with patched(shared.total_tqdm, update=step):
        yield
    _move(first + jobs, count)


class Bars:
    """They show how far one image after the other is, and never go back."""

    def __init__(self) -> None:
        self._progress, self._first, self._jobs = Progress(), 0, JOBS
        self._count = shared.total_tqdm.update

    def begin(self, last: bool) -> None:
        """The next image; last: of its batch, whose last job the WebUI counts itself."""
        self._first, self._jobs = shared.state.job_no, JOBS - last

    def show(self, progress: Progress) -> None:
        """How far the image is, before some tiles are sampled."""
        self._progress = progress
        self.advance(0.0)
        self.say()

    def say(self, more: str = "") -> None:
        """The current work, and details of it."""
        shared.state.textinfo = f"DINO Tile: {self._progress.text}{more}"

    def advance(self, share: float) -> None:
        """That share of those tiles' sampling is done."""
        self._move(self._progress.at(share))

    def end(self) -> None:
        """The image is done, or will not be."""
        self._move(1.0)

    def _move(self, share: float) -> None:
        _move(self._first + min(int(share * JOBS), self._jobs), self._count)

    @staticmethod
    def own() -> contextlib.AbstractContextManager[Any]:
        """While open, the sampler does not count its steps in the console."""
        return patched(shared.total_tqdm, update=lambda: None)
