"""Adapters that the tests lend to the WebUI: such that fit its checkpoint, and such that do not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lib_dinotile.condition.adapter import Adapter, AdapterConfig
from lib_dinotile.condition.adapter_file import save_adapter
from lib_dinotile.condition.conditioner import MINI
from lib_dinotile.condition.shape import UNetShape

ENCODER = "mini"
FEATURES = json.loads((MINI / "encoder" / "config.json").read_text(encoding="utf-8"))["hidden_size"]
SPREAD = 0.05
"""Standard deviation of the random output weights: enough to be seen, not enough to break the picture."""


class Adapters:
    """Names of adapters, as DINO Tile's option takes them; a file is written when its name is first asked for."""

    def __init__(self, folder: Path, base: str, channels: Sequence[int], blocks: int) -> None:
        """folder: below the WebUI's adapters; the rest describes the loaded checkpoint, see UNetShape.build."""
        self._folder = folder
        self._fitting = {
            "base": base,
            "shape": UNetShape.build(list(channels), blocks),
            "encoder": ENCODER,
            "features": FEATURES,
            "width": 64,
        }
        self._blocks, self._channels = blocks, list(channels)

    def _name(self, stem: str) -> str:
        return f"{self._folder.name}/{stem}"

    def _write(self, stem: str, spread: float = 0.0, **config: Any) -> str:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            adapter = Adapter(AdapterConfig(**{**self._fitting, **config}))
            for output in adapter.outputs:
                torch.nn.init.normal_(output.weight, std=spread)
        save_adapter(adapter, self._folder / f"{stem}.safetensors")
        return self._name(stem)

    @cached_property
    def untrained(self) -> str:
        """Fits, and changes nothing."""
        return self._write("untrained")

    @cached_property
    def random(self) -> str:
        """Fits, and changes the image."""
        return self._write("random", SPREAD)

    @cached_property
    def other_shape(self) -> str:
        """For a UNet with one more residual block per level."""
        return self._write("other-shape", SPREAD, shape=UNetShape.build(self._channels, self._blocks + 1))

    @cached_property
    def other_base(self) -> str:
        """For another family of checkpoints."""
        return self._write("other-base", SPREAD, base="nobase")

    @cached_property
    def other_encoder(self) -> str:
        """For an encoder that is nowhere."""
        return self._write("other-encoder", SPREAD, encoder="no-such-encoder")

    @cached_property
    def other_width(self) -> str:
        """For tokens of another width than the encoder's."""
        return self._write("other-width", SPREAD, features=FEATURES + 8)

    @cached_property
    def cut_off(self) -> str:
        """The file ends too early."""
        whole = (self._folder / f"{Path(self.random).name}.safetensors").read_bytes()
        (self._folder / "cut-off.safetensors").write_bytes(whole[: len(whole) // 2])
        return self._name("cut-off")

    @cached_property
    def text(self) -> str:
        """Not a safetensors file at all."""
        (self._folder / "text.safetensors").write_text("<!doctype html>404", encoding="utf-8")
        return self._name("text")

    @cached_property
    def foreign(self) -> str:
        """Safetensors, but no adapter."""
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(4)}, self._folder / "foreign.safetensors")
        return self._name("foreign")

    @cached_property
    def mixed_up(self) -> str:
        """Its tensors are not those that its metadata promise."""
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        file = self._folder / f"{Path(self.random).name}.safetensors"
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        tensors["outputs.0.weight"] = tensors["outputs.0.weight"][:-8].clone()
        save_file(tensors, self._folder / "mixed-up.safetensors", metadata=metadata)
        return self._name("mixed-up")
