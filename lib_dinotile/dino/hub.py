"""Models of the Hugging Face Hub: those in its cache on this machine, and downloads, with progress, into a folder."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lib_dinotile import one_line
from lib_dinotile.dino.locks import Progress, locked

STEP = 1 << 18
"""Bytes between two reports of a download, which can be stopped there: huggingface_hub's own 10 MB may take minutes."""
PROBE = 5.0
"""Seconds that the Hub has to answer: huggingface_hub 2 itself retries for 23 s before it gives up."""


class Failed(Exception):
    """A download that was not finished, and why."""


class Unreachable(Failed):
    """There is no way to the Hub."""


class Gated(Failed):
    """The Hub gives it only to users who have accepted its licence and are logged in."""


class NotThere(Failed):
    """The Hub has no such model, or not with these files."""


def cached(name: str, files: Sequence[str]) -> Path | None:
    """The folder in Hugging Face's cache that has these files of a model, all of one revision."""
    import huggingface_hub

    try:
        paths = [Path(huggingface_hub.hf_hub_download(name, file, local_files_only=True)) for file in files]
    except Exception:  # not (wholly) in the cache, in whatever words this huggingface_hub says so
        return None
    return paths[0].parent if len({path.parent for path in paths}) == 1 else None


def download(
    name: str, files: Sequence[str], target: Path, check: Callable[[Path], object], progress: Progress
) -> Path:
    """Files of a model, all of one revision, into a folder of their own, `target`, which appears when it is complete.

    From Hugging Face's cache if they are there, else from the Hub. check: is shown the folder before, and raises what
    speaks against it. One process downloads while others wait. Failed, or OSError, if it cannot be had; what `progress`
    raises ends it.
    """
    part = target.with_name(f".{target.name}.part")

    def waiting() -> None:
        progress(f"waiting for another process that downloads {target.name}", 0.0)

    with locked(target.with_name(f".{target.name}.lock"), waiting):
        if all((target / file).is_file() for file in files):  # another process has downloaded them
            return target
        kept = cached(name, files)
        if kept is None and not _reachable():
            raise Unreachable
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        part.mkdir()
        try:
            if kept is None:
                _fetch(name, files, part, progress)
            else:
                for file in files:
                    shutil.copyfile(kept / file, part / file)
            check(part)
            os.replace(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target


def _fetch(name: str, files: Sequence[str], folder: Path, progress: Progress) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        build_hf_headers,
    )

    report = _Report(name.split("/")[-1], progress)
    try:
        revision = get_hf_file_metadata(hf_hub_url(name, files[0])).commit_hash
        urls = {file: hf_hub_url(name, file, revision=revision) for file in files}
        sizes = {file: get_hf_file_metadata(url).size for file, url in urls.items()}
        report.total = sum(size or 0 for size in sizes.values())
        for file, url in urls.items():
            with _Watched(folder / file, report) as written, _without_bar(), _in_small_steps():
                http_get(url, written, headers=build_hf_headers())
            came = (folder / file).stat().st_size
            if came != (sizes[file] or came):
                raise Failed(f"{file} broke off after {came} of {sizes[file]} bytes")
    except LocalEntryNotFoundError as error:  # a subclass of EntryNotFoundError that means no network
        raise Unreachable from error
    except GatedRepoError as error:  # a subclass of RepositoryNotFoundError
        raise Gated from error
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise NotThere from error
    except Exception as error:  # of requests or httpx, as huggingface_hub is old or new
        raise error if report.stopped else Failed(one_line(error)) from error


class _Report:
    """How much of all files has come."""

    def __init__(self, name: str, progress: Progress) -> None:
        self._name, self._progress, self._done = name, progress, 0
        self.total = 0
        self.stopped = False
        """Whether `progress` has ended it."""

    def add(self, count: int) -> None:
        self._done += count
        total = max(self.total, self._done, 1)
        self.stopped = True
        self._progress(f"downloading {self._name}, {self._done / 1e6:.0f} of {total / 1e6:.0f} MB", self._done / total)
        self.stopped = False


class _Watched(io.BufferedWriter):
    """A file that reports what is written into it."""

    def __init__(self, path: Path, report: _Report) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self._report = report

    def write(self, data: Any) -> int:
        count = super().write(data)
        self._report.add(count)
        return count


@contextlib.contextmanager
def _without_bar() -> Iterator[None]:
    """huggingface_hub shows no progress of its own on the console."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def _in_small_steps() -> Iterator[None]:
    """huggingface_hub writes as often as there is to be a report."""
    from huggingface_hub import constants

    before = getattr(constants, "DOWNLOAD_CHUNK_SIZE", STEP)
    constants.DOWNLOAD_CHUNK_SIZE = STEP
    try:
        yield
    finally:
        constants.DOWNLOAD_CHUNK_SIZE = before


def _reachable() -> bool:
    """Whether anything answers where the Hub should be."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=PROBE).close()
    except urllib.error.HTTPError:
        return True  # an answer, if not a kind one
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # huggingface_hub brings certificates of its own
    except (OSError, ValueError):
        return False
    return True
