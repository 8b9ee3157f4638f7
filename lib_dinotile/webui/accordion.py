"""The controls in the txt2img and img2img tabs, made from the tables of options."""

from __future__ import annotations

import contextlib
import functools
import html
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr
from gradio.context import Context
from modules import infotext_utils
from modules.ui_common import create_refresh_button
from modules.ui_components import InputAccordion

from lib_dinotile import DinotileError, presets
from lib_dinotile.condition.conditioner import installed_weights
from lib_dinotile.dino.checkpoint import encoders
from lib_dinotile.hosts import upscalers
from lib_dinotile.hosts.interrogators import interrogators
from lib_dinotile.options import Option
from lib_dinotile.settings import AUTOMATIC, CALIBRATED, NONE, Settings, Txt2Img
from lib_dinotile.webui import first_minute, folders, infotext
from lib_dinotile.webui.comparison import Comparison
from lib_dinotile.webui.javascript import in_the_browser, to_allowed
from lib_dinotile.webui.notices import Notices
from lib_dinotile.webui.preview import Captions, Img2Img
from lib_dinotile.webui.regions import Naming

TITLE = "DINO Tile"
TABS: dict[str, type[Settings]] = {"txt2img": Txt2Img, "img2img": Settings}
"""Their options."""
PREFIXES = {"txt2img": "txt2img_dinotile_", "img2img": "dinotile_"}
"""What the ids of their controls begin with."""
captions = {tab: Captions(tab) for tab in TABS}
img2img = Img2Img()
"""img2img's own controls, for the preview."""
PREVIEW = ()
"""The row that has the preview, in img2img."""
GROUPS: tuple[tuple[str | None, tuple[tuple[str, ...], ...]], ...] = (
    (None, (("target", "scale", "longest"), ("denoise", "steps"), ("tile",), ("guidance", "guard"), PREVIEW)),
    ("Upscaler and tiles", (("upscaler", "colour"), ("overlap", "order"), ("batch", "flat"))),
    ("Seam fix", (("seams",), ("seam_denoise", "seam_width"))),
    (
        "Prompts per region and tile",
        (
            ("regions", "region_share"),
            ("region_prompts",),
            ("tile_prompt", "tile_prompt_mode"),
            ("captions",),
            ("tile_prompts",),
        ),
    ),
    (
        "Guidance and guard settings",
        (
            ("guard_seeds", "guard_weaker"),
            ("guard_budget", "guard_strictness"),
            ("guidance_start", "guidance_end"),
            ("every", "views"),
            ("distance", "layer"),
            ("decoder",),
            ("maps",),
        ),
    ),
    ("Adapter", (("adapter",), ("strength",), ("start", "end"))),
    ("DINO encoder", (("encoder", "head"), ("patches", "windows"))),
)
"""Titles of foldable groups, and which options stand side by side in them, in tabs that have them.
`enabled` is the accordion's own switch."""


def adapter_choices() -> list[str]:
    """None and the names of the installed adapters."""
    return [NONE, *installed_weights(folders.adapters())]


def head_choices() -> list[str]:
    """Automatic, None, calibrated and the names of the installed restoration heads."""
    return [AUTOMATIC, NONE, CALIBRATED, *folders.trained_heads()]


def encoder_choices() -> list[str]:
    """Automatic, the encoders that are installed, and the published ones, which are downloaded when first used."""
    return [AUTOMATIC, *encoders(folders.encoders())]


CHOICES: dict[str, Callable[[], list[str]]] = {
    "adapter": adapter_choices,
    "encoder": encoder_choices,
    "head": head_choices,
    "upscaler": upscalers.names,
    "captions": lambda: [NONE, *interrogators()],
}
"""Lists that depend on what is installed."""
REFRESHED = ("adapter", "encoder", "head", "upscaler")
"""Those that may grow while the WebUI runs."""


