"""What the engine costs beside the model: python benchmarks/engine.py [--json]

overhead: time of a whole run of the engine over that of the encode, sample and decode calls within it, less what the
sampler spends on noise and residuals, which are the engine's; the median of several runs.
canvas_ratio: seconds per tile on a canvas of 8192 x 8192 over those on one of 1024 x 1024. What a run does once
(upscaling, the finished image) is shared out over all tiles of the canvas; the tiles timed are the first ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from lib_dinotile.condition.conditioner import MINI, Conditioner, Conditions
from lib_dinotile.engine.flow import upscale
from lib_dinotile.engine.host import Views
from lib_dinotile.hosts.diffusers import DiffusersHost, load_host
from lib_dinotile.settings import Generation, Settings
from lib_dinotile.tiling.noise import NoiseField, TileNoise

TILES = 8
"""How many tiles of each canvas are timed."""
GENERATION = Generation(steps=10, denoise=0.2)  # two UNet steps a tile
SETTINGS = Settings(scale=4.0, tile=256, overlap=32, batch=4, guidance=0.0, guard="off")


class Clock:
    """Adds up the seconds of the calls made through it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            self.seconds += time.perf_counter() - start


class Watched:
    """A host whose model calls are timed, and which stops after so many tiles."""

    def __init__(self, host: DiffusersHost, tiles: int | None = None) -> None:
        self._host, self._tiles = host, tiles
        self.model, self.ours = Clock(), Clock()
        self.done, self.began, self.ended = 0, 0.0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.model(self._host.encode, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self.model(self._host.decode, latents)

    def sample(self, latents: Tensor, views: Views, noise: TileNoise, *more: Any) -> Tensor:
        """The sampler's time is the model's, but for the noise and the residuals that it asks us for."""
        drawn = SimpleNamespace(next=lambda: self.ours(noise.next))
        self.done += len(latents)
        return self.model(self._host.sample, latents, views, drawn, *more)

    def watch(self, conditioner: Conditioner) -> Any:
        """The conditioner, its residuals timed."""

        def conditions(*arguments: Any) -> Conditions:
            made = conditioner.conditions(*arguments)
            return replace(made, adapted=lambda *more: adapted(made.adapted(*more)))

        def adapted(made: Any) -> Any:
            return SimpleNamespace(residuals=lambda *a: self.ours(made.residuals, *a), forget=made.forget)

        return SimpleNamespace(features=conditioner.features, conditions=conditions)

    def interrupted(self) -> bool:
        """Asked before each batch."""
        self.ended = time.perf_counter()
        self.began = self.began or self.ended
        return self._tiles is not None and self.done >= self._tiles


def source(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def overhead(host: DiffusersHost, conditioner: Conditioner | None, image: Image.Image) -> float:
    """A whole run over the model calls in it."""
    watched, whole = Watched(host), Clock()
    asked = conditioner and watched.watch(conditioner)
    whole(upscale, watched, image, SETTINGS, NoiseField(0, host.channels), asked)
    return whole.seconds / (watched.model.seconds - watched.ours.seconds)


def per_tile(host: DiffusersHost, image: Image.Image, tiles: int) -> float:
    """Seconds per tile of a whole run, from its first `tiles` tiles and what it does once."""
    watched, whole = Watched(host, tiles), Clock()
    result = whole(upscale, watched, image, SETTINGS, NoiseField(0, host.channels))
    loop = watched.ended - watched.began
    return loop / watched.done + (whole.seconds - loop) / result.total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one last line of JSON")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()

    host = load_host(GENERATION)
    adapters = {"mini": MINI / "adapter.safetensors"}
    conditioner = Conditioner.load(replace(SETTINGS, adapter="mini"), host, adapters)
    small, large, runs = source(128), source(2048), range(arguments.runs)
    per_tile(host, small, 4)  # warm up
    plain = statistics.median(overhead(host, None, small) for _ in runs)
    adapted = statistics.median(overhead(host, conditioner, small) for _ in runs)
    # The fastest of several interleaved runs: other work on the machine only ever makes one slower.
    pairs = [(per_tile(host, source(256), TILES), per_tile(host, large, TILES)) for _ in runs]
    at_1024, at_8192 = (min(side) for side in zip(*pairs))
    ratio = at_8192 / at_1024
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
