"""Routes in the WebUI's own API: what is installed, the tiles of an image, and what DINO sees in it."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from modules import call_queue
from pydantic import VERSION, BaseModel, Field

from lib_dinotile import DinotileError, __version__, printable
from lib_dinotile.condition.conditioner import installed_weights
from lib_dinotile.condition.description import describe
from lib_dinotile.dino.state import states
from lib_dinotile.engine.memory import is_out_of_memory
from lib_dinotile.images import read_image, read_size
from lib_dinotile.options import Option
from lib_dinotile.settings import MAX_SIDE, Settings
from lib_dinotile.webui import folders
from lib_dinotile.webui.accordion import TITLE
from lib_dinotile.webui.preview import Preview, checkpoint, loaded, waves

PREFIX = "/dinotile/v1"
LIKE = "/sdapi/v1/img2img"
"""The WebUI's route whose authentication holds for these, too."""
MOST_TILES = 10_000
"""That are listed."""


def schema_of(option: Option) -> dict[str, Any]:
    """An option in JSON Schema."""
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
    free = option.type is str and option.choices is None
    allowed = "" if free else f" {option.allowed[0].upper()}{option.allowed[1:]}."
    range_ = {
        "minimum": option.minimum if option.zero is None else 0,
        "maximum": option.maximum,
        "enum": option.choices,
    }
    return {
        "type": kinds[option.type],
        "title": option.label,
        "description": f"{option.help}{allowed}",
        "default": option.default,
        **{key: value for key, value in range_.items() if value is not None},
        **({"multipleOf": option.step} if option.type is int and option.step else {}),
    }


OPTIONS = {
    "properties": {option.name: schema_of(option) for option in Settings.table()},
    "additionalProperties": False,
}
TINY = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR42mO+s6XinAgD8zkRBjm5HgAoKwSbdKVq4AAAAABJRU5ErkJggg=="
"""An image of 2x2 pixels, to try a route out with."""
EXAMPLE = {"requestBody": {"content": {"application/json": {"example": {"image": TINY, "options": {"scale": 8}}}}}}
"""The request that the OpenAPI page begins with."""


def options_field(default: Any, description: str) -> Any:
    """A field for options, for pydantic 1 (A1111) and 2 (Forge)."""
    more = OPTIONS if VERSION.startswith("1.") else {"json_schema_extra": OPTIONS}
    return Field(default, description=description, **more)


