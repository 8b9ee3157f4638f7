"""The Preview button: an image's tiles, what DINO sees in it and how long it will take, before anything is painted."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import gradio as gr
import torch
from modules import (
    call_queue,
    devices,
    errors,
    images,
    infotext_utils,
    processing,
    sd_models,
    shared,
    ui_tempdir,
)
from PIL import Image, ImageOps

from lib_dinotile import DinotileError
from lib_dinotile.condition.conditioner import Conditioner, installed_weights
from lib_dinotile.condition.names import check_names
from lib_dinotile.dino.encoder import encoder_dtype
from lib_dinotile.dino.regions import Regions
from lib_dinotile.engine import flow
from lib_dinotile.engine.host import check_name
from lib_dinotile.engine.retry import reserve
from lib_dinotile.hosts import upscalers
from lib_dinotile.hosts.interrogators import interrogators
from lib_dinotile.hosts.samplers import steps_asked
from lib_dinotile.hosts.webui import base_of, resized_by
from lib_dinotile.settings import NO_REGIONS, NONE, OFF, SEMANTIC, Settings
from lib_dinotile.tiling.plan import TilePlan
from lib_dinotile.webui import folders
from lib_dinotile.webui.area import CROP, FILL, Area
from lib_dinotile.webui.comparison import Comparison
from lib_dinotile.webui.notices import Notices, as_html, notices
from lib_dinotile.webui.regions import Naming, ask, lines
from lib_dinotile.webui.speed import Estimate, guess

IMAGES = ("img2img_image", "img2img_sketch", "img2maskimg", "inpaint_sketch", "img_inpaint_base")
"""The places for a source, in the order of img2img's tabs."""
BACKGROUND = "logical_image_background"
"""Class of the component that holds the picture of a place in Forge."""
BATCH = len(IMAGES)
"""Number of the tab that has no picture to show."""
NUMBERS = {
    "steps": "img2img_steps",
    "denoise": "img2img_denoising_strength",
    "width": "img2img_width",
    "height": "img2img_height",
    "resize": "resize_mode",
    "scale": "img2img_scale",
    "area": "img2img_inpaint_full_res",
}
"""img2img's own controls that a preview depends on."""
INPAINTING = tuple(IMAGES.index(name) for name in ("img2maskimg", "inpaint_sketch", "img_inpaint_base"))
"""Numbers of the tabs that have a mask."""
GALLERY = "img2img_gallery"
PROMPTS = Settings.option("region_prompts")
INFORMATION = "generation_info_"
"""With a tab's name: its hidden text box with the infotexts of the images that it shows, as JSON (`Processed.js`)."""
LAST = f"{INFORMATION}img2img"
"""By the time that this is there, all of them are."""


def loaded() -> Any:
    """The WebUI's model if it is loaded now, else None."""
    data = sd_models.model_data
    if hasattr(data, "forge_loading_parameters") and data.forge_hash != str(data.forge_loading_parameters):
        return None  # another one is chosen, Forge loads it when it is first used
    return data.sd_model


def checkpoint() -> Any:
    """The WebUI's model, loaded if it is not yet. DinotileError if there is none."""
    if not hasattr(sd_models, "forge_model_reload"):
        model = shared.sd_model
    elif sd_models.model_data.forge_loading_parameters.get("checkpoint_info"):
        model = sd_models.forge_model_reload()[0]
    else:
        model = None
    if model is None:
        raise DinotileError("no checkpoint is loaded: choose one")
    return model


def flat(image: Image.Image) -> Image.Image:
    """As img2img takes it: turned as its EXIF says, RGB, on the WebUI's own background."""
    return images.flatten(ImageOps.exif_transpose(image), shared.opts.img2img_background_color)


