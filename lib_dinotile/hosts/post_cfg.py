"""Post-CFG functions of the Forge family's samplers, where the model is given a batch in several parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KEY = "sampler_post_cfg_function"


class PostCFG:
    """The functions are called for each part, and then once more for the whole batch: CFG++ samplers go on with the
    `uncond_denoised` that they were called with last."""

    def __init__(self, extra: Mapping[str, Any]) -> None:
        """extra: what the sampler gives the denoiser."""
        options = extra.get("model_options") or {}
        self._functions = list(options.get(KEY, ()))
        self._parts: list[dict[str, Any]] = []
        self.extra = {"model_options": {**options, KEY: [*self._functions, self._record]}} if self._functions else {}
        """What the denoiser is given for each part in place of that."""

    def _record(self, args: dict[str, Any]) -> Any:
        self._parts.append(args)
        return args["denoised"]

    def show(self, order: Tensor) -> None:
        """Calls the functions for the whole batch; order: the tiles' places in the parts, one after another."""
        if len(self._parts) > 1:
            whole = {name: _joined([part[name] for part in self._parts], order) for name in self._parts[0]}
            for function in self._functions:
                function(whole)
        self._parts.clear()


def _joined(values: list[Any], order: Tensor) -> Any:
    return torch.cat(values)[order] if isinstance(values[0], Tensor) else values[0]
