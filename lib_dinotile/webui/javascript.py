"""What happens in the browser alone, so that nothing typed waits for the server."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

from lib_dinotile.options import Option


def in_the_browser(listen: Any, script: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Connects an event with JavaScript alone. Gradio 3 has another name for it."""
    name = "js" if "js" in inspect.signature(listen).parameters else "_js"
    listen(fn=None, inputs=list(inputs), outputs=list(outputs), **{name: script})


def to_allowed(option: Option) -> str:
    """The value of a whole number's slider that is nearest to what was typed into its number box, which takes anything:
    gradio itself only minds the ends of the slider."""
    assert option.minimum is not None and option.maximum is not None  # as all numbers have
    step = int(option.step or 1)
    least, most = math.ceil(option.minimum / step) * step, option.maximum // step * step
    near = f"Math.min(Math.max(Math.round(typed / {step}) * {step}, {least}), {most:.0f})"
    return f"(typed) => typed < {least / 2} ? 0 : {near}" if option.zero else f"(typed) => {near}"