def _component(option: Option, prefix: str) -> Any:
    common = {"label": option.label, "value": option.default, "info": option.help, "elem_id": prefix + option.name}
    choices = CHOICES[option.name]() if option.name in CHOICES else option.choices
    if choices is not None:
        return gr.Dropdown(choices=list(choices), **common)
    if option.type is str:
        return gr.Textbox(lines=option.lines, **common)
    least = option.minimum if option.zero is None else 0
    slider = gr.Slider(minimum=least, maximum=option.maximum, step=option.step, **common)
    if option.type is int:
        in_the_browser(slider.release, to_allowed(option), [slider], [slider])  # also when its number box is left
    return slider


def build(tab: str) -> dict[str, Any]:
    """A tab's accordion; its components by option name, in the order of the table."""
    options, prefix = {option.name: option for option in TABS[tab].table()}, PREFIXES[tab]
    components: dict[str, Any] = {}
    enabled = options["enabled"]
    with InputAccordion(enabled.default, label=TITLE, elem_id=f"{prefix}enabled") as components["enabled"]:
        notices = Notices(components["enabled"], prefix)
        status = first_minute.add(prefix)
        preset = _add_presets(prefix)
        for title, rows in GROUPS:
            with gr.Accordion(title, open=False) if title else contextlib.nullcontext():
                for row in rows:
                    if row == PREVIEW and tab == "img2img":
                        shown = _add_preview(prefix)
                    names = [name for name in row if name in options]
                    if not names:
                        continue
                    with gr.Row(elem_classes="dinotile-row"):
                        for name in names:
                            components[name] = _component(options[name], prefix)
                            if name in REFRESHED:
                                _add_refresh(name, components[name], prefix)
                    if "tile_prompts" in row:
                        _add_captions(components["tile_prompts"], tab)
    _connect_presets(*preset, components, TABS[tab])
    _follow_target(components)
    if tab == "img2img":
        img2img.show_in(*shown, notices, components)
    else:
        notices.connect(components["denoise"])
    first_minute.connect(*status, components)
    return {name: components[name] for name in options}


def _add_presets(prefix: str) -> tuple[Any, Any]:
    chosen = gr.Dropdown(
        choices=list(presets.NAMES),
        value=None,
        label="Preset",
        info="Sets the controls below for a purpose. Change them afterwards as you like.",
        elem_id=f"{prefix}preset",
    )
    chosen.do_not_save_to_config = True  # it is not what the controls are at when the page is loaded
    return chosen, gr.HTML(elem_id=f"{prefix}preset_hint")


def _connect_presets(chosen: Any, hint: Any, components: Mapping[str, Any], table: type[Settings]) -> None:
    names = list(dict.fromkeys(option for name in presets.NAMES for option in presets.values(name, table)))

    def choose(name: str) -> list[Any]:
        values = presets.values(name, table)
        line = f"<p>{html.escape(f'{name}: {presets.find(name).hint}')}</p>"
        return [line, *(gr.update(value=values[each]) if each in values else gr.update() for each in names)]

    outputs = [hint, *(components[name] for name in names)]
    chosen.input(fn=choose, inputs=[chosen], outputs=outputs, show_progress=False)


def _add_preview(prefix: str) -> tuple[Any, Any, Any, Naming, Comparison]:
    with gr.Row():
        button = gr.Button("Preview tiles and time", size="sm", elem_id=f"{prefix}preview")
        comparison = Comparison(prefix)
    text = gr.HTML(elem_id=f"{prefix}preview_text")
    picture = gr.Image(visible=False, interactive=False, type="pil", show_label=False, elem_id=f"{prefix}preview_image")
    naming = Naming(prefix)
    comparison.build()
    return button, text, picture, naming, comparison


def _follow_target(components: Mapping[str, Any]) -> None:
    """Of the sizes only the one that counts is shown."""
    names = ("scale", "longest")

    def sizes(target: str) -> list[Any]:
        settings = Settings(target=target)
        return [gr.update(visible=Settings.option(name).only_with(settings)) for name in names]

    wiring = {"fn": sizes, "inputs": [components["target"]], "outputs": [components[name] for name in names]}
    components["target"].change(**wiring, show_progress=False)
    Context.root_block.load(**wiring, show_progress=False)  # the user's own defaults are set after the page is built


