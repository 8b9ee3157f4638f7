"""Each place where a run can fail, and each way: one line, what is painted is kept, nothing is left behind."""

from __future__ import annotations

import contextlib
import errno
import gc
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lib_dinotile.engine.journal
from lib_dinotile import DinotileError
from lib_dinotile import __main__ as cli
from lib_dinotile.cli import upscale as upscale_command
from lib_dinotile.condition import conditioner as conditioning
from lib_dinotile.condition.adapter import Adapter
from lib_dinotile.condition.conditioner import MINI, Conditioner
from lib_dinotile.condition.guard import Guard
from lib_dinotile.condition.guidance import Guide
from lib_dinotile.dino.encoder import PatchEncoder
from lib_dinotile.engine import flow
from lib_dinotile.engine.flow import Result, UnfinishedError, upscale
from lib_dinotile.engine.journal import Journal
from lib_dinotile.engine.prompts import TilePrompts
from lib_dinotile.hosts.diffusers import DiffusersHost, load_host
from lib_dinotile.settings import Generation, Settings
from lib_dinotile.tiling.noise import NoiseField
from tests.processes import Running, command
from tests.test_engine import StubHost
from tests.test_tiling import random_image

SOURCE = random_image(64, 64)
OPTIONS: dict[str, Any] = {"scale": 2.0, "tile": 64, "overlap": 0, "batch": 1, "colour": "none", "patches": 8}
"""Four tiles that touch nowhere: what is painted first does not change any more."""
ALL = {"adapter": "mini", "guidance": 0.5, "guidance_end": 1.0, "every": 1, "views": 2, "guard": "report"}
ORDERS = {
    "linear": {"order": "linear"},
    "chess": {"order": "chess", "batch": 4},
    "fused": {"order": "fused"},
    "seams": {"order": "linear", "seams": "half tile"},
}
STAGES: dict[str, tuple[Any, str]] = {
    "upscale": (DiffusersHost, "upscale"),
    "encode": (DiffusersHost, "encode"),
    "prompts": (TilePrompts, "of"),
    "sample": (DiffusersHost, "sample"),
    "unet": (DiffusersHost, "predict"),
    "decode": (DiffusersHost, "decode"),
    "encoder": (PatchEncoder, "several"),
    "positions": (PatchEncoder, "_positions"),
    "guidance": (Guide, "__call__"),
    "guard": (Guard, "distances"),
    "adapter": (Adapter, "forward"),
    "progress": (DiffusersHost, "progress"),
    "journal": (lib_dinotile.engine.journal, "save_file"),
    "maps": (flow, "draw_maps"),
}
FAULTS: dict[str, Callable[[], BaseException]] = {
    "error": lambda: RuntimeError("the fault\nand what a second line says"),
    "memory": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB"),
    "memory in words": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "main memory": MemoryError,
    "disk": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "cancelled": KeyboardInterrupt,
}
SAID = {
    "error": "the fault and what a second line says",
    "disk": r"\[Errno 28\] No space left on device",
    "cancelled": "KeyboardInterrupt",
    **dict.fromkeys(("memory in words", "cuBLAS", "main memory"), "out of memory with a single tile"),
}
NUMBERS = ("encode", "unet", "decode", "encoder", "guidance", "guard", "adapter")
"""Stages that give numbers, or what is none."""


def spoilt(result: Any) -> Any:
    """The same with nothing but NaN in its tensors."""
    if isinstance(result, torch.Tensor):
        return torch.full_like(result, torch.nan)
    return [spoilt(each) for each in result] if isinstance(result, list) else result


@dataclass
class Fault:
    """Strikes when the stage is reached for the (after + 1)st time, and every time from then on, or `times` times."""

    stage: str
    kind: str | None = None
    after: int = 0
    times: int = 1_000_000
    calls: int = 0
    fired: int = 0

    @contextlib.contextmanager
    def armed(self) -> Iterator[Fault]:
        target, name = STAGES[self.stage]
        real = getattr(target, name)

        def call(*args: Any, **more: Any) -> Any:
            self.calls += 1
            if self.kind is None or self.calls <= self.after or self.fired >= self.times:
                return real(*args, **more)
            self.fired += 1
            if self.kind == "nan":
                return spoilt(real(*args, **more))
            raise FAULTS[self.kind]()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, call)
            yield self


@pytest.fixture(scope="module")
def host() -> DiffusersHost:
    return load_host(Generation(steps=2, denoise=0.5))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out.png.tiles"


def paint(host: DiffusersHost, order: str, folder=None, **more: Any) -> Result:
    """A run with everything that a run can have."""
    conditioning._features.clear()  # a source that was seen before is not looked at again
    settings = Settings(**{**OPTIONS, **ALL, **ORDERS[order], **more})
    conditioner = Conditioner.load(settings, host, {"mini": MINI / "adapter.safetensors"})
    journal = Journal(folder, {}, resume=False) if folder else None
    return upscale(host, SOURCE, settings, NoiseField(3, host.channels), conditioner, journal=journal)


