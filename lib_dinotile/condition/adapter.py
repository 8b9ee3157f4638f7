"""The adapter: DINO patch tokens in, residuals for the UNet's skip connections and middle block out.

It follows ControlNet (arXiv 2302.05543): what it gives is added to the UNet's own activations through zero-initialised
1x1 convolutions, so an untrained adapter changes nothing, bit for bit. Unlike ControlNet it does not run a copy of the
UNet's encoder: the multi-scale part looks at the features alone and runs once per tile; a step costs a gate that
depends on the noise level and one 1x1 convolution per slot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.condition.steps import is_between

NORM_GROUPS = 8


@dataclass(frozen=True)
class AdapterConfig:
    """Configuration that an adapter is built from; written into its file."""

    base: str
    """The family of checkpoints it belongs to: `sd15`, `sd2`, `sdxl`, `mini` ..."""
    shape: UNetShape
    encoder: str
    """Id of the patch encoder whose tokens it reads."""
    features: int
    """Width D of those tokens."""
    layer: int = -1
    """Layer of the encoder they come from, as in PatchEncoder.__call__."""
    width: int = 128
    """Channels of the adapter's own maps; a multiple of 8."""
    blocks: int = 2
    """Residual blocks of the multi-scale part, on its coarse grid."""
    grid: int = 4
    """Latent cells per cell of that grid."""
    restored: bool = False
    """Whether it reads the tokens as the restoration head in its file gives them."""

    def __post_init__(self) -> None:
        for name, low, high in (("features", 1, 8192), ("width", 8, 2048), ("blocks", 0, 32), ("grid", 1, 64)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} {getattr(self, name)} is not between {low} and {high}")
        if self.width % NORM_GROUPS:
            raise ValueError(f"width {self.width} is no multiple of {NORM_GROUPS}")


class ResidualBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions (arXiv 1603.05027)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(NORM_GROUPS, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class NoiseLevel(nn.Module):
    """Embeds sigma: Fourier features of ln(sigma) / 4, the noise conditioning of EDM (arXiv 2206.00364), and an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._count = width // 2
        self.mlp = nn.Sequential(nn.Linear(width // 2 * 2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, sigma: Tensor) -> Tensor:
        """sigma (n,), as in k-diffusion: standard deviation of the noise over that of the signal -> (n, width)."""
        # In float32 whatever the weights are in: the highest phases span many turns.
        frequencies = torch.exp(torch.linspace(0, math.log(64), self._count, device=sigma.device))
        phase = sigma.clamp(min=1e-4).log()[:, None] / 4 * frequencies
        return self.mlp(torch.cat([phase.cos(), phase.sin()], dim=1).to(self.mlp[0].weight.dtype))


class Adapter(nn.Module):
    """`prepare` once per tile, `forward` at every step."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.norm = nn.LayerNorm(config.features)
        self.project = nn.Conv2d(config.features, width, 1)
        self.trunk = nn.Sequential(*(ResidualBlock(width) for _ in range(config.blocks)))
        self.levels = nn.ModuleDict(
            {
                str(scale): nn.Sequential(ResidualBlock(width), nn.GroupNorm(NORM_GROUPS, width), nn.SiLU())
                for scale in config.shape.scales
            }
        )
        self.noise = NoiseLevel(width)
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in config.shape.slots)
        self.outputs = nn.ModuleList(nn.Conv2d(width, channels, 1) for channels, _ in config.shape.slots)
        for layer in (*self.gates, *self.outputs):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def grid(self, latent: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the grid on which `prepare` wants the features of a tile with this latent (h, w)."""
        rows, columns = (-(-side // self.config.grid) for side in latent)
        return rows, columns

    def prepare(self, features: Tensor, latent: tuple[int, int]) -> dict[int, Tensor]:
        """The part that does not depend on the step.

        features: (k, D, *self.grid(latent)), the patch tokens of k tiles; latent: the tiles' latent (h, w).
        Returns for each downscale s of the UNet's shape a map (k, width, ceil(h / s), ceil(w / s)).
        """
        weight = self.project.weight
        tokens = features.to(weight.device, weight.dtype)
        tokens = self.norm(tokens.movedim(1, -1)).movedim(-1, 1)
        trunk = self.trunk(self.project(tokens))
        maps = {}
        for scale in self.config.shape.scales:
            size = (-(-latent[0] // scale), -(-latent[1] // scale))
            resized = trunk
            if size != tuple(trunk.shape[-2:]):
                resized = F.interpolate(trunk, size=size, mode="bilinear", align_corners=False)
            maps[scale] = self.levels[str(scale)](resized)
        return maps

    def forward(self, maps: dict[int, Tensor], sigma: Tensor) -> list[Tensor]:
        """Residuals (k, C, h / s, w / s) for each slot of the UNet's shape, the middle block's last.

        maps: what `prepare` gave for k tiles; sigma: (1,) or (k,), the noise level.
        """
        level = self.noise(sigma.to(self.project.weight.device))
        return [
            output(maps[scale] * (1 + gate(level))[:, :, None, None])
            for (_, scale), gate, output in zip(self.config.shape.slots, self.gates, self.outputs)
        ]


class AdapterCondition:
    """An adapter at work on one batch of tiles: what a host asks for residuals.

    The residuals of a step are computed once, however often the host calls the UNet for it.
    """

    def __init__(
        self,
        adapter: Adapter,
        features: Tensor,
        latent: tuple[int, int],
        strength: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
    ) -> None:
        """features (k, D, *adapter.grid(latent)); strength >= 0; start and end: fractions of the steps in [0, 1]."""
        self._adapter = adapter
        self._strength, self._start, self._end = strength, start, end
        with torch.no_grad():
            self._maps = adapter.prepare(features, latent)
        self._cached: tuple[float, list[Tensor]] | None = None

    def residuals(self, sigma: float, progress: float) -> list[Tensor] | None:
        """Residuals of the k tiles at this noise level, or None outside the adapter's steps.

        progress: fraction of the sampling steps already done, in [0, 1).
        """
        if self._strength == 0 or not is_between(progress, self._start, self._end):
            return None
        if self._cached is None or self._cached[0] != sigma:
            with torch.no_grad():
                found = self._adapter(self._maps, torch.tensor([sigma]))
            self._cached = sigma, [residual * self._strength for residual in found]
        return self._cached[1]

    def forget(self) -> None:
        """Drop the residuals of the last step."""
        self._cached = None
