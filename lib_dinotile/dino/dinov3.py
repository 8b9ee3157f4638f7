"""DINOv3 (arXiv 2508.10104): the numbers of a `config.json`, the tensors that follow from them in transformers' files
and in timm's, and rotary position embeddings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lib_dinotile.dino.architecture import WHOLE, Shapes, check_numbers, linear, norm


@dataclass(frozen=True)
class DINOv3:
    """The numbers of a DINOv3's `config.json`; the defaults are those of transformers' DINOv3ViTConfig."""

    family: ClassVar[str] = "DINOv3"
    model: ClassVar[str] = "DINOv3ViT"
    needs: ClassVar[str] = "transformers 4.56 or later, or timm 1.0.20 or later (else choose a DINOv2)"
    PATCHES: ClassVar[str] = "embeddings.patch_embeddings"
    LAYERS: ClassVar[str] = "layer"
    NORM: ClassVar[str] = "norm"

    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    rope_theta: float = 100.0
    patch_size: int = 16
    num_channels: int = 3
    query_bias: bool = True
    key_bias: bool = False
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    use_gated_mlp: bool = False
    """The feed-forward layer of the models whose size has a plus."""
    num_register_tokens: int = 0
    """Register tokens, after the class token; published models have 4."""

    def __post_init__(self) -> None:
        """ValueError for what no DINOv3 has, before anything of such a size is made."""
        kinds = {name: bool for name in self.__dataclass_fields__ if name.endswith("_bias")} | {"use_gated_mlp": bool}
        whole = WHOLE | {"intermediate_size": (1, 1 << 16)}
        check_numbers(self, whole, {"rope_theta": 1e6, "layer_norm_eps": 1}, kinds | {"hidden_act": str})
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError("features per head are no multiple of 4")
        if self.key_bias or not (self.proj_bias and self.mlp_bias) or self.query_bias != self.value_bias:
            raise ValueError("its linear layers have other biases")

    @property
    def head_size(self) -> int:
        """Features per head."""
        return self.hidden_size // self.num_attention_heads

    def stored(self, name: str) -> tuple[str, int | None]:
        """(name in the file, which third of that tensor, if not all of it) of a tensor of `shapes`."""
        return name, None

    def shapes(self) -> Shapes:
        """Names and shapes of all tensors that the features depend on, as transformers' files name them."""
        d, p, c = self.hidden_size, self.patch_size, self.num_channels
        shapes: Shapes = {
            "embeddings.cls_token": (1, 1, d),
            f"{self.PATCHES}.weight": (d, c, p, p),
            f"{self.PATCHES}.bias": (d,),
        }
        if self.num_register_tokens:
            shapes["embeddings.register_tokens"] = (1, self.num_register_tokens, d)
        for i in range(self.num_hidden_layers):
            at = f"{self.LAYERS}.{i}"
            shapes |= norm(f"{at}.norm1", d) | norm(f"{at}.norm2", d)
            for part, bias in (("q", self.query_bias), ("k", False), ("v", self.value_bias), ("o", True)):
                shapes |= linear(f"{at}.attention.{part}_proj", d, d, bias)
            shapes |= {f"{at}.layer_scale1.lambda1": (d,), f"{at}.layer_scale2.lambda1": (d,)}
            for part in ("gate", "up") if self.use_gated_mlp else ("up",):
                shapes |= linear(f"{at}.mlp.{part}_proj", self.intermediate_size, d)
            shapes |= linear(f"{at}.mlp.down_proj", d, self.intermediate_size)
        return shapes | norm(self.NORM, d)

    def timm_name(self, name: str) -> str:
        """timm's name for a tensor, where queries, keys and values are apart."""
        for theirs, ours in _TIMM_NAMES.items():
            name = re.sub(theirs, ours, name)
        return name.replace(".up_proj", ".fc1_x" if self.use_gated_mlp else ".fc1")


_TIMM_NAMES = {
    r"^embeddings\.cls_token": "cls_token",
    r"^embeddings\.register_tokens": "reg_token",
    r"^embeddings\.patch_embeddings": "patch_embed.proj",
    r"^layer\.": "blocks.",
    r"attention\.o_proj": "attn.proj",
    r"attention\.": "attn.",
    r"layer_scale([12])\.lambda1": r"gamma_\1",
    r"mlp\.gate_proj": "mlp.fc1_g",
    r"mlp\.down_proj": "mlp.fc2",
}

TIMM_MODELS: dict[str, dict[str, Any]] = {
    "vit_small_patch16_dinov3": {},
    "vit_small_plus_patch16_dinov3": {"use_gated_mlp": True, "hidden_act": "silu"},
    "vit_base_patch16_dinov3": {"hidden_size": 768, "num_attention_heads": 12},
    "vit_large_patch16_dinov3": {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24},
}
"""timm's names of models, and how they differ from the small one. With `_qkvb` at the end it is the same with biases
of queries and values, which are zeros in the published models."""

_TIMM_ARGUMENTS = {
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "in_chans": "num_channels",
}
_IRRELEVANT = {"global_pool", "num_classes", "img_size", "dynamic_img_size"}
"""Arguments that change no patch's features."""


class TimmDINOv3(DINOv3):
    """A DINOv3 whose file has timm's names."""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> TimmDINOv3:
        """The numbers behind timm's `config.json`. ValueError if they are not known."""
        name, arguments = config["architecture"], config.get("model_args", {})
        arguments = {key: value for key, value in arguments.items() if key not in _IRRELEVANT}
        if other := sorted(arguments.keys() - _TIMM_ARGUMENTS.keys()):
            raise ValueError(f"its {other[0]!r:.40} is not the published models'")
        numbers = TIMM_MODELS[name.removesuffix("_qkvb")] | {_TIMM_ARGUMENTS[k]: v for k, v in arguments.items()}
        numbers["intermediate_size"] = 4 * numbers.get("hidden_size", cls.hidden_size)
        bias = name.endswith("_qkvb")
        return cls(**numbers, query_bias=bias, value_bias=bias, num_register_tokens=4)

    def stored(self, name: str) -> tuple[str, int | None]:
        """The weights of queries, keys and values are one tensor."""
        name = self.timm_name(name)
        found = re.fullmatch(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)", name)
        if found is None:
            return name, None
        if found[3] == "bias":
            return f"{found[1]}{found[2]}_bias", None
        return f"{found[1]}qkv.weight", "qkv".index(found[2])


def rotary_embeddings(grid: tuple[int, int], theta: float, head_size: int) -> Tensor:
    """Cosines and sines of the angles by which queries and keys of a grid's patches are turned, (2, h * w, head_size).

    RoPE along both axes, coordinates from -1 to 1 whatever the grid, as in DINOv3's `RopePositionEmbedding`
    (facebookresearch/dinov3, layers/rope_position_encoding.py), without what is drawn at random in training. float32.
    """
    along = [2 * (torch.arange(n, dtype=torch.float32) + 0.5) / n - 1 for n in grid]
    places = torch.stack(torch.meshgrid(*along, indexing="ij"), -1).flatten(0, 1)
    periods = theta ** (torch.arange(head_size // 4, dtype=torch.float32) * 4 / head_size)
    angles = (2 * math.pi * places[:, :, None] / periods).flatten(1).tile(2)
    return torch.stack([angles.cos(), angles.sin()])
