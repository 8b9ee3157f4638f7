"""What guidance and guard cost, as shares of a tile's plain time: python benchmarks/cost.py [--json] [--shapes sd15]

And what an adapter costs, as its share of the UNet: python benchmarks/cost.py --adapter [--json] [--time sd15]

guard: a tile that is not in doubt, the guard's once-per-image work shared out over the canvas's tiles.
guidance: at its default options.
encoder_calls: how often the encoder saw the whole of a 1024 x 1024 source, for an image upscaled twice with all on.

Each is timed within one run: seconds in guidance or guard over the seconds of everything else in the tiles. With
`--shapes sd15` the models have the shapes of Stable Diffusion 1.5, TAESD and DINOv2 small (random weights; slow on a
CPU), else they are the built-in ones; one tile of a canvas of 1024 x 1024 is painted, with a negative prompt as usual,
and the floating-point operations of guidance are counted, too.

--adapter: parameters and floating-point operations of an adapter for Stable Diffusion 1.5 (tiles of 512 px) and XL (of
1024 px) against those of the UNet with one row, counted and not run: of a step, and of a tile, which also has the part
that runs once. How often the parts run is counted in an image upscaled with the built-in model and adapter. `--time`
also takes the seconds, with random weights (minutes on a CPU; XL in float32 wants 12 GB).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.adapter_cost import PARAMETERS, SHARE, STEPS, UNETS, counted, timed
from lib_dinotile.condition import conditioner as conditioners
from lib_dinotile.condition.adapter import Adapter
from lib_dinotile.condition.conditioner import Conditioner
from lib_dinotile.condition.guard import Guard
from lib_dinotile.condition.guidance import Guide
from lib_dinotile.condition.heads import FixedHeads
from lib_dinotile.dino.calibration import LAYERS
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.dino.head import RestorationHead
from lib_dinotile.engine.flow import upscale
from lib_dinotile.engine.run import Run
from lib_dinotile.hosts.diffusers import DiffusersHost, VaeCodec, load_host
from lib_dinotile.settings import Generation, Settings
from lib_dinotile.tiling.noise import NoiseField

SETTINGS = Settings(scale=2.0, tile=512, overlap=64, batch=1)


class Clock:
    """Seconds spent in some methods, and calls of them; it wraps them while it is open."""

    def __init__(self, *methods: tuple[type, str]) -> None:
        self._methods, self._before, self.seconds, self.calls = methods, [], 0.0, 0

    def __enter__(self) -> Clock:
        for owner, name in self._methods:
            self._before.append((owner, name, owner.__dict__[name]))
            setattr(owner, name, self._timed(owner.__dict__[name]))
        return self

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            self.calls += 1
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
    """Random models of the real shapes; two UNet rows a tile, prompt and negative prompt, but of no text."""
    from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
    from transformers import Dinov2Config, Dinov2Model

    class Textless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet2DConditionModel(cross_attention_dim=768).eval().requires_grad_(False)
            self.words = torch.randn(1, 77, 768)

        def forward(self, x: Any, timestep: Any, encoder_hidden_states: None, **more: Any) -> Any:
            words = self.words.expand(2 * len(x), -1, -1)
            seen = self.unet(torch.cat([x, x]), timestep, encoder_hidden_states=words, **more)
            return [part.chunk(2)[0] for part in seen]

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


class Operations(TorchDispatchMode):
    """Floating-point operations in guidance, and all of them, while it is open; for torch 2.2 and newer."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry

        super().__init__()
        self._count = flop_registry
        self.total, self.guidance, self._call = 0, 0, Guide.__call__

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = self._count.get(func._overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out

    def __enter__(self) -> Operations:
        def counted(guide: Guide, *arguments: Any) -> Any:
            before = self.total
            moved = self._call(guide, *arguments)
            self.guidance += self.total - before
            return moved

        Guide.__call__ = counted
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Guide.__call__ = self._call
        super().__exit__(*error)

    @property
    def share(self) -> float:
        """Guidance's over those of everything else."""
        return self.guidance / (self.total - self.guidance)


def shares(
    host: DiffusersHost, make: Callable[[Settings], Conditioner], source: Image.Image, mask: Image.Image | None
) -> tuple[float, float]:
    """(guard's, guidance's) share of the tiles' plain time, of one run with both."""
    settings = replace(SETTINGS, guard="report")
    tiles = Clock((Run, "paint"))
    guidance, guard, once = Clock((Guide, "__call__")), Clock((Guard, "distances")), Clock((Conditioner, "conditions"))
    with tiles, guidance, guard, once:
        upscale(host, source, settings, NoiseField(0, host.channels), make(settings), mask=mask)
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


def adapter_calls(batch: int, side: int = 128) -> dict[str, int]:
    """How often the parts of the built-in adapter ran for an image of `side` px, enlarged with `batch` tiles at once.

    prepare: the multi-scale part; forward: what depends on the noise level; unet: the UNet. And the tiles painted.
    """
    host = load_host(Generation(steps=20, denoise=0.35))
    settings = Settings(scale=2.0, tile=128, overlap=32, batch=batch, adapter="mini", guidance=0.0, guard="off")
    conditioner = Conditioner.load(settings, host, {"mini": conditioners.MINI / "adapter.safetensors"})
    prepare, forward = Clock((Adapter, "prepare")), Clock((Adapter, "forward"))
    unet = Clock((UNet2DConditionModel, "forward"))
    with prepare, forward, unet:
        result = upscale(host, picture(side), settings, NoiseField(0, host.channels), conditioner)
    return {"tiles": result.painted, "prepare": prepare.calls, "forward": forward.calls, "unet": unet.calls}


def adapter_costs(time_of: Sequence[str], runs: int) -> dict[str, Any]:
    """Prints what an adapter costs, and gives the figures; time_of: the shapes to take seconds of."""
    figures: dict[str, Any] = {}
    for name in UNETS:
        found = figures[name] = counted(name)
        unet, step, once = (found[f"{part}_gflop"] for part in ("unet", "forward", "prepare"))
        millions, of = found["parameters"] / 1e6, found["unet_parameters"] / 1e6
        limit = f"   (at most {PARAMETERS / 1e6:.0f})" if name == "sd15" else ""
        print(f"an adapter for {name}, against one row of the UNet")
        print(f"  parameters, millions       {millions:.2f} of {of:.0f}{limit}")
        print(f"  GFLOP: UNet, step, once    {unet:.1f}, {step:.2f}, {once:.2f}")
        print(f"  share of a step's FLOP     {found['step_share']:.4f}   (at most {SHARE})")
        print(f"  share of a tile's FLOP     {found['tile_share']:.4f}   ({STEPS} steps, and what runs once)")
        if name in time_of:
            found.update(timed(name, runs))
            print(
                f"  seconds: UNet, step, once  {found['unet_seconds']:.2f}, {found['forward_seconds']:.4f}, "
                f"{found['prepare_seconds']:.3f}   (medians of {runs} runs)"
            )
            print(f"  share of a step's seconds  {found['step_time_share']:.4f}   (at most {SHARE})")
            print(f"  share of a tile's seconds  {found['tile_time_share']:.4f}")
    for batch in (1, 4):
        calls = figures[f"calls_batch_{batch}"] = adapter_calls(batch)
        told = ", ".join(f"{name} {count}" for name, count in calls.items())
        print(f"calls for an image, batch {batch}: {told}")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one last line of JSON")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shapes", choices=("mini", "sd15"), default="mini")
    parser.add_argument("--adapter", action="store_true", help="what an adapter costs, instead")
    parser.add_argument("--time", nargs="+", choices=tuple(UNETS), default=(), help="with --adapter: also in seconds")
    arguments = parser.parse_args()
    if arguments.adapter:
        figures = adapter_costs(arguments.time, arguments.runs)
        if arguments.json:
            print(json.dumps(figures))
        return
    full = arguments.shapes == "sd15"
    with tempfile.TemporaryDirectory() as folder:
        if full:
            host, encoder = sd15(Generation(), Path(folder))
        else:
            host, encoder = load_host(Generation()), load_encoder("mini")

        heads = FixedHeads({layer: RestorationHead(encoder.width, 0).eval() for layer in LAYERS}, "as it begins")

        def make(settings: Settings) -> Conditioner:
            return Conditioner(settings, encoder, heads=heads, decoder=host.guidance_decoder(settings.decoder))

        source, mask = picture(512), None
        if full:  # the upper left tile only
            mask = Image.new("L", source.size)
            mask.paste(255, (0, 0, 128, 128))
        operations = Operations()
        with torch.no_grad():
            calls = encoder_calls(make, host)
            with operations if full else contextlib.nullcontext():
                found = [shares(host, make, source, mask) for _ in range(arguments.runs)]
    guard, guidance = (statistics.median(values) for values in zip(*found))
    figures = {"guard": round(guard, 4), "guidance": round(guidance, 4), "encoder_calls": calls}
    print(f"shares of a tile's plain time, models like {arguments.shapes}, {arguments.runs} runs, default settings")
    print(f"  guard, nothing in doubt   {guard:.3f}   (at most 0.05)")
    print(f"  guidance, as by default   {guidance:.3f}   (at most 0.25)")
    if full:
        figures["guidance_operations"] = round(operations.share, 4)
        print(f"  guidance, operations      {operations.share:.3f}")
    print(f"whole views of a 1024 x 1024 source, for two images of it: {calls}")
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
