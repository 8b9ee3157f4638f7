"""What the engine costs beside the model: python benchmarks/engine.py [--json]

overhead: time of a whole run of the engine over that of the bare encode, sample and decode calls for the same tiles.
canvas_ratio: seconds per tile on a canvas of 8192 x 8192 over those on one of 1024 x 1024. What a run does once
(upscaling, the finished image) is shared out over all tiles of the canvas; the tiles timed are the first ones.

With the built-in model, both interleaved with what they are compared to; medians of the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from lib_dinotile.condition.conditioner import MINI, Conditioner
from lib_dinotile.engine import make_plan, upscale
from lib_dinotile.hosts.diffusers import DiffusersHost, load_host
from lib_dinotile.settings import Generation, Settings
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.noise import NoiseField

GENERATION = Generation(steps=10, denoise=0.2)  # two UNet steps a tile
SETTINGS = Settings(scale=4.0, tile=128, overlap=16, batch=4)


class Watched:
    """A host that stops after so many tiles and says when the first began and the last was done."""

    def __init__(self, host: DiffusersHost, tiles: int) -> None:
        self._host, self._tiles = host, tiles
        self.done, self.total, self.began, self.ended = 0, 0, 0.0, 0.0

    def __getattr__(self, name: str):
        return getattr(self._host, name)

    def interrupted(self) -> bool:
        return self.done >= self._tiles

    def progress(self, done: int, total: int, canvas: Canvas) -> None:
        self.done, self.total, self.ended = done, total, time.perf_counter()
        self.began = self.began or self.ended


def source(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.no_grad()
def bare(host: DiffusersHost, size: int) -> float:
    """The model's calls for the tiles of a canvas, and nothing else; pixels and noise are at hand."""
    plan, spent = make_plan(host, (size, size), SETTINGS), 0.0

    class AtHand:
        def __init__(self, tiles: int) -> None:
            side = SETTINGS.tile // host.factor
            self._noise = torch.randn(tiles, host.channels, side, side)

        def next(self) -> torch.Tensor:
            return self._noise

    for tiles in plan.batches(SETTINGS.batch):
        pixels, noise = torch.rand(len(tiles), 3, SETTINGS.tile, SETTINGS.tile), AtHand(len(tiles))
        spent += seconds(lambda: host.decode(host.sample(host.encode(pixels), noise, None)))  # noqa: B023
    return spent


def overhead(host: DiffusersHost, conditioner: Conditioner | None, side: int, runs: int) -> float:
    """Median over runs of engine time over bare time."""
    ratios, image = [], source(side)
    for run in range(runs):
        noise = NoiseField(run, host.channels)
        engine = seconds(lambda: upscale(host, image, SETTINGS, noise, conditioner))  # noqa: B023
        ratios.append(engine / bare(host, round(side * SETTINGS.scale)))
    return statistics.median(ratios)


def per_tile(host: DiffusersHost, image: Image.Image, tiles: int) -> float:
    """Seconds per tile of a whole run, from its first `tiles` tiles and what it does once."""
    watched = Watched(host, tiles)
    whole = seconds(lambda: upscale(watched, image, SETTINGS, NoiseField(0, host.channels)))
    loop = watched.ended - watched.began
    return loop / watched.done + (whole - loop) / watched.total


def canvas_ratio(host: DiffusersHost, tiles: int, runs: int) -> tuple[float, float, float]:
    """(seconds per tile at 8192, at 1024, median ratio)."""
    small, large = source(256), source(2048)
    pairs = [(per_tile(host, large, tiles), per_tile(host, small, tiles)) for _ in range(runs)]
    return (*map(statistics.median, zip(*pairs)), statistics.median(a / b for a, b in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one last line of JSON")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()

    host = load_host(GENERATION)
    adapters = {"mini": MINI / "adapter.safetensors"}
    conditioner = Conditioner.load(replace(SETTINGS, adapter="mini"), host, adapters)
    bare(host, 256)  # warm up
    plain = overhead(host, None, 96, arguments.runs)
    adapted = overhead(host, conditioner, 96, arguments.runs)
    at_8192, at_1024, ratio = canvas_ratio(host, 8, arguments.runs)
    print(f"engine over bare model calls, tiles of {SETTINGS.tile}, {arguments.runs} runs")
    print(f"  without a condition   {plain:.3f}")
    print(f"  with mini's adapter   {adapted:.3f}")
    print("seconds per tile")
    print(f"  canvas 1024 x 1024    {at_1024:.3f}")
    print(f"  canvas 8192 x 8192    {at_8192:.3f}")
    print(f"  ratio                 {ratio:.3f}")
    if arguments.json:
        print(json.dumps({"overhead": round(plain, 4), "canvas_ratio": round(ratio, 4), "adapter": round(adapted, 4)}))


if __name__ == "__main__":
    main()
