"""Encoders from the Hub: whole in the folder of encoders, or not there at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lib_dinotile import DinotileError
from lib_dinotile.dino import hub as module
from lib_dinotile.dino.checkpoint import CONFIG, KNOWN, WEIGHTS, install, installed, locate
from lib_dinotile.dino.encoder import load_encoder
from tests.hub import Hub, ask, serve
from tests.test_encoder import TINY, dinov3_runs, write_checkpoint

NAME = KNOWN[0]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """With a small model of that name."""
    folder = write_checkpoint(tmp_path / "published")
    files = {file: (folder / file).read_bytes() for file in (CONFIG, WEIGHTS)}
    with serve(Hub({NAME: files})) as hub:
        ask(hub.url, str(tmp_path / "cache"), monkeypatch)
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of encoders; not made yet."""
    return tmp_path / "encoders"


def assert_nothing_is_there(folder: Path) -> None:
    assert installed(folder) == ["mini"]
    assert not folder.exists() or not list(folder.iterdir())


def test_a_download_gets_into_the_folder_of_encoders_with_progress(hub, folder):
    told = []
    assert install(NAME, folder, lambda text, share: told.append((text, share))) == folder / "dinov2-small"
    assert {file.name: file.read_bytes() for file in (folder / "dinov2-small").iterdir()} == hub.models[NAME]
    assert [file.name for file in folder.iterdir()] == ["dinov2-small"]
    assert installed(folder) == ["mini", NAME] and locate(NAME, folder, download=False)[0] == NAME
    assert sorted(share for _, share in told) == [share for _, share in told] and told[-1][1] == 1
    assert all(text.startswith("downloading dinov2-small, ") and text.endswith(" MB") for text, _ in told)


def test_a_download_is_reported_often(hub, folder, tmp_path):
    """So that it is seen on a slow line, and soon stopped."""
    larger = write_checkpoint(tmp_path / "larger", dataclasses.replace(TINY, image_size=2100))
    hub.models[NAME] = {file: (larger / file).read_bytes() for file in (CONFIG, WEIGHTS)}  # 4 MB
    told = []
    install(NAME, folder, lambda text, share: told.append(share))
    assert len(told) > 10 and max(np.diff(told)) < 0.1


def test_what_is_there_is_not_downloaded_again(hub, folder):
    for _ in range(2):
        install(NAME, folder)
        load_encoder(NAME, folder)
    assert sorted(hub.asked) == [CONFIG, WEIGHTS]


def test_a_chosen_encoder_is_downloaded_when_it_is_first_used(hub, folder):
    assert load_encoder(NAME, folder).id == NAME
    assert installed(folder) == ["mini", NAME]


def test_what_the_hubs_cache_has_is_copied(hub, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "cached", lambda name, files: tmp_path / "published")
    install(NAME, folder)
    assert installed(folder) == ["mini", NAME] and not hub.asked


@pytest.mark.parametrize("after", [0, 1])
def test_a_stopped_download_leaves_nothing(hub, folder, after):
    class Stop(Exception):
        pass

    def stop(text: str, share: float) -> None:
        if share >= 0.5 * after:
            raise Stop

    with pytest.raises(Stop):
        install(NAME, folder, stop)
    assert_nothing_is_there(folder)
    install(NAME, folder)
    assert installed(folder) == ["mini", NAME]


def test_a_killed_download_is_never_taken_for_an_encoder(hub, folder):
    """What it leaves, at the worst: both files, in the folder that they are put together in."""
    write_checkpoint(folder / ".dinov2-small.part")
    assert installed(folder) == ["mini"]
    install(NAME, folder)
    assert [file.name for file in folder.iterdir()] == ["dinov2-small"]


def assert_refused(folder: Path, *says: str) -> None:
    with pytest.raises(DinotileError) as caught:
        install(NAME, folder)
    line = str(caught.value)
    files = f"put config.json and model.safetensors of https://huggingface.co/{NAME} into {folder / 'dinov2-small'}"
    for part in (*says, files):
        assert part in line, line
    assert_nothing_is_there(folder)


def test_what_is_missing_or_damaged_is_one_line(hub, folder):
    whole = dict(hub.models[NAME])
    hub.models[NAME] = {**whole, WEIGHTS: whole[WEIGHTS][:-100]}
    assert_refused(folder, "cannot be downloaded", "is damaged or not whole")
    hub.models[NAME] = {CONFIG: whole[CONFIG]}
    assert_refused(folder, f"the Hugging Face Hub has no {NAME!r}")
    hub.models = {}
    assert_refused(folder, f"the Hugging Face Hub has no {NAME!r}")


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_is_one_line_that_says_how_to_get_it(hub, folder, status):
    name = "facebook/dinov3-vitb16-pretrain-lvd1689m"
    hub.gated[name] = status
    with pytest.raises(DinotileError) as caught:
        install(name, folder)
    line = str(caught.value)
    says = [
        f"accept its licence at https://huggingface.co/{name}",
        "`hf auth login` or set HF_TOKEN",
        "or choose timm/vit_base_patch16_dinov3.lvd1689m",
    ]
    if not dinov3_runs():  # then that is what there is to say
        says = ["DINOv3 needs transformers 4.56 or later, or timm 1.0.20 or later (else choose a DINOv2)"]
    assert all(part in line for part in says) and "\n" not in line, line
    assert_nothing_is_there(folder)


def test_a_dinov3_is_not_downloaded_where_no_library_runs_it(hub, folder, monkeypatch):
    name = "timm/vit_small_patch16_dinov3.lvd1689m"
    for library in ("transformers", "timm.models.eva"):
        monkeypatch.setitem(sys.modules, library, None)
    hub.models[name] = hub.models[NAME]
    with pytest.raises(DinotileError, match="DINOv3 needs transformers"):
        load_encoder(name, folder)
    assert not hub.asked
    assert_nothing_is_there(folder)


def test_a_broken_connection_is_one_line(hub, folder, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its attempts
    hub.cut = 1000
    assert_refused(folder, "cannot be downloaded")


def test_a_full_disk_is_one_line(hub, folder, monkeypatch):
    def full(self: object, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module._Watched, "write", full)
    assert_refused(folder, "cannot be downloaded", "No space left on device")


def test_without_a_network_one_line_says_which_files_go_where(folder, tmp_path, monkeypatch):
    ask("http://127.0.0.1:9", str(tmp_path / "cache"), monkeypatch)
    assert_refused(folder, "the Hugging Face Hub cannot be reached")


def test_two_at_once_download_once(hub, folder):
    hub.pause = 0.01
    failed = []

    def get() -> None:
        with contextlib.suppress(Exception):
            install(NAME, folder)
            return
        failed.append(1)

    threads = [threading.Thread(target=get) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and sorted(hub.asked) == [CONFIG, WEIGHTS]
    assert [file.name for file in folder.iterdir()] == ["dinov2-small"]