@pytest.fixture(scope="module")
def good(host) -> dict[str, Result]:
    """What each order gives where nothing fails."""
    return {order: paint(host, order) for order in ORDERS}


def state(host: DiffusersHost) -> dict[str, Any]:
    """What a run must leave as it found it."""
    modules = list(host.unet.modules())
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "hooks": sum(len(getattr(module, kind)) for module in modules for kind in kinds),
        "own": sorted(vars(host)),
        "weights": {
            (name, weight.dtype, float(weight.detach().sum())) for name, weight in host.unet.named_parameters()
        },
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "random": torch.get_rng_state().tolist(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "dtype": torch.get_default_dtype(),
    }


def check_kept(result: Result, whole: Result) -> None:
    """Tiles that are painted are those of the whole image; the others show the upscaled source."""
    ours, done = (np.asarray(each.image).astype(int) for each in (result, whole))
    bare = np.asarray(SOURCE.resize(whole.image.size, Image.Resampling.LANCZOS)).astype(int)
    for tile in result.report.tiles:
        expected = done if tile.state == "painted" else bare
        assert (ours[tile.area.slices] == expected[tile.area.slices]).all(), tile
    assert (done != bare).mean() > 0.5


def check_breaks_off(host, good, folder, fault: Fault, order: str) -> Result | None:
    """The run with the fault, held to all that is promised; what is kept of it, if the first tile was reached."""
    before, result = state(host), None
    with fault.armed(), pytest.raises((DinotileError, KeyboardInterrupt)) as caught:
        paint(host, order, folder)
    error = caught.value
    assert fault.fired
    if isinstance(error, DinotileError):
        line, said = str(error), SAID.get(fault.kind, "out of memory")
        assert "\n" not in line and re.search(said, line) and error.status_code == 500, line
    if isinstance(error, UnfinishedError):
        result = error.result
        assert line.startswith(f"stopped after {result.painted} of {result.total} tiles: ")
        if order != "seams" or result.painted <= len(result.report.tiles):
            check_kept(result, good["linear" if order == "seams" else order])
    else:
        assert fault.kind in ("cancelled", "nan") or "before the first tile" in line
    assert state(host) == before
    del caught, error
    again = paint(host, order)
    assert again.image.tobytes() == good[order].image.tobytes()
    assert state(host) == before
    return result


def later(host, stage: str, order: str, folder) -> int:
    """So many calls that the next one belongs to neither the first nor the last tile."""
    counted = Fault(stage)
    with counted.armed():
        paint(host, order, folder)
    shutil.rmtree(folder, ignore_errors=True)
    assert counted.calls > 1, counted
    return (counted.calls + 1) // 2


STRUCK = [
    *((stage, "error") for stage in STAGES if stage not in ("positions", "maps")),
    *(
        (stage, "memory")
        for stage in ("upscale", "encode", "unet", "decode", "encoder", "guidance", "guard", "adapter")
    ),
    *((stage, "cancelled") for stage in ("encode", "unet", "guidance", "journal")),
    ("unet", "memory in words"),
    ("decode", "cuBLAS"),
    ("encode", "main memory"),
    ("sample", "disk"),
    ("journal", "disk"),
]


@pytest.mark.parametrize("stage, kind", STRUCK)
def test_at_the_first_tile(host, good, folder, stage, kind):
    result = check_breaks_off(host, good, folder, Fault(stage, kind), "linear")
    assert (result is None) == (stage in ("upscale", "encoder")), stage
    assert result is None or result.painted == {"journal": 1, "guard": 4}.get(stage, 0)


LATER = [(stage, "error") for stage in STAGES if stage not in ("upscale", "encode", "positions", "maps")]


@pytest.mark.parametrize("stage, kind", [*LATER, ("unet", "cancelled"), ("guard", "cancelled")])
def test_at_a_later_tile(host, good, folder, stage, kind):
    after = later(host, stage, "linear", folder)
    result = check_breaks_off(host, good, folder, Fault(stage, kind, after), "linear")
    assert 0 < result.painted <= result.total
    assert (result.painted == result.total) == (stage == "guard")  # which looks when all are painted


@pytest.mark.parametrize("stage", ["sample", "unet", "decode", "encoder", "guidance", "guard", "adapter", "journal"])
@pytest.mark.parametrize("order", ["chess", "fused"])
def test_in_other_orders(host, good, folder, order, stage):
    """All four are one batch of theirs, so that only what comes behind the painting finds anything painted."""
    if (order, stage) == ("fused", "journal"):
        pytest.skip("a canvas that is sampled as a whole has no journal")
    after = 2 if stage == "encoder" else 0  # it has looked at the source then
    result = check_breaks_off(host, good, folder, Fault(stage, "error", after), order)
    assert result.painted == (4 if stage in ("journal", "guard") else 0)


