"""Residuals into a UNet of the ldm kind (ldm, sgm): `input_blocks`, `middle_block`, `output_blocks`.

The forward pass of these UNets takes skip connections from the end of a list, `h = cat([h, skips.pop()], 1)`, and calls
`output_blocks[i](h, emb, context)`. So what is added to the last channels of `h` in front of output block i is added to
the skip connection of input block n - 1 - i, and what is added behind the middle block is added to that: ControlNet's
residuals, put in by PyTorch's own hooks. Other extensions that replace the UNet's `forward` call the same blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lib_dinotile import DinotileError
from lib_dinotile.engine.host import Residuals


def cfg_rows(parts: Sequence[int], rows: int) -> list[int]:
    """Which tile each of the UNet's rows of A1111's CFGDenoiser belongs to.

    It stacks the conditional rows first, for each tile as many as its prompt has AND parts, then the unconditional
    rows, once over all tiles (twice for InstructPix2Pix).
    """
    conditional = [tile for tile, count in enumerate(parts) for _ in range(count)]
    copies, odd = divmod(rows - len(conditional), len(parts))
    if odd or copies < 0:
        raise DinotileError(f"cannot tell which of {rows} UNet rows belongs to which of {len(parts)} tiles")
    return conditional + list(range(len(parts))) * copies


class LdmResiduals:
    """Context manager: while it is open, the UNet's rows get the residuals of their tiles.

    Call `step` before the UNet is called for a sampling step, with the tile of every row in the order in which the rows
    will come. The UNet may then be called once or in slices, with all these rows or only the first of them.
    """

    def __init__(
        self,
        unet: nn.Module,
        condition: Residuals | None,
        sigma: Callable[[float], float],
        on_rows: Callable[[Tensor], None] = lambda rows: None,
    ) -> None:
        """sigma: from the timestep that the UNet is called with to the noise level; on_rows: called before the UNet
        with the tile of every row of this call, for what other extensions give the UNet per row."""
        self._unet, self._condition, self._sigma, self._on_rows = unet, condition, sigma, on_rows
        self._hooks: list[Any] = []
        self._rows: list[int] = []
        self._progress = 0.0
        self._residuals: list[Tensor] | None = None
        self._index: Tensor | None = None

    def __enter__(self) -> LdmResiduals:
        unet = self._unet
        self._hooks = [
            unet.register_forward_pre_hook(self._before_unet, with_kwargs=True),
            unet.middle_block.register_forward_hook(self._after_middle),
        ]
        count = len(unet.output_blocks)
        for number, block in enumerate(unet.output_blocks):
            self._hooks.append(block.register_forward_pre_hook(self._before_output(count - 1 - number)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._residuals = [], None

    def step(self, rows: Sequence[int], progress: float) -> None:
        """A step begins: row i of the UNet calls to come belongs to tile rows[i]; progress as in `Residuals`."""
        self._rows, self._progress = list(rows), progress

    def _before_unet(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["x"]
        timesteps = args[1] if len(args) > 1 else kwargs["timesteps"]
        if len(self._rows) < len(x):
            raise DinotileError(
                f"the UNet was called with {len(x)} rows where {len(self._rows)} were announced: "
                "another extension changes the batch; switch it off"
            )
        rows, self._rows = self._rows[: len(x)], self._rows[len(x) :]
        self._index = torch.tensor(rows, device=x.device)
        self._on_rows(self._index)
        if self._condition is not None:
            self._residuals = self._condition.residuals(self._sigma(float(timesteps[0])), self._progress)

    def _add(self, h: Tensor, residual: Tensor) -> Tensor:
        residual = residual.to(h.device, h.dtype).index_select(0, self._index)
        head = h.shape[1] - residual.shape[1]
        if head == 0:
            return h + residual
        return torch.cat([h[:, :head], h[:, head:] + residual], dim=1)

    def _after_middle(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return None if self._residuals is None else self._add(output, self._residuals[-1])

    def _before_output(self, slot: int) -> Callable[..., tuple[Any, ...] | None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            return None if self._residuals is None else (self._add(args[0], self._residuals[slot]), *args[1:])

        return hook
