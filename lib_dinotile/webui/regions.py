"""The regions of a preview: fields for their words, the interrogators' words for them, and which one a place is in."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
import torch
from modules import shared
from PIL import Image

from lib_dinotile import DinotileError
from lib_dinotile.dino.regions import Regions
from lib_dinotile.engine.flow import map_scale
from lib_dinotile.engine.host import Interrupted
from lib_dinotile.hosts.interrogators import interrogators
from lib_dinotile.hosts.patched import patched
from lib_dinotile.lines import ALIKE, BREAK, COLON, LETTER, LETTERS, SPACE
from lib_dinotile.webui.javascript import in_the_browser

_READ = f"""const lines = text => (text ?? "").split(/[\\r\\n]|{BREAK}/).filter(line => line.trim());
    const read = line => {{
        const found = line.match(/^{SPACE}*({LETTER}){SPACE}*{COLON}(.*)$/);
        const typed = found ? found[1].normalize("NFKC").toUpperCase() : "";
        return [{json.dumps(ALIKE)}[typed] ?? typed, found ? found[2].trim() : ""];
    }};"""
TO_LINES = f"""(typed, text) => {{
    {_READ}
    const words = (typed ?? "").replace(/\\s+/g, " ").replace(/{BREAK}/g, ",").trim();
    const all = lines(text), at = all.findIndex(line => read(line)[0] === "%s");
    all.splice(at < 0 ? all.length : at, at < 0 ? 0 : 1, ...(words ? ["%s: " + words] : []));
    return all.join("\\n");
}}"""
"""The option's text with the words of the field of a letter, in the browser, so that nothing typed waits for the
server, and the other lines stay as they are."""
FROM_LINES = f"""(text) => {{
    {_READ}
    const all = lines(text).map(read);
    return [...{LETTERS!r}].map(letter => all.filter(([of]) => of === letter).map(([, words]) => words).join(" "));
}}"""
"""The words of the fields from the option's text."""


@dataclass(frozen=True)
class KeptRegions:
    """What the page keeps of the regions that it shows: plain values, no tensor."""

    labels: Sequence[Sequence[int]]
    canvas: tuple[int, int]

    @classmethod
    def of(cls, regions: Regions) -> KeptRegions:
        return cls(regions.labels.tolist(), regions.canvas)

    @property
    def regions(self) -> Regions:
        return Regions(torch.tensor(self.labels), self.canvas)


class Naming:
    """The controls below the preview of a tab."""

    def __init__(self, prefix: str) -> None:
        """Builds them, hidden; prefix: of their ids."""
        self.place = gr.HTML(elem_id=f"{prefix}region_at")
        self.shown = gr.State(None)
        with gr.Column(visible=False, elem_id=f"{prefix}naming") as self.all:
            with gr.Row(elem_classes="dinotile-row"):  # of as many as fit side by side
                self.fields = [
                    gr.Textbox(label=letter, visible=False, elem_id=f"{prefix}region_{letter}", max_lines=2)
                    for letter in LETTERS
                ]
            with gr.Row():
                self.buttons = {
                    name: gr.Button(f"Ask {name} for the empty ones", size="sm", elem_id=f"{prefix}ask_{name}")
                    for name in interrogators()
                }

    @property
    def outputs(self) -> list[Any]:
        """What `updates` is for."""
        return [self.place, self.shown, self.all, *self.fields]

    @staticmethod
    def updates(regions: Regions | None) -> list[Any]:
        """The controls for these regions; without any they are hidden. What was typed meanwhile stays."""
        if regions is None:
            return ["", None, gr.update(visible=False), *(gr.update(visible=False) for _ in LETTERS)]
        fields = [
            gr.update(visible=True, label=f"{letter}, {share:.0%} of the picture")
            for letter, share in zip(regions.letters, regions.areas)
        ]
        fields += [gr.update(visible=False)] * (len(LETTERS) - len(fields))
        return ["", KeptRegions.of(regions), gr.update(visible=True), *fields]

    def connect(self, picture: Any, prompts: Any, previews: Sequence[Any]) -> None:
        """picture: the preview; prompts: the control of the option `region_prompts`; previews: events that show one."""
        picture.select(fn=where, inputs=[self.shown], outputs=[self.place], show_progress=False)
        for letter, field in zip(LETTERS, self.fields):
            in_the_browser(field.input, TO_LINES % (letter, letter), [field, prompts], [prompts])
        for listen in (prompts.input, *(event.then for event in previews)):
            in_the_browser(listen, FROM_LINES, [prompts], self.fields)


def where(shown: KeptRegions | None, event: gr.SelectData) -> str:
    """Says in which region a click on the picture is."""
    if shown is None:
        return ""
    regions = shown.regions
    x, y = (place / map_scale(regions.canvas) for place in event.index)
    if x >= regions.canvas[0] or y >= regions.canvas[1]:  # the legend
        return ""
    letter = regions.at(x, y)
    return f"<p>This place is in region <b>{html.escape(letter)}</b>.</p>"


def ask(interrogator: str, source: Image.Image, regions: Regions, words: Mapping[str, str]) -> dict[str, str]:
    """Words of all regions: those that have none get the interrogator's for the square that shows them best.

    source: RGB, of any size. DinotileError if the interrogator fails.
    """
    empty = [letter for letter in regions.letters if not words.get(letter)]
    # What was stopped before is no job of ours, and what is told of the progress has no bar to stand above.
    flags = dict.fromkeys(("interrupted", "skipped", "stopping_generation"), False)
    try:
        with patched(shared.state, textinfo=None, **flags):
            found = interrogators()[interrogator]([crop(source, regions, letter) for letter in empty])
    except Interrupted as error:
        raise DinotileError(f"captions: {interrogator} was stopped") from error
    return {**words, **dict(zip(empty, found))}


def crop(source: Image.Image, regions: Regions, letter: str) -> Image.Image:
    """The part of a source (RGB), of any size, that shows a region best."""
    area, ratio = regions.best_crop(letter), source.width / regions.canvas[0]
    box = [round(side * ratio) for side in (area.x, area.y, area.right, area.bottom)]
    return source.crop((box[0], box[1], max(box[2], box[0] + 1), max(box[3], box[1] + 1)))


def lines(words: Mapping[str, str]) -> str:
    """Words of regions as the option `region_prompts` takes them."""
    return "\n".join(f"{letter}: {text}" for letter, text in sorted(words.items()) if text)
