"""Conditionings of single tiles, put together for the WebUI's samplers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modules import prompt_parser


def stacked(entries: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Conditionings of tiles as the sampler takes them, from entries (cond, uncond) of the batches."""
    batch = [cond for cond, _ in entries]
    uncond = None if entries[0][1] is None else [uncond for _, uncond in entries]
    return prompt_parser.MulticondLearnedConditioning(shape=(len(batch),), batch=batch), uncond


def form(cond: Any) -> Any:
    """Equal for conditionings that the WebUI stacks as they are: it pads short ones to the length of long
    ones, which changes what they say, and Forge weighs the parts of all prompts alike."""

    def length(entry: Any) -> int:
        return (entry["crossattn"] if isinstance(entry, dict) else entry).shape[0]

    return tuple((part.weight, tuple((at.end_at_step, length(at.cond)) for at in part.schedules)) for part in cond)