def _add_captions(prompts: Any, tab: str) -> None:
    button = gr.Button("Edit the captions of the last image", size="sm", elem_id=f"{PREFIXES[tab]}take_captions")
    captions[tab].copy(button, prompts)


def _add_refresh(name: str, component: Any, prefix: str) -> None:
    def looked_up() -> dict[str, Any]:
        return first_minute.listed() if name == "encoder" else {"choices": CHOICES[name]()}

    create_refresh_button(component, lambda: None, looked_up, f"{prefix}refresh_{name}")


class InfotextKey(str):
    """An option's key in PNG info. The WebUI gets the value by calling it, and its buttons, which carry values from tab
    to tab, know it by its name."""

    option: Option

    def __new__(cls, option: Option) -> InfotextKey:
        key = super().__new__(cls, option.infotext)
        key.option = option
        return key

    def __call__(self, info: Mapping[str, Any]) -> Any:
        return infotext.read(self.option, info)


def infotext_fields(components: Mapping[str, Any], tab: str) -> list[tuple[Any, Any]]:
    """Which control is set from what when PNG info is pasted.

    What an image of ours leaves out goes to its default then: nothing of an earlier image stays. The switch goes on
    only in the tab that the image was made in: in the other one its size is not what it is here.
    """

    def here(info: Mapping[str, Any]) -> bool:
        try:
            return infotext.is_ours(info) and infotext.is_of_txt2img(info) == (tab == "txt2img")
        except DinotileError as error:
            gr.Warning(str(error))  # the WebUI itself only logs it
            raise

    def key(option: Option) -> Callable[[Mapping[str, Any]], Any]:
        # Only what is alike in both tabs may have a name.
        alike = all(
            any((option.name, option.choices) == (row.name, row.choices) for row in table.table())
            for table in TABS.values()
        )
        return InfotextKey(option) if alike else functools.partial(infotext.read, option)

    keys = [(components[option.name], key(option)) for option in TABS[tab].table() if option.infotext]
    return [(components["enabled"], here), *keys]


def restore_types(*_: Any) -> None:
    """Values of controls in their options' own types, once the WebUI has set the user's defaults.

    It keeps 0.0 as 0, and would then read PNG info in a request as whole numbers.
    """
    for tab, table in TABS.items():
        options = {PREFIXES[tab] + option.name: option for option in table.table()}
        for field in infotext_utils.paste_fields.get(tab, {}).get("fields", ()):
            option = options.get(getattr(field.component, "elem_id", None) or "")
            if option is not None and option.type in (int, float):
                field.component.value = option.type(field.component.value)


def called(args: tuple[Any, ...], table: type[Settings] = Settings) -> Callable[[str], str]:
    """What makes of a refusal what the caller reads: who sent the script's arguments from the page sees labels."""
    return str if args and isinstance(args[0], Mapping) else table.with_label


def settings_from(args: tuple[Any, ...], axes: Mapping[str, Any], table: type[Settings] = Settings) -> Settings:
    """Settings from the script's arguments: one value per option of the table, or, from the API, one dict in front.

    A dict that says anything turns dinotile on, unless it says `enabled: false`. axes: options that an X/Y/Z plot sets
    for this image; they turn it on, too. While it is off, what the controls are at is nobody's business. DinotileError
    if a value is not allowed: it calls options as the caller does, by their names in the API, and by their labels in
    the UI.
    """
    first, on = args[0] if args else False, {"enabled": True} if axes else {}
    if isinstance(first, Mapping):
        return table.parse({"enabled": bool(first), **first, **on, **axes})
    if first is False and not axes:
        return table()
    names = [option.name for option in table.table()]
    if len(args) > len(names):
        raise DinotileError(f"DINO Tile takes {len(names)} arguments, not {len(args)}: give one dict of options")
    return table.parse({**dict(zip(names, args)), **on, **axes}, labels=True)
