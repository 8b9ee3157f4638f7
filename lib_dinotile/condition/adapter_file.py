"""Adapters on disk: safetensors with metadata that is checked before a tensor is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from lib_dinotile import DinotileError
from lib_dinotile.condition.adapter import Adapter, AdapterConfig
from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.dino.head import RestorationHead, pack
from lib_dinotile.weights import DAMAGED, check_shapes, open_tensors, shapes_of

FORMAT = "dinotile-adapter"
VERSION = 1
HYPERPARAMETERS = ("width", "blocks", "grid")


def save_adapter(
    adapter: Adapter,
    path: Path,
    dtype: torch.dtype = torch.float16,
    heads: Mapping[int, RestorationHead] | None = None,
    **extra: str,
) -> None:
    """Write `adapter` to `path`, and its encoder's restoration heads; `extra` goes into the metadata (how it was made).

    ValueError if the adapter reads through a head that is not among them.
    """
    config = adapter.config
    if config.restored and config.layer not in (heads or {}):
        raise ValueError(f"the adapter reads layer {config.layer} through a head that is not given")
    packed, described = pack(heads) if heads else ({}, {})
    metadata = {
        **extra,
        **described,
        "format": FORMAT,
        "version": str(VERSION),
        "base": config.base,
        "encoder": config.encoder,
        "features": str(config.features),
        "layer": str(config.layer),
        "restored": str(config.restored).lower(),
        "slots": json.dumps(config.shape.slots),
        "hyperparameters": json.dumps({name: getattr(config, name) for name in HYPERPARAMETERS}),
    }
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in adapter.state_dict().items()}
    path.write_bytes(save({**tensors, **packed}, metadata=metadata))  # save_file's files are readable by one user only


def _config(metadata: dict[str, str], path: Path) -> AdapterConfig:
    if metadata.get("format") != FORMAT:
        raise DinotileError(f"{path.name} is not a dinotile adapter: its metadata names no format {FORMAT!r}")
    if metadata.get("version") != str(VERSION):
        raise DinotileError(
            f"{path.name} has adapter format version {metadata.get('version')}, but this dinotile reads {VERSION}: "
            "update dinotile"
        )
    try:
        hyperparameters = json.loads(metadata["hyperparameters"])
        return AdapterConfig(
            base=metadata["base"],
            shape=UNetShape(tuple((int(channels), int(scale)) for channels, scale in json.loads(metadata["slots"]))),
            encoder=metadata["encoder"],
            features=int(metadata["features"]),
            layer=int(metadata["layer"]),
            restored=metadata.get("restored") == "true",
            **{name: int(hyperparameters[name]) for name in HYPERPARAMETERS},
        )
    except DAMAGED as error:
        raise DinotileError(f"{path.name} is damaged: bad adapter metadata ({error!r})") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file, without reading its tensors. DinotileError if it is none."""
    try:
        with open_tensors(path) as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise DinotileError(f"{path.name} cannot be read as a safetensors file: {error}") from error


def read_config(path: Path) -> AdapterConfig:
    """The configuration of the adapter in a file. DinotileError if it is no adapter."""
    return _config(read_metadata(path), path)


def load_adapter(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Adapter:
    """The adapter in `path`, ready to run. DinotileError if the file is damaged or no adapter."""
    config = read_config(path)
    wanted = shapes_of(lambda: Adapter(config), path.name)
    try:
        with open_tensors(path) as file:
            names = [name for name in file.keys() if not name.startswith("heads.")]  # noqa: SIM118
            check_shapes({name: tuple(file.get_slice(name).get_shape()) for name in names}, wanted, path.name)
            tensors = {name: file.get_tensor(name) for name in wanted}
    except DinotileError:
        raise
    except Exception as error:  # whatever safetensors and torch raise for what is damaged
        raise DinotileError(f"{path.name} cannot be read: {error}") from error
    # Made outside of inference mode, which hosts run under: training and gradients must be able to use it.
    # And its first, random values are not drawn at the cost of the next generation's.
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        adapter = Adapter(config)
        adapter.load_state_dict(tensors)
        return adapter.to(device, dtype).eval().requires_grad_(False)


def check_fit(config: AdapterConfig, name: str, base: str, shape: UNetShape) -> None:
    """DinotileError if the adapter `name` is not for a checkpoint of this family and shape."""
    if config.base != base:
        raise DinotileError(
            f"adapter {name!r} is for {config.base} checkpoints, this one is {base}: choose another adapter or None"
        )
    if config.shape != shape:
        raise DinotileError(
            f"adapter {name!r} does not fit this checkpoint's UNet: it gives {config.shape}, the UNet takes {shape}"
        )


def check_encoder(
    config: AdapterConfig, name: str, encoder: str, width: int | None = None, depth: int | None = None
) -> None:
    """DinotileError if the adapter `name` does not read the tokens of this encoder; width, depth: of it, once known."""
    if config.encoder != encoder:
        raise DinotileError(f"adapter {name!r} reads encoder {config.encoder!r}, not {encoder!r}: choose that encoder")
    if width not in (None, config.features):
        raise DinotileError(
            f"adapter {name!r} reads tokens {config.features} wide, those of encoder {encoder!r} are {width}: choose "
            "the encoder that it was trained with"
        )
    if depth is not None and not -depth <= config.layer < depth:
        raise DinotileError(f"adapter {name!r} is damaged: it reads layer {config.layer}, of {depth}")