class Preview:
    """How an image would be upscaled with these settings, and img2img's own size and resize mode."""

    settings: Settings
    plan: TilePlan

    def __init__(
        self, size: tuple[int, int], settings: Settings, model: Any, given: tuple[int, int] = (0, 0), resize: int = 0
    ) -> None:
        """size, given: (width, height) of the image and of img2img's `Resize to`. DinotileError as in a run."""
        self.settings = settings
        check_name("upscaler", settings.upscaler, upscalers.names())
        if settings.captions != NONE:
            check_name("captions", settings.captions, [NONE, *interrogators()])
        self._adapters, self._heads = installed_weights(folders.adapters()), folders.trained_heads()
        check_names(settings, self._adapters, self._heads, folders.encoders(), trusted=False)
        img2img = SimpleNamespace(width=given[0], height=given[1], resize_mode=resize, image_mask=None)
        self._area = Area(img2img, settings, size)
        self.plan = flow.plan_tiles(self._area.canvas, settings, base_of(model), processing.opt_f)

    @property
    def workload(self) -> tuple[int, int]:
        """(tiles, pixels of all of them)."""
        return flow.workload(self.plan, self.settings)

    def semantic_map(self, image: Image.Image) -> Image.Image:
        """The semantic map of the image (RGB), with the tiles. DinotileError if an encoder or adapter is not there."""
        return flow.preview(self._conditioner(), self._area.cut(image), self.plan)

    def regions(self, image: Image.Image) -> Regions:
        """The regions of the image (RGB) over the result. DinotileError likewise."""
        return self._conditioner().regions(self._area.cut(image), self.plan.size)

    def asked(
        self, image: Image.Image, regions: Regions, words: Mapping[str, str], interrogator: str
    ) -> dict[str, str]:
        """The words of the image's regions, with the interrogator's for those that have none."""
        return ask(interrogator, self._area.cut(image), regions, words)

    def region_map(self, image: Image.Image, regions: Regions, words: Mapping[str, str]) -> Image.Image:
        """The regions of the image as colours, with their words and the tiles."""
        return flow.draw_regions(self._area.cut(image), regions, self.plan, words)

    def _conditioner(self) -> Conditioner:
        device = torch.device(devices.device)
        return Conditioner.without_model(
            dataclasses.replace(self.settings, maps=SEMANTIC, guard=OFF),
            self._heads,
            device,
            encoder_dtype(device, devices.dtype),
            self._adapters,
            folders.encoders(),
            trusted=False,
        )


def waves(plan: TilePlan) -> Sequence[Sequence[int]]:
    """The numbers of the tiles, counted from 1 row by row, in their order; those of a wave together."""
    numbers = {tile: number for number, tile in enumerate(plan.tiles, 1)}
    return [] if plan.order == "none" else [[numbers[tile] for tile in wave] for wave in plan.waves]


