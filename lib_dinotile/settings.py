"""The table of options. The UI, the API, PNG info, X/Y/Z axes and the command line are all made from it.

An option is one field of `Settings` (the engine's; everywhere), of `Txt2Img` (what only the txt2img tab of a WebUI has
besides) or of `Generation` (img2img's, which has controls of its own in a WebUI; command line only). Adding an option
is adding a field.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lib_dinotile import DinotileError, presets
from lib_dinotile.lines import LETTERS, parse_region_prompts, parse_tile_prompts
from lib_dinotile.options import Option, Options, option
from lib_dinotile.tiling.colour import CORRECTIONS
from lib_dinotile.tiling.plan import ORDERS
from lib_dinotile.tiling.seams import SEAMS

Own = TypeVar("Own", bound="Settings")

DEFAULTS = 1
"""Version of the defaults below. Images leave out in PNG info what is at its default, so raise it whenever one changes,
and have lib_dinotile/webui/infotext.py read images of the versions before by what the default was then."""

VERSION = "DINO Tile"
"""Key of that version in PNG info."""

TARGETS = ("scale", "longest side", "img2img size")
PROMPT_MODES = ("follow", "replace")

MAX_SIDE = 65536
"""Longest side of a canvas, in pixels."""

SMALL = ("sd15", "sd2", "mini")
"""Families of checkpoints that are at home at 512 pixels; all others are at 1024."""

LEAST = 0.75
"""Least side of a tile as a share of what a checkpoint is at home at, where the tile size is automatic."""

NONE = "None"
"""The choice that stands for no adapter, and for no captions."""

AUTOMATIC = "Automatic"
"""The choice that stands for what fits best: of encoders the one that the adapter names, of decoders a cheap one."""

AUTO = "auto"
"""The device, and the precision, that are usual on this machine."""

CALIBRATED = "calibrated"
"""The choice that stands for the restoration heads that dinotile makes for an encoder by itself."""

TAESD, APPROXIMATE, LINEAR, FULL_VAE = "TAESD", "approximate", "linear", "full VAE"
DECODERS = (AUTOMATIC, TAESD, APPROXIMATE, LINEAR, FULL_VAE)
PREDICTIONS = (AUTOMATIC, "epsilon", "v_prediction")
PRECISIONS = (AUTO, "fp32", "fp16", "bf16")
SAMPLERS = ("DPM++ 2M", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "Euler", "Euler a", "DDIM", "UniPC", "LCM")
SCHEDULERS = (AUTOMATIC, "Uniform", "Normal", "Karras", "Exponential", "SGM Uniform", "Simple", "Beta", "Leading")
OFF, REPORT, BLEND, RETRY = "off", "report", "blend back", "retry"
POLICIES = (OFF, REPORT, BLEND, RETRY)
PATCHES, SELF_SIMILARITY = "patches", "self-similarity"
DISTANCES = (PATCHES, SELF_SIMILARITY)
"""`patches`: one minus the cosine, patch by patch. `self-similarity`: how patches resemble each other (keys of the
attention, their cosines, as in DiffuseIT, arXiv 2209.15264), which a change of style leaves as it is."""
SOURCE, SEMANTIC, CONSISTENCY, BOTH = "source", "semantic", "consistency", "both"
MAPS = {
    "none": (),
    SOURCE: (SOURCE,),
    SEMANTIC: (SEMANTIC,),
    CONSISTENCY: (CONSISTENCY,),
    BOTH: (SEMANTIC, CONSISTENCY),
    "all": (SOURCE, SEMANTIC, CONSISTENCY),
}
"""The pictures that each choice shows besides the result: the enlarged source as it was before the tiles were painted,
what DINO sees in it, and how well the result agrees with that."""
NO_REGIONS, AS_MANY_AS_SEEN = "0", "automatic"
REGIONS = (NO_REGIONS, AS_MANY_AS_SEEN, *map(str, range(2, len(LETTERS) + 1)))


def _adapted(settings: Settings) -> bool:
    return settings.adapter != NONE


def _named(settings: Settings) -> bool:
    return bool(settings.region_words)


def _guided(settings: Settings) -> bool:
    return settings.guidance > 0


def _looking(settings: Settings) -> bool:
    return settings.looks


@dataclass(frozen=True)
class Settings(Options):
    """Options of dinotile itself."""

    enabled: bool = option(False, "Enable", "Upscale the image tile by tile.")
    target: str = option(
        "scale",
        "Target size",
        "scale: times larger. longest side: in pixels. img2img size: as set in img2img's Resize to or Resize by.",
        choices=TARGETS,
        infotext="DINO Tile target",
    )
    scale: float = option(
        2.0,
        "Scale",
        "How many times larger the result is. Fractions are allowed.",
        minimum=1.0,
        maximum=8.0,
        step=0.05,
        infotext="DINO Tile scale",
        only_with=lambda settings: settings.target == "scale",
    )
    longest: int = option(
        2048,
        "Longest side",
        "Longest side of the result, in pixels. The other side follows in proportion.",
        minimum=8,
        maximum=MAX_SIDE,
        step=1,
        infotext="DINO Tile longest side",
        only_with=lambda settings: settings.target == "longest side",
    )
    upscaler: str = option(
        "Lanczos",
        "Upscaler",
        "Enlarges the image before the tiles are painted.",
        infotext="DINO Tile upscaler",
    )
    tile: int = option(
        0,
        "Tile size",
        "Width and height of a tile, in pixels. 0 picks the checkpoint's own size: 512 for SD 1.5 and 2, 1024 for SDXL "
        "and newer. A side may then be as little as three quarters of that, where it saves pixels.",
        minimum=64,
        maximum=2048,
        step=8,
        zero="automatic",
        infotext="DINO Tile tile size",
    )
    overlap: int = option(
        64,
        "Tile overlap",
        "Pixels that neighbouring tiles share. They are blended there. At most half a tile.",
        minimum=0,
        maximum=1024,
        step=8,
        infotext="DINO Tile overlap",
    )
    batch: int = option(
        4,
        "Tile batch size",
        "Tiles sampled at once. More is faster and needs more memory. The image stays the same.",
        minimum=1,
        maximum=64,
        step=1,
    )
    order: str = option(
        "chess",
        "Tile order",
        "chess: tiles that do not overlap, together. linear: row by row. fused: all tiles together, blended at every "
        "step. none: no tiles, only the upscaler and the seam fix.",
        choices=ORDERS,
        infotext="DINO Tile order",
    )
    seams: str = option(
        "none",
        "Seam fix",
        "Paints over the borders between tiles afterwards. bands: narrow strips. half tile: strips as wide as a tile. "
        "half tile + crossings: these, then the places where they cross.",
        choices=SEAMS,
        infotext="DINO Tile seams",
    )
    seam_denoise: float = option(
        0.25,
        "Seam fix denoising strength",
        "How much the seam fix may change.",
        minimum=0.0,
        maximum=1.0,
        step=0.01,
        infotext="DINO Tile seam denoise",
        only_with=lambda settings: settings.seams != "none",
    )
    seam_width: int = option(
        64,
        "Seam fix width",
        "Width of the bands, in pixels.",
        minimum=8,
        maximum=1024,
        step=8,
        infotext="DINO Tile seam width",
        only_with=lambda settings: settings.seams == "bands",
    )
    colour: str = option(
        "wavelet",
        "Colour correction",
        "Keeps the colours of the source. wavelet: large areas keep their colour. AdaIN: every tile keeps its average "
        "colour and contrast.",
        choices=CORRECTIONS,
        infotext="DINO Tile colour",
    )
    flat: float = option(
        0.0,
        "Skip flat tiles",
        "Leaves tiles alone that have less detail than this, on the scale of brightness from 0 to 255. 0.9 skips clear "
        "sky. 0 skips none.",
        minimum=0.0,
        maximum=16.0,
        step=0.1,
        infotext="DINO Tile flat",
    )
    tile_prompt: str = option(
        "",
        "Tile prompt",
        "Prompt added to every tile.",
        infotext="DINO Tile tile prompt",
    )
    tile_prompt_mode: str = option(
        "follow",
        "Tile prompt mode",
        "follow: after the main prompt. replace: instead of the main prompt.",
        choices=PROMPT_MODES,
        infotext="DINO Tile tile prompt mode",
        only_with=lambda settings: settings.prompts_by_tile,
    )
    captions: str = option(
        NONE,
        "Tile captions",
        "Captions tiles with one of the WebUI's interrogators. The caption is used as the tile's prompt. Tiles with a "
        "prompt of their own or of their regions get none.",
        infotext="DINO Tile captions",
        only_with=lambda settings: settings.captions != NONE,
    )
    tile_prompts: str = option(
        "",
        "Prompts per tile",
        'One line per tile, for example "3: whiskers", or one line for all: "3: whiskers; 5: stone". Tiles count from '
        "1, row by row. Such a tile gets no caption and no prompts of its regions.",
        infotext="DINO Tile tile prompts",
        lines=3,
    )
    regions: str = option(
        AS_MANY_AS_SEEN,
        "Regions",
        "How many regions of the source DINO looks for. A is the largest. 0: none.",
        choices=REGIONS,
        infotext="DINO Tile regions",
        only_with=_named,
    )
    region_prompts: str = option(
        "",
        "Prompts per region",
        'One line per region, for example "A: tabby fur", or one line for all: "A: tabby fur; B: stone wall". The '
        "preview in img2img shows the letters, and so does analyze on the command line. A line in Prompts "
        "per tile takes precedence.",
        infotext="DINO Tile region prompts",
        only_with=_named,
        lines=3,
    )
    region_share: float = option(
        0.1,
        "Minimum region share",
        "Regions that cover a smaller share of a tile than this are left out of its prompt.",
        minimum=0.0,
        maximum=1.0,
        step=0.01,
        infotext="DINO Tile region share",
        only_with=_named,
    )
    adapter: str = option(
        NONE,
        "Adapter",
        "Trained weights that show the model what DINO sees in the source.",
        infotext="DINO Tile adapter",
    )
    strength: float = option(
        1.0,
        "Adapter strength",
        "0 is off, 1 is as trained.",
        minimum=0.0,
        maximum=2.0,
        step=0.05,
        infotext="DINO Tile strength",
        only_with=_adapted,
    )
    start: float = option(
        0.0,
        "Adapter start",
        "Share of the steps before the adapter starts.",
        minimum=0.0,
        maximum=1.0,
        step=0.05,
        infotext="DINO Tile start",
        only_with=_adapted,
    )
    end: float = option(
        1.0,
        "Adapter end",
        "Share of the steps after which the adapter stops.",
        minimum=0.0,
        maximum=1.0,
        step=0.05,
        infotext="DINO Tile end",
        only_with=_adapted,
    )
    guidance: float = option(
        1.0,
        "Guidance strength",
        "Keeps every tile true to what DINO sees in the source. Higher is stricter. 0 is off.",
        minimum=0.0,
        maximum=4.0,
        step=0.05,
        infotext="DINO Tile guidance",
    )
    guidance_start: float = option(
        0.0,
        "Guidance start",
        "Share of the steps before guidance starts.",
        minimum=0.0,
        maximum=1.0,
        step=0.05,
        infotext="DINO Tile guidance start",
        only_with=_guided,
    )
    guidance_end: float = option(
        0.7,
        "Guidance end",
        "Share of the steps after which guidance stops. The last steps run unguided.",
        minimum=0.0,
        maximum=1.0,
        step=0.05,
        infotext="DINO Tile guidance end",
        only_with=_guided,
    )
    every: int = option(
        1,
        "Guidance interval",
        "Guides every n-th step. Higher is faster and weaker.",
        minimum=1,
        maximum=20,
        step=1,
        infotext="DINO Tile guidance every",
        only_with=_guided,
    )
    views: int = option(
        1,
        "Guidance views",
        "How many shifted views of a tile DINO looks at per step. More is steadier and slower.",
        minimum=1,
        maximum=8,
        step=1,
        infotext="DINO Tile guidance views",
        only_with=_guided,
    )
    distance: str = option(
        "patches",
        "Guidance distance",
        "What is compared with the source. patches: every patch. self-similarity: how patches resemble each other.",
        choices=DISTANCES,
        infotext="DINO Tile guidance distance",
        only_with=_guided,
    )
    layer: int = option(
        2,
        "Guidance layer",
        "DINO layer that is compared, counted from the last, which is 1.",
        minimum=1,
        maximum=40,
        step=1,
        infotext="DINO Tile guidance layer",
        only_with=_guided,
    )
    decoder: str = option(
        AUTOMATIC,
        "Guidance decoder",
        "Decodes unfinished tiles for DINO. Automatic: the first in this list that needs no download.",
        choices=DECODERS,
        infotext="DINO Tile guidance decoder",
        only_with=_guided,
    )
    guard: str = option(
        "retry",
        "Guard",
        "Compares every painted tile with the source. report: only lists them. blend back: shows the source where the "
        "match is in doubt. retry: paints again, then blends back.",
        choices=POLICIES,
        infotext="DINO Tile guard",
    )
    guard_seeds: int = option(
        2,
        "Retries with new seeds",
        "How often a tile in doubt is painted again, at most.",
        minimum=0,
        maximum=16,
        step=1,
        infotext="DINO Tile guard seeds",
        only_with=lambda settings: settings.guard == RETRY,
    )
    guard_weaker: int = option(
        1,
        "Retries with less denoise",
        "How often it is painted again after that, each time with 0.7 times the last denoising strength.",
        minimum=0,
        maximum=16,
        step=1,
        infotext="DINO Tile guard weaker",
        only_with=lambda settings: settings.guard == RETRY,
    )
    guard_budget: float = option(
        0.5,
        "Retry budget",
        "Limit on the extra work of retries, as a share of the sampling: 0.5 is half as much again. 0: no retries.",
        minimum=0.0,
        maximum=10.0,
        step=0.05,
        infotext="DINO Tile guard budget",
        only_with=lambda settings: settings.guard == RETRY,
    )
    guard_strictness: float = option(
        6.0,
        "Guard threshold",
        "How different from the source a place may look, in standard deviations. Lower is stricter.",
        minimum=-5.0,
        maximum=20.0,
        step=0.25,
        infotext="DINO Tile guard threshold",
        only_with=lambda settings: settings.guard != OFF,
    )
    maps: str = option(
        "none",
        "Show maps",
        "Adds pictures: the enlarged source, to compare; what DINO sees in it (semantic); where the result agrees "
        "(consistency). both: the last two. all: all three.",
        choices=tuple(MAPS),
    )
    head: str = option(
        AUTOMATIC,
        "Restoration head",
        "Predicts what DINO would see if the source were sharp. Automatic: the adapter's own, else calibrated. "
        "calibrated: what dinotile has learned for this encoder. None: guidance only by self-similarity.",
        infotext="DINO Tile head",
        only_with=_looking,
    )
    encoder: str = option(
        AUTOMATIC,
        "DINO encoder",
        "DINOv2 or DINOv3 model that looks at the source. Automatic: the adapter's own, else an installed one, DINOv2 "
        "first, else the small built-in one.",
        infotext="DINO Tile encoder",
        only_with=_looking,
        flag="dino",
    )
    patches: int = option(
        64,
        "DINO patches",
        "Patches along the longer side of the source. More shows DINO finer detail and takes longer.",
        minimum=8,
        maximum=256,
        step=1,
        infotext="DINO Tile patches",
        only_with=_looking,
    )
    windows: int = option(
        1,
        "DINO windows",
        "1: DINO sees the source as a whole. 2 or more: in overlapping parts, that many times finer.",
        minimum=1,
        maximum=8,
        step=1,
        infotext="DINO Tile windows",
        only_with=_looking,
    )

    @classmethod
    def parse(cls: type[Own], values: Mapping[str, Any], labels: bool = False, texts: bool = False) -> Own:
        """As of every table. `preset` names a preset; options given explicitly take precedence."""
        parse = super().parse
        if not isinstance(values, Mapping) or "preset" not in values:
            return parse(values, labels, texts)
        given = {name: value for name, value in values.items() if name != "preset"}
        try:
            preset = presets.values(values["preset"], cls)
        except DinotileError as wrong:
            try:
                parse(given, labels, texts)
            except DinotileError as more:
                raise DinotileError(f"{wrong}; {more}") from more
            raise
        start = {name: str(value) for name, value in preset.items()} if texts else preset
        return parse({**start, **given}, labels, texts)

    @classmethod
    def option(cls, name: str) -> Option:
        only = {row.name for row in Txt2Img.table()} - {row.name for row in Settings.table()}
        if cls is Settings and name in only:
            raise DinotileError(f"{name}: only txt2img has this option: leave it out, and use img2img's own")
        return super().option(name)

    def tile_sides(self, base: str) -> tuple[int, int]:
        """(largest, smallest) side of a tile for a checkpoint of that family, `sd15` and so on; see `Host.base`.

        DinotileError if the overlap is too wide for it.
        """
        largest = self.tile or (512 if base in SMALL else 1024)
        if self.overlap > largest // 2:
            raise DinotileError(
                f"overlap: {self.overlap} is not allowed with tile {largest}, give at most {largest // 2}"
            )
        return largest, self.tile or int(LEAST * largest)

    @property
    def looks(self) -> bool:
        """Whether anything looks at the source with DINO."""
        shown = self.shows(SEMANTIC) or bool(self.region_words)
        return bool(self.guidance) or self.adapter != NONE or self.judges or shown

    def shows(self, picture: str) -> bool:
        """Whether that picture is wanted besides the result: SOURCE, SEMANTIC or CONSISTENCY."""
        return picture in MAPS[self.maps]

    @property
    def region_words(self) -> dict[str, str]:
        """The prompts of regions by their letters; none if there are to be no regions."""
        return {} if self.regions == NO_REGIONS else parse_region_prompts(self.region_prompts)

    @property
    def region_count(self) -> int | None:
        """How many regions there are to be; None: as many as there seem to be, or none at all."""
        return int(self.regions) or None if self.regions != AS_MANY_AS_SEEN else None

    @property
    def judges(self) -> bool:
        """Whether the result is compared with the source."""
        return self.guard != OFF or self.shows(CONSISTENCY)

    def _lacks(self, letter: str) -> bool:
        return self.region_count is not None and LETTERS.index(letter) >= self.region_count

    @property
    def prompts_by_tile(self) -> bool:
        """Whether tiles have prompts of their own."""
        return bool(self.tile_prompt or self.tile_prompts or self.region_words) or self.captions != NONE

    @property
    def infotext(self) -> dict[str, Any]:
        """Keys and values for PNG info: the version of the defaults, and all that differs from them and had a part in
        the image."""
        rows = [row for row in self.table() if row.infotext and row.only_with(self)]
        values = {str(row.infotext): getattr(self, row.name) for row in rows if getattr(self, row.name) != row.default}
        return {VERSION: DEFAULTS, **values}

    def conflicts(self, called: Callable[[str], str] = str) -> Iterator[tuple[tuple[str, ...], str]]:
        for name, read in (("tile_prompts", parse_tile_prompts), ("region_prompts", parse_region_prompts)):
            try:
                read(getattr(self, name))
            except DinotileError as error:
                yield (name,), f"{called(name)}: {error}"
        with contextlib.suppress(DinotileError):  # told already
            beyond = [letter for letter in parse_region_prompts(self.region_prompts) if self._lacks(letter)]
            if beyond:
                names = "region_prompts", "regions"
                line = f"there is no region {beyond[0]} where {called('regions')} is {self.regions}"
                yield names, f"{called('region_prompts')}: {line}"
        pairs = [(f"{kind}start", f"{kind}end", getattr(self, f"{kind}end")) for kind in ("", "guidance_")]
        if self.tile:
            pairs.insert(0, ("overlap", "tile", self.tile // 2))
        for name, other, most in pairs:
            value = getattr(self, name)
            if value > most:
                beside = f"{called(other)} {getattr(self, other):g}"
                yield (name, other), f"{called(name)}: {value:g} is not allowed with {beside}, give at most {most:g}"


@dataclass(frozen=True)
class Txt2Img(Settings):
    """Options in the txt2img tab of a WebUI, where images are upscaled as soon as they are generated."""

    target: str = option(
        "scale",
        "Target size",
        "scale: times larger. longest side: in pixels.",
        choices=TARGETS[:2],
        infotext="DINO Tile target",
    )
    denoise: float = option(
        0.3,
        "Denoising strength",
        "Only in txt2img. How much the tiles may change. 0 changes next to nothing.",
        minimum=0.0,
        maximum=1.0,
        step=0.01,
        infotext="DINO Tile denoise",
    )
    steps: int = option(
        0,
        "Steps",
        "Only in txt2img. Sampling steps for the tiles, counted as in img2img. 0: as many as the image has.",
        minimum=1,
        maximum=150,
        step=1,
        zero="the image's",
        infotext="DINO Tile steps",
    )

    @property
    def infotext(self) -> dict[str, Any]:
        """With the denoising strength whatever it is: of such images img2img's own says it."""
        return {**super().infotext, str(self.option("denoise").infotext): self.denoise}


