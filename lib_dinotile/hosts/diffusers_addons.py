"""LoRAs and another VAE for a diffusers pipeline, from files."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.utils import USE_PEFT_BACKEND
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from lib_dinotile import DinotileError, one_line
from lib_dinotile.hosts.diffusers_checkpoints import UNION, kind_of
from lib_dinotile.settings import Generation
from lib_dinotile.weights import open_tensors

Tensors = Mapping[str, Tensor]
"""The tensors of a file, by name."""

GIVE = {"vae": "give a VAE", "controlnet": "give a ControlNet of the Tile kind"}
"""What refusals of a file of another kind end with, by option."""

_LORA = re.compile(r"\s*(.+?\.safetensors)(?:\s*:\s*([^,:\\/]+?))?\s*(?:,|$)", re.I)


class Lora(NamedTuple):
    """A LoRA, and how strongly it counts."""

    path: Path
    weight: float


def parse_loras(text: str) -> list[Lora]:
    """The LoRAs of an option's text: FILE.safetensors or FILE.safetensors:WEIGHT, separated by commas."""
    loras, at = [], 0
    while text[at:].strip():
        found = _LORA.match(text, at)
        if found is None:
            raise DinotileError(
                f"lora: {text[at:]!r} is not FILE.safetensors or FILE.safetensors:WEIGHT; only such files"
            )
        try:
            weight = float(found[2] or 1)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise DinotileError(f"lora: {found[2]!r} is no weight of {Path(found[1]).name}, give a number")
        loras.append(Lora(Path(found[1]), weight))
        at = found.end()
    return loras


def added_files(generation: Generation) -> dict[str, list[Path]]:
    """The files and folders that options of a generation name besides the checkpoint, by option."""
    named = {name: getattr(generation, name) for name in ("vae", "controlnet")}
    files = {name: [Path(path)] for name, path in named.items() if path}
    return {**files, "lora": [lora.path for lora in parse_loras(generation.lora)]}


def check_added(generation: Generation) -> None:
    """DinotileError for files and folders that are not there, or of a kind that is not read."""
    for option, paths in added_files(generation).items():
        for path in paths:
            if option == "lora" or not os.path.isdir(path):
                _check_file(option, path)


def load_loras(pipe: Any, text: str) -> None:
    """Merge LoRAs into the pipeline's weights. DinotileError for files that are none, or for another checkpoint."""
    loras = parse_loras(text)
    files = [read_tensors("lora", lora.path) for lora in loras]
    if not loras:
        return
    if not USE_PEFT_BACKEND:
        raise DinotileError("lora: needs newer packages: pip install --upgrade peft transformers")
    for number, (lora, tensors) in enumerate(zip(loras, files)):
        name = f"lora{number}"
        if not any("lora" in key for key in tensors):
            raise DinotileError(f"lora: {lora.path.name} is not a LoRA, or of a kind that diffusers does not load")
        wanted = sum(bool(each.any()) for key, each in tensors.items() if re.search(r"(up|lora_B)\.weight$", key))
        try:
            with quiet():
                pipe.load_lora_weights(tensors, adapter_name=name)
                pipe.set_adapters([name], [lora.weight])
            fits = wanted == _adapted(pipe, name) and not any("dora_scale" in key for key in tensors)
            reason = "a part of it fits nothing there"
        except Exception as error:  # whatever the libraries raise
            fits, reason = False, one_line(error)
        if not fits:
            raise DinotileError(
                f"lora: {lora.path.name} does not fit this checkpoint, or is of a kind that diffusers does not load: "
                f"{reason}"
            )
        with quiet():
            pipe.fuse_lora(adapter_names=[name])
            pipe.unload_lora_weights()