class Img2Img:
    """img2img's own controls, picked up while the WebUI builds its page."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        """The page is built anew."""
        self._found: dict[str, Any] = {}
        self._place: str | None = None
        self._hidden: list[Any] = []
        self._own: tuple[Any, Any, Any, Naming, Comparison, Notices, Mapping[str, Any]] | None = None

    def on_component(self, component: Any, **arguments: Any) -> None:
        """Called with every component that is built, and the arguments that it is built with."""
        name = arguments.get("elem_id") or ""
        if name == "mode_img2img":  # img2img's part of the page begins
            self._forget()
        if name in IMAGES:
            self._place = name
        if name in IMAGES and isinstance(component, gr.Image):
            self._found[name] = component
        elif self._place and BACKGROUND in (arguments.get("elem_classes") or ()):
            self._found.setdefault(self._place, component)
        elif name in (GALLERY, *NUMBERS.values()):
            self._found[name] = component
        elif not name and isinstance(component, gr.Number) and not component.visible:
            self._hidden.append(component)  # the numbers of the chosen tabs: of sources, and of sizes
        elif name == LAST:
            self._connect(component)

    def show_in(
        self,
        button: Any,
        text: Any,
        picture: Any,
        naming: Naming,
        comparison: Comparison,
        notices: Notices,
        options: Mapping[str, Any],
    ) -> None:
        """Set the button, the line, the image and the fields of the preview, what compares the result, the notices,
        and the controls of the options."""
        self._own = button, text, picture, naming, comparison, notices, options

    def _connect(self, information: Any) -> None:
        if self._own is None:
            return
        button, text, picture, naming, comparison, notices, options = self._own
        places = [name for name in IMAGES if name in self._found]
        numbers = [key for key, name in NUMBERS.items() if name in self._found]
        tabs = self._hidden[:2]
        inputs = [
            *(self._found[name] for name in places),
            *(self._found[NUMBERS[key]] for key in numbers),
            *tabs,
            *options.values(),
        ]

        def show_preview(interrogator: str, values: Sequence[Any]) -> list[Any]:
            rest = iter(values)
            sources = {name: next(rest) for name in places}
            img2img = {key: next(rest) for key in numbers}
            chosen, sizing = [next(rest) for _ in tabs] if len(tabs) == 2 else (0, 0)
            where = sources, int(chosen or 0), int(sizing or 0), img2img
            return answer(partial(show, *where, dict(zip(options, rest)), interrogator), bool(interrogator))

        prompts = options["region_prompts"]

        def clicked(interrogator: str) -> Callable[..., list[Any]]:
            return lambda *values: show_preview(interrogator, values)

        previews = [
            each.click(fn=clicked(name), inputs=inputs, outputs=[text, picture, *naming.outputs, prompts])
            for name, each in {"": button, **naming.buttons}.items()
        ]
        naming.connect(picture, prompts, previews)

        def laid(size: tuple[int, int], resize: int | None, *values: Any) -> Image.Image:
            source = source_of(dict(zip(places, values)), int(values[len(places)] or 0) if tabs else 0)
            return images.resize_image(resize if resize in (CROP, FILL) else 0, source, *size, "None")

        inputs = [self._found[NUMBERS["resize"]], *(self._found[name] for name in places), *tabs[:1]]
        comparison.connect(self._found[GALLERY], information, inputs, laid)
        denoise, area = (self._found.get(NUMBERS[key]) for key in ("denoise", "area"))
        notices.connect(denoise, area, tabs[0] if tabs else None, INPAINTING)


class Captions:
    """A tab's button that copies the captions of its last image."""

    def __init__(self, tab: str) -> None:
        self._place, self._own = f"{INFORMATION}{tab}", list[tuple[Any, Any]]()

    def copy(self, button: Any, prompts: Any) -> None:
        """Set the button, and the control that they are copied into."""
        self._own = [(button, prompts)]

    def on_component(self, component: Any, **arguments: Any) -> None:
        """Called with every component that is built, and the arguments that it is built with."""
        if arguments.get("elem_id") == self._place and self._own:
            button, prompts = self._own.pop()
            button.click(fn=last_captions, inputs=[component], outputs=[prompts], show_progress=False)


def last_captions(information: str | None) -> Any:
    """Prompts of the tiles of the last image of a page, one line each.

    information: of that page's images, and so of no other user's; without an image the control stays as it is.
    """
    texts = json.loads(information or "{}").get("infotexts")
    if not texts:
        return gr.update()
    return infotext_utils.parse_generation_parameters(texts[-1], []).get(Settings.option("tile_prompts").infotext, "")


def answer(make: Callable[[], PreviewResult], asked: bool = False) -> list[Any]:
    """Updates of the line, of the image, of what belongs to the regions and of their prompts.

    The line also says why an image cannot be upscaled. make: see `show`; asked: an interrogator was, for words.
    """
    try:
        with call_queue.queue_lock:  # after what is being generated
            found = make()
        ui_tempdir.on_tmpdir_changed()  # Forge Neo puts pictures into a folder that it makes only when that is set
        said = f"<p>{html.escape(found.line)}</p>{as_html(found.notices)}"
        line, image = gr.update(value=said), gr.update(value=found.picture, visible=True)
        prompts = gr.update(value=lines(found.words)) if asked else gr.update()
        return [line, image, *Naming.updates(found.regions), prompts]
    except DinotileError as error:
        line = Settings.with_label(str(error))
    except Exception as error:
        errors.report("DINO Tile: preview failed", exc_info=True)
        line = f"the preview failed: {' '.join(str(error).split()) or type(error).__name__}"
    failed = gr.update(value=f"<div class='error'>{html.escape(line)}</div>"), gr.update(value=None, visible=False)
    return [*failed, *Naming.updates(None), gr.update()]


