"""Between pixels and latents: a field over the canvas, encoded and decoded in pieces."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lib_dinotile.engine.host import Host, Interrupted
from lib_dinotile.engine.memory import PieceSize, is_out_of_memory, mended
from lib_dinotile.tiling.blend import RIM, Blend
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.plan import Rect, Tiles

CACHE = 128 * 2**20
"""Bytes of encoded pieces that are kept. Those of a larger canvas are encoded again when they are needed again."""


class SourceLatents:
    """Latents that the tiles of a pass start from. However tiles overlap, a pixel is not encoded for each anew."""

    def __init__(self, host: Host, canvas: Canvas, area: Rect, size: PieceSize, note: Callable[[str], None]) -> None:
        """area: of the canvas, on the latent grid; note: tells the user. Nothing is encoded before it is asked for."""
        self._factor, self._pieces = host.factor, size.cut(area)
        cells = self._pieces.shrink(host.factor)
        self._blend = Blend(cells, rim=1)
        count = host.channels * cells.tile_size.width * cells.tile_size.height * 4
        self._encoded = functools.lru_cache(max(1, CACHE // count))(
            functools.partial(_encode, host, canvas, size, note)
        )

    def crop(self, area: Rect) -> Tensor:
        """(C, h, w) for a rectangle of the canvas in pixels, on the latent grid."""
        whole, latents = area.shrink(self._factor), None
        for piece in self._pieces.touching(area):
            cells = piece.shrink(self._factor)
            part = cells.intersection(whole)
            weight = part.within(cells).of(self._blend.weight(cells))
            if not weight.any():
                continue
            encoded = part.within(cells).of(self._encoded(piece))
            if latents is None:
                latents = encoded.new_zeros(encoded.shape[0], whole.height, whole.width)
            weight = weight.to(encoded)
            # No weight, no NaN.
            part.within(whole).of(latents).add_(torch.where(weight > 0, encoded, 0) * weight)
        return latents


def _encode(host: Host, canvas: Canvas, size: PieceSize, note: Callable[[str], None], piece: Rect) -> Tensor:
    """(C, h, w): a piece's latents, in full precision if they are not finite else, in parts if memory runs out."""
    if host.interrupted():
        raise Interrupted
    if len(size.cut(piece)) == 1:
        pixels = canvas.crop(piece, canvas.source(piece))[None]
        try:
            latents, finite = mended(host, first := host.encode(pixels), lambda: host.encode(pixels))
        except Exception as error:
            if not is_out_of_memory(error) or not size.halve(piece):
                raise
        else:
            place = f"the picture at {piece.x}, {piece.y}"
            if not finite:
                note(f"the VAE returned NaN for {place}")
            elif latents is not first:
                note(f"{place} was encoded again in full precision: the VAE returned NaN")
            # A WebUI may keep what its VAE gives on another device.
            return latents[0].to(pixels.device, first.dtype)
        del pixels
        host.free_memory()
    return SourceLatents(host, canvas, piece, size, note).crop(piece)


def decode(host: Host, latents: Tensor, area: Rect, size: PieceSize) -> Tensor:
    """Pixels (3, H, W) of latents (1, C, h, w) that lie there; in parts if memory runs out."""
    parts: Tiles = size.cut(area)
    if len(parts) == 1:
        try:
            return host.decode(latents)[0]
        except Exception as error:
            if not is_out_of_memory(error) or not size.halve(area):
                raise
        host.free_memory()
        parts = size.cut(area)
    pixels, blend = torch.zeros(3, area.height, area.width), Blend(parts, RIM)
    for part in parts.tiles:
        inner = part.within(area)
        made = decode(host, inner.shrink(host.factor).of(latents), part, size).cpu()
        inner.of(pixels).add_(made * blend.weight(part))
    return pixels.to(latents.device)
