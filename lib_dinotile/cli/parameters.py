"""Parts of PNG info that a WebUI reads again, by the keys that it has for them."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

from lib_dinotile.hosts.diffusers_addons import parse_loras
from lib_dinotile.settings import Generation


def prompt_with_loras(generation: Generation) -> str:
    """The prompt as a WebUI is given it: there LoRAs are named in it."""
    loras = [f"<lora:{lora.path.stem}:{lora.weight:g}>" for lora in parse_loras(generation.lora)]
    return " ".join(filter(None, [generation.prompt, *loras]))


def model_name(generation: Generation) -> str:
    """A file without its folder and ending, as in the WebUIs; else as it was given."""
    return Path(generation.model).stem if os.path.isfile(generation.model) else generation.model


def added_parameters(generation: Generation) -> dict[str, str]:
    """Keys and values for what was added to the checkpoint."""
    values = {"Clip skip": str(generation.clip_skip)} if generation.clip_skip > 1 else {}
    if generation.vae:
        hashed = {"VAE hash": _sha256(generation.vae)[:10]} if os.path.isfile(generation.vae) else {}
        values |= {**hashed, "VAE": Path(generation.vae).name}
    loras = parse_loras(generation.lora)
    if loras:
        hashes = [f"{lora.path.stem}: {_sha256(str(lora.path), tensors=True)[:12]}" for lora in loras]
        values["Lora hashes"] = ", ".join(hashes)
    if generation.controlnet:
        name, strength = Path(generation.controlnet).stem, generation.controlnet_strength
        values["ControlNet 0"] = f"Module: none, Model: {name}, Weight: {strength:g}"
    return values


@functools.cache
def _sha256(path: str, tensors: bool = False) -> str:
    """Of a file; tensors: without the header, as the WebUIs and kohya's scripts tell LoRAs apart."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        if tensors:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