@dataclass(frozen=True)
class Generation(Options):
    """Options of img2img, for the command line; a WebUI has controls of its own for them."""

    model: str = option(
        "mini",
        "Model",
        "mini (built in), a checkpoint file, a diffusers folder or a Hugging Face id.",
    )
    config: str = option(
        "",
        "Configuration",
        "Folder with the diffusers configuration of a checkpoint file. Empty: from the Hugging Face Hub.",
    )
    prediction: str = option(
        AUTOMATIC,
        "Prediction",
        "What the checkpoint's UNet predicts. Automatic: as the file or its configuration says, else epsilon. Must be "
        "given for files of SD 2 that do not say it.",
        choices=PREDICTIONS,
    )
    device: str = option(
        AUTO,
        "Device",
        "Where the model runs, by torch's names: cpu, cuda, cuda:1, xpu, mps. auto: a GPU if there is one (CUDA or "
        "ROCm, XPU, MPS), else the CPU.",
    )
    precision: str = option(
        AUTO,
        "Precision",
        "Number format of the model. auto: fp16 on a GPU, fp32 on the CPU and for mini.",
        choices=PRECISIONS,
    )
    width: int = option(
        0,
        "Width",
        "Width of the result, in pixels; stands for --target 'img2img size'. 0: in proportion to the height.",
        minimum=0,
        maximum=MAX_SIDE,
        step=1,
    )
    height: int = option(
        0,
        "Height",
        "Height of the result, in pixels; stands for --target 'img2img size'. 0: in proportion to the width.",
        minimum=0,
        maximum=MAX_SIDE,
        step=1,
    )
    mask: str = option("", "Mask", "Image of the source's size. White may change, black stays.")
    prompt: str = option("", "Prompt", "What the image shows.")
    negative: str = option("", "Negative prompt", "What the image should not show.")
    clip_skip: int = option(
        1,
        "Clip skip",
        "Layer of the text encoder whose output is used, counted from the end: 1 is the last. SDXL begins at 2.",
        minimum=1,
        maximum=12,
        step=1,
    )
    lora: str = option(
        "",
        "LoRA",
        "LoRAs as FILE.safetensors or FILE.safetensors:WEIGHT, separated by commas; the weight is 1 if left out.",
    )
    vae: str = option("", "VAE", "A VAE in place of the checkpoint's: a .safetensors file, or a diffusers folder.")
    controlnet: str = option(
        "",
        "ControlNet",
        "A ControlNet of the Tile kind: a .safetensors file, or a diffusers folder. Every tile is its own control "
        "image.",
    )
    controlnet_strength: float = option(
        1.0, "ControlNet strength", "0 is off, 1 as trained.", minimum=0.0, maximum=2.0, step=0.05
    )
    denoise: float = option(
        0.35,
        "Denoising strength",
        "How much the tiles may change. 0 changes next to nothing.",
        minimum=0.0,
        maximum=1.0,
        step=0.01,
    )
    steps: int = option(20, "Steps", "Sampling steps at denoising strength 1.", minimum=1, maximum=150, step=1)
    sampler: str = option(
        "DPM++ 2M",
        "Sampler",
        "As in the WebUIs. Not supported: DPM++ 3M SDE, and samplers that call the model twice a step, such as Heun "
        "and DPM++ SDE.",
        choices=SAMPLERS,
    )
    scheduler: str = option(
        AUTOMATIC,
        "Schedule type",
        "How the noise falls from step to step. Automatic: as the checkpoint's configuration spaces its steps.",
        choices=SCHEDULERS,
    )
    cfg: float = option(5.0, "CFG scale", "How strongly the prompt counts.", minimum=1.0, maximum=30.0, step=0.5)
    seed: int = option(0, "Seed", "The same seed gives the same image.", minimum=0, maximum=2**32 - 1)
