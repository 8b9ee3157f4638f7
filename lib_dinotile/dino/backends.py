"""The transformer blocks of a checkpoint, from the library that the host has.

Only the blocks come from a library. Patch embedding, prefix tokens, position embeddings and the final LayerNorm are
`PatchEncoder`'s own: their interpolation of position embeddings is where library versions differ. So a checkpoint
with registers runs on versions that know none, and both libraries give the same features.
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
from lib_dinotile.dino.checkpoint import Checkpoint

NAMES = ("auto", "transformers", "timm")


def load_blocks(checkpoint: Checkpoint, backend: str) -> tuple[str, nn.ModuleList]:
    """(library's name, blocks) with the checkpoint's weights, in float32, on the CPU.

    Each block takes (N, L, D) and returns that, or a tuple that begins with it. `auto` is transformers where it has
    Dinov2Model (4.32 and later), else timm. DinotileError with one line if there is no such library.
    """
    if backend not in NAMES:
        raise ValueError(f"backend {backend!r} is none of {', '.join(NAMES)}")
    lacks = []
    for name, load in (("transformers", _transformers), ("timm", _timm)):
        if backend not in ("auto", name):
            continue
        try:
            return name, load(checkpoint)
        except _LibraryMissing as error:
            lacks.append(str(error))
    raise DinotileError(f"DINOv2 needs transformers 4.32 or later, or timm 0.9 or later: {'; '.join(lacks)}")


def keys(block: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Attention keys of a block for tokens (N, L, D), all heads side by side: (N, L, D)."""
    seen = block.norm1(tokens)
    attention = getattr(block, "attn", None)
    if attention is not None:  # timm
        return attention.qkv(seen).chunk(3, dim=-1)[1]
    attention = block.attention  # transformers 5; up to 4 it is one deeper
    project = attention.k_proj if hasattr(attention, "k_proj") else attention.attention.key
    return project(seen)


class _LibraryMissing(Exception):
    """The library is not installed, too old or does not import; the message says which."""


def _transformers(checkpoint: Checkpoint) -> nn.ModuleList:
    try:
        import transformers
        from transformers import Dinov2Config, Dinov2Model
    except (ImportError, RuntimeError) as error:  # transformers 4 turns an ImportError inside into a RuntimeError
        raise _LibraryMissing(f"no Dinov2Model from transformers ({one_line(error)})") from error
    # A model with registers differs before its blocks only: the plain one, which older versions have too, will do.
    numbers = {k: v for k, v in dataclasses.asdict(checkpoint.architecture).items() if k != "num_register_tokens"}
    try:
        with _quiet(transformers.logging):
            # Not from the folder: there it would also follow an adapter_config.json, to pickles and other models.
            model, info = Dinov2Model.from_pretrained(
                None,
                config=Dinov2Config(**numbers),
                state_dict=checkpoint.tensors("encoder.layer."),
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:
        line = f"transformers {transformers.__version__} cannot load {checkpoint.folder} ({one_line(error)})"
        raise DinotileError(f"{line}: get its files again") from error
    random = sorted(name for name in info["missing_keys"] if "encoder.layer" in name)
    if random:
        line = f"transformers {transformers.__version__} found no weights for {len(random)} tensors"
        raise DinotileError(f"{line} of {checkpoint.folder}, {random[0]} first: get its files again")
    return nn.ModuleList(model.encoder.layer)


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
    try:
        from timm.models.vision_transformer import Block
    except Exception as error:  # also what comes of a torchvision that does not fit torch
        raise _LibraryMissing(f"timm does not import ({one_line(error)})") from error
    a = checkpoint.architecture
    if a.use_swiglu_ffn or a.hidden_act != "gelu":
        what = "the giant model's SwiGLU layers" if a.use_swiglu_ffn else f"the activation {a.hidden_act!r}"
        raise DinotileError(
            f"{checkpoint.folder} has {what}, which dinotile does not run through timm: choose the small, base or "
            f"large DINOv2, or have transformers 4.32 or later"
        )

    def block(index: int) -> nn.Module:
        with torch.device("meta"):  # no time spent on random weights, and none can be left over
            made = Block(
                dim=a.hidden_size,
                num_heads=a.num_attention_heads,
                mlp_ratio=a.mlp_ratio,
                qkv_bias=a.qkv_bias,
                init_values=1.0,
                act_layer=nn.GELU,
                norm_layer=partial(nn.LayerNorm, eps=a.layer_norm_eps),
            )
        prefix = f"encoder.layer.{index}."
        made.load_state_dict(to_timm(checkpoint.tensors(prefix), prefix), strict=True, assign=True)
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
