"""The transformer blocks of a checkpoint, from the library that the host has.

Only the blocks come from a library. Patch embedding, prefix tokens, position embeddings and the final LayerNorm are
`PatchEncoder`'s own: their interpolation of position embeddings is where library versions differ. So a DINOv2 with
registers runs on versions that know none, and both libraries give the same features.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from lib_dinotile import DinotileError, one_line
from lib_dinotile.dino.architecture import Architecture
from lib_dinotile.dino.checkpoint import Checkpoint
from lib_dinotile.dino.dinov3 import DINOv3
from lib_dinotile.dino.libraries import NAMES, check_library, timm_block, transformers_classes


def load_blocks(checkpoint: Checkpoint, backend: str) -> tuple[str, nn.ModuleList]:
    """(library's name, blocks) with the checkpoint's weights, in float32, on the CPU. They are called by `run`.

    `auto` is transformers where it has the model, else timm. DinotileError with one line if there is no such library.
    """
    if backend not in NAMES:
        raise ValueError(f"backend {backend!r} is none of {', '.join(NAMES)}")
    name = check_library(type(checkpoint.architecture), backend)
    return name, (_transformers if name == "transformers" else _timm)(checkpoint)


def run(block: nn.Module, tokens: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    """A block's output for tokens (N, L, D), of that shape. rotation: cosines and sines for the patches of a DINOv3,
    (2, h * w, D / heads)."""
    if rotation is None:
        output = block(tokens)
    elif hasattr(block, "attn"):  # timm
        output = block(tokens, rope=torch.cat([rotation[1], rotation[0]], -1))
    else:
        output = block(tokens, position_embeddings=(rotation[0], rotation[1]))
    return output[0] if isinstance(output, tuple) else output


def keys(block: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Attention keys of a block for tokens (N, L, D), all heads side by side: (N, L, D). Those of a DINOv3 are not yet
    turned by their patch's position."""
    seen = block.norm1(tokens)
    attention = block.attn if hasattr(block, "attn") else block.attention  # timm's, transformers'
    if hasattr(attention, "k_proj"):  # all but the two below
        return attention.k_proj(seen)
    if hasattr(attention, "qkv"):  # timm's DINOv2
        return attention.qkv(seen).chunk(3, dim=-1)[1]
    return attention.attention.key(seen)  # transformers' DINOv2, up to 4


def _transformers(checkpoint: Checkpoint) -> nn.ModuleList:
    a = checkpoint.architecture
    transformers, model_class, config_class = transformers_classes(type(a))
    # A DINOv2 with registers differs before its blocks only: the plain one, which older versions have too, will do.
    numbers = {k: v for k, v in dataclasses.asdict(a).items() if k != "num_register_tokens"}
    try:
        with _quiet(transformers.logging):
            # Not from the folder: there it would also follow an adapter_config.json, to pickles and other models.
            model, info = model_class.from_pretrained(
                None,
                config=config_class(**numbers),
                state_dict=checkpoint.tensors(f"{a.LAYERS}."),
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:
        line = f"transformers {transformers.__version__} cannot load {checkpoint.folder} ({one_line(error)})"
        raise DinotileError(f"{line}: get its files again") from error
    random = sorted(name for name in info["missing_keys"] if f"{a.LAYERS}." in name)
    if random:
        line = f"transformers {transformers.__version__} found no weights for {len(random)} tensors"
        raise DinotileError(f"{line} of {checkpoint.folder}, {random[0]} first: get its files again")
    # Where they are depends on the version.
    return next(each for each in model.modules() if isinstance(each, nn.ModuleList))


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without transformers' report of what it takes for missing or too much: `_transformers` looks for itself."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _timm(checkpoint: Checkpoint) -> nn.ModuleList:
    a = checkpoint.architecture
    made_of = timm_block(type(a))
    gated = a.use_gated_mlp if isinstance(a, DINOv3) else a.use_swiglu_ffn
    if (gated and isinstance(a, Architecture)) or a.hidden_act != ("silu" if gated else "gelu"):
        what = "the giant model's SwiGLU layers" if gated else f"the activation {a.hidden_act!r}"
        raise DinotileError(
            f"{checkpoint.folder} has {what}, which dinotile does not run through timm: choose the small, base or "
            f"large {a.family}, or have {a.needs.partition(',')[0]}"
        )
    common = {"init_values": 1.0, "norm_layer": partial(nn.LayerNorm, eps=a.layer_norm_eps)}
    if isinstance(a, DINOv3):
        common |= {
            "mlp_ratio": (a.intermediate_size + 0.5) / a.hidden_size,  # times hidden_size it is rounded down
            "swiglu_mlp": gated,
            "swiglu_align_to": 1,  # the layout of the published models; widths as they are
            "qkv_bias": a.query_bias,
            "qkv_fused": False,
            "num_prefix_tokens": 1 + a.num_register_tokens,
            "rotate_half": True,
        }
    else:
        common |= {"mlp_ratio": a.mlp_ratio, "qkv_bias": a.qkv_bias, "act_layer": nn.GELU}

    def block(index: int) -> nn.Module:
        with torch.device("meta"):  # no time spent on random weights, and none can be left over
            made: nn.Module = made_of(a.hidden_size, a.num_attention_heads, **common)
        prefix = f"{a.LAYERS}.{index}."
        tensors = checkpoint.tensors(prefix)
        if isinstance(a, DINOv3):
            renamed = {a.timm_name(name).removeprefix(f"blocks.{index}."): each for name, each in tensors.items()}
        else:
            renamed = to_timm(tensors, prefix)
        made.load_state_dict(renamed, strict=True, assign=True)
        return made

    return nn.ModuleList(block(i) for i in range(a.num_hidden_layers))


_TIMM_NAMES = {
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}


def to_timm(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """One block's tensors under timm's names, with query, key and value in one matrix, as in Meta's original files."""
    result, projections = {}, {}
    for name, tensor in tensors.items():
        name = name.removeprefix(prefix)
        if name.startswith("attention.attention."):
            projections[name.removeprefix("attention.attention.")] = tensor
            continue
        for theirs, ours in _TIMM_NAMES.items():
            name = name.replace(theirs, ours)
        result[name] = tensor
    for kind in ("weight", "bias"):
        if f"query.{kind}" in projections:
            parts = [projections[f"{part}.{kind}"] for part in ("query", "key", "value")]
            result[f"attn.qkv.{kind}"] = torch.cat(parts)
    return result
