"""Post-CFG functions of the Forge family's samplers, where the model is given a batch in several parts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

KEY = "sampler_post_cfg_function"


@contextlib.contextmanager
def whole_after_parts(extra: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], Callable[[Tensor], None]]]:
    """Lets a sampler's functions see the batch as a whole: a CFG++ sampler goes on with the `uncond_denoised` that its
    function was called with last.

    extra: what the sampler gives the denoiser. Gives what each part is given besides, and a function to be called after
    all parts, which calls the sampler's for the whole batch; order: the tiles' places in the parts, one after another.
    """
    options = extra.get("model_options") or {}
    functions, parts = list(options.get(KEY, ())), list[dict[str, Any]]()

    def record(args: dict[str, Any]) -> Tensor:
        parts.append(args)
        return args["denoised"]

    def show_whole(order: Tensor) -> None:
        if len(parts) > 1:
            whole = {
                name: torch.cat([part[name] for part in parts])[order] if isinstance(value, Tensor) else value
                for name, value in parts[0].items()
            }
            for function in functions:
                function(whole)

    try:
        yield {"model_options": {**options, KEY: [*functions, record]}} if functions else {}, show_whole
    finally:
        parts.clear()  # they have the options, which have `record`: a circle, in which tensors would stay