class Route(APIRoute):
    """Answers a bad request with 4xx and one line, its `detail`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def route(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                first = error.errors()[0]
                place = ".".join(str(part) for part in first["loc"] if part != "body")
                raise HTTPException(422, printable(f"{place or 'the request'}: {first['msg']}")) from error
            except DinotileError as error:
                raise HTTPException(error.status_code, error.detail) from error

        return route


class Refused(BaseModel):
    """Why a request is not answered."""

    detail: str = Field(..., description="What is wrong, in one line.")


class Body(BaseModel):
    """A request; unknown fields are refused."""

    options: dict[str, Any] = options_field(
        {}, "DINO Tile's options by name, as for img2img; what is left out has its default."
    )
    resize_width: int = Field(
        0, ge=0, le=MAX_SIDE, description="img2img's width, in pixels; counts only with the target 'img2img size'."
    )
    resize_height: int = Field(0, ge=0, le=MAX_SIDE, description="img2img's height, likewise.")
    resize_mode: int = Field(
        0,
        ge=0,
        le=3,
        description="img2img's resize mode, likewise: 0 stretches, 1 crops, 2 fills the border, 3 stretches, too.",
    )

    class Config:
        extra = "forbid"


class PlanRequest(Body):
    """An image, or its width and height."""

    image: str | None = Field(None, description="The image in base64 (PNG, JPEG, WebP ...), as a data URL or not.")
    width: int | None = Field(None, ge=1, le=MAX_SIDE, description="The image's width in pixels, in place of it.")
    height: int | None = Field(None, ge=1, le=MAX_SIDE, description="The image's height in pixels.")


class MapRequest(Body):
    """An image."""

    image: str = Field(..., description="The image in base64 (PNG, JPEG, WebP ...), as a data URL or not.")


class Version(BaseModel):
    version: str


class Tile(BaseModel):
    number: int = Field(..., description="Counted from 1, row by row.")
    x: int = Field(..., description="Its left edge, in pixels of the result.")
    y: int = Field(..., description="Its upper edge.")
    width: int
    height: int


class Plan(BaseModel):
    """The tiles that would be painted."""

    width: int = Field(..., description="Of the result, in pixels.")
    height: int = Field(..., description="Of the result, in pixels.")
    options: dict[str, Any] = options_field(
        ..., "All options as they would be used: with defaults, and the tile size that the checkpoint likes."
    )
    tiles: list[Tile] = Field(
        ...,
        description="Row by row. They overlap. The last may reach up to 7 pixels over the result, which are cut off.",
    )
    waves: list[list[int]] = Field(
        ...,
        description="Numbers of the tiles in the order in which they are painted; those of a wave do not overlap.",
    )
    painted: int = Field(..., description="How many tiles are painted in all, with those of the seam pass.")


class SemanticMap(BaseModel):
    image: str = Field(
        ...,
        description="A PNG in base64: the image with its numbered tiles, in like colours where DINO sees the like.",
    )
    width: int = Field(..., description="Of the PNG, in pixels: the result's, but at most 2048 a side.")
    height: int


class Weights(BaseModel):
    """Description of a file. Besides the fields here it has all that `python -m lib_dinotile info FILE` prints."""

    name: str = Field(..., description="As the option takes it.")
    error: str | None = Field(None, description="Why the file cannot be used; it has no other fields then.")
    kind: str | None = Field(None, description="adapter, or restoration heads.")
    base: str | None = Field(None, description="The family of checkpoints that an adapter is for: sd15, sdxl ...")
    encoder: str | None = Field(None, description="The encoder that it was trained with.")
    features: int | None = Field(None, description="Numbers that this encoder tells of a patch.")
    parameters: int | None = None
    megabytes: float | None = None
    made: dict[str, str] | None = Field(None, description="How it was made, if its maker says so.")

    class Config:
        extra = "allow"


class Encoder(BaseModel):
    name: str = Field(..., description="As the option `encoder` takes it.")
    installed: bool = Field(..., description="If not, using it downloads it first.")
    calibrated: list[float] = Field(
        ...,
        description="The scales that there are calibrated heads for, of 1, 2 and 4; others are made when first needed.",
    )
    automatic: bool = Field(..., description="Whether the option's value Automatic stands for it now.")


router = APIRouter(
    prefix=PREFIX,
    route_class=Route,
    tags=[TITLE],
    responses={"4XX": {"model": Refused, "description": "The request is refused; nothing was done."}},
)


@router.get("/version", response_model=Version)
def version() -> Any:
    """The version of the DINO Tile extension."""
    return {"version": __version__}


@router.get("/adapters", response_model=list[Weights], response_model_exclude_unset=True)
def adapters() -> Any:
    """The installed adapters: the values of the option `adapter`, besides None."""
    return _described(installed_weights(folders.adapters()))


@router.get("/heads", response_model=list[Weights], response_model_exclude_unset=True)
def heads() -> Any:
    """The installed restoration heads: the values of the option `head`, besides Automatic, None and calibrated."""
    return _described(folders.trained_heads())


@router.get("/encoders", response_model=list[Encoder])
def encoders() -> Any:
    """The encoders: the values of the option `encoder`, besides Automatic."""
    return [dataclasses.asdict(state) for state in states(folders.encoders(), folders.calibrated_heads())]


@router.post("/plan", response_model=Plan, openapi_extra=EXAMPLE)
def plan(request: PlanRequest) -> Any:
    """The size of the result and its tiles, for an image and options, with the checkpoint that is loaded.

    Nothing is painted. Give an image, or its width and height.
    """
    settings = Settings.parse(request.options)
    if request.image is not None and (request.width or request.height):
        raise DinotileError("image: give an image, or a width and a height, not both")
    if request.image is not None:
        size = read_size(_file(request.image), "image")
    elif request.width and request.height:
        size = request.width, request.height
    else:
        raise DinotileError("image: give an image, or a width and a height")
    preview = _preview(size, settings, request)
    found = preview.plan
    tiles = found.tiles if found.order != "none" else []
    return {
        "width": found.width,
        "height": found.height,
        "options": {row.name: getattr(preview.settings, row.name) for row in Settings.table()},
        "tiles": [
            {"number": number, "x": tile.x, "y": tile.y, "width": tile.width, "height": tile.height}
            for number, tile in enumerate(tiles, 1)
        ],
        "waves": waves(found),
        "painted": preview.workload[0],
    }


@router.post("/semantic-map", response_model=SemanticMap, openapi_extra=EXAMPLE)
def semantic_map(request: MapRequest) -> Any:
    """The semantic map of an image, with the tiles.

    Nothing is painted. It is answered after what is being generated.
    """
    settings, source = Settings.parse(request.options), read_image(_file(request.image), "image")
    preview = _preview(source.size, settings, request)
    with call_queue.queue_lock:
        try:
            picture = preview.semantic_map(source)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DinotileError(
                "there is not enough memory: give a smaller image, or less patches or windows"
            ) from error
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {
        "image": base64.b64encode(file.getvalue()).decode(),
        "width": picture.width,
        "height": picture.height,
    }


def _preview(size: tuple[int, int], settings: Settings, request: Body) -> Preview:
    model = loaded()
    if model is None:
        with call_queue.queue_lock:  # after what is being generated
            model = checkpoint()
    preview = Preview(size, settings, model, (request.resize_width, request.resize_height), request.resize_mode)
    if len(preview.plan) > MOST_TILES:
        raise DinotileError(f"tile: makes {len(preview.plan)} tiles, more than {MOST_TILES} are not listed")
    return preview


def _file(text: str) -> io.BytesIO:
    """The file that base64 text holds, as data URL or not."""
    text = text.split(",", 1)[1] if text.startswith("data:") and "," in text else text
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (ValueError, binascii.Error) as error:
        raise DinotileError("image: this is no base64") from error
    return io.BytesIO(data)


def _described(files: Mapping[str, Path]) -> list[dict[str, Any]]:
    found = []
    for name, path in files.items():
        try:
            found.append({"name": name, **describe(path)})
        except DinotileError as error:
            found.append({"name": name, "error": error.detail})
    return found


def register(_: Any, app: FastAPI) -> None:
    """Add the routes to a WebUI that has its API on, behind the same authentication."""
    own = next((route for route in app.routes if getattr(route, "path", None) == LIKE), None)
    if own is not None:
        app.include_router(router, dependencies=own.dependencies)
