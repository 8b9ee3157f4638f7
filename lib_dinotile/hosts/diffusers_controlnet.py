"""A ControlNet of the Tile kind beside a diffusers UNet: every tile of the enlarged source is its own hint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from torch import Tensor, nn

from lib_dinotile import DinotileError, one_line
from lib_dinotile.hosts.diffusers_addons import GIVE, Tensors, load_model
from lib_dinotile.hosts.diffusers_checkpoints import UNION, kind_of
from lib_dinotile.hosts.memory_format import fast

ALIKE = (
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
)
"""Parts of the configuration that a ControlNet has from the UNet that it was trained for."""


LDM = "control_model."
"""In front of the names of its tensors in the original layout, or not there."""
SIZES = {"label_emb.0.0.": "add_embedding.linear_1.", "label_emb.0.2.": "add_embedding.linear_2."}
"""Layers of SDXL's sizes in the original layout, which diffusers does not rename."""


class ControlNet(nn.Module):
    """Residuals of a ControlNet, as the UNet takes them (arXiv 2302.05543)."""

    def __init__(self, model: ControlNetModel, strength: float) -> None:
        super().__init__()
        self._model, self._strength = model, strength

    def residuals(self, x: Tensor, timestep: Tensor, inputs: Mapping[str, Any], hint: Tensor) -> Sequence[Tensor]:
        """For every slot of the UNet's shape a tensor, for latents (k, C, h, w).

        inputs: what the UNet is given besides; hint: pixels (k, 3, H, W) in [0, 1].
        """
        down, middle = self._model(
            fast(x),
            timestep,
            controlnet_cond=fast(hint.to(x)),
            conditioning_scale=self._strength,
            return_dict=False,
            **inputs,
        )
        return [*down, middle]


def load_controlnet(unet: Any, name: str, strength: float) -> ControlNet | None:
    """The ControlNet of a .safetensors file or a diffusers folder; None without a name.

    DinotileError if it is for another UNet, or takes another hint than a picture.
    """
    if not name:
        return None
    try:
        with torch.device("meta"):
            config = ControlNetModel.from_unet(unet, load_weights_from_unet=False).config
    except Exception as error:  # whatever diffusers raises for a UNet of another make
        raise DinotileError(f"controlnet: none fits this checkpoint's UNet: {one_line(error)}") from error
    model, extra = load_model("controlnet", ControlNetModel, Path(name), config, _from_ldm)
    if extra:
        found = UNION if kind_of(extra) == UNION else f"of a kind that is not supported (it has {extra[0]})"
        raise DinotileError(f"controlnet: {name} is {found}; {GIVE['controlnet']}")
    for key in ALIKE:
        theirs, ours = (_plain(each.config.get(key)) for each in (model, unet))
        if theirs != ours:
            raise DinotileError(
                f"controlnet: {name} is for other checkpoints: its {key} is {theirs}, this one's {ours}"
            )
    if model.config.get("conditioning_channels", 3) != 3 or model.config.get("global_pool_conditions"):
        raise DinotileError(f"controlnet: {name} takes no picture as its hint; {GIVE['controlnet']}")
    return ControlNet(model.requires_grad_(False), strength)


def _from_ldm(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Tensors of the original layout by diffusers' names; those that it has no name for keep their own."""
    own = {name.removeprefix(LDM): tensor for name, tensor in tensors.items() if name.startswith(LDM)} or tensors
    found = convert_controlnet_checkpoint(own, config)
    known = {id(tensor) for tensor in found.values()}
    rest = {name: tensor for name, tensor in own.items() if id(tensor) not in known}
    for theirs, ours in SIZES.items():
        rest = {name.replace(theirs, ours): tensor for name, tensor in rest.items()}
    return {**{name: tensor for name, tensor in found.items() if tensor is not None}, **rest}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
