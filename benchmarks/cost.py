"""What guidance and guard cost, as shares of a tile's plain time: python benchmarks/cost.py [--json] [--shapes sd15]

guard: a tile that is not in doubt, the guard's once-per-image work shared out over the canvas's tiles.
guidance: at its default options.
encoder_calls: how often the encoder saw the whole of a 1024 x 1024 source, for an image upscaled twice with all on.

Each is timed within one run: seconds in guidance or guard over the seconds of everything else in the tiles. With
`--shapes sd15` the models have the shapes of Stable Diffusion 1.5, TAESD and DINOv2 small (random weights; slow on a
CPU), else they are the built-in ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from lib_dinotile.condition import conditioner as conditioners
from lib_dinotile.condition.conditioner import Conditioner
from lib_dinotile.condition.guard import Guard
from lib_dinotile.condition.guidance import Guide
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.engine import upscale
from lib_dinotile.hosts.diffusers import DiffusersHost, VaeCodec, load_host
from lib_dinotile.run import Run
from lib_dinotile.settings import Generation, Settings
from lib_dinotile.tiling.noise import NoiseField

SETTINGS = Settings(scale=2.0, tile=512, overlap=64, batch=1)


class Clock:
    """Seconds spent in some methods, which it wraps while it is open."""

    def __init__(self, *methods: tuple[type, str]) -> None:
        self._methods, self._before, self.seconds = methods, [], 0.0

    def __enter__(self) -> Clock:
        for owner, name in self._methods:
            self._before.append((owner, name, owner.__dict__[name]))
            setattr(owner, name, self._timed(owner.__dict__[name]))
        return self

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return timed

    def __exit__(self, *_: object) -> None:
        for owner, name, before in self._before:
            setattr(owner, name, before)


def picture(side: int) -> Image.Image:
    """A photo, and nothing that a model could mistake."""
    photo = Image.open(Path(__file__).parents[1] / "examples" / "photo.png").convert("RGB")
    return photo.resize((side, side), Image.Resampling.LANCZOS)


def sd15(generation: Generation, folder: Path) -> tuple[DiffusersHost, PatchEncoder]:
    """Random models of the real shapes; no text, so one UNet row a tile: half of what is usual."""
    from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
    from transformers import Dinov2Config, Dinov2Model

    class Textless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet2DConditionModel(cross_attention_dim=768).eval().requires_grad_(False)
            self.words = torch.randn(1, 77, 768)

        def forward(self, x: Any, timestep: Any, encoder_hidden_states: None, **more: Any) -> Any:
            return self.unet(x, timestep, encoder_hidden_states=self.words.expand(len(x), -1, -1), **more)

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )
    unet = Textless()
    host = DiffusersHost(unet.unet, DDIMScheduler(), VaeCodec(vae.eval().requires_grad_(False)), "sd15", generation)
    host.unet, tiny = unet, AutoencoderTiny().eval().requires_grad_(False)
    host.guidance_decoder = lambda _: ("TAESD", lambda latents: (tiny.decode(latents).sample + 1) / 2)
    Dinov2Model(Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6)).save_pretrained(folder)
    return host, load_encoder(str(folder))


def shares(host: DiffusersHost, make: Callable[[Settings], Conditioner], source: Image.Image) -> tuple[float, float]:
    """(guard's, guidance's) share of the tiles' plain time, of one run with both."""
    settings = replace(SETTINGS, guard="report")
    tiles = Clock((Run, "paint"))
    guidance, guard, once = Clock((Guide, "__call__")), Clock((Guard, "distances")), Clock((Conditioner, "conditions"))
    with tiles, guidance, guard, once:
        upscale(host, source, settings, NoiseField(0, host.channels), make(settings))
    plain = tiles.seconds - guidance.seconds - guard.seconds
    return (guard.seconds + once.seconds) / plain, guidance.seconds / plain


def encoder_calls(make: Callable[[Settings], Conditioner], host: DiffusersHost) -> int:
    """How often the encoder saw the whole of a source, in two runs on it."""
    seen: list[tuple[int, ...]] = []
    several = PatchEncoder.several

    def watched(self: PatchEncoder, pixels: Any, *more: Any) -> Any:
        seen.append(tuple(pixels.shape))
        return several(self, pixels, *more)

    conditioners._features.clear()
    PatchEncoder.several = watched
    try:
        for _ in range(2):
            conditioner = make(replace(SETTINGS, guard="report"))
            conditioner.features(picture(1024), (2048, 2048))
    finally:
        PatchEncoder.several = several
    return len(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one last line of JSON")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shapes", choices=("mini", "sd15"), default="mini")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.shapes == "sd15":
            host, encoder = sd15(Generation(steps=20, denoise=0.35, cfg=1.0), Path(folder))
        else:
            host, encoder = load_host(Generation()), load_encoder("mini")

        def make(settings: Settings) -> Conditioner:
            decoder = host.guidance_decoder(settings.decoder)
            return Conditioner(settings, encoder, decoder=decoder)

        source = picture(512 if arguments.shapes == "mini" else 256)
        with torch.no_grad():
            calls = encoder_calls(make, host)
            found = [shares(host, make, source) for _ in range(arguments.runs)]
    guard, guidance = (statistics.median(values) for values in zip(*found))
    print(f"shares of a tile's plain time, models like {arguments.shapes}, {arguments.runs} runs")
    print(f"  guard, nothing in doubt   {guard:.3f}   (at most 0.05)")
    print(f"  guidance, as by default   {guidance:.3f}   (at most 0.25)")
    print(f"whole views of a 1024 x 1024 source, for two images of it: {calls}")
    if arguments.json:
        print(json.dumps({"guard": round(guard, 4), "guidance": round(guidance, 4), "encoder_calls": calls}))


if __name__ == "__main__":
    main()
