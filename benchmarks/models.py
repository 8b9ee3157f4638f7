"""Models of the real shapes with random weights, which are as fast as trained ones; clocks and a counter for them."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lib_dinotile.condition.adapter import Adapter, AdapterCondition, AdapterConfig
from lib_dinotile.condition.conditioner import Conditioner
from lib_dinotile.condition.heads import FixedHeads
from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.dino.calibration import LAYERS
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.dino.head import RestorationHead
from lib_dinotile.engine.flow import Result, upscale
from lib_dinotile.engine.progress import Progress
from lib_dinotile.hosts.diffusers import DiffusersHost, VaeCodec
from lib_dinotile.settings import Generation, Settings
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.noise import NoiseField, TileNoise
from lib_dinotile.train.adapter import AdapterLoss, AdapterTraining
from lib_dinotile.train.options import Training

logging.set_verbosity_error()
UNETS: dict[str, tuple[dict[str, Any], int]] = {
    "sd15": ({"cross_attention_dim": 768}, 64),
    "sdxl": (
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        128,
    ),
}
"""Configuration of the UNet, and side of a tile's latent: tiles of 512 px and of 1024 px."""
TINY = "tiny"
"""Shapes to try the code with."""
_TINY_UNET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 768,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


class Clock:
    """Adds up the seconds of the calls made through it, and counts them.

    On the CPU these are seconds that this process computed, so that other work on the machine hardly shows; on a GPU
    those on the wall, begun and ended when the GPU has nothing left to do.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._gpu = torch.device(device).type == "cuda"
        self.seconds, self.calls = 0.0, 0

    def now(self) -> float:
        if not self._gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        start = self.now()
        self.calls += 1
        try:
            return function(*arguments, **options)
        finally:
            self.seconds += self.now() - start

    def method(self, owner: type, name: str) -> AbstractContextManager[Any]:
        """While open, all calls of a method are made through the clock."""
        function = getattr(owner, name)
        return mock.patch.object(owner, name, lambda *arguments, **options: self(function, *arguments, **options))


class Watched:
    """A host whose model calls are timed, and which stops after so many tiles."""

    def __init__(self, host: DiffusersHost, tiles: int | None = None) -> None:
        self._host, self._tiles = host, tiles
        self.whole, self.model, self.ours = (Clock(host.device) for _ in range(3))
        self.done, self.began, self.ended = 0, 0.0, 0.0
        self.short = False
        """Whether the memory was too small for a batch."""
        self.result: Result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def run(self, image: Image.Image, settings: Settings, conditioner: Conditioner | None = None, **more: Any) -> Any:
        """Itself, after one run. What the sampler spends on noise and residuals is not the model's."""
        noise = NoiseField(0, self._host.channels)
        with self.ours.method(TileNoise, "next"), self.ours.method(AdapterCondition, "residuals"):
            self.result = self.whole(upscale, self, image, settings, noise, conditioner, **more)
        return self

    @property
    def bare(self) -> float:
        """Seconds of the model calls."""
        return self.model.seconds - self.ours.seconds

    @property
    def tiles(self) -> float:
        """Seconds from the first tile to the end of the last one, with all that follows for each."""
        return self.ended - self.began

    def _stamp(self) -> None:
        self.ended = self.whole.now()
        self.began = self.began or self.ended

    def encode(self, pixels: Tensor) -> Tensor:
        return self.model(self._host.encode, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self.model(self._host.decode, latents)

    def sample(self, latents: Tensor, *more: Any) -> Tensor:
        self.done += len(latents)
        return self.model(self._host.sample, latents, *more)

    def free_memory(self) -> None:
        self.short = True
        self._host.free_memory()

    def interrupted(self) -> bool:
        self._stamp()
        return self._tiles is not None and self.done >= self._tiles

    def progress(self, progress: Progress, canvas: Canvas) -> None:
        self._stamp()


def overhead(runs: Sequence[Watched]) -> float:
    """1 + the engine's time over that of the model calls."""
    return 1 + min(run.whole.seconds - run.bare for run in runs) / min(run.bare for run in runs)


def random_unet(name: str, device: str = "meta") -> tuple[UNet2DConditionModel, int]:
    """(UNet, side of a tile's latent)."""
    config, side = (_TINY_UNET, 8) if name == TINY else UNETS[name]
    with torch.device(device):
        return UNet2DConditionModel(**config).eval().requires_grad_(False), side


def random_adapter(unet: UNet2DConditionModel, name: str, features: int = 768) -> Adapter:
    """As wide as a published one would be: tokens 768 wide (DINOv2 base), maps 256."""
    shape = UNetShape.of_diffusers(unet)
    with unet.device:
        adapter = Adapter(AdapterConfig(name, shape, "facebook/dinov2-base", features, width=256, blocks=2, grid=4))
    return adapter.to(unet.device).eval().requires_grad_(False)  # transformers makes torch.linspace forget the device


def random_words(unet: UNet2DConditionModel) -> list[Tensor]:
    """Embeddings of a prompt and of the negative one (1, 77, D), for SDXL also the pooled ones (1, D)."""
    config, device = unet.config, unet.device
    words = [torch.zeros(1, 77, config.cross_attention_dim, device=device)] * 2
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        words += [torch.zeros(1, pooled, device=device)] * 2
    return words


class RandomHost(DiffusersHost):
    """With a VAE, TAESD, a prompt and a negative one: two rows of the UNet a tile."""

    def __init__(self, name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        unet, side = random_unet(name, device)
        with torch.device(device):
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(32,) * 4 if name == TINY else (128, 256, 512, 512),
                layers_per_block=2,
            )
            self._tiny = AutoencoderTiny().to(dtype).eval().requires_grad_(False)
        words, codec = random_words(unet), VaeCodec(vae.to(dtype).eval().requires_grad_(False))
        base, generation = ("sd15", Generation(steps=6)) if name == TINY else (name, Generation())
        super().__init__(unet.to(dtype), DDIMScheduler(), codec, base, generation, lambda _: tuple(words))
        self.tile = side * self.factor

    def guidance_decoder(self, choice: str) -> tuple[str, Callable[[Tensor], Tensor]]:
        return "TAESD", lambda latents: (self._tiny.decode(latents.to(self._tiny.dtype)).sample.float() + 1) / 2


def random_encoder(name: str, device: str = "cpu") -> PatchEncoder:
    """Like DINOv2 small."""
    from transformers import Dinov2Config, Dinov2Model  # from 4.31 on

    width, depth = (24, 4) if name == TINY else (384, 12)
    with tempfile.TemporaryDirectory() as folder:
        config = Dinov2Config(hidden_size=width, num_hidden_layers=depth, num_attention_heads=6)
        Dinov2Model(config).save_pretrained(folder)
        return load_encoder(folder, device=torch.device(device))


def blank_heads(encoder: PatchEncoder) -> FixedHeads:
    """As calibration begins."""
    head = {layer: RestorationHead(encoder.width, 0).eval().to(encoder.device) for layer in LAYERS}
    return FixedHeads(head, "as it begins")


class Codec(nn.Module):
    """Stands for the VAE where it is not called: in training its latents are cached."""

    factor, channels = 8, 4


def peak(device: torch.device) -> float:
    """GiB that were taken at most; 0 where that is not known."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class _Untracked(contextlib.nullcontext):
    """In place of what follows the modules, from torch 2.4 on."""

    parents = ("Global",)


def operations(function: Callable[..., Any], *arguments: Any) -> tuple[int, Any]:
    """(Floating-point operations of convolutions, matrix products and attention in a call; what it gave.)

    Modules are not followed, as torch does else: that fails when only a gradient for the input is asked for.
    """
    counter = FlopCounterMode(display=False)
    if hasattr(counter, "mod_tracker"):
        counter.mod_tracker = _Untracked()
    with counter:
        result = function(*arguments)
    return counter.get_total_flops(), result


class Trainer:
    """One training tile at a time, or some, as the training loop makes its steps."""

    def __init__(
        self, name: str, device: str, dtype: torch.dtype = torch.bfloat16, batch: int = 1, checkpointing: bool = False
    ) -> None:
        (unet, side), self.dtype = random_unet(name, device), dtype
        self.adapter, self.latent, words = random_adapter(unet, name), (side, side), random_words(unet)
        self.unet, self.device = unet.to(self.dtype), torch.device(device)
        self.host = DiffusersHost(unet, DDIMScheduler(), Codec(), name, Generation(), lambda _: tuple(words))
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.unet.train()
        self.loss = AdapterLoss(self.host, Training(batch=batch))
        self.model = AdapterTraining(self.adapter.train().requires_grad_(True))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        latent = (batch, 4, side, side)
        grid = (batch, self.adapter.config.features, *self.adapter.grid(self.latent))
        sizes = {"sharp": latent, "degraded": latent, "features": grid}
        self.batch: dict[str, Tensor] = {key: torch.randn(size, device=device) for key, size in sizes.items()}
        for number, kind in enumerate(words[::2]):
            self.batch[f"words.{number}"] = kind.expand(batch, *kind.shape[1:])

    def train(self) -> None:
        kind = self.device.type
        with torch.autocast(kind if kind != "meta" else "cpu", self.dtype, enabled=self.dtype != torch.float32):
            value, _ = self.loss(self.model, self.batch, torch.Generator().manual_seed(0))
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def bare(self) -> None:
        """A row of the UNet for each tile: half of a step with classifier-free guidance."""
        x = self.batch["sharp"].to(self.dtype)
        words = [self.batch[name] for name in sorted(self.batch) if name.startswith("words.")]
        self.host.predict(x, torch.ones(len(x), device=self.device, dtype=torch.long), words)

    def measure(self, runs: int) -> dict[str, float]:
        """Seconds a tile and a row, medians; their ratio; tiles an hour; GiB at most (0: not known)."""
        self.train()  # warm up
        rows, count = [], len(self.batch["sharp"])
        for _ in range(runs):
            tile, row = Clock(self.device), Clock(self.device)
            tile(self.train)
            row(self.bare)
            rows.append((tile.seconds, row.seconds))
        tile, row = (statistics.median(column) / count for column in zip(*rows))
        return {
            "train_seconds": tile,
            "row_seconds": row,
            "ratio": statistics.median(first / second for first, second in rows),
            "tiles_an_hour": 3600 / tile,
            "gib": peak(self.device),
        }

    def kept(self) -> float:
        """GiB that a training tile keeps for its backward pass, besides the weights."""
        kept: dict[int, int] = {}
        weights = {_memory(each) for module in (self.unet, self.model) for each in module.state_dict().values()}

        def keep(tensor: Tensor) -> Tensor:
            if _memory(tensor) not in weights:
                kept[_memory(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.train()
        return sum(kept.values()) / 2**30


def counted_training(name: str) -> dict[str, float]:
    """TFLOP of a training tile, and of a UNet row; GiB of the UNet's weights and of what a tile keeps, in bf16, without
    and with gradient checkpointing (then blocks are computed again, one at a time: what one of them keeps comes on top
    of the figure)."""
    trainer, halved = Trainer(name, "meta", torch.float32), Trainer(name, "meta")
    return {
        "train_tflop": operations(trainer.train)[0] / 1e12,
        "row_tflop": operations(trainer.bare)[0] / 1e12,
        "kept_gib": halved.kept(),
        "kept_checkpointing_gib": Trainer(name, "meta", checkpointing=True).kept(),
        "weights_gib": sum(each.nbytes for each in halved.unet.state_dict().values()) / 2**30,
    }


def _memory(tensor: Tensor) -> int:
    """The same for all views of one memory."""
    return tensor.untyped_storage()._cdata
