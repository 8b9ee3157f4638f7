"""Routes in the WebUI's own API: what is installed, the tiles of an image, and what DINO sees in it."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from modules import call_queue
from PIL import Image

from lib_dinotile import DinotileError, __version__, one_line, printable
from lib_dinotile.condition.conditioner import installed_weights
from lib_dinotile.condition.description import describe
from lib_dinotile.dino.state import states
from lib_dinotile.engine.host import check_name
from lib_dinotile.engine.memory import is_out_of_memory
from lib_dinotile.engine.prompts import check_letters
from lib_dinotile.hosts.interrogators import interrogators
from lib_dinotile.images import read_image, read_size
from lib_dinotile.settings import NO_REGIONS, Settings
from lib_dinotile.webui import folders
from lib_dinotile.webui.accordion import TITLE
from lib_dinotile.webui.preview import Preview, checkpoint, loaded, waves
from lib_dinotile.webui.regions import lines
from lib_dinotile.webui.schemas import (
    Body,
    Encoder,
    MapRequest,
    Plan,
    PlanRequest,
    Refused,
    RegionRequest,
    Regions,
    SemanticMap,
    Version,
    Weights,
)

PREFIX = "/dinotile/v1"
LIKE = "/sdapi/v1/img2img"
"""The WebUI's route whose authentication holds for these, too."""
MOST_TILES = 10_000
"""That are listed."""


TINY = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR42mO+s6XinAgD8zkRBjm5HgAoKwSbdKVq4AAAAABJRU5ErkJggg=="
"""An image of 2x2 pixels, to try a route out with."""
EXAMPLE = {"requestBody": {"content": {"application/json": {"example": {"image": TINY, "options": {"scale": 8}}}}}}
"""The request that the OpenAPI page begins with."""


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
    with call_queue.queue_lock, _enough_memory():
        picture = preview.semantic_map(source)
    return _png(picture)


@router.post("/regions", response_model=Regions, openapi_extra=EXAMPLE)
def regions(request: RegionRequest) -> Any:
    """The regions of an image: their letters, shares and boxes, and a picture of them.

    Nothing is painted. It is answered after what is being generated.
    """
    settings, source = Settings.parse(request.options), read_image(_file(request.image), "image")
    if settings.regions == NO_REGIONS:
        raise DinotileError("regions: 0 finds none, give automatic or how many")
    if request.interrogator:
        check_name("interrogator", request.interrogator, list(interrogators()))
    preview = _preview(source.size, settings, request)
    with call_queue.queue_lock, _enough_memory():
        found = preview.regions(source)
        check_letters(found, settings.region_words)
        words = {letter: settings.region_words.get(letter, "") for letter in found.letters}
        if request.interrogator:
            words = preview.asked(source, found, words, request.interrogator)
        picture = preview.region_map(source, found, words)
    return {
        "regions": [
            {
                "letter": letter,
                "share": share,
                "box": dataclasses.asdict(found.box(letter)),
                "crop": dataclasses.asdict(found.best_crop(letter)),
                "words": words[letter],
            }
            for letter, share in zip(found.letters, found.areas)
        ],
        "region_prompts": lines(words),
        **_png(picture),
    }


@router.get("/regions", response_model=Regions)
def regions_of(
    image: str = Query(..., description="A small image in base64; larger ones by POST."),
    options: str = Query("{}", description="DINO Tile's options as JSON."),
    interrogator: str = Query("", description="As for POST."),
) -> Any:
    """The same for an image in the address."""
    try:
        parsed = json.loads(options)
    except ValueError as error:
        raise DinotileError(f"options: this is not JSON: {one_line(error)}") from error
    if not isinstance(parsed, dict):
        raise DinotileError("options: give one dict of options")
    return regions(RegionRequest(image=image, options=parsed, interrogator=interrogator))


@contextlib.contextmanager
def _enough_memory() -> Iterator[None]:
    """DinotileError where memory runs out in it."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise DinotileError("there is not enough memory: give a smaller image, or fewer patches or windows") from error


def _png(picture: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {"image": base64.b64encode(file.getvalue()).decode(), "width": picture.width, "height": picture.height}


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
        raise DinotileError("image: this is not base64") from error
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
