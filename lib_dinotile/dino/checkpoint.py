"""DINOv2 checkpoints in Hugging Face's format: where they lie, what they hold, and what to say when they do not.

A checkpoint is a folder with `config.json` and `model.safetensors`. Pickles (`pytorch_model.bin`) are never opened.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from lib_dinotile import DinotileError, one_line
from lib_dinotile.dino import hub
from lib_dinotile.dino.locks import Progress, models_folder, silent
from lib_dinotile.weights import DAMAGED, open_tensors

KNOWN = (
    "facebook/dinov2-small",
    "facebook/dinov2-base",
    "facebook/dinov2-large",
    "facebook/dinov2-with-registers-small",
    "facebook/dinov2-with-registers-base",
    "facebook/dinov2-with-registers-large",
)

BUILT_IN = "mini"
BUILT_IN_FOLDER = Path(__file__).resolve().parents[1] / "mini" / "encoder"

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MAX_CONFIG = 1 << 20
"""Bytes of a `config.json`; those of DINOv2 have under a thousand."""
MODEL_TYPES = ("dinov2", "dinov2_with_registers")

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


# Where a checkpoint lies --------------------------------------------------------------------------------------------


def _is_checkpoint(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def _known(name: str) -> str:
    """The Hugging Face id that `name` is the last part of, or `name` itself."""
    return next((known for known in KNOWN if known.split("/")[1] == name), name)


def installed(folder: Path | None) -> list[str]:
    """Names that `load_encoder` finds without a network: the built-in encoder, then what lies in `folder`.

    `folder/dinov2-small` and `folder/facebook/dinov2-small` are both called by their Hugging Face id.
    """
    found = set()
    if folder is not None:
        for config in [*folder.glob(f"*/{CONFIG}"), *folder.glob(f"*/*/{CONFIG}")]:
            place = config.parent.relative_to(folder)
            if _is_checkpoint(config.parent) and not place.parts[0].startswith("."):  # hidden: a download under way
                found.add(_known(place.as_posix()))
    return ([BUILT_IN] if _is_checkpoint(BUILT_IN_FOLDER) else []) + sorted(found)


def encoders(folder: Path | None) -> list[str]:
    """The installed ones, then the published ones, which are downloaded when they are first used."""
    return list(dict.fromkeys([*installed(folder), *KNOWN]))


def automatic_encoder(folder: Path | None) -> str:
    """The encoder where neither the user nor an adapter names one: an installed DINOv2, small ones first; else the
    built-in one, so that nothing is downloaded that nobody has asked for."""
    found = [name for name in installed(folder) if name != BUILT_IN]
    sizes = ("small", "base", "large")
    return min(found, key=lambda name: next((n for n, size in enumerate(sizes) if size in name), 9), default=BUILT_IN)


def locate(name: str, folder: Path | None, download: bool = True, progress: Progress = silent) -> tuple[str, Path]:
    """(id, checkpoint folder) of an encoder; DinotileError with one line if it is not to be had.

    In this order: the built-in encoder; `folder/name` and `folder/<last part of name>`; a local folder of that path;
    the Hugging Face cache; with `download` the Hugging Face Hub, from which it gets into `folder`, with `progress`.
    None: the folder where encoders are kept without a WebUI.
    """
    if name == BUILT_IN:
        if not _is_checkpoint(BUILT_IN_FOLDER):
            raise DinotileError(
                f"the built-in encoder is missing from this installation: put {CONFIG} and {WEIGHTS} back into "
                f"{BUILT_IN_FOLDER}, or install dinotile again"
            )
        return BUILT_IN, BUILT_IN_FOLDER
    if not name.strip():
        raise DinotileError(f"no encoder is named; it is one of {', '.join([*installed(folder), *KNOWN])}")
    folder = folder or models_folder("encoders")
    if ".." not in Path(name).parts and not Path(name).is_absolute():
        for candidate in (folder / name, folder / Path(name).name):
            if os.path.isdir(candidate):
                return _known(name), candidate
    if os.path.isdir(name):
        return Path(name).resolve().name, Path(name)
    name = _known(name)
    if not _HUB_ID.fullmatch(name):
        raise DinotileError(
            f"there is no DINOv2 encoder {name!r}: put its {CONFIG} and {WEIGHTS} into {folder / Path(name).name}, "
            f"or choose one of {', '.join([*installed(folder), *KNOWN])}"
        )
    cached = hub.cached(name, (CONFIG, WEIGHTS))
    if cached is None and not download:
        raise DinotileError(
            f"DINOv2 weights {name!r} are not on this machine: choose {name} as DINO encoder to download them, or "
            f"{_remedy(name, folder)}"
        )
    return name, cached or install(name, folder, progress)


def _remedy(name: str, folder: Path) -> str:
    return f"put {CONFIG} and {WEIGHTS} of https://huggingface.co/{name} into {folder / Path(name).name}"


def install(name: str, folder: Path, progress: Progress = silent) -> Path:
    """Puts an encoder of the Hub into the folder of encoders, if it is not there; where it is then.

    DinotileError, one line that says which files go where, if it cannot be had.
    """
    target, remedy = folder / Path(name).name, _remedy(name, folder)
    try:
        return hub.download(name, (CONFIG, WEIGHTS), target, read_checkpoint, progress)
    except hub.Unreachable as error:
        raise DinotileError(
            f"DINOv2 weights {name!r} are not on this machine and the Hugging Face Hub cannot be reached: {remedy}"
        ) from error
    except hub.NotThere as error:
        raise DinotileError(f"the Hugging Face Hub has no {name!r} with {CONFIG} and {WEIGHTS}: {remedy}") from error
    except (hub.Failed, DinotileError, OSError) as error:
        raise DinotileError(f"DINOv2 weights {name!r} cannot be downloaded ({one_line(error)}): {remedy}") from error


# What a checkpoint holds --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """The numbers of a `config.json`; the defaults are those of transformers' Dinov2Config."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: float = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    """Pixels; with `patch_size` the grid that the position embeddings were trained on."""
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    """The giant model's feed-forward layer."""
    num_register_tokens: int = 0
    """Register tokens (arXiv 2309.16588), after the class token."""

    def __post_init__(self) -> None:
        """ValueError for what no DINOv2 has, before anything of such a size is made."""
        for name, low, high in (
            ("hidden_size", 1, 8192),
            ("num_hidden_layers", 1, 128),
            ("num_attention_heads", 1, 256),
            ("image_size", 1, 8192),
            ("patch_size", 1, 256),
            ("num_channels", 3, 3),
            ("num_register_tokens", 0, 1024),
        ):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} {value!r:.40} is no whole number from {low} to {high}")
        for name, high in (("mlp_ratio", 16), ("layer_norm_eps", 1)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value <= high:
                raise ValueError(f"{name} {value!r:.40} is no number from 0 to {high}")
        for name, kind in (("hidden_act", str), ("qkv_bias", bool), ("use_swiglu_ffn", bool)):
            if type(getattr(self, name)) is not kind:
                raise ValueError(f"{name} {getattr(self, name)!r:.40} is no {kind.__name__}")
        if self.hidden_size % self.num_attention_heads or self.image_size < self.patch_size:
            raise ValueError("a whole number of features per head and at least one patch are wanted")

    @property
    def grid(self) -> int:
        """Patches along a side of the images that the position embeddings were trained on."""
        return self.image_size // self.patch_size

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors that the features depend on, as Hugging Face's files name them."""
        d, p, c = self.hidden_size, self.patch_size, self.num_channels

        def linear(name: str, out: int, into: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
            return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})

        def norm(name: str) -> dict[str, tuple[int, ...]]:
            return {f"{name}.weight": (d,), f"{name}.bias": (d,)}

        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.cls_token": (1, 1, d),
            "embeddings.position_embeddings": (1, 1 + self.grid**2, d),
            "embeddings.patch_embeddings.projection.weight": (d, c, p, p),
            "embeddings.patch_embeddings.projection.bias": (d,),
        }
        if self.num_register_tokens:
            shapes["embeddings.register_tokens"] = (1, self.num_register_tokens, d)
        hidden = int(d * self.mlp_ratio)
        gated = (int(hidden * 2 / 3) + 7) // 8 * 8
        for i in range(self.num_hidden_layers):
            at = f"encoder.layer.{i}"
            shapes |= norm(f"{at}.norm1") | norm(f"{at}.norm2")
            for part in ("query", "key", "value"):
                shapes |= linear(f"{at}.attention.attention.{part}", d, d, self.qkv_bias)
            shapes |= linear(f"{at}.attention.output.dense", d, d)
            shapes |= {f"{at}.layer_scale1.lambda1": (d,), f"{at}.layer_scale2.lambda1": (d,)}
            if self.use_swiglu_ffn:
                shapes |= linear(f"{at}.mlp.weights_in", 2 * gated, d) | linear(f"{at}.mlp.weights_out", d, gated)
            else:
                shapes |= linear(f"{at}.mlp.fc1", hidden, d) | linear(f"{at}.mlp.fc2", d, hidden)
        return shapes | norm("layernorm")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files were found to be what they should be."""

    folder: Path
    architecture: Architecture
    fingerprint: str
    """SHA-256 of the weights file, in hex."""

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The tensors whose names begin with `prefix`, float32, on the CPU, by name."""
        with open_tensors(self.folder / WEIGHTS) as file:
            names = [name for name in self.architecture.shapes() if name.startswith(prefix)]
            return {name: file.get_tensor(name).float() for name in names}


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check a checkpoint's two files against each other; DinotileError with one line if anything is amiss."""
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            pickle = file == WEIGHTS and any(folder.glob("*.bin"))
            why = "; pickled weights (.bin) are not read, they can run code" if pickle else ""
            raise DinotileError(f"the DINOv2 encoder in {folder} has no {file}{why}: put {file} there")
    architecture = _read_config(folder / CONFIG)
    _check_weights(folder / WEIGHTS, architecture)
    return Checkpoint(folder, architecture, fingerprint(folder))


