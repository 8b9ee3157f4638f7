"""The thread in which Forge and its descendants generate what the page asks for."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from lib_dinotile import DinotileError


def hand_on_errors(*_: Any) -> None:
    """Let the page tell what stopped a run of ours, also where that thread only logs errors, as in reForge."""
    thread: Any = sys.modules.get("modules_forge.main_thread")
    if thread is None or hasattr(thread.Task(0, None, (), {}), "exception"):
        return
    run: Callable[..., Any] = thread.run_and_wait_result
    if hasattr(run, "__wrapped__"):  # the page is made anew
        return

    @functools.wraps(run)
    def run_and_wait_result(work: Callable[..., Any], *args: Any, **more: Any) -> Any:
        lines: list[tuple[str, int]] = []

        def noted(*args: Any, **more: Any) -> Any:
            try:
                return work(*args, **more)
            except DinotileError as error:
                # Not the error itself: its frames know the job.
                lines.append((error.detail, error.status_code))
                raise

        result = run(noted, *args, **more)
        if lines:
            raise DinotileError(*lines[0])
        return result

    thread.run_and_wait_result = run_and_wait_result
