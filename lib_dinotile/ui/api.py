"""Routes in the WebUI's own API: what is installed, the tiles of an image, and what DINO sees in it."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from modules import call_queue
from pydantic import BaseModel, Field

from lib_dinotile import DinotileError, __version__, weights
from lib_dinotile.condition.conditioner import installed_weights
from lib_dinotile.dino.encoder import installed
from lib_dinotile.hosts import folders
from lib_dinotile.images import read_image
from lib_dinotile.settings import MAX_SIDE, Settings
from lib_dinotile.ui.accordion import encoder_choices
from lib_dinotile.ui.prospect import Prospect, checkpoint, waves

PREFIX = "/dinotile/v1"
LIKE = "/sdapi/v1/img2img"
"""The WebUI's route whose authentication holds for these, too."""
MOST_TILES = 10_000
"""That are listed."""
LONGEST = 300
"""Characters of an error."""


def one_line(text: str) -> str:
    """A text that fits in a line, and in UTF-8."""
    text = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


class Route(APIRoute):
    """What is wrong with a request is told in one line, the `detail` of an answer 4xx."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def told(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                first = error.errors()[0]
                place = ".".join(str(part) for part in first["loc"] if part != "body")
                raise HTTPException(422, one_line(f"{place or 'the request'}: {first['msg']}")) from error
            except DinotileError as error:
                raise HTTPException(error.status_code, one_line(str(error))) from error

        return told


class Body(BaseModel):
    """A request; unknown fields are refused."""

    options: dict[str, Any] = Field({}, description="DINO Tile's options by name; what is left out has its default.")

    class Config:
        extra = "forbid"


class PlanRequest(Body):
    """An image, or its size."""

    image: str | None = Field(None, description="The source in base64, or its width and height.")
    width: int | None = Field(None, ge=1, le=MAX_SIDE, description="Of the source, in pixels.")
    height: int | None = Field(None, ge=1, le=MAX_SIDE)
    resize_width: int = Field(0, ge=0, le=MAX_SIDE, description="img2img's width, for the target 'img2img size'.")
    resize_height: int = Field(0, ge=0, le=MAX_SIDE)
    resize_mode: int = Field(0, ge=0, le=3, description="img2img's, as in its own API.")


class MapRequest(Body):
    """An image."""

    image: str = Field(..., description="The source in base64.")


class Version(BaseModel):
    version: str


class Tile(BaseModel):
    number: int
    x: int
    y: int
    width: int
    height: int


class Plan(BaseModel):
    """Where the tiles lie, in pixels of the result."""

    width: int
    height: int
    options: dict[str, Any] = Field(..., description="All of them, with the tile size that the checkpoint likes.")
    tiles: list[Tile]
    waves: list[list[int]] = Field(..., description="Numbers of the tiles in their order; those of a wave together.")
    painted: int = Field(..., description="How many tiles are painted, with those of the seam pass.")


class SemanticMap(BaseModel):
    image: str = Field(..., description="PNG in base64: DINO's features as colours over the picture, and the tiles.")
    width: int
    height: int


class Encoder(BaseModel):
    name: str
    installed: bool = Field(..., description="If not, choosing it downloads it.")


router = APIRouter(prefix=PREFIX, route_class=Route, tags=["DINO Tile"])


@router.get("/version", response_model=Version)
def version() -> Any:
    """Which dinotile this is."""
    return {"version": __version__}


@router.get("/adapters", response_model=list[dict[str, Any]])
def adapters() -> Any:
    """The installed adapters, with what their files say of themselves, or what is wrong with them."""
    return _described(installed_weights(folders.adapters()))


@router.get("/heads", response_model=list[dict[str, Any]])
def heads() -> Any:
    """The installed restoration heads, in the same way."""
    return _described(installed_weights(folders.heads()))


@router.get("/encoders", response_model=list[Encoder])
def encoders() -> Any:
    """The encoders that can be chosen."""
    there = installed(folders.encoders())
    return [{"name": name, "installed": name in there} for name in encoder_choices()[1:]]


@router.post("/plan", response_model=Plan)
def plan(request: PlanRequest) -> Any:
    """The tiles of an image with these options and the loaded checkpoint."""
    settings = Settings.parse(request.options)
    if request.image is not None:
        size = _image(request.image).size
    elif request.width and request.height:
        size = request.width, request.height
    else:
        raise DinotileError("image: give an image, or a width and a height")
    prospect = _prospect(size, settings, (request.resize_width, request.resize_height), request.resize_mode)
    found = prospect.plan
    tiles = found.tiles if found.order != "none" else []
    return {
        "width": found.width,
        "height": found.height,
        "options": {row.name: getattr(prospect.settings, row.name) for row in Settings.table()},
        "tiles": [
            {"number": number, "x": tile.x, "y": tile.y, "width": tile.width, "height": tile.height}
            for number, tile in enumerate(tiles, 1)
        ],
        "waves": waves(found),
        "painted": prospect.workload[0],
    }


@router.post("/semantic-map", response_model=SemanticMap)
def semantic_map(request: MapRequest) -> Any:
    """What DINO sees in an image, with the tiles that these options and the loaded checkpoint make of it."""
    settings, source = Settings.parse(request.options), _image(request.image)
    prospect = _prospect(source.size, settings)
    with call_queue.queue_lock:  # after what is being generated
        picture = prospect.semantic_map(source)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {
        "image": base64.b64encode(file.getvalue()).decode(),
        "width": picture.width,
        "height": picture.height,
    }


def _prospect(size: tuple[int, int], settings: Settings, given: tuple[int, int] = (0, 0), resize: int = 0) -> Prospect:
    with call_queue.queue_lock:
        model = checkpoint()
    prospect = Prospect(size, settings, model, given, resize)
    if len(prospect.plan) > MOST_TILES:
        raise DinotileError(f"tile: makes {len(prospect.plan)} tiles, more than {MOST_TILES} are not listed")
    return prospect


def _image(text: str) -> Any:
    """The image that base64 text holds, as data URL or not."""
    text = text.split(",", 1)[1] if text.startswith("data:") and "," in text else text
    try:
        data = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise DinotileError("image: this is no base64") from error
    return read_image(io.BytesIO(data), "image")


def _described(files: Mapping[str, Path]) -> list[dict[str, Any]]:
    found = []
    for name, path in files.items():
        try:
            found.append({"name": name, **weights.describe(path)})
        except DinotileError as error:
            found.append({"name": name, "error": one_line(str(error))})
    return found


def register(_: Any, app: FastAPI) -> None:
    """Add the routes to a WebUI that has its API on, behind the same authentication."""
    own = next((route for route in app.routes if getattr(route, "path", None) == LIKE), None)
    if own is not None:
        app.include_router(router, dependencies=own.dependencies)
