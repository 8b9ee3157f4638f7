"""A running WebUI as these tests and the benchmarks see it: requests go in, images and their PNG info come out."""

from __future__ import annotations

import base64
import functools
import io
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import requests
from PIL import Image

from lib_dinotile.settings import VERSION, Txt2Img

TIMEOUT = 3600
"""Seconds that one generation may take."""
POLL = 0.05
"""Seconds between two looks at the progress."""
SLACK = 2e-4
"""The WebUI does not look at its progress in one moment: so much it may seem to have fallen."""
SCRIPT = "dino tile"

Options = Mapping[str, Any]

BLIND = {"guidance": 0.0, "guard": "off"}
"""Nothing looks at the source unless a test asks for it."""


def encode(image: Image.Image) -> str:
    """The image as a PNG in base64."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def decode(text: str) -> Image.Image:
    """The image that base64 text holds, as it is in the file."""
    return Image.open(io.BytesIO(base64.b64decode(text)))


def pixels(image: Image.Image) -> np.ndarray:
    """(H, W, 3) as integers that can be subtracted."""
    return np.asarray(image.convert("RGB")).astype(int)


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two images of one size, in levels of 255."""
    assert one.size == other.size
    return int(abs(pixels(one) - pixels(other)).max())


def correlation(one: Image.Image, other: Image.Image) -> float:
    """Pearson's, over all values of two images of one size."""
    return float(np.corrcoef(pixels(one).ravel(), pixels(other).ravel())[0, 1])


def fields(infotext: str) -> dict[str, str]:
    """Keys and values of PNG info's last line."""
    pairs = re.findall(r'([\w+/ -]+): ("(?:\\.|[^\\"])*"|[^,]*)(?:, |$)', infotext.split("\n")[-1])
    return {key.strip(): value.strip('"') for key, value in pairs}


def used(info: Mapping[str, str], name: str) -> str:
    """The value of an option as text, by PNG info: what it leaves out is at its default."""
    option = Txt2Img.option(name)
    assert VERSION in info, info
    return info.get(str(option.infotext), str(option.default))


@dataclass(frozen=True)
class Reply:
    """The result of a generation."""

    images: list[Image.Image]
    infotexts: list[str]
    """PNG info, one for each image."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What the API tells besides: `extra_generation_params`."""
    seconds: float = 0.0
    """From the request until the answer began to come."""

    @property
    def image(self) -> Image.Image:
        """The only image."""
        assert len(self.images) == 1
        return self.images[0]

    @property
    def fields(self) -> dict[str, str]:
        """PNG info of the first image."""
        return fields(self.infotexts[0])


@dataclass(frozen=True)
class Progress:
    """One look at how far a generation is."""

    running: bool
    share: float
    text: str
    preview: Image.Image | None
    jobs: tuple[int, int] = (0, 0)
    """The one that it is at, from 0, and how many there are; (0, 0) where nothing runs."""
    when: float = field(default_factory=time.perf_counter)

    @property
    def tiles(self) -> int | None:
        """Tiles done, or None where the WebUI is not at tiles."""
        found = re.fullmatch(r"DINO Tile: painting tiles: (\d+) of \d+", self.text)
        return int(found[1]) if self.running and found else None


@dataclass
class Job:
    """A generation that runs while the test looks on."""

    _webui: WebUI
    _body: dict[str, Any]
    _task: str = "img2img"
    _answer: list[requests.Response] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._answer.append(self._webui.post(self._task, self._body))

    def looks(self, preview: bool = True) -> Iterator[Progress]:
        """Looks at the progress, one after the other, until the generation is done."""
        while self._thread.is_alive():
            yield self._webui.progress(preview)
            time.sleep(POLL)

    def reply(self) -> Reply:
        """The result."""
        self._thread.join(TIMEOUT)
        return self._webui.reply(self._answer[0])


