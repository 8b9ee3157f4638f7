"""The cost of dinotile beside the model: python benchmarks/speed.py [engine | cost | adapter | training] [--json]

On a CPU seconds are those that this process computes, on one core: other work on the machine hardly shows in them. Runs
take turns, and of their times the least counts, for what disturbs only ever adds to it.

engine (the default), with the built-in model and tiles of 256 px:
  overhead      1 + time of a run outside of its encode, sample and decode calls over that in them, at most 1.05. What
                the sampler spends on noise and residuals is not the model's. adapter: with the built-in adapter.
  canvas_ratio  seconds per tile on a canvas of 8192 x 8192 over those on one of 1024 x 1024, at most 1.03. The first
                tiles of both are timed; what a run does once (upscaling, the finished image) is shared out over all.
                Model calls are the same on both, so they count the same.
  own           with a model that does nothing (latents of zeros, pixels off the source's colours), 2048 to 4096 x 4096
                in tiles of 512 px, batch 4: from the first tile to the end of the last one and what follows for each,
                less the model calls, by tile; over `torch.lerp(a, b, 0.3).clamp_(0, 1)` on (3, 512, 512) float32, done
                50 times on end between the runs. At most 40. own_once: upscaling and the finished image, of a run.

cost: guidance and guard at default settings, as shares of a tile's plain time.
  guard         a tile not in doubt, what is done for the whole image shared out over its tiles, at most 0.05
  guidance      at most 0.25
  encoder_calls whole views of a 1024 x 1024 source, for an image upscaled twice with all on
With `--shapes sd15` the models are like Stable Diffusion 1.5, TAESD and DINOv2 small (random weights; slow on a CPU),
one tile of a canvas of 1024 x 1024 is painted, and guidance_operations is what guidance adds to its floating-point
operations, as a share.

adapter: an adapter for Stable Diffusion 1.5 (tiles of 512 px) and XL (of 1024 px), counted and not run.
  parameters    at most 60 million; unet_parameters: those of the UNet
  unet_gflop    of a row of the UNet; of the adapter forward_gflop at each step, and prepare_gflop once a tile
  step_share    the adapter's operations at a step over the UNet's, at most 0.03; tile_share: the same of a whole tile
  calls_batch_1, calls_batch_4: how often the parts run, with the built-in model and so many tiles at once

training: train_tflop of a training tile (forward, backward through the frozen UNet, adapter; latents and features from
the cache), row_tflop of a bare UNet row; GiB of the UNet's weights in bf16 and of what a tile keeps for its backward
pass; their seconds, on a GPU if there is one; tiles_an_hour. `--count` only counts.

--gpu [--shapes sd15 sdxl]: what a GPU decides. Models with the shapes of Stable Diffusion 1.5 and XL, their VAE, TAESD
and DINOv2 small, random weights in half precision (the VAE in float32, as the command line runs it); 20 steps at
strength 0.35, a negative prompt. Some minutes on a large GPU. What its memory does not hold is null. For each shape

seconds, peak_gib: of a tile with 1, 2, 4, 8 and 16 at once, 16 tiles in one wave; the most memory that was
  allocated.
overhead: a whole run of 16 tiles, 4 at once, over the encode, sample and decode calls in it. At most 1.05.
guidance, guard, adapter: how much longer such a run takes with one of them, as a share of the plain one. The guard only
  looks (`report`).
tiles_an_hour: that an adapter trains on, in bf16, 4 at once; for XL one, with gradient checkpointing.

And calibration_seconds: of the encoder, from the photographs that come with dinotile.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import models
from benchmarks.photographs import UNGUIDED, example, noise
from lib_dinotile.condition import conditioner as conditioners
from lib_dinotile.condition.adapter import Adapter
from lib_dinotile.condition.conditioner import MINI, Conditioner, to_tensor
from lib_dinotile.condition.guard import Guard
from lib_dinotile.condition.guidance import Guide
from lib_dinotile.dino.calibrated import Pictures
from lib_dinotile.dino.calibration import FOLDS, calibrate
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.engine.memory import OutOfMemoryError, is_out_of_memory
from lib_dinotile.hosts.diffusers import DiffusersHost, load_host
from lib_dinotile.settings import Generation, Settings

TILES = 8
"""How many tiles of each canvas are timed."""
GENERATION = Generation(steps=10, denoise=0.2)  # two UNet steps a tile
BLIND = {"batch": 4, **UNGUIDED}
SETTINGS = Settings(scale=4.0, tile=256, overlap=32, **BLIND)
OWN = Settings(scale=2.0, tile=512, **BLIND)
COST = Settings(scale=2.0, tile=512, overlap=64, batch=1, guard="report")

STEPS = 7
"""UNet calls of a tile: 20 steps at denoising strength 0.35."""
ADAPTERS = {"mini": MINI / "adapter.safetensors"}
BATCHES = (1, 2, 4, 8, 16)
ACROSS, RUNS = 4, 2
WAYS: dict[str, dict[str, Any]] = {
    "plain": UNGUIDED,
    "guidance": {**UNGUIDED, "guidance": Settings().guidance},
    "guard": {**UNGUIDED, "guard": "report"},
    "adapter": UNGUIDED,
}


class Null(models.Watched):
    """A host whose model does nothing: what is left is the engine's own time."""

    def __init__(self, source: Image.Image, scale: float = 2.0) -> None:
        super().__init__(models.RandomHost(models.TINY))
        self._pixels = torch.nn.functional.interpolate(to_tensor(source)[None], scale_factor=scale) * 0.9 + 0.03

    def encode(self, pixels: Tensor) -> Tensor:
        count, _, height, width = pixels.shape
        return self.model(torch.zeros, count, self.channels, height // self.factor, width // self.factor)

    def sample(self, latents: Tensor, *more: Any) -> Tensor:
        self.done += len(latents)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        height, width = (side * self.factor for side in latents.shape[2:])
        return self.model(self._pixels[..., :height, :width].repeat, len(latents), 1, 1, 1)

    @property
    def own(self) -> float:
        """Seconds by tile."""
        return (self.tiles - self.model.seconds) / self.done

    @property
    def once(self) -> float:
        return self.whole.seconds - self.tiles


def lerp(times: int = 50) -> float:
    """Seconds that a common operation takes on a tile, again and again, so that its operands are at hand."""
    (a, b), clock = torch.rand(2, 3, 512, 512), models.Clock()
    for number in range(2 * times):
        clock = models.Clock() if number == times else clock  # the first half warms up
        clock(lambda: torch.lerp(a, b, 0.3).clamp_(0, 1))
    return clock.seconds / times


def per_tile(runs: Sequence[models.Watched]) -> tuple[float, float]:
    """Seconds per tile, of a run broken off, (of the model calls, of the rest); what is done once is shared out."""
    rest = min((run.tiles - run.bare) / run.done for run in runs)
    return min(run.bare / run.done for run in runs), rest + min(
        (run.whole.seconds - run.tiles) / run.result.total for run in runs
    )


def engine(arguments: argparse.Namespace) -> dict[str, float]:
    host, turns = load_host(GENERATION), range(arguments.runs)
    conditioner = Conditioner.load(replace(SETTINGS, adapter="mini"), host, ADAPTERS)
    small, medium, large, own_source = noise(128), noise(256), noise(2048), example(2048)
    models.Watched(host, 4).run(small, SETTINGS)  # warm up
    ways: dict[str, list[models.Watched]] = {name: [] for name in ("plain", "adapted", "1024", "8192", "own")}
    lerps = [lerp()]
    for _ in turns:
        ways["plain"].append(models.Watched(host).run(small, SETTINGS))
        ways["adapted"].append(models.Watched(host).run(small, SETTINGS, conditioner))
        ways["1024"].append(models.Watched(host, TILES).run(medium, SETTINGS))
        ways["8192"].append(models.Watched(host, TILES).run(large, SETTINGS))
        ways["own"].append(Null(own_source).run(own_source, OWN))
        lerps.append(lerp())
    (model, at_1024), (other, at_8192) = per_tile(ways["1024"]), per_tile(ways["8192"])
    model = min(model, other)
    print(
        f"tiles of {SETTINGS.tile}, {arguments.runs} runs; seconds per tile: model calls {model:.3f}, beside them",
        end="",
    )
    print(f" {at_1024:.4f} on 1024 x 1024, {at_8192:.4f} on 8192 x 8192")
    return {
        "overhead": models.overhead(ways["plain"]),
        "canvas_ratio": (model + at_8192) / (model + at_1024),
        "adapter": models.overhead(ways["adapted"]),
        "own": min(run.own for run in ways["own"]) / min(lerps),
        "own_once": min(run.once for run in ways["own"]) / min(lerps),
    }


def shares(run: models.Watched, *work: Any, **more: Any) -> tuple[float, float]:
    """(guard's, guidance's) share of the tiles' plain time, of one run with both."""
    guidance, guard, once = (models.Clock(run.device) for _ in range(3))
    with (
        guidance.method(Guide, "__call__"),
        guard.method(Guard, "distances"),
        once.method(Conditioner, "conditions"),
    ):
        run.run(*work, **more)
    plain = run.tiles - guidance.seconds - guard.seconds
    return (guard.seconds + once.seconds) / plain, guidance.seconds / plain


def encoder_calls(make: Callable[[], Conditioner]) -> int:
    """How often the encoder saw the whole of a source, in two runs on it."""
    conditioners._features.clear()
    clock = models.Clock()
    with clock.method(PatchEncoder, "several"):
        for _ in range(2):
            make().features(example(1024), (2048, 2048))
    return clock.calls


def cost(arguments: argparse.Namespace) -> dict[str, float]:
    shapes = arguments.shapes[0]
    if shapes == "mini":
        host, encoder = load_host(Generation()), load_encoder("mini")
    else:
        host, encoder = models.RandomHost(shapes), models.random_encoder(shapes)
    source = example(512)
    more: dict[str, Any] = {}

    def make(settings: Settings = COST) -> Conditioner:
        decoder = host.guidance_decoder(settings.decoder)
        return Conditioner(settings, encoder, None, models.blank_heads(encoder), decoder)

    def run(settings: Settings = COST) -> tuple[float, float]:
        return shares(models.Watched(host), source, settings, make(settings), **more)

    found: dict[str, float] = {}
    calls = encoder_calls(make)
    if shapes != "mini":
        more["mask"] = Image.new("L", source.size)
        more["mask"].paste(255, (0, 0, 128, 128))  # the upper left tile only
        guided, unguided = (models.operations(run, each)[0] for each in (COST, replace(COST, guidance=0.0)))
        found["guidance_operations"] = guided / unguided - 1
    guard, guidance = (statistics.median(values) for values in zip(*(run() for _ in range(arguments.runs))))
    return {"guard": guard, "guidance": guidance, "encoder_calls": calls, **found}


@torch.no_grad()
def counted(name: str) -> dict[str, float]:
    """Parameters, GFLOP, and the adapter's share of a step and of a whole tile, without a number being computed."""
    pair = models.Trainer(name, "meta", torch.float32)
    unet, _ = models.operations(pair.bare)
    prepare, maps = models.operations(pair.adapter.prepare, pair.batch["features"], pair.latent)
    forward, _ = models.operations(pair.adapter, maps, torch.ones(1, device="meta"))
    return {
        "parameters": models.parameters(pair.adapter),
        "unet_parameters": models.parameters(pair.unet),
        "unet_gflop": unet / 1e9,
        "prepare_gflop": prepare / 1e9,
        "forward_gflop": forward / 1e9,
        "step_share": forward / unet,
        "tile_share": (prepare + STEPS * forward) / (STEPS * unet),
    }


def adapter_calls(batch: int, side: int = 128) -> dict[str, int]:
    """How often the parts of the built-in adapter ran for an image of `side` px, enlarged with `batch` tiles at once.

    prepare: the multi-scale part; forward: what depends on the noise level; unet: the UNet. And the tiles painted.
    """
    host = load_host(Generation(steps=20, denoise=0.35))
    settings = Settings(scale=2.0, tile=128, overlap=32, **{**BLIND, "batch": batch}, adapter="mini")
    prepare, forward, unet = models.Clock(), models.Clock(), models.Clock()
    with (
        prepare.method(Adapter, "prepare"),
        forward.method(Adapter, "forward"),
        unet.method(UNet2DConditionModel, "forward"),
    ):
        run = models.Watched(host).run(example(side), settings, Conditioner.load(settings, host, ADAPTERS))
    return {"tiles": run.done, "prepare": prepare.calls, "forward": forward.calls, "unet": unet.calls}


def adapter(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        **{name: counted(name) for name in models.UNETS},
        **{f"calls_batch_{batch}": adapter_calls(batch) for batch in (1, 4)},
    }


def training(arguments: argparse.Namespace) -> dict[str, Any]:
    device, found = "cuda" if torch.cuda.is_available() else "cpu", {}
    for name in arguments.shapes:
        found[name] = models.counted_training(name)
        if not arguments.count:
            found[name] |= models.Trainer(name, device).measure(arguments.runs)
    return found


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


def painted(host: DiffusersHost, settings: Settings, conditioner: Conditioner | None = None) -> models.Watched:
    """A run of 16 tiles. OutOfMemoryError if the memory is too small for its batches."""
    side = ACROSS * (settings.tile - settings.overlap) + settings.overlap
    run = models.Watched(host).run(example(side // 2), settings, conditioner)
    if run.short:
        raise OutOfMemoryError("the memory does not hold a batch")
    return run


def with_batch(host: models.RandomHost, batch: int) -> tuple[float, float]:
    """(seconds per tile, GiB at most)."""
    settings = Settings(scale=2.0, tile=host.tile, overlap=0, batch=batch, **UNGUIDED)  # all tiles in one wave
    painted(host, settings)  # warm up
    if host.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(host.device)
    run = painted(host, settings)
    return run.tiles / run.done, models.peak(host.device)


def ways(host: models.RandomHost, encoder: PatchEncoder) -> dict[str, float | None]:
    """Overhead, and what guidance, guard and adapter cost."""
    settings = Settings(scale=2.0, tile=host.tile, overlap=host.tile // 8, batch=4, **UNGUIDED)
    adapter = models.random_adapter(host.unet, host.base, encoder.width).to(host.dtype)
    heads = models.blank_heads(encoder)
    runs: dict[str, list[Any]] = {name: [] for name in WAYS}
    for _ in range(1 + RUNS):
        for name, changed in WAYS.items():
            now, read = replace(settings, **changed), adapter if name == "adapter" else None
            conditioner = Conditioner(now, encoder, read, heads, host.guidance_decoder(now.decoder))
            runs[name].append(fitting(painted, host, now, None if name == "plain" else conditioner))
    good = {name: each[1:] for name, each in runs.items() if None not in each}  # the first ones warm up
    found: dict[str, float | None] = {"overhead": models.overhead(good["plain"]) if "plain" in good else None}
    seconds = {name: min(run.whole.seconds for run in each) for name, each in good.items()}
    for name in ("guidance", "guard", "adapter"):
        known = name in seconds and "plain" in seconds
        found[name] = seconds[name] / seconds["plain"] - 1 if known else None
    return found


def gpu(shapes: Sequence[str], device: str = "cuda", batches: Sequence[int] = BATCHES) -> dict[str, Any]:
    """The figures; one line and the end if there is no such device."""
    cuda = torch.device(device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        sys.exit(f"{device}: there is no such device here")
    dtype = torch.float16 if cuda else torch.float32
    name = torch.cuda.get_device_name() if cuda else device
    figures: dict[str, Any] = {"device": name, "torch": torch.__version__, "date": str(datetime.date.today())}
    print(", ".join(figures.values()), flush=True)
    for shape in shapes:
        host, encoder = models.RandomHost(shape, device, dtype), models.random_encoder(shape, device)
        rows = {str(batch): fitting(with_batch, host, batch) or (None, None) for batch in batches}
        found = figures[shape] = {
            "seconds": {batch: seconds for batch, (seconds, _) in rows.items()},
            "peak_gib": {batch: gib for batch, (_, gib) in rows.items()},
            **ways(host, encoder),
        }
        del host
        large = shape == "sdxl"
        trainer = fitting(models.Trainer, shape, device, torch.bfloat16, 1 if large else 4, large)
        trained = trainer and fitting(trainer.measure, RUNS)
        found["tiles_an_hour"] = trained and trained["tiles_an_hour"]
        del trainer
        print(shape, found, flush=True)
    clock = models.Clock(device)
    clock(calibrate, encoder, Pictures() if cuda else list(Pictures())[:FOLDS], 2.0)
    figures["calibration_seconds"] = clock.seconds
    return figures


SECTIONS = {"engine": engine, "cost": cost, "adapter": adapter, "training": training}
SHAPES = {"cost": ["mini"], "training": list(models.UNETS)}


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", nargs="?", choices=SECTIONS, default="engine")
    parser.add_argument("--json", action="store_true", help="one last line of JSON")
    parser.add_argument("--runs", type=int, default=3)
    shapes = ("mini", models.TINY, *models.UNETS)
    parser.add_argument("--shapes", nargs="+", choices=shapes, help="cost (one), training, --gpu")
    parser.add_argument("--count", action="store_true", help="training: count operations, time nothing")
    parser.add_argument("--gpu", action="store_true", help="what a GPU decides, instead")
    arguments = parser.parse_args(given)
    if arguments.gpu:
        figures = gpu(arguments.shapes or list(models.UNETS))
    else:
        torch.set_num_threads(1)
        arguments.shapes = arguments.shapes or SHAPES.get(arguments.section)
        figures = SECTIONS[arguments.section](arguments)
    figures = json.loads(json.dumps(figures), parse_float=lambda number: round(float(number), 4))
    print(json.dumps(figures, indent=None if arguments.json else 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
