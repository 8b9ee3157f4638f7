"""The WebUI's X/Y/Z plot script, as a request asks for it."""

from __future__ import annotations

from typing import Any

from client import Reply, WebUI
from PIL import Image

SCRIPT = "x/y/z plot"
OURS = "[DINO Tile] "


class Plot:
    """Makes the argument list of the plot script, as the WebUI describes it."""

    def __init__(self, webui: WebUI, img2img: bool = True) -> None:
        """img2img: of that tab, else of txt2img."""
        scripts = webui.get("sdapi/v1/script-info").json()
        self._args = next(s["args"] for s in scripts if s["name"] == SCRIPT and s["is_img2img"] == img2img)

    @property
    def axes(self) -> list[str]:
        """Labels of the options that are axes, in their order."""
        types = next(arg["choices"] for arg in self._args if arg["label"] == "X type")
        return [label.removeprefix(OURS) for label in types if label.startswith(OURS)]

    def args(self, legend: bool = False, **axes: tuple[str, list[Any]]) -> list[Any]:
        """axes: x, y, z -> (label of the option, or of an axis of the WebUI's own, values)."""
        values, dropdown = {}, set()
        for letter in "XYZ":
            label, wanted = axes.get(letter.lower(), ("Nothing", []))
            choices = next(arg["choices"] for arg in self._args if arg["label"] == f"{letter} type")
            label = OURS + label if OURS + label in choices else label
            values[f"{letter} type"] = choices.index(label)
            values[f"{letter} values"] = ", ".join(str(value) for value in wanted)
            dropdown.add(f"{letter} values")
        values |= {"Draw legend": legend, "Include Sub Images": True}
        row, seen = [], set()
        for arg in self._args:
            label = arg["label"]
            if label in dropdown and label in seen:  # of two of that name the second is the list of choices
                row.append([value for value in values[label].split(", ") if value])
            else:
                row.append(values.get(label, arg["value"]))
            seen.add(label)
        return row


def run(webui: WebUI, source: Image.Image, options: dict[str, Any], args: list[Any]) -> Reply:
    return webui.img2img(source, options, script_name=SCRIPT, script_args=args)
