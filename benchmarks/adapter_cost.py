"""What an adapter costs beside a UNet: parameters, floating-point operations, seconds, and how often its parts run.

Used by cost.py --adapter. The adapter is as wide as a published one would be: tokens 768 wide (DINOv2 base), maps 256.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lib_dinotile.condition.adapter import Adapter, AdapterCondition, AdapterConfig
from lib_dinotile.condition.shape import UNetShape

STEPS = 7
"""UNet calls of a tile: 20 steps at denoising strength 0.35."""
PARAMETERS, SHARE = 60_000_000, 0.03
"""Limits: the adapter's parameters for SD 1.5, and its part of a step."""

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


@dataclass(frozen=True)
class Pair:
    """A UNet and an adapter for it, with random weights, and one tile for them."""

    unet: UNet2DConditionModel
    adapter: Adapter
    side: int
    """Of the tile's latent."""

    @classmethod
    def make(cls, name: str, device: str = "meta", width: int = 256) -> Pair:
        config, side = UNETS[name]
        with torch.device(device):
            unet = UNet2DConditionModel(**config).eval().requires_grad_(False)
            shape = UNetShape.of_diffusers(unet)
            adapter = Adapter(AdapterConfig(name, shape, "facebook/dinov2-base", 768, width=width, blocks=2, grid=4))
        return cls(unet, adapter.eval().requires_grad_(False), side)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def features(self) -> Tensor:
        """Of one tile, as `Adapter.prepare` wants them."""
        return torch.randn(1, 768, *self.adapter.grid((self.side, self.side)), device=self.device)

    def step(self) -> None:
        """One call of the UNet with one row: half of a step with classifier-free guidance."""
        config, more = self.unet.config, {}
        words = torch.randn(1, 77, config.cross_attention_dim, device=self.device)
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            given = {"text_embeds": torch.randn(1, pooled), "time_ids": torch.randn(1, 6)}
            more["added_cond_kwargs"] = {name: tensor.to(self.device) for name, tensor in given.items()}
        x = torch.randn(1, 4, self.side, self.side, device=self.device)
        self.unet(x, torch.ones(1, device=self.device), encoder_hidden_states=words, **more)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def operations(function: Any, *arguments: Any) -> tuple[int, Any]:
    """(floating-point operations of convolutions, matrix products and attention; what the function gave)."""
    with FlopCounterMode(display=False) as counter:
        result = function(*arguments)
    return counter.get_total_flops(), result


@torch.no_grad()
def counted(name: str, width: int = 256) -> dict[str, float]:
    """Parameters, GFLOP, and the adapter's share of a step and of a whole tile, without a number being computed."""
    pair = Pair.make(name, width=width)
    unet, _ = operations(pair.step)
    prepare, maps = operations(pair.adapter.prepare, pair.features, (pair.side, pair.side))
    forward, _ = operations(pair.adapter, maps, torch.ones(1, device=pair.device))
    return {
        "parameters": parameters(pair.adapter),
        "unet_parameters": parameters(pair.unet),
        "unet_gflop": unet / 1e9,
        "prepare_gflop": prepare / 1e9,
        "forward_gflop": forward / 1e9,
        "step_share": forward / unet,
        "tile_share": (prepare + STEPS * forward) / (STEPS * unet),
    }


@torch.no_grad()
def timed(name: str, runs: int, width: int = 256) -> dict[str, float]:
    """Seconds, and the share of a step and of a whole tile, in float32 on the CPU; medians of some runs.

    A step of the adapter is `AdapterCondition.residuals` and adding them as a host does, the UNet's is its bare call;
    each run times both.
    """
    pair = Pair.make(name, "cpu", width)
    latent = (pair.side, pair.side)
    for module in (pair.unet, pair.adapter):
        module.to(memory_format=torch.channels_last)
    sizes = [
        (1, channels, pair.side // scale, pair.side // scale) for channels, scale in pair.adapter.config.shape.slots
    ]
    skips, features = [torch.randn(size) for size in sizes], pair.features

    def once(sigma: float) -> tuple[float, float, float]:
        start = time.perf_counter()
        condition = AdapterCondition(pair.adapter, features, latent)
        prepared = time.perf_counter()
        found = condition.residuals(sigma, 0.5)
        _ = [skip + residual.to(skip).repeat(1, 1, 1, 1) for skip, residual in zip(skips, found)]
        added = time.perf_counter()
        pair.step()
        return prepared - start, added - prepared, time.perf_counter() - added

    once(1.0)  # warm up
    rows = [once(1.0 + run) for run in range(runs)]
    prepare, forward, unet = (statistics.median(column) for column in zip(*rows))
    return {
        "prepare_seconds": prepare,
        "forward_seconds": forward,
        "unet_seconds": unet,
        "step_time_share": statistics.median(row[1] / row[2] for row in rows),
        "tile_time_share": statistics.median((row[0] + STEPS * row[1]) / (STEPS * row[2]) for row in rows),
    }
