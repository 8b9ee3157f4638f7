"""Tells what an extension such as ADetailer sees of a generation: the size of each image that it may work on."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, HTTPException, Request
from modules import script_callbacks, scripts

ROUTE = "/dinotile-faults/seen"
LOOPBACK = ("127.0.0.1", "localhost", "::1", None)

_seen: list[dict[str, Any]] = []


class Script(scripts.Script):
    def title(self) -> str:
        return "dinotile seen"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def before_process(self, p: Any, *args: Any) -> None:
        _seen.clear()

    def postprocess_image(self, p: Any, pp: Any, *args: Any) -> None:
        _seen.append({"size": pp.image.size, "job": [p.width, p.height], "denoise": p.denoising_strength})


def _add_route(_: Any, app: FastAPI) -> None:
    def look(request: Request) -> list[dict[str, Any]]:
        """What was seen of the last generation."""
        if request.client is None or request.client.host not in LOOPBACK:
            raise HTTPException(403)
        return _seen

    app.add_api_route(ROUTE, look, methods=["GET"])


script_callbacks.on_app_started(_add_route)