class WebUI:
    """The API at an address. Every request names the generation's settings itself, whatever the WebUI's defaults."""

    def __init__(self, url: str, auth: tuple[str, str] | None = None) -> None:
        """auth: user and password of its API."""
        self._url, self._auth = url.rstrip("/"), auth
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy stands between this machine and itself
        self._session.auth = auth

    def get(self, path: str, query: Mapping[str, str] | None = None) -> requests.Response:
        return self._session.get(f"{self._url}/{path}", params=query, timeout=TIMEOUT)

    def post(self, task: str, body: Mapping[str, Any] | None = None) -> requests.Response:
        return self._send(f"sdapi/v1/{task}", json.dumps(body or {}).encode())

    def dinotile(self, route: str, body: Mapping[str, Any] | bytes | None = None) -> requests.Response:
        """The answer of one of the routes of DINO Tile; by POST if there is a body."""
        path = f"dinotile/v1/{route}"
        if body is None:
            return self.get(path)
        return self._send(path, body if isinstance(body, bytes) else json.dumps(body).encode())

    def _send(self, path: str, body: bytes) -> requests.Response:
        # No session: requests go out from two threads at once.
        with requests.Session() as session:
            session.trust_env = False
            headers = {"Content-Type": "application/json"}
            return session.post(f"{self._url}/{path}", body, headers=headers, auth=self._auth, timeout=TIMEOUT)

    @functools.cached_property
    def settings(self) -> frozenset[str]:
        """Names of the settings that it knows; others are an error in some WebUIs."""
        return frozenset(self.get("openapi.json").json()["components"]["schemas"]["Options"]["properties"])

    def names(self, kind: str) -> list[str]:
        """Names of a kind in the WebUI, as `samplers` or `upscalers`."""
        return [entry["name"] for entry in self.get(f"sdapi/v1/{kind}").json()]

    @functools.cached_property
    def hires_upscalers(self) -> frozenset[str]:
        """Names of what hires fix can upscale with; in Forge Neo there is little."""
        return frozenset(self.names("upscalers") + self.names("latent-upscale-modes"))

    def body(self, source: Image.Image, options: Options | None, **request: Any) -> dict[str, Any]:
        """A request for img2img; `options` are DINO Tile's, None where it is not to be spoken of."""
        body: dict[str, Any] = {
            "init_images": [encode(source)],
            "prompt": "a photo",
            "negative_prompt": "",
            "width": source.width,
            "height": source.height,
            "steps": 4,
            "denoising_strength": 0.4,
            "sampler_name": "Euler",
            "scheduler": "Automatic",
            "seed": 1,
            "cfg_scale": 7,
            "save_images": False,
            "alwayson_scripts": {},
        }
        if "override_settings" in request:
            given = request["override_settings"].items()
            request["override_settings"] = {name: value for name, value in given if name in self.settings}
        scripts = request.pop("alwayson_scripts", {})
        if options is not None:
            scripts = {SCRIPT: {"args": [{"enabled": True, **BLIND, **options}]}, **scripts}
        return {**body, **request, "alwayson_scripts": scripts}

    def img2img(self, source: Image.Image, options: Options | None = None, **request: Any) -> Reply:
        """A generation that must succeed; `request` as in the API."""
        return self.reply(self.post("img2img", self.body(source, options, **request)))

    def start(self, source: Image.Image, options: Options | None = None, **request: Any) -> Job:
        """`img2img`, without waiting for it."""
        return Job(self, self.body(source, options, **request))

    def refusal(self, source: Image.Image, options: Options | None = None, **request: Any) -> str:
        """The one line with which a generation is refused, as it must be."""
        return self.refused(self.post("img2img", self.body(source, options, **request)))

    @staticmethod
    def reply(response: requests.Response) -> Reply:
        """The images of an answer that must be good."""
        assert response.status_code == 200, response.text[:2000]
        answer = response.json()
        info = json.loads(answer["info"])
        images, seconds = [decode(image) for image in answer["images"]], response.elapsed.total_seconds()
        return Reply(images, info["infotexts"], info["extra_generation_params"], seconds)

    @staticmethod
    def refused(response: requests.Response) -> str:
        """The line of an answer that must be a refusal."""
        assert response.status_code == 422, f"{response.status_code}: {response.text[:2000]}"
        line = response.json()["detail"]
        assert isinstance(line, str) and line and "\n" not in line
        assert "images" not in response.json()
        return line

    def progress(self, preview: bool = True) -> Progress:
        answer = self.get("sdapi/v1/progress" + ("" if preview else "?skip_current_image=true")).json()
        shown = decode(answer["current_image"]) if answer.get("current_image") else None
        jobs = answer["state"]["job_no"], answer["state"]["job_count"]
        return Progress(jobs[1] > 0, answer["progress"], answer.get("textinfo") or "", shown, jobs)

    def txt2img_body(self, options: Options | None = None, **request: Any) -> dict[str, Any]:
        """A request for txt2img, of 64x64 pixels."""
        body = self.body(Image.new("RGB", (64, 64)), options, **request)
        del body["init_images"]
        if "denoising_strength" not in request:
            del body["denoising_strength"]
        if body.get("hr_upscaler") not in (None, *self.hires_upscalers):
            body["hr_upscaler"] = "None"
        return body

    def txt2img(self, options: Options | None = None, **request: Any) -> Reply:
        """A generation without a source that must succeed."""
        return self.reply(self.post("txt2img", self.txt2img_body(options, **request)))

    def start_txt2img(self, options: Options | None = None, **request: Any) -> Job:
        """`txt2img`, without waiting for it."""
        return Job(self, self.txt2img_body(options, **request), "txt2img")