@pytest.mark.parametrize("stage", ["encode", "sample", "decode", "guard"])
def test_in_a_seam_pass_all_tiles_are_kept(host, good, folder, stage):
    first = Fault(stage)
    with first.armed():
        paint(host, "linear")
    result = check_breaks_off(host, good, folder, Fault(stage, "error", first.calls), "seams")
    assert result.painted == 4 < result.total or stage == "guard"


def test_in_a_larger_batch_memory_that_runs_out_is_told_and_the_image_is_made(host, good):
    fault = Fault("unet", "memory", times=1)
    with fault.armed():
        result = paint(host, "chess")
    assert "out of memory with 4 tiles at once, went on with 2" in result.report.notes
    assert abs(np.asarray(result.image).astype(int) - np.asarray(good["chess"].image)).max() <= 1


NOTES = {
    "encode": "the VAE returned NaN for the picture at 0, 0",
    "unet": "tile 1 shows the enlarged source: the model returned NaN",
    "decode": "tile 1 shows the enlarged source: the model returned NaN",
    "guidance": "tile 1 shows the enlarged source: the model returned NaN",
    "guard": r"guard: 4 of 4 tiles were in doubt \(still in doubt: 1-4\)",
    "adapter": "tile 1 shows the enlarged source: the model returned NaN",
}
MENDED = {
    "encode": "the picture at 0, 0 was encoded again in full precision: the VAE returned NaN",
    **dict.fromkeys(("unet", "decode", "guidance"), "tile 1 was done again in full precision: the model returned NaN"),
}


@pytest.mark.parametrize(
    "stage, line, times",
    [
        *((stage, line, 1_000_000) for stage, line in NOTES.items()),
        *((stage, line, 1) for stage, line in MENDED.items()),
    ],
)
def test_what_is_not_a_number_is_told_and_does_not_spread(host, good, stage, line, times):
    before = state(host)
    with Fault(stage, "nan", times=times).armed() as fault:
        result = paint(host, "linear")
    assert fault.fired and any(re.fullmatch(line, told) for told in result.report.lines), result.report.lines
    assert result.complete
    if times == 1 or stage == "guard":
        assert result.image.tobytes() == good["linear"].image.tobytes()
    else:
        assert result.image.tobytes() == SOURCE.resize((128, 128), Image.Resampling.LANCZOS).tobytes()
    assert state(host) == before
    assert paint(host, "linear").image.tobytes() == good["linear"].image.tobytes()


@pytest.mark.parametrize("after", [0, 3])
def test_an_encoder_that_gives_no_numbers_is_an_error(host, good, folder, after):
    """Nothing could be steered or judged by it, and nobody would know."""
    SAID["nan"] = "encoder: 'mini' returned NaN: choose another, .*"
    result = check_breaks_off(host, good, folder, Fault("positions", "nan", after), "linear")
    assert (result is None) == (after == 0)


def test_a_gradient_that_is_no_number_is_told(host, good):
    """As from a decoder that overflows in half precision."""

    def overflows(self, choice):
        return "a decoder", lambda latents: torch.nn.functional.pixel_shuffle(latents, 2) * torch.inf

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusersHost, "guidance_decoder", overflows)
        result = paint(host, "linear")
    assert "guidance was left out where its decoder or encoder returned NaN" in result.report.notes
    assert result.image.tobytes() == paint(host, "linear", guidance=0.0).image.tobytes()


def test_maps_that_cannot_be_drawn_cost_no_image(host, good):
    with Fault("maps", "error").armed():
        result = paint(host, "linear", maps="both")
    assert "maps: they cannot be drawn: the fault and what a second line says" in result.report.notes
    assert result.maps == {} and result.image.tobytes() == good["linear"].image.tobytes()


@pytest.mark.parametrize("kind", ["error", "memory", "disk", "cancelled"])
def test_captions(kind):
    class Host(StubHost):
        def caption(self, images, interrogator):
            raise FAULTS[kind]()

    settings = Settings(tile=64, overlap=0, captions="Stub", guidance=0.0, guard="off")
    with pytest.raises(UnfinishedError) as caught:
        upscale(Host(), SOURCE, settings, NoiseField(0, 4))
    assert re.fullmatch(rf"stopped after 0 of 4 tiles: ({SAID.get(kind, '.*out of memory.*')})", str(caught.value))


