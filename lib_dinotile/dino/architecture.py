"""DINOv2: the numbers of a `config.json`, and the tensors that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of pixels in [0, 1], as DINOv2 and DINOv3 were trained with."""

Shapes = dict[str, tuple[int, ...]]

# What no encoder exceeds.
WHOLE = {
    "hidden_size": (1, 8192),
    "num_hidden_layers": (1, 128),
    "num_attention_heads": (1, 256),
    "patch_size": (1, 256),
    "num_channels": (3, 3),
    "num_register_tokens": (0, 1024),
}


def check_numbers(
    config: Any, whole: Mapping[str, tuple[int, int]], real: Mapping[str, float], kinds: Mapping[str, type]
) -> None:
    """ValueError unless attributes are whole numbers from low to high, numbers from 0 to high, or of a type."""
    for name, (low, high) in whole.items():
        value = getattr(config, name)
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{name} {value!r:.40} is no whole number from {low} to {high}")
    for name, most in real.items():
        value = getattr(config, name)
        if type(value) not in (int, float) or not 0 < value <= most:
            raise ValueError(f"{name} {value!r:.40} is no number from 0 to {most}")
    for name, kind in kinds.items():
        if type(getattr(config, name)) is not kind:
            raise ValueError(f"{name} {getattr(config, name)!r:.40} is no {kind.__name__}")


def linear(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    """Shapes of a linear layer's tensors."""
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, width: int) -> Shapes:
    """Shapes of a LayerNorm's tensors."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


@dataclass(frozen=True)
class Architecture:
    """The numbers of a DINOv2's `config.json`; the defaults are those of transformers' Dinov2Config."""

    family: ClassVar[str] = "DINOv2"
    model: ClassVar[str] = "Dinov2"
    """How the names of transformers' classes begin."""
    needs: ClassVar[str] = "transformers 4.32 or later, or timm 0.9 or later"
    # Where tensors are, under transformers' names.
    PATCHES: ClassVar[str] = "embeddings.patch_embeddings.projection"
    LAYERS: ClassVar[str] = "encoder.layer"
    NORM: ClassVar[str] = "layernorm"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: float = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    """Pixels; with `patch_size` the grid that the position embeddings were trained on."""
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    """The giant model's feed-forward layer."""
    num_register_tokens: int = 0
    """Register tokens (arXiv 2309.16588), after the class token."""

    def __post_init__(self) -> None:
        """ValueError for what no DINOv2 has, before anything of such a size is made."""
        kinds = {"hidden_act": str, "qkv_bias": bool, "use_swiglu_ffn": bool}
        check_numbers(self, WHOLE | {"image_size": (1, 8192)}, {"mlp_ratio": 16, "layer_norm_eps": 1}, kinds)
        if self.hidden_size % self.num_attention_heads or self.image_size < self.patch_size:
            raise ValueError("a whole number of features per head and at least one patch are wanted")

    @property
    def grid(self) -> int:
        """Patches along a side of the images that the position embeddings were trained on."""
        return self.image_size // self.patch_size

    def stored(self, name: str) -> tuple[str, int | None]:
        """(name in the file, which third of that tensor, if not all of it) of a tensor of `shapes`."""
        return name, None

    def shapes(self) -> Shapes:
        """Names and shapes of all tensors that the features depend on, as transformers' files name them."""
        d, p, c = self.hidden_size, self.patch_size, self.num_channels
        shapes: Shapes = {
            "embeddings.cls_token": (1, 1, d),
            "embeddings.position_embeddings": (1, 1 + self.grid**2, d),
            f"{self.PATCHES}.weight": (d, c, p, p),
            f"{self.PATCHES}.bias": (d,),
        }
        if self.num_register_tokens:
            shapes["embeddings.register_tokens"] = (1, self.num_register_tokens, d)
        hidden = int(d * self.mlp_ratio)
        gated = (int(hidden * 2 / 3) + 7) // 8 * 8
        for i in range(self.num_hidden_layers):
            at = f"{self.LAYERS}.{i}"
            shapes |= norm(f"{at}.norm1", d) | norm(f"{at}.norm2", d)
            for part in ("query", "key", "value"):
                shapes |= linear(f"{at}.attention.attention.{part}", d, d, self.qkv_bias)
            shapes |= linear(f"{at}.attention.output.dense", d, d)
            shapes |= {f"{at}.layer_scale1.lambda1": (d,), f"{at}.layer_scale2.lambda1": (d,)}
            if self.use_swiglu_ffn:
                shapes |= linear(f"{at}.mlp.weights_in", 2 * gated, d) | linear(f"{at}.mlp.weights_out", d, gated)
            else:
                shapes |= linear(f"{at}.mlp.fc1", hidden, d) | linear(f"{at}.mlp.fc2", d, hidden)
        return shapes | norm(self.NORM, d)
