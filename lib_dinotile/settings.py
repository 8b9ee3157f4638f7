"""The table of options. The UI, the API, PNG info, X/Y/Z axes and the command line are all made from it.

An option is one field of `Settings` (the engine's; everywhere), of `Txt2Img` (what only the txt2img tab of a WebUI has
besides) or of `Generation` (img2img's, which has controls of its own in a WebUI; command line only). Adding an option
is adding a field.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lib_dinotile import DinotileError
from lib_dinotile.lines import LETTERS, parse_region_prompts, parse_tile_prompts
from lib_dinotile.options import Option, Options, option
from lib_dinotile.tiling.colour import CORRECTIONS
from lib_dinotile.tiling.plan import ORDERS
from lib_dinotile.tiling.seams import SEAMS

TARGETS = ("scale", "longest side", "img2img size")
PROMPT_MODES = ("follow", "replace")

MAX_SIDE = 65536
"""Longest side of a canvas, in pixels."""

SMALL = ("sd15", "sd2", "mini")
"""Families of checkpoints that are at home at 512 pixels; all others are at 1024."""

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
SEMANTIC, CONSISTENCY, BOTH = "semantic", "consistency", "both"
MAPS = ("none", SEMANTIC, CONSISTENCY, BOTH)
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
        "Where the size of the result comes from: scale, longest side, or img2img's own Resize to or Resize by.",
        choices=TARGETS,
        infotext="DINO Tile target",
    )
    scale: float = option(
        2.0,
        "Scale",
        "How many times larger the result is; fractions are fine.",
        minimum=1.0,
        maximum=8.0,
        step=0.05,
        infotext="DINO Tile scale",
        only_with=lambda settings: settings.target == "scale",
    )
    longest: int = option(
        2048,
        "Longest side",
        "Of the result, in pixels; the other side in proportion.",
        minimum=8,
        maximum=MAX_SIDE,
        step=1,
        infotext="DINO Tile longest side",
        only_with=lambda settings: settings.target == "longest side",
    )
    upscaler: str = option(
        "Lanczos",
        "Upscaler",
        "Makes the large image that the tiles are then painted on.",
        infotext="DINO Tile upscaler",
    )
    tile: int = option(
        0,
        "Tile size",
        "Side of a tile in pixels. 0: as the checkpoint likes it, 512 for SD 1.5 and 2, 1024 for SDXL and newer ones.",
        minimum=64,
        maximum=2048,
        step=8,
        zero="automatic",
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
        "chess: tiles that do not touch are sampled together; linear: one after the other, row by row; fused: all "
        "advance together, blended at every step; none: no tiles, only the upscaler and the seam pass.",
        choices=ORDERS,
        infotext="DINO Tile order",
    )
    seams: str = option(
        "none",
        "Seam pass",
        "Paints over the borders of the tiles afterwards: in bands, in bands as wide as a tile, or in those and then "
        "where they cross.",
        choices=SEAMS,
        infotext="DINO Tile seams",
    )
    seam_denoise: float = option(
        0.25,
        "Seam denoising strength",
        "How much the seam pass may change.",
        minimum=0.0,
        maximum=1.0,
        step=0.01,
        infotext="DINO Tile seam denoise",
        only_with=lambda settings: settings.seams != "none",
    )
    seam_width: int = option(
        64,
        "Seam width",
        "Width of the bands in pixels.",
        minimum=8,
        maximum=1024,
        step=8,
        infotext="DINO Tile seam width",
        only_with=lambda settings: settings.seams == "bands",
    )
    colour: str = option(
        "wavelet",
        "Colour correction",
        "Keeps the source's colours in every tile. AdaIN: its mean and spread; wavelet: all its large shapes.",
        choices=CORRECTIONS,
        infotext="DINO Tile colour",
    )
    flat: float = option(
        0.0,
        "Pass over flat tiles",
        "Tiles with less detail than this, in levels of 255, stay as they are: 0.9 is bare sky. 0: paint them all.",
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
        "follow: a tile's prompt comes after the main prompt; replace: in place of it.",
        choices=PROMPT_MODES,
        infotext="DINO Tile tile prompt mode",
        only_with=lambda settings: settings.prompts_by_tile,
    )
    captions: str = option(
        NONE,
        "Captions",
        "Prompts every tile with a caption of it, made by one of the WebUI's interrogators.",
        infotext="DINO Tile captions",
        only_with=lambda settings: settings.captions != NONE,
    )
    tile_prompts: str = option(
        "",
        "Prompts by tile",
        'One line a tile, as "3: whiskers"; tiles are counted from 1, row by row. Comes in place of a caption.',
        infotext="DINO Tile tile prompts",
        lines=3,
    )
    regions: str = option(
        AS_MANY_AS_SEEN,
        "Regions",
        "Regions of the source that look alike to DINO, lettered from the largest: as many as there seem to be, or at "
        "most so many. 0: none.",
        choices=REGIONS,
        infotext="DINO Tile regions",
        only_with=_named,
    )
    region_prompts: str = option(
        "",
        "Prompts by region",
        'One line a region, as "A: tabby fur"; Preview shows which is which. Every tile is told what it shows, each '
        "place by its own region; a tile's own line comes in place of that.",
        infotext="DINO Tile region prompts",
        only_with=_named,
        lines=3,
    )
    region_share: float = option(
        0.1,
        "Least share of a region",
        "A tile is told of regions that cover at least this share of it.",
        minimum=0.0,
        maximum=1.0,
        step=0.01,
        infotext="DINO Tile region share",
        only_with=_named,
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
        only_with=_adapted,
    )
    start: float = option(
        0.0,
        "Adapter start",
        "Share of the steps after which the adapter begins.",
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
        "Stay true to the source",
        "How strongly every tile is steered towards what DINO sees in the source there (guidance strength). 0 is off.",
        minimum=0.0,
        maximum=4.0,
        step=0.05,
        infotext="DINO Tile guidance",
    )
    guidance_start: float = option(
        0.0,
        "Guidance start",
        "Share of the steps after which guidance begins.",
        minimum=0.0,
        maximum=1.0,
        step=0.05,
        infotext="DINO Tile guidance start",
        only_with=_guided,
    )
    guidance_end: float = option(
        0.7,
        "Guidance end",
        "Share of the steps after which guidance stops; the last steps run unguided.",
        minimum=0.0,
        maximum=1.0,
        step=0.05,
        infotext="DINO Tile guidance end",
        only_with=_guided,
    )
    every: int = option(
        1,
        "Guidance every",
        "Guides at every n-th step; more is faster.",
        minimum=1,
        maximum=20,
        step=1,
        infotext="DINO Tile guidance every",
        only_with=_guided,
    )
    views: int = option(
        1,
        "Guidance views",
        "How often the encoder looks at each of them, every time a little beside; more steers better and is slower.",
        minimum=1,
        maximum=8,
        step=1,
        infotext="DINO Tile guidance views",
        only_with=_guided,
    )
    distance: str = option(
        "patches",
        "Guidance distance",
        "What is to agree with the source: patches one by one, or how they resemble each other.",
        choices=DISTANCES,
        infotext="DINO Tile guidance distance",
        only_with=_guided,
    )
    layer: int = option(
        2,
        "Guidance layer",
        "Layer of the encoder that guidance looks at, counted from the end: 1 is the last.",
        minimum=1,
        maximum=40,
        step=1,
        infotext="DINO Tile guidance layer",
        only_with=_guided,
    )
    decoder: str = option(
        AUTOMATIC,
        "Guidance decoder",
        "What guidance sees the unfinished picture through. Automatic: the first of them that needs no download.",
        choices=DECODERS,
        infotext="DINO Tile guidance decoder",
        only_with=_guided,
    )
    guard: str = option(
        "retry",
        "Guard",
        "Compares every painted tile with the source. report: only says what is in doubt; blend back: shows the source "
        "there; retry: paints it again first.",
        choices=POLICIES,
        infotext="DINO Tile guard",
    )
    guard_seeds: int = option(
        2,
        "Retries with other seeds",
        "How often what is in doubt is painted again, at most.",
        minimum=0,
        maximum=16,
        step=1,
        infotext="DINO Tile guard seeds",
        only_with=lambda settings: settings.guard == RETRY,
    )
    guard_weaker: int = option(
        1,
        "Retries with less denoise",
        "How often after that, with 0.7 of the denoising strength each time.",
        minimum=0,
        maximum=16,
        step=1,
        infotext="DINO Tile guard weaker",
        only_with=lambda settings: settings.guard == RETRY,
    )
    guard_budget: float = option(
        0.5,
        "Retry budget",
        "What painting again may cost at most, as a share of the sampling work (pixels times steps, not seconds) "
        "without it; tiles most in doubt come first. 0: nothing is painted again.",
        minimum=0.0,
        maximum=10.0,
        step=0.05,
        infotext="DINO Tile guard budget",
        only_with=lambda settings: settings.guard == RETRY,
    )
    guard_strictness: float = option(
        6.0,
        "Guard threshold",
        "How far from the source a place may look before it is in doubt, in standard deviations of what is known to be "
        "true: less is stricter.",
        minimum=-5.0,
        maximum=20.0,
        step=0.25,
        infotext="DINO Tile guard threshold",
        only_with=lambda settings: settings.guard != OFF,
    )
    maps: str = option(
        "none",
        "Show maps",
        "Besides the image: what DINO sees in the source, with the tiles; how well the result agrees with it.",
        choices=MAPS,
    )
    head: str = option(
        AUTOMATIC,
        "Restoration head",
        "Tells guidance and guard what DINO would see if the source were sharp. Automatic: the one in the adapter's "
        "file, if it has any, else calibrated: made by dinotile itself, once for every encoder. None: guidance is off.",
        infotext="DINO Tile head",
        only_with=_looking,
    )
    encoder: str = option(
        AUTOMATIC,
        "DINO encoder",
        "The DINOv2 or DINOv3 model that looks at the source. Automatic: the one that the adapter was trained with, "
        "else one that is installed, a DINOv2 first.",
        infotext="DINO Tile encoder",
        only_with=_looking,
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
        only_with=_looking,
    )
    windows: int = option(
        1,
        "DINO windows",
        "1: the encoder sees the whole source at once. More: that many times finer, in overlapping windows.",
        minimum=1,
        maximum=8,
        step=1,
        infotext="DINO Tile windows",
        only_with=_looking,
    )

    @classmethod
    def option(cls, name: str) -> Option:
        only = {row.name for row in Txt2Img.table()} - {row.name for row in Settings.table()}
        if cls is Settings and name in only:
            raise DinotileError(
                f"{name}: only txt2img has this option, what img2img itself is set to counts: leave it out"
            )
        return super().option(name)

    def for_base(self, base: str) -> Settings:
        """With automatic values resolved for a checkpoint of that family, `sd15` and so on; see `Host.base`."""
        return self if self.tile else dataclasses.replace(self, tile=512 if base in SMALL else 1024)

    @property
    def looks(self) -> bool:
        """Whether anything looks at the source with DINO."""
        shown = self.maps != "none" or bool(self.region_words)
        return bool(self.guidance) or self.adapter != NONE or self.guard != OFF or shown

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
        return self.guard != OFF or self.maps in (CONSISTENCY, BOTH)

    def _lacks(self, letter: str) -> bool:
        return self.region_count is not None and LETTERS.index(letter) >= self.region_count

    @property
    def prompts_by_tile(self) -> bool:
        """Whether tiles have prompts of their own."""
        return bool(self.tile_prompt or self.tile_prompts or self.region_words) or self.captions != NONE

    @property
    def infotext(self) -> dict[str, Any]:
        """Keys and values for PNG info: all options that had a part in the image."""
        return {
            row.infotext: getattr(self, row.name)
            for row in self.table()
            if row.infotext and getattr(self, row.name) != "" and row.only_with(self)
        }

    def __post_init__(self) -> None:
        parse_tile_prompts(self.tile_prompts)
        beyond = [letter for letter in parse_region_prompts(self.region_prompts) if self._lacks(letter)]
        if beyond:
            raise DinotileError(f"region_prompts: there is no region {beyond[0]} where regions is {self.regions}")
        if self.tile and self.overlap > self.tile // 2:
            raise DinotileError(
                f"overlap: {self.overlap} is not allowed with tile {self.tile}, give at most {self.tile // 2}"
            )
        for kind in ("", "guidance_"):
            start, end = getattr(self, f"{kind}start"), getattr(self, f"{kind}end")
            if start > end:
                raise DinotileError(
                    f"{kind}start: {start:g} is not allowed with {kind}end {end:g}, give at most {end:g}"
                )


@dataclass(frozen=True)
class Txt2Img(Settings):
    """Options in the txt2img tab of a WebUI, where images are upscaled as soon as they are generated."""

    target: str = option(
        "scale",
        "Target size",
        "Where the size of the result comes from: scale, or longest side.",
        choices=TARGETS[:2],
        infotext="DINO Tile target",
    )
    denoise: float = option(
        0.3,
        "Denoising strength",
        "In txt2img only: how much the tiles may change; 0 leaves them as they are.",
        minimum=0.0,
        maximum=1.0,
        step=0.01,
        infotext="DINO Tile denoise",
    )
    steps: int = option(
        0,
        "Steps",
        "In txt2img only: sampling steps of the tiles, counted as in img2img. 0: as many as the image has.",
        minimum=1,
        maximum=150,
        step=1,
        zero="the image's",
        infotext="DINO Tile steps",
    )


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
        "Folder with the diffusers configuration for a checkpoint file; empty: from the Hugging Face Hub.",
    )
    prediction: str = option(
        AUTOMATIC,
        "Prediction",
        "What the checkpoint's UNet predicts. Automatic: what the file or its configuration says, else epsilon.",
        choices=PREDICTIONS,
    )
    device: str = option(
        AUTO,
        "Device",
        "Where the model computes, as torch names it: cpu, cuda, cuda:1, xpu, mps ... auto: a GPU (CUDA or ROCm, else "
        "XPU, else MPS) if there is any, else the CPU.",
    )
    precision: str = option(
        AUTO,
        "Precision",
        "What the model computes in. auto: fp16 on a GPU, fp32 on a CPU and for mini.",
        choices=PRECISIONS,
    )
    width: int = option(
        0, "Width", "With --target 'img2img size'; 0: in proportion to the height.", minimum=0, maximum=MAX_SIDE, step=1
    )
    height: int = option(
        0, "Height", "With --target 'img2img size'; 0: in proportion to the width.", minimum=0, maximum=MAX_SIDE, step=1
    )
    mask: str = option("", "Mask", "Image that is white where the result may change, as large as the source.")
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
    sampler: str = option(
        "DPM++ 2M",
        "Sampler",
        "As in the WebUIs. Not there: DPM++ 3M SDE, and those that ask the model twice a step, as Heun and DPM++ SDE.",
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
