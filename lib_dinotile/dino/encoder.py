"""Patch features of DINOv2 (arXiv 2304.07193) and DINOv3 (arXiv 2508.10104), whichever library the host has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_dinotile import DinotileError
from lib_dinotile.dino.architecture import MEAN, STD
from lib_dinotile.dino.backends import keys, load_blocks, run
from lib_dinotile.dino.checkpoint import BUILT_IN, KNOWN, Checkpoint, installed, locate, read_checkpoint
from lib_dinotile.dino.dinov3 import DINOv3, rotary_embeddings
from lib_dinotile.dino.locks import Progress, silent

__all__ = [
    "BUILT_IN",
    "KNOWN",
    "Facet",
    "PatchEncoder",
    "bicubic",
    "encoder_dtype",
    "installed",
    "interpolate_positions",
    "load_encoder",
]

Facet = Literal["tokens", "keys"]
"""Features of a layer: its output tokens, or the keys of its attention."""
FACETS = get_args(Facet)

_GRIDS_KEPT = 8


def bicubic(images: Tensor, size: Sequence[int], antialias: bool) -> Tensor:
    """Images (k, C, H, W) at another size (h, w), on their device, computed on the CPU where that may not be able to.

    MPS lacks bicubic interpolation in torch 2.5 (pytorch/pytorch#77764), the antialiased one in 2.7 (#149378) and its
    gradient in 2.9 (#169785); XPU once lacked the antialiased one (intel/torch-xpu-ops#1106).
    """
    able = images if images.device.type in ("cpu", "cuda") else images.cpu()
    resized = F.interpolate(able, tuple(size), mode="bicubic", align_corners=False, antialias=antialias)
    return resized.to(images.device)


def interpolate_positions(positions: Tensor, grid: tuple[int, int], antialias: bool) -> Tensor:
    """Position embeddings (1, n * n, D) of a square grid -> (1, h * w, D) of `grid` = (h, w), in float32.

    Bicubic, as in DINOv2's `interpolate_pos_encoding` (facebookresearch/dinov2, models/vision_transformer.py), with
    antialiasing for models with registers, as there. It is stretched to the whole grid: the reference's `+ 0.1` for
    models without registers, a workaround for rounding, is left out, as transformers 5 leaves it out.
    """
    side = round(positions.shape[1] ** 0.5)
    square = positions.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if grid != (side, side):
        square = bicubic(square, grid, antialias)
    return square.flatten(2).transpose(1, 2)


class PatchEncoder(nn.Module):
    """Images -> patch features of DINOv2 or DINOv3.

    Frozen and always in eval mode; gradients with respect to the image work.
    The weights are usable under `torch.inference_mode` and outside of it, wherever they were loaded or moved.
    """

    id: str
    """Name in adapters: the Hugging Face id; for a local folder its name; `mini` for the built-in encoder."""
    patch: int
    """Pixels along a side of a patch."""
    width: int
    """Features per patch, D."""
    depth: int
    """Number of layers."""
    backend: str
    """The library that runs the layers, `transformers` or `timm`; the features are the same."""
    fingerprint: str
    """SHA-256 of the weights file: two encoders of the same id need not be the same."""

    def __init__(self, name: str, checkpoint: Checkpoint, backend: str, blocks: nn.ModuleList) -> None:
        super().__init__()
        a = checkpoint.architecture
        self.id, self.backend, self.fingerprint = name, backend, checkpoint.fingerprint
        self.patch, self.width, self.depth = a.patch_size, a.hidden_size, a.num_hidden_layers
        own = {k.removeprefix("embeddings."): v for k, v in checkpoint.tensors("embeddings.").items()}
        own |= checkpoint.tensors(f"{a.NORM}.")
        prefix, positions = [own["cls_token"]], own.get("position_embeddings")
        if positions is not None:  # the class token has one, registers have none
            prefix[0] = prefix[0] + positions[:, :1]
            positions = positions[:, 1:].contiguous()
        if a.num_register_tokens:
            prefix.append(own["register_tokens"])
        self._antialias = a.num_register_tokens > 0
        self._rope = (a.rope_theta, a.head_size) if isinstance(a, DINOv3) else None
        self.embed = nn.Conv2d(3, self.width, self.patch, self.patch)
        patches = a.PATCHES.removeprefix("embeddings.")
        self.embed.weight.data, self.embed.bias.data = own[f"{patches}.weight"], own[f"{patches}.bias"]
        self.blocks = blocks
        self.norm = nn.LayerNorm(self.width, eps=a.layer_norm_eps)
        self.norm.weight.data, self.norm.bias.data = own[f"{a.NORM}.weight"], own[f"{a.NORM}.bias"]
        self.register_buffer("prefix", torch.cat(prefix, 1))
        self.register_buffer("positions", positions)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self._grids: dict[tuple[int, int], Tensor] = {}
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the computation; features are float32 all the same."""
        return self.mean.dtype

    def forward(self, pixels: Tensor, layer: int = -1, facet: Facet = "tokens") -> Tensor:
        """Pixels (N, 3, H, W) in [0, 1] -> patch features (N, D, H / patch, W / patch), float32.

        They are on the encoder's device. `layer` counts the layers, from the end if negative; the tokens of any layer
        go through the model's final LayerNorm, keys come as they are. Class and register tokens are left out.
        ValueError if H or W is not a positive multiple of `patch`, or if there is no such layer or facet.
        DinotileError if the features of an image of numbers are no numbers.
        """
        return self.several(pixels, [(layer, facet)])[0]

    def several(self, pixels: Tensor, wanted: Sequence[tuple[int, Facet]]) -> list[Tensor]:
        """`forward` for some layers and facets, for the work of one."""
        if (
            pixels.ndim != 4
            or pixels.shape[1] != 3
            or 0 in pixels.shape
            or any(s % self.patch for s in pixels.shape[2:])
        ):
            raise ValueError(f"pixels {tuple(pixels.shape)} are not (N, 3, H, W) in whole patches of {self.patch}")
        for layer, facet in wanted:
            if not -self.depth <= layer < self.depth or facet not in FACETS:
                raise ValueError(f"{facet} of layer {layer} of an encoder of {self.depth} layers")
        # Keys of a layer are made of what goes into it, tokens are what comes out.
        places = [(range(self.depth)[layer] + (facet == "tokens"), facet) for layer, facet in wanted]
        found: dict[tuple[int, Facet], Tensor] = {}
        with without_autocast(self.device):
            patches = self.embed((pixels.to(self.mean) - self.mean) / self.std)
            grid = (patches.shape[2], patches.shape[3])
            tokens, positions, rotation = patches.flatten(2).transpose(1, 2), self._positions(grid), None
            if self._rope:
                rotation = positions
            else:
                tokens = tokens + positions
            tokens = torch.cat([self.prefix.expand(len(tokens), -1, -1), tokens], 1)
            for depth in range(max(place for place, _ in places) + 1):
                if depth:
                    tokens = run(self.blocks[depth - 1], tokens, rotation)
                for place, facet in places:
                    if place == depth:
                        seen = self.norm(tokens) if facet == "tokens" else keys(self.blocks[depth], tokens)
                        seen = seen[:, self.prefix.shape[1] :].transpose(1, 2).unflatten(2, grid)
                        found[place, facet] = seen.float().contiguous()
        if pixels.isfinite().all() and not all(seen.isfinite().all() for seen in found.values()):
            raise DinotileError(
                f"encoder: {self.id!r} returned NaN: choose another, or switch guidance, guard, adapter and maps off",
                500,
            )
        return [found[place] for place in places]

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings (1, h * w, D) of a grid, or rotary ones (2, h * w, D / heads) of a DINOv3; kept for the
        next image of that size."""
        if grid not in self._grids:
            if len(self._grids) >= _GRIDS_KEPT:
                self._grids.clear()
            # Made under inference mode, it could not take part in a gradient later.
            with torch.inference_mode(False), torch.no_grad():
                if self._rope:
                    made = rotary_embeddings(grid, *self._rope)
                else:
                    made = interpolate_positions(self.positions, grid, self._antialias)
                made = made.to(self.mean)
            self._grids[grid] = made
            return made
        return self._grids[grid]

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> PatchEncoder:
        """Called by `to`, `half` and the like."""
        self._grids.clear()
        with torch.inference_mode(False):
            return super()._apply(fn, *args, **kwargs)

    def train(self, mode: bool = True) -> PatchEncoder:
        """Stay in eval mode, also as a part of a model that is trained."""
        return super().train(False)


def encoder_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Precision of an encoder beside a model of that dtype: the same; on a CPU float32, which is faster there."""
    return torch.float32 if device.type == "cpu" else dtype


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The weights' dtype is what is computed in, whatever the host has autocast set to."""
    try:
        return torch.autocast(device.type, enabled=False)
    except (RuntimeError, AssertionError):  # it has none, as MPS in torch 2.3
        return contextlib.nullcontext()


def load_encoder(
    name: str,
    folder: Path | None = None,
    backend: Literal["auto", "transformers", "timm"] = "auto",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    download: bool = True,
    progress: Progress = silent,
) -> PatchEncoder:
    """Load an encoder by name, from safetensors only.

    `name` is looked up in this order: `mini`, the built-in encoder; `folder/name` and `folder/<last part of name>`,
    `folder` being where encoders are installed; a local folder with `config.json` and `model.safetensors`; a Hugging
    Face id, from its cache or, with `download`, the Hub. The caller checks names from outside against `installed` and
    KNOWN.
    A DINOv3 computes in float32 where float16 is asked for.
    DinotileError, one line, if anything is missing or damaged, or neither a DINOv2 nor a DINOv3, or if no library here
    runs it; no weight is ever left random.
    """
    name, found = locate(name, folder, download, progress)
    # Libraries fill new layers with random numbers before they load them: not at the cost of the caller's next draw.
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        checkpoint = read_checkpoint(found)
        library, blocks = load_blocks(checkpoint, backend)
        if isinstance(checkpoint.architecture, DINOv3) and dtype == torch.float16:
            dtype = torch.float32  # float16 may overflow: facebookresearch/dinov3#181, NVIDIA/TensorRT#4723
        return PatchEncoder(name, checkpoint, library, blocks).to(device, dtype)