def _adapted(pipe: Any, name: str) -> int:
    """How many layers a LoRA of that name changes."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    layers = (getattr(layer, "lora_B", {}) for part in parts for layer in part.modules())
    return sum(name in layer and bool(layer[name].weight.any()) for layer in layers)


def load_vae(own: Any, name: str) -> Any:
    """The VAE of a .safetensors file or a diffusers folder, for a checkpoint whose own is `own`.

    DinotileError if its latents are others than that one's.
    """
    vae, _ = load_model("vae", AutoencoderKL, Path(name), own.config, convert_ldm_vae_checkpoint)
    for key in ("latent_channels", "block_out_channels", "scaling_factor", "shift_factor", "latents_mean"):
        theirs, ours = (config.get(key) or None for config in (vae.config, own.config))
        if theirs != ours:
            raise DinotileError(f"vae: {name} is for other checkpoints: its {key} is {theirs}, this one's {ours}")
    return vae


def load_model(
    option: str, kind: Any, path: Path, config: Any, convert: Callable[[Tensors, Any], Tensors]
) -> tuple[Any, list[str]]:
    """A diffusers model of a class from a folder, or from a .safetensors file that has this configuration; and the
    names of tensors that it has no place for.

    convert: gives tensors of the original layout (LDM) the names that diffusers has for them.
    """
    names: list[str] = []
    try:
        if os.path.isdir(path):
            return _from_folder(option, kind, path)
        tensors: Tensors = read_tensors(option, path)
        names = [*tensors]
        # A file says nothing of its configuration: diffusers would ask the Hub for that of some model.
        with torch.device("meta"):
            model = kind.from_config(config)
        if not tensors.keys() >= model.state_dict().keys():
            tensors = convert(tensors, config)
        told = model.load_state_dict(tensors, strict=False, assign=True)
        if told.missing_keys:
            raise ValueError("weights are missing")
        return model.eval(), told.unexpected_keys
    except DinotileError:
        raise
    except Exception as error:  # whatever the libraries raise for what is missing or does not fit
        other = kind_of(names)
        if other and f"--{option}" not in other:
            raise DinotileError(f"{option}: {path} is {other}; {GIVE[option]}") from error
        raise DinotileError(
            f"{option}: {path} is not {_a(kind.__name__)} for this checkpoint, or is damaged: {one_line(error)}"
        ) from error


def _from_folder(option: str, kind: Any, path: Path) -> tuple[Any, list[str]]:
    if (path / option / "config.json").is_file():  # of a whole pipeline
        path = path / option
    found = kind.load_config(path).get("_class_name")
    if found == "ControlNetUnionModel":
        raise DinotileError(f"{option}: {path} is {UNION}; {GIVE[option]}")
    if found != kind.__name__:
        raise DinotileError(f"{option}: {path} holds {_a(found)}, not {_a(kind.__name__)}")
    half = not [file for file in path.glob("*.safetensors") if ".fp16." not in file.name]
    with quiet():
        model, told = kind.from_pretrained(
            path,
            use_safetensors=True,
            variant="fp16" if half else None,
            output_loading_info=True,
            low_cpu_mem_usage=False,  # with it older versions do not tell of what they leave out
        )
    if told["missing_keys"]:
        raise ValueError("weights are missing")
    return model.eval(), told["unexpected_keys"]


def _a(name: Any) -> str:
    return f"an {name}" if str(name).startswith("A") else f"a {name}"


def _check_file(option: str, path: Path) -> None:
    """DinotileError if it is not there, or no .safetensors file."""
    if not os.path.isfile(path):
        kinds = "file" if option == "lora" else "file or folder"
        raise DinotileError(f"{option}: there is no {kinds} {path} (Hugging Face ids are only for --model)")
    if path.suffix.lower() != ".safetensors":
        raise DinotileError(f"{option}: {path} is not a .safetensors file; other formats can run code, convert it")


def read_tensors(option: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file; DinotileError if it is none."""
    _check_file(option, path)
    try:
        with open_tensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DinotileError(f"{option}: {path} cannot be read as a safetensors file: {one_line(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While open, diffusers, transformers and the Hub's client neither log nor warn: what went wrong one line of ours
    says."""
    before = [(each, each.get_verbosity()) for each in (diffusers_logging, transformers_logging, hub_logging)]
    try:
        for each, _ in before:
            each.set_verbosity(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in before:
            each.set_verbosity(level)