def _read_config(path: Path) -> Architecture:
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise ValueError(f"more than {MAX_CONFIG} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (OSError, *DAMAGED) as error:
        raise DinotileError(f"{path} is not a model's configuration ({one_line(error)}): get it again") from error
    if kind not in MODEL_TYPES:
        raise DinotileError(f"{path} describes a model of type {kind!r}: an encoder is one of {', '.join(MODEL_TYPES)}")
    fields = {k: v for k, v in config.items() if k in Architecture.__dataclass_fields__}
    if kind == "dinov2_with_registers":
        fields.setdefault("num_register_tokens", 4)
    try:
        return Architecture(**fields)
    except DAMAGED as error:
        raise DinotileError(f"{path} has numbers that fit no DINOv2 ({one_line(error)}): get it again") from error


def _check_weights(path: Path, architecture: Architecture) -> None:
    """Read the file's header only: it knows every tensor's shape, and whether the file is whole."""
    try:
        with open_tensors(path) as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise DinotileError(f"{path} is damaged or not whole ({one_line(error)}): get it again") from error
    wanted = architecture.shapes()
    missing = [name for name in wanted if name not in shapes]
    if missing:
        raise DinotileError(
            f"{path} lacks {len(missing)} of {len(wanted)} tensors of a DINOv2, {missing[0]} first: "
            f"get it and its {CONFIG} again"
        )
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise DinotileError(
                f"{path} does not fit its {CONFIG} ({name} is {list(shapes[name])}, not {list(shape)}): get both again"
            )


def fingerprint(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights file, in hex; of one that did not change it is computed once. OSError if it
    cannot be read."""
    file = folder / WEIGHTS
    state = file.stat()
    return _sha256(file, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _sha256(path: Path, size: int, modified: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