@dataclasses.dataclass(frozen=True)
class PreviewResult:
    """A preview."""

    line: str
    picture: Image.Image
    """RGB."""
    regions: Regions | None
    words: Mapping[str, str]
    """Of the regions."""
    notices: Sequence[str] = ()


def source_of(sources: Mapping[str, Any], chosen: int) -> Image.Image:
    """The source (RGB) in the chosen tab. DinotileError if there is none."""
    if chosen == BATCH:
        raise DinotileError("this works on a single image: choose a tab other than Batch")
    source = sources.get(IMAGES[chosen])
    source = source["image"] if isinstance(source, dict) else source  # with a mask drawn on it
    if source is None:
        raise DinotileError("there is no image to upscale: drop one into the img2img tab")
    return flat(source)


def show(
    sources: Mapping[str, Any],
    chosen: int,
    sizing: int,
    img2img: Mapping[str, Any],
    options: Mapping[str, Any],
    interrogator: str = "",
) -> PreviewResult:
    """The preview of an image; interrogator: is asked for regions without words, if any. DinotileError as in a run."""
    source, settings = source_of(sources, chosen), Settings.parse({**options, "enabled": True}, labels=True)
    given = int(img2img.get("width") or 0), int(img2img.get("height") or 0)
    if sizing == 1:  # Resize by
        given = resized_by(source.size, img2img["scale"])
    model = checkpoint()
    preview = Preview(source.size, settings, model, given, int(img2img.get("resize") or 0))
    regions, words, beyond = None, settings.region_words, ""
    if settings.regions == NO_REGIONS:
        picture = preview.semantic_map(source)
    else:
        regions = preview.regions(source)
        beyond = "".join(letter for letter in words if letter not in regions.letters)
        words = {letter: text for letter, text in words.items() if letter not in beyond}
        if interrogator:
            words = preview.asked(source, regions, words, interrogator)
        picture = preview.region_map(source, regions, words)
    job = SimpleNamespace(steps=int(img2img.get("steps") or 20), denoising_strength=img2img.get("denoise") or 0)
    line = describe(preview, guess(model, preview.workload[1], preview.plan.tile_size, steps_asked(job)))
    if beyond:
        line += f" There is no region {beyond[0]} in this image: take its line out of {PROMPTS.label}."
    only_masked = chosen in INPAINTING and bool(img2img.get("area"))
    if only_masked:
        line += " These are the tiles of the whole image; Only masked paints the masked part alone."
    return PreviewResult(line, picture, regions, words, notices(img2img.get("denoise"), only_masked))


def describe(preview: Preview, estimate: Estimate | None) -> str:
    """The preview in a line."""
    plan, (tiles, _) = preview.plan, preview.workload
    main = 0 if plan.order == "none" else len(plan)
    parts = [f"{main} tile{'s' * (main > 1)} of {plan.tile_size[0]} x {plan.tile_size[1]}"] if main else []
    if tiles > main:
        parts.append(f"{tiles - main} for the seam fix")
    work = " and ".join(parts) or "nothing to paint"
    time = f", {duration(estimate, preview.settings)}" if tiles else ""
    colours = "what DINO sees: alike where the image is alike."
    if preview.settings.regions != NO_REGIONS:
        colours = (
            "regions that look alike to DINO. Describe them below: the prompt of each tile then says what it shows."
        )
    return f"{plan.width} x {plan.height} pixels: {work}{time}. In colours: {colours}"


def duration(estimate: Estimate | None, settings: Settings) -> str:
    """How long it will take, with all that the guard may paint again."""
    if estimate is None:
        return "time not known yet"
    more = reserve(settings)
    most = f", up to {in_words(estimate.seconds * (1 + more))} if the guard repaints tiles" if more else ""
    missing = "; guidance takes extra time, known after the first run"
    return f"about {in_words(estimate.seconds)}{most}{missing if estimate.tried and settings.guidance else ''}"


def in_words(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = int(seconds / 60 + 0.5)
    return f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"