@pytest.mark.parametrize("stage", ["upscale", "unet", "encoder", "guidance", "guard", "adapter"])
def test_no_tensor_is_left(host, folder, stage):
    def alive() -> list[int]:
        found = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
        return [len(found), sum(each.nbytes for each in found)]

    paint(host, "linear")
    gc.collect()  # of what came before
    gc.disable()
    try:
        paint(host, "linear")
        before = alive()
        after = {"upscale": 0, "encoder": 3}.get(stage, 1)
        with Fault(stage, "error", after).armed(), pytest.raises(DinotileError):
            paint(host, "linear", folder)
        assert all(now <= known for now, known in zip(alive(), before))
        paint(host, "linear")
        assert alive() == before
    finally:
        gc.enable()


# The command line ---------------------------------------------------------------------------------------------------

QUICK = [
    "--quiet",
    "--steps",
    "2",
    "--denoise",
    "0.5",
    "--tile",
    "64",
    "--overlap",
    "0",
    "--patches",
    "8",
    "--batch",
    "1",
]


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "in.png"
    SOURCE.save(path)
    return path


@pytest.mark.parametrize(
    "limit, name", [(4_000, r"out\.png\.tiles, where painted tiles are kept,"), (60_000, r"out\.png")]
)
def test_a_full_disk_is_one_line_and_leaves_no_half_file(photo, tmp_path, limit, name):
    """A tile's file has some 50 kB, the image more."""
    plain = ["--guidance", "0", "--guard", "off"]
    arguments = ["upscale", str(photo), str(tmp_path / "out.png"), *QUICK, *plain, "--scale", "4"]
    done = Running(command, *arguments, limit=limit).wait()
    assert done.returncode == 1, done
    assert re.fullmatch(rf"dinotile: (stopped after 1 of 16 tiles.*: )?\S*{name} cannot be .*\n", done.stderr), (
        done.stderr
    )
    kept = list(tmp_path.rglob("*.safetensors"))
    assert len(kept) == (0 if limit == 4_000 else 16) and all(file.stat().st_size > 49_000 for file in kept)
    assert [file.name for file in tmp_path.rglob("*.png")] == ["in.png"]
    assert cli.main([*arguments, "--resume"]) == 0


def test_half_a_line_of_a_report_is_taken_back(photo, tmp_path):
    report = tmp_path / "report.jsonl"
    before = '{"image": "a.pn"}\n' * 11_000
    report.write_text(before)
    words = ["upscale", photo, tmp_path / "out.png", *QUICK, "--guard", "off", "--report", report]
    done = Running(command, *words, limit=198_100).wait()
    assert done.returncode == 1 and re.fullmatch(rf"dinotile: report: {report} cannot be written: .*\n", done.stderr)
    assert report.read_text() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.png", "out.png", "report.jsonl"]


def test_a_map_that_has_no_room_is_made_by_resuming(photo, tmp_path, monkeypatch, capsys):
    write = upscale_command.write_image

    def full(image, path, texts):
        if path.name == "out-consistency.png":
            raise DinotileError(f"{path} cannot be written: No space left on device", 500)
        write(image, path, texts)

    arguments = ["upscale", str(photo), str(tmp_path / "out.png"), *QUICK, "--maps", "both"]
    with monkeypatch.context() as patch:
        patch.setattr(upscale_command, "write_image", full)
        assert cli.main(arguments) == 1
    assert "--resume continues with them" in capsys.readouterr().err and not (tmp_path / "out.png").exists()
    assert cli.main([*arguments, "--resume"]) == 0
    names = ["in.png", "out-consistency.png", "out-semantic.png", "out.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names


def test_what_nobody_thought_of_is_one_line(photo, tmp_path, monkeypatch, capsys):
    def fails(*arguments, **more):
        raise FAULTS["error"]()

    monkeypatch.setattr(Conditioner, "load", fails)
    assert cli.main(["upscale", str(photo), str(tmp_path / "out.png"), *QUICK]) == 1
    assert capsys.readouterr().err == "dinotile: RuntimeError: the fault and what a second line says\n"


def test_killed_in_the_middle_it_is_resumed_to_the_same_image(photo, tmp_path):
    arguments = ["upscale", str(photo), str(tmp_path / "out.png"), *QUICK, "--scale", "4"]
    running = Running(command, *arguments)
    tiles, began = tmp_path / "out.png.tiles", time.monotonic()
    while len(list(tiles.glob("*.safetensors"))) < 3 and time.monotonic() < began + 300:
        assert running.alive
        time.sleep(0.01)
    running.kill()
    assert running.wait().returncode == -9
    kept = {file: file.read_bytes() for file in tiles.glob("*.safetensors")}
    assert 3 <= len(kept) < 16 and not (tmp_path / "out.png").exists()
    painted = Fault("sample")
    with painted.armed():
        assert cli.main([*arguments, "--resume"]) == 0
    assert painted.calls == 16 - len(kept)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.png", "out.png"]
    resumed = (tmp_path / "out.png").read_bytes()
    (tmp_path / "out.png").unlink()
    assert cli.main(arguments) == 0
    assert (tmp_path / "out.png").read_bytes() == resumed
