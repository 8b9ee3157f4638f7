"""The table of options. The UI, the API, PNG info, X/Y/Z axes and the command line are all made from it.

An option is one field of `Settings` (what the engine does; everywhere) or of `Generation` (what img2img is told by the
WebUI's own controls; command line only). Adding an option is adding a field.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lib_dinotile import DinotileError
from lib_dinotile.tiling.plan import ORDERS

NONE = "None"
"""The choice that stands for no adapter."""

AUTOMATIC = "Automatic"
"""The choice that stands for the encoder that the adapter names."""

T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """One row of the table."""

    name: str
    """As in the API; the command line has it with dashes."""
    type: type
    """bool, int, float or str."""
    default: Any
    label: str
    help: str
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    """Of the slider; an int must be a multiple of it, counted from zero."""
    choices: tuple[str, ...] | None = None
    """The allowed values where they are fixed. Lists that depend on what is installed are checked by the host."""
    infotext: str | None = None
    """Key in PNG info, or None if it does not change the image."""
    flag: str | None = None
    """On the command line, where that is not the name with dashes."""
    only_with: str | None = None
    """Another option without which this one changes nothing, as long as that has its default."""
    xyz: bool = True
    """Whether it is an X/Y/Z axis."""

    @property
    def allowed(self) -> str:
        """What values it takes, in words."""
        if self.choices is not None:
            return "one of " + ", ".join(self.choices)
        if self.type in (int, float):
            number = "a whole number" if self.type is int else "a number"
            steps = f", a multiple of {self.step:g}" if self.type is int and self.step and self.step > 1 else ""
            return f"{number} from {self.type(self.minimum):n} to {self.type(self.maximum):n}{steps}"
        return "true or false" if self.type is bool else "text"

    def check(self, value: Any) -> Any:
        """`value` in the option's own type; DinotileError with one line if it is not allowed.

        A whole float is accepted for an int (JSON and sliders do not tell them apart), nothing else is converted.
        """
        if self.type in (int, float):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            # Also refuses what is not a number: nothing compares with it.
            if not number or not self.minimum <= value <= self.maximum or (self.type is int and value != int(value)):
                raise self._refuse(value)
            value = self.type(value)
            if self.type is int and self.step and value % self.step:
                raise self._refuse(value)
        elif not isinstance(value, self.type) or (self.choices is not None and value not in self.choices):
            raise self._refuse(value)
        return value

    def parse(self, text: str) -> Any:
        """`check` for a value that comes as text: PNG info, an X/Y/Z axis, the command line."""
        text = text.strip()
        try:
            if self.type is bool:
                return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
            return self.check(self.type(text))
        except (KeyError, ValueError) as error:
            raise self._refuse(text) from error

    def _refuse(self, value: Any) -> DinotileError:
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return DinotileError(f"{self.name}: {shown} is not allowed, give {self.allowed}")


def option(default: T, label: str, help: str, **more: Any) -> T:
    """A field of an options class; `more` as in `Option`."""
    return dataclasses.field(default=default, metadata={"label": label, "help": help, **more})  # type: ignore[return-value]


class Options:
    """What `Settings` and `Generation` share: a frozen dataclass whose fields are made by `option`."""

    @classmethod
    def table(cls) -> Iterator[Option]:
        """The options, in the order in which they are shown."""
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            yield Option(field.name, type(field.default), field.default, **field.metadata)

    @classmethod
    def option(cls, name: str) -> Option:
        """The option of that name; DinotileError, with the nearest name there is, if there is none."""
        rows = {row.name: row for row in cls.table()}
        if name in rows:
            return rows[name]
        near = difflib.get_close_matches(str(name), rows, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "there are " + ", ".join(rows)
        raise DinotileError(f"{str(name)[:80]!r} is no option of DINO Tile: {hint}")

    @classmethod
    def parse(cls: Callable[..., T], values: Mapping[str, Any]) -> T:
        """Options from a dict, defaults for what is left out. DinotileError for a wrong name, type or range."""
        return cls(**{name: cls.option(name).check(value) for name, value in values.items()})  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Settings(Options):
    """What dinotile does with the image."""

    enabled: bool = option(False, "Enable", "Upscale the image tile by tile.", xyz=False)
    scale: float = option(
        2.0,
        "Scale",
        "How many times larger the result is; fractions are fine.",
        minimum=1.0,
        maximum=8.0,
        step=0.05,
        infotext="DINO Tile scale",
    )
    upscaler: str = option(
        "Lanczos",
        "Upscaler",
        "Makes the large image that the tiles are then painted on.",
        infotext="DINO Tile upscaler",
    )
    tile: int = option(
        512,
        "Tile size",
        "Side of a tile in pixels: 512 for SD 1.5, 1024 for SDXL.",
        minimum=64,
        maximum=2048,
        step=8,
        infotext="DINO Tile tile size",
    )
    overlap: int = option(
        64,
        "Overlap",
        "Pixels that neighbouring tiles share and blend over; at most half a tile.",
        minimum=0,
        maximum=1024,
        step=8,
        infotext="DINO Tile overlap",
    )
    batch: int = option(
        4,
        "Tile batch",
        "Tiles sampled at once. More is faster and takes more memory; the image stays the same.",
        minimum=1,
        maximum=64,
        step=1,
    )
    order: str = option(
        "chess",
        "Order",
        "chess: tiles that do not touch are sampled together; linear: one after the other, row by row.",
        choices=ORDERS,
        infotext="DINO Tile order",
    )
    adapter: str = option(
        NONE,
        "Adapter",
        "Trained weights that tell the model what the source shows at each place.",
        infotext="DINO Tile adapter",
    )
    strength: float = option(
        1.0,
        "Adapter strength",
        "0 is off, 1 as trained.",
        minimum=0.0,
        maximum=2.0,
        step=0.05,
        infotext="DINO Tile strength",
        only_with="adapter",
    )
    start: float = option(
        0.0,
        "Adapter start",
        "Share of the steps after which the adapter begins.",
        minimum=0.0,
        maximum=1.0,
        step=0.05,
        infotext="DINO Tile start",
        only_with="adapter",
    )
    end: float = option(
        1.0,
        "Adapter end",
        "Share of the steps after which the adapter stops.",
        minimum=0.0,
        maximum=1.0,
        step=0.05,
        infotext="DINO Tile end",
        only_with="adapter",
    )
    encoder: str = option(
        AUTOMATIC,
        "DINO encoder",
        "The DINOv2 model that looks at the source. Automatic: the one that the adapter was trained with.",
        infotext="DINO Tile encoder",
        only_with="adapter",
        flag="dino",
    )
    patches: int = option(
        64,
        "DINO patches",
        "How finely the encoder sees the source: patches along its longer side.",
        minimum=8,
        maximum=256,
        step=1,
        infotext="DINO Tile patches",
        only_with="adapter",
    )
    windows: int = option(
        1,
        "DINO windows",
        "1: the encoder sees the whole source at once. More: that many times finer, in overlapping windows.",
        minimum=1,
        maximum=8,
        step=1,
        infotext="DINO Tile windows",
        only_with="adapter",
    )

    @property
    def infotext(self) -> dict[str, Any]:
        """Keys and values for PNG info: all options that had a part in the image."""
        rows = {row.name: row for row in self.table()}
        return {
            row.infotext: getattr(self, name)
            for name, row in rows.items()
            if row.infotext and (row.only_with is None or getattr(self, row.only_with) != rows[row.only_with].default)
        }

    def __post_init__(self) -> None:
        if self.overlap > self.tile // 2:
            raise DinotileError(
                f"overlap: {self.overlap} is not allowed with tile {self.tile}, give at most {self.tile // 2}"
            )
        if self.start > self.end:
            raise DinotileError(
                f"start: {self.start:g} is not allowed with end {self.end:g}, give at most {self.end:g}"
            )


@dataclass(frozen=True)
class Generation(Options):
    """What the command line tells img2img; in a WebUI its own controls do."""

    model: str = option(
        "mini",
        "Model",
        "mini (built in), a checkpoint file, a diffusers folder or a Hugging Face id.",
    )
    config: str = option(
        "",
        "Configuration",
        "Folder with the diffusers configuration for a checkpoint file; empty: from the Hugging Face Hub.",
    )
    prompt: str = option("", "Prompt", "What the picture shows.")
    negative: str = option("", "Negative prompt", "What it should not show.")
    denoise: float = option(
        0.35,
        "Denoising strength",
        "How much the tiles may change; 0 leaves them as they are.",
        minimum=0.0,
        maximum=1.0,
        step=0.01,
    )
    steps: int = option(20, "Steps", "Sampling steps at denoising strength 1.", minimum=1, maximum=150, step=1)
    cfg: float = option(5.0, "CFG scale", "How strongly the prompt counts.", minimum=1.0, maximum=30.0, step=0.5)
    seed: int = option(0, "Seed", "The same seed gives the same image.", minimum=0, maximum=2**32 - 1)
