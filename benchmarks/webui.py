"""A running WebUI, and how dinotile and its peers are asked for the same thing."""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

Image.MAX_IMAGE_PIXELS = None
DINOTILE, ULTIMATE, TILED = "dino tile", "ultimate sd upscale", "tiled diffusion"
ADDRESSES = {
    DINOTILE: "this repository",
    ULTIMATE: "https://github.com/Coyote-A/ultimate-upscale-for-automatic1111",
    TILED: "https://github.com/pkuliyi2015/multidiffusion-upscaler-for-automatic1111",
}
TIMEOUT = 3600
POLL = 0.1
"""Seconds between two looks at the progress."""
RESAMPLER = "Lanczos"

Request = Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """What a request gave."""

    image: Image.Image
    """The last one: a script that returns several returns the finished one last."""
    infotext: str
    seconds: float
    """From request to answer."""


def encoded(image: Image.Image) -> str:
    """The image as the API takes it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def inpaint(mask: Image.Image) -> Request:
    """Only where the mask (L, of the source's size) is white, starting from what is there."""
    return {"mask": encoded(mask), "mask_blur": 0, "inpainting_fill": 1, "inpaint_full_res": False}


class Job:
    """A request that runs while one looks on."""

    def __init__(self, webui: WebUI, source: Image.Image, request: Request) -> None:
        self._webui, self._answer = webui, []
        self._thread = threading.Thread(target=lambda: self._answer.append(webui.img2img(source, request)), daemon=True)
        self._thread.start()

    def looks(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """The time and what the WebUI says of its progress, again and again until the answer is there."""
        while self._thread.is_alive():
            yield time.perf_counter(), self._webui.call("progress?skip_current_image=true")
            time.sleep(POLL)

    def reply(self) -> Reply:
        self._thread.join()
        if not self._answer:
            sys.exit("the WebUI did not answer the request, see above")
        return self._answer[0]


class WebUI:
    """The API at an address. Whatever it refuses ends the program with one line."""

    def __init__(self, url: str, steps: int = 4, denoise: float = 0.4) -> None:
        self._url, self._steps, self._denoise = url.rstrip("/"), steps, denoise
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(self, path: str, body: Request | None = None) -> Any:
        """The answer to a GET, or a POST if there is a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}/sdapi/v1/{path}", data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=TIMEOUT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            sys.exit(f"{self._url}: {path.split('?')[0]}: {error.code} {error.read(300).decode(errors='replace')}")
        except OSError as error:
            sys.exit(f"{self._url}: no WebUI with --api answers there: {error}")

    def scripts(self) -> set[str]:
        """Names of all that is installed for img2img."""
        return {name.lower() for name in self.call("scripts")["img2img"]}

    def need(self, *scripts: str) -> None:
        """One line and the end, if one of these is not installed."""
        there = self.scripts()
        for script in scripts:
            if script not in there:
                sys.exit(f"{self._url}: {script!r} is not installed there ({ADDRESSES[script]})")

    def img2img(self, source: Image.Image, request: Request) -> Reply:
        """request: what is asked for besides source, steps and strength."""
        body = {
            "init_images": [encoded(source)],
            "prompt": "a photo",
            "negative_prompt": "",
            "width": source.width,
            "height": source.height,
            "steps": self._steps,
            "denoising_strength": self._denoise,
            "sampler_name": "Euler",
            "scheduler": "Automatic",
            "cfg_scale": 7,
            "seed": 1,
            "save_images": False,
            **request,
        }
        start = time.perf_counter()
        answer = self.call("img2img", body)
        seconds = time.perf_counter() - start
        if not answer["images"]:
            sys.exit(f"{self._url}: img2img gave no image")
        image = Image.open(io.BytesIO(base64.b64decode(answer["images"][-1])))
        return Reply(image, json.loads(answer["info"])["infotexts"][0], seconds)

    def start(self, source: Image.Image, request: Request) -> Job:
        """`img2img`, without waiting for it."""
        return Job(self, source, request)

    def upscaler(self, name: str) -> int:
        """Its number in the WebUI's list."""
        names = [entry["name"] for entry in self.call("upscalers")]
        if name not in names:
            sys.exit(f"{self._url}: has no upscaler {name!r}")
        return names.index(name)

    def dinotile(self, **options: Any) -> Request:
        """dinotile; `options` are its own."""
        arguments = {"enabled": True, "upscaler": RESAMPLER, "guidance": 0.0, "guard": "off", **options}
        return {"alwayson_scripts": {DINOTILE: {"args": [arguments]}}}

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
                self.upscaler(RESAMPLER),
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
