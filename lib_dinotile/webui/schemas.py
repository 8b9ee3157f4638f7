"""Requests and answers of the API's routes, for pydantic 1 (A1111, reForge) and 2 (Forge)."""

from __future__ import annotations

from typing import Any

from pydantic import VERSION, BaseModel, Field

from lib_dinotile import presets
from lib_dinotile.options import Option
from lib_dinotile.settings import MAX_SIDE, Settings


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


PRESET = {
    "type": "string",
    "title": "Preset",
    "description": "Sets options for a purpose. Options that are given explicitly take precedence.",
    "enum": presets.NAMES,
}
OPTIONS = {
    "properties": {"preset": PRESET, **{option.name: schema_of(option) for option in Settings.table()}},
    "additionalProperties": False,
}


def options_field(default: Any, description: str) -> Any:
    """A field for options, for pydantic 1 (A1111) and 2 (Forge)."""
    more = OPTIONS if VERSION.startswith("1.") else {"json_schema_extra": OPTIONS}
    return Field(default, description=description, **more)


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


class RegionRequest(MapRequest):
    """An image, and who is to name its regions."""

    interrogator: str = Field("", description="One of the WebUI's (as in `captions`): names those without words.")


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
    options: dict[str, Any] = options_field(..., "All options as they would be used, with defaults.")
    tiles: list[Tile] = Field(
        ...,
        description="Row by row. They overlap. The last may reach up to 7 pixels over the result, which are cut off.",
    )
    waves: list[list[int]] = Field(
        ...,
        description="Numbers of the tiles in the order in which they are painted; those of a wave do not overlap.",
    )
    painted: int = Field(..., description="How many tiles are painted in all, with those of the seam fix.")


class SemanticMap(BaseModel):
    image: str = Field(
        ...,
        description="A PNG in base64: the image with its numbered tiles, in like colours where DINO sees the like.",
    )
    width: int = Field(..., description="Of the PNG, in pixels: the result's, but at most 2048 a side.")
    height: int


class Box(BaseModel):
    """A rectangle, in pixels of the result."""

    x: int
    y: int
    width: int
    height: int


class Region(BaseModel):
    letter: str = Field(..., description="As the option `region_prompts` names it.")
    share: float = Field(..., description="Of the picture, from 0 to 1.")
    box: Box = Field(..., description="The smallest rectangle with all of it.")
    crop: Box = Field(..., description="The square that shows it best, for a captioner.")
    words: str = Field(..., description="Of the options' `region_prompts`, or the interrogator's.")


class Regions(BaseModel):
    """Regions of an image that look alike to DINO."""

    regions: list[Region] = Field(..., description="The largest first.")
    region_prompts: str = Field(..., description="Their words, as the option takes them.")
    image: str = Field(..., description="A PNG in base64: the regions as colours with letters, the tiles, a legend.")
    width: int = Field(..., description="Of the PNG, in pixels. It shows the result at most 2048 pixels a side.")
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
