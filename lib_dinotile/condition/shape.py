"""Shapes of a UNet's residuals: one per skip connection and one for the middle block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MOST_SLOTS, MOST_CHANNELS = 128, 1 << 16
DOWNSCALES = tuple(2**n for n in range(11))
"""More has no UNet; where they are read from a file, more would be harm."""


@dataclass(frozen=True)
class UNetShape:
    """Where a UNet takes residuals, in the order of its input blocks, the middle block last.

    A slot is (channels, downscale): the residual of a tile with latent size (h, w) has that many channels and the
    spatial size that `downscale` halvings by a strided convolution leave: ceil(h / downscale), ceil(w / downscale).
    """

    slots: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not 2 <= len(self.slots) <= MOST_SLOTS:
            raise ValueError(f"a UNet has at least one skip connection and a middle block, and {MOST_SLOTS} at most")
        for channels, downscale in self.slots:
            if not 1 <= channels <= MOST_CHANNELS or downscale not in DOWNSCALES:
                raise ValueError(f"({channels}, {downscale}) is not (channels, a power of two) of any UNet")

    @property
    def scales(self) -> tuple[int, ...]:
        """The distinct downscales, finest first."""
        return tuple(sorted({downscale for _, downscale in self.slots}))

    def __str__(self) -> str:
        runs: list[list[Any]] = []
        for channels, downscale in self.slots[:-1]:
            if runs and runs[-1][0] == (channels, downscale):
                runs[-1][1] += 1
            else:
                runs.append([(channels, downscale), 1])
        skips = ", ".join(f"{count}x{channels}@1/{downscale}" for (channels, downscale), count in runs)
        return f"{skips}; middle {self.slots[-1][0]}@1/{self.slots[-1][1]}"

    @classmethod
    def build(cls, channels: list[int], blocks: int) -> UNetShape:
        """The shape of a UNet with these channels per level (finest first) and `blocks` residual blocks a level."""
        slots = [(channels[0], 1)]
        for level, width in enumerate(channels):
            slots += [(width, 2**level)] * blocks
            if level < len(channels) - 1:
                slots.append((width, 2 ** (level + 1)))
        return cls((*slots, slots[-1]))

    @classmethod
    def of_ldm(cls, unet: Any) -> UNetShape:
        """Read off a UNet with `input_blocks` and `middle_block`, as in ldm, sgm and Forge's backend.

        Told by the layers' own attributes: a residual block or a downsampling names its `out_channels`, the first
        block is a plain convolution; a downsampling halves the size.
        """
        slots, downscale, channels = [], 1, 0
        for block in unet.input_blocks:
            for layer in block:
                if type(layer).__name__ == "Downsample":
                    downscale *= 2
                channels = getattr(layer, "out_channels", channels)
            slots.append((channels, downscale))
        return cls((*slots, slots[-1]))

    @classmethod
    def of_diffusers(cls, unet: Any) -> UNetShape:
        """Read off a diffusers UNet2DConditionModel by its configuration."""
        blocks = unet.config.layers_per_block
        if not isinstance(blocks, int):
            raise ValueError("a UNet with a different number of blocks per level is not supported")
        return cls.build(list(unet.config.block_out_channels), blocks)


SD15 = UNetShape.build([320, 640, 1280, 1280], 2)
SDXL = UNetShape.build([320, 640, 1280], 2)
