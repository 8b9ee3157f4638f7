"""Figures that need a GPU: python benchmarks/speed.py --gpu [--shapes sd15 sdxl] [--json]

Models with the shapes of Stable Diffusion 1.5 and XL, their VAE, TAESD and DINOv2 small, random weights in half
precision (the VAE in float32, as the command line runs it); 20 steps at strength 0.35, a negative prompt. Some minutes
on a large GPU. What its memory does not hold is null. For each of the shapes

seconds, peak_gib: of a tile with 1, 2, 4, 8 and 16 at once, 16 tiles in one wave; the most memory that was
  allocated.
overhead: a whole run of 16 tiles, 4 at once, over the encode, sample and decode calls in it. At most 1.05.
guidance, guard, adapter: how much longer such a run takes with one of them, as a share of the plain one. The guard only
  looks (`report`).
tiles_an_hour: that an adapter trains on, in bf16, 4 at once; for XL one, with gradient checkpointing.

and calibration_seconds: of the encoder, from the photographs that come with dinotile.
"""

from __future__ import annotations

import datetime
import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.models import (
    Clock,
    Trainer,
    Watched,
    blank_heads,
    overhead,
    peak,
    random_adapter,
    random_encoder,
    random_host,
)
from benchmarks.photographs import UNGUIDED, example
from lib_dinotile.condition.conditioner import Conditioner
from lib_dinotile.dino.calibrated import Pictures
from lib_dinotile.dino.calibration import FOLDS, calibrate
from lib_dinotile.dino.encoder import PatchEncoder
from lib_dinotile.engine.memory import is_out_of_memory
from lib_dinotile.hosts.diffusers import DiffusersHost
from lib_dinotile.settings import Settings

BATCHES = (1, 2, 4, 8, 16)
ACROSS, RUNS = 4, 2
WAYS: dict[str, dict[str, Any]] = {
    "plain": UNGUIDED,
    "guidance": {**UNGUIDED, "guidance": Settings().guidance},
    "guard": {**UNGUIDED, "guard": "report"},
    "adapter": UNGUIDED,
}


def fitting(measure: Callable[..., Any], *arguments: Any) -> Any:
    """The result, or None if the GPU's memory is too small."""
    try:
        return measure(*arguments)
    except Exception as error:
        if not any(is_out_of_memory(each) for each in (error, error.__cause__) if each):
            raise
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def painted(host: DiffusersHost, settings: Settings, conditioner: Conditioner | None = None) -> Watched | None:
    """A run of 16 tiles, or None if the memory is too small for its batches."""
    side = ACROSS * (settings.tile - settings.overlap) + settings.overlap
    run = Watched(host).run(example(side // 2), settings, conditioner)
    return None if run.short else run


def with_batch(host: DiffusersHost, batch: int) -> tuple[float | None, float | None]:
    """(seconds per tile, GiB at most), None where the memory is too small."""
    settings = Settings(scale=2.0, tile=host.tile, overlap=0, batch=batch, **UNGUIDED)  # all tiles in one wave
    if painted(host, settings) is None:  # warm up
        return None, None
    if host.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(host.device)
    run = painted(host, settings)
    return run and run.tiles / run.done, run and peak(host.device)


def ways(host: DiffusersHost, encoder: PatchEncoder) -> dict[str, float | None]:
    """Overhead, and what guidance, guard and adapter cost."""
    settings = Settings(scale=2.0, tile=host.tile, overlap=host.tile // 8, batch=4, **UNGUIDED)
    adapter, heads = random_adapter(host.unet, host.base, encoder.width).to(host.dtype), blank_heads(encoder)
    runs: dict[str, list[Watched | None]] = {name: [] for name in WAYS}
    for _ in range(1 + RUNS):
        for name, changed in WAYS.items():
            now, read = replace(settings, **changed), adapter if name == "adapter" else None
            conditioner = Conditioner(now, encoder, read, heads, host.guidance_decoder(now.decoder))
            runs[name].append(fitting(painted, host, now, None if name == "plain" else conditioner))
    good = {name: each[1:] for name, each in runs.items() if None not in each}  # the first ones warm up
    found: dict[str, float | None] = {"overhead": overhead(good["plain"]) if "plain" in good else None}
    seconds = {name: min(run.whole.seconds for run in each) for name, each in good.items()}
    for name in ("guidance", "guard", "adapter"):
        known = name in seconds and "plain" in seconds
        found[name] = seconds[name] / seconds["plain"] - 1 if known else None
    return found


def gpu(shapes: Sequence[str], device: str = "cuda", batches: Sequence[int] = BATCHES) -> dict[str, Any] | None:
    """Prints and gives the figures; None if there is no such device."""
    cuda = torch.device(device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        return None
    dtype = torch.float16 if cuda else torch.float32
    name = torch.cuda.get_device_name() if cuda else device
    figures: dict[str, Any] = {"device": name, "torch": torch.__version__, "date": str(datetime.date.today())}
    print(", ".join(figures.values()), flush=True)
    for shape in shapes:
        host, encoder = random_host(shape, device, dtype), random_encoder(shape, device)
        rows = {str(batch): fitting(with_batch, host, batch) or (None, None) for batch in batches}
        found = figures[shape] = {
            "seconds": {batch: seconds for batch, (seconds, _) in rows.items()},
            "peak_gib": {batch: gib for batch, (_, gib) in rows.items()},
            **ways(host, encoder),
        }
        del host
        large = shape == "sdxl"
        trainer = fitting(Trainer, shape, device, torch.bfloat16, 1 if large else 4, large)
        trained = trainer and fitting(trainer.measure, RUNS)
        found["tiles_an_hour"] = trained and trained["tiles_an_hour"]
        del trainer
        for key, value in found.items():
            print(f"{shape} {key}: {value}", flush=True)
    clock = Clock(device)
    clock(calibrate, encoder, Pictures() if cuda else list(Pictures())[:FOLDS], 2.0)
    figures["calibration_seconds"] = clock.seconds
    print(f"calibration: {clock.seconds:.1f} s")
    return figures
