"""dinotile and its peers in a running WebUI, asked for the same thing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import requests
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "tests" / "live"))

import client

Image.MAX_IMAGE_PIXELS = None
ULTIMATE, TILED = "ultimate sd upscale", "tiled diffusion"
ADDRESSES = {
    client.SCRIPT: "this repository",
    ULTIMATE: "https://github.com/Coyote-A/ultimate-upscale-for-automatic1111",
    TILED: "https://github.com/pkuliyi2015/multidiffusion-upscaler-for-automatic1111",
}
RESAMPLER = "Lanczos"

Request = Mapping[str, Any]
"""Arguments of `img2img` and `start` besides the source."""


def tiles(**options: Any) -> Request:
    """dinotile; `options` are its own."""
    return {"options": {"upscaler": RESAMPLER, **options}}


class WebUI(client.WebUI):
    """The API at an address."""

    def __init__(self, url: str, **given: Any) -> None:
        """given: is part of every request."""
        super().__init__(url)
        self._given = given

    def body(self, source: Image.Image, options: client.Options | None, **request: Any) -> dict[str, Any]:
        return super().body(source, options, **{**self._given, **request})

    def scripts(self) -> set[str]:
        """Names of all that is installed for img2img; one line and the end if no WebUI answers."""
        try:
            return {name.lower() for name in self.get("sdapi/v1/scripts").json()["img2img"]}
        except (requests.RequestException, KeyError) as error:
            sys.exit(f"{self._url}: no WebUI with --api answers there: {error}")

    def need(self, *scripts: str) -> None:
        """One line and the end, if one of these is not installed."""
        for script in set(scripts) - self.scripts():
            sys.exit(f"{self._url}: {script!r} is not installed there ({ADDRESSES[script]})")

    def ultimate(
        self, scale: float, tile: int, padding: int, order: str, seams: str = "none", denoise: float = 0.25
    ) -> Request:
        """Ultimate SD Upscale; order and seams by dinotile's names."""
        return {
            "script_name": ULTIMATE,
            "script_args": [
                None,
                tile,
                tile,
                8,  # mask blur
                padding,
                64,  # seam width
                denoise,
                16,  # seam padding
                self.names("upscalers").index(RESAMPLER),
                False,  # save
                ("linear", "chess").index(order),
                False,  # save after the seam pass
                4,  # mask blur of the seam pass
                ("none", "bands", "half tile", "half tile + crossings").index(seams),
                2,  # target: scale
                0,
                0,
                scale,
            ],
        }

    def tiled(self, scale: float, tile: int, overlap: int, batch: int, method: str = "MultiDiffusion") -> Request:
        """Tiled Diffusion; tile and overlap in pixels."""
        cells = [tile // 8, tile // 8, overlap // 8]
        arguments = [True, method, False, True, 0, 0, *cells, batch, RESAMPLER, scale]
        return {"alwayson_scripts": {TILED: {"args": arguments}}}
