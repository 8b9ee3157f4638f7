"""How fast an adapter trains at the real shapes: python benchmarks/training.py [--shapes sd15 sdxl] [--json]

Random weights, which are as fast as trained ones; features and latents from the cache, as in training. For each shape:
floating-point operations of a training tile (forward, backward through the frozen UNet, adapter) and of a bare UNet
row, counted without a number being computed; their seconds on this machine, on a GPU if there is one; the ratio of the
two; tiles an hour; and on a GPU the most memory that was taken. `--count` only counts, also the memory that a tile
keeps for its backward pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.adapter_cost import UNETS, Pair, operations
from lib_dinotile.hosts.diffusers import DiffusersHost
from lib_dinotile.settings import Generation
from lib_dinotile.train.adapter import AdapterLoss, AdapterTraining
from lib_dinotile.train.options import Training

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


class Codec(nn.Module):
    """Stands for the VAE, which training does not call: its latents are cached."""

    factor, channels = 8, 4


class Trainer:
    """One training tile at a time, or some, as the training loop makes its steps."""

    def __init__(self, name: str, device: str, batch: int, precision: str, checkpointing: bool) -> None:
        pair, dtype = Pair.make(name, device), PRECISIONS[precision]
        self.unet, self.device = pair.unet.to(dtype), torch.device(device)
        width, more = self.unet.config.cross_attention_dim, self.unet.config.addition_embed_type
        words = [torch.zeros(1, 77, width, device=device)] * 2
        if more:
            pooled = self.unet.config.projection_class_embeddings_input_dim - 6 * 256
            words += [torch.zeros(1, pooled, device=device)] * 2
        host = DiffusersHost(self.unet, DDIMScheduler(), Codec(), name, Generation(), lambda _: tuple(words))
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.unet.train()
        self.loss, self.dtype = AdapterLoss(host, Training(batch=batch)), dtype
        self.model = AdapterTraining(pair.adapter.train().requires_grad_(True))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.host = host
        latent = (batch, 4, pair.side, pair.side)
        grid = (batch, pair.adapter.config.features, *pair.adapter.grid((pair.side, pair.side)))
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
        x = self.batch["sharp"].to(self.dtype)
        words = [self.batch[name] for name in sorted(self.batch) if name.startswith("words.")]
        self.host.predict(x, torch.ones(len(x), device=self.device, dtype=torch.long), words)

    def seconds(self, function: Any) -> float:
        self._wait()
        start = time.perf_counter()
        function()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def saved(trainer: Trainer) -> float:
    """GiB that a training tile keeps for its backward pass, besides the weights."""
    kept: dict[int, int] = {}
    weights = {id_of(each) for module in (trainer.unet, trainer.model) for each in module.state_dict().values()}

    def keep(tensor: Tensor) -> Tensor:
        if id_of(tensor) not in weights:
            kept[id_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.train()
    return sum(kept.values()) / 2**30


def id_of(tensor: Tensor) -> int:
    """The same for all views of one memory."""
    return tensor.untyped_storage()._cdata


def counted(name: str) -> dict[str, float]:
    """TFLOP of a training tile, and of a UNet row; GiB of the UNet's weights and of what a tile keeps, in bf16, without
    and with gradient checkpointing (then blocks are computed again, one at a time: what one of them keeps comes on top
    of the figure)."""
    trainer = Trainer(name, "meta", 1, "no", False)
    figures = {
        "train_tflop": operations(trainer.train)[0] / 1e12,
        "row_tflop": operations(trainer.bare)[0] / 1e12,
    }
    for key, checkpointing in (("kept_gib", False), ("kept_checkpointing_gib", True)):
        trainer = Trainer(name, "meta", 1, "bf16", checkpointing)
        figures[key] = saved(trainer)
    figures["weights_gib"] = sum(each.nbytes for each in trainer.unet.state_dict().values()) / 2**30
    return figures


def timed(name: str, device: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds a tile and a row, medians; their ratio; tiles an hour; GiB at most (0: not known)."""
    trainer = Trainer(name, device, arguments.batch, arguments.precision, arguments.checkpointing)
    trainer.train()  # warm up
    rows = [(trainer.seconds(trainer.train), trainer.seconds(trainer.bare)) for _ in range(arguments.runs)]
    tile, row = (statistics.median(column) / arguments.batch for column in zip(*rows))
    return {
        "train_seconds": tile,
        "row_seconds": row,
        "ratio": statistics.median(first / second for first, second in rows),
        "tiles_an_hour": 3600 / tile,
        "gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=UNETS, default=list(UNETS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--count", action="store_true", help="count operations, time nothing")
    parser.add_argument("--json", action="store_true", help="one last line of JSON")
    arguments = parser.parse_args()
    device, found = "cuda" if torch.cuda.is_available() else "cpu", {}
    for name in arguments.shapes:
        figures = counted(name)
        print(
            f"{name}: a tile {figures['train_tflop']:.2f} TFLOP, a bare UNet row {figures['row_tflop']:.2f}; in bf16 "
            f"the UNet takes {figures['weights_gib']:.1f} GiB, a tile {figures['kept_gib']:.1f}, with gradient "
            f"checkpointing {figures['kept_checkpointing_gib']:.1f}"
        )
        if not arguments.count:
            figures |= timed(name, device, arguments)
            print(
                f"  on {device}: a tile {figures['train_seconds']:.3f} s, a row {figures['row_seconds']:.3f} s, ratio "
                f"{figures['ratio']:.2f}; {figures['tiles_an_hour']:.0f} tiles an hour; {figures['gib']:.1f} GiB"
            )
        found[name] = {key: round(value, 4) for key, value in figures.items()}
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
