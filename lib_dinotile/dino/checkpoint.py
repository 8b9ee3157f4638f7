"""DINOv2 and DINOv3 checkpoints: where they lie, what they hold, and what to say when they do not.

A checkpoint is a folder with `config.json` and `model.safetensors`, in transformers' format, or for DINOv3 also in
timm's. Pickles (`pytorch_model.bin`) are never opened.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib_dinotile import DinotileError, one_line
from lib_dinotile.dino import hub
from lib_dinotile.dino.architecture import MEAN, STD, Architecture
from lib_dinotile.dino.dinov3 import TIMM_MODELS, DINOv3, TimmDINOv3
from lib_dinotile.dino.libraries import check_library
from lib_dinotile.dino.locks import Progress, models_folder, silent
from lib_dinotile.weights import DAMAGED, open_tensors

_TWINS = {
    "facebook/dinov3-vits16-pretrain-lvd1689m": "timm/vit_small_patch16_dinov3.lvd1689m",
    "facebook/dinov3-vits16plus-pretrain-lvd1689m": "timm/vit_small_plus_patch16_dinov3.lvd1689m",
    "facebook/dinov3-vitb16-pretrain-lvd1689m": "timm/vit_base_patch16_dinov3.lvd1689m",
    "facebook/dinov3-vitl16-pretrain-lvd1689m": "timm/vit_large_patch16_dinov3.lvd1689m",
}
"""Gated repositories, and those that have the same weights without a gate."""

_DINOV2 = (
    "facebook/dinov2-small",
    "facebook/dinov2-base",
    "facebook/dinov2-large",
    "facebook/dinov2-with-registers-small",
    "facebook/dinov2-with-registers-base",
    "facebook/dinov2-with-registers-large",
)
KNOWN = (*_DINOV2, *_TWINS, *_TWINS.values())

BUILT_IN = "mini"
BUILT_IN_FOLDER = Path(__file__).resolve().parents[1] / "mini" / "encoder"

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MAX_CONFIG = 1 << 20
"""Bytes of a `config.json`; published ones have under a thousand or two."""
MODEL_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit")

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
    """The encoder where neither the user nor an adapter names one: an installed DINOv2, small ones first; else a
    DINOv3, with which the defaults were not measured; else the built-in one, so that nothing is downloaded that nobody
    has asked for."""
    found = [name for name in installed(folder) if name != BUILT_IN]
    return min(found, key=lambda name: (is_dinov3(name), size_class(name)), default=BUILT_IN)


def is_dinov3(name: str) -> bool:
    """Whether an encoder's name says that it is a DINOv3."""
    return "dinov3" in name.lower()


SIZES = {"small": "vits16", "base": "vitb16", "large": "vitl16"}
"""Of models, as their names say them in transformers and, of DINOv3, in the Hub."""


def size_class(name: str) -> int:
    """The number of an encoder's size in `SIZES`, or their count if its name does not say."""
    return next((n for n, words in enumerate(SIZES.items()) if any(word in name for word in words)), len(SIZES))


def find(name: str, folder: Path | None) -> tuple[str, Path | None]:
    """(id, checkpoint folder) of an encoder; no folder where it is not here, but may be on the Hugging Face Hub.

    It is the built-in encoder, `folder/name` or `folder/<last part of name>`, or a local folder of that path. None: the
    folder where encoders are kept without a WebUI. DinotileError for a name that nothing can have.
    """
    if name == BUILT_IN:
        if not _is_checkpoint(BUILT_IN_FOLDER):
            raise DinotileError(
                f"the built-in encoder is missing from this installation: put {CONFIG} and {WEIGHTS} back into "
                f"{BUILT_IN_FOLDER}, or install dinotile again"
            )
        return BUILT_IN, BUILT_IN_FOLDER
    if not name.strip():
        raise DinotileError(f"no encoder is named; it is one of {_choices(folder)}")
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
            f"there is no DINO encoder {name!r}: put its {CONFIG} and {WEIGHTS} into {folder / Path(name).name}, "
            f"or choose one of {_choices(folder)}"
        )
    return name, None


def locate(name: str, folder: Path | None, download: bool = True, progress: Progress = silent) -> tuple[str, Path]:
    """(id, checkpoint folder) of an encoder; DinotileError with one line if it is not to be had.

    Where `find` finds none, the Hugging Face cache has it; or, with `download`, the Hugging Face Hub, from which it
    gets into `folder`, with `progress`.
    """
    name, found = find(name, folder)
    if found is not None:
        return name, found
    folder = folder or models_folder("encoders")
    cached = hub.cached(name, (CONFIG, WEIGHTS))
    if cached is None and not download:
        raise DinotileError(
            f"DINO weights {name!r} are not on this machine: choose {name} as DINO encoder to download them, or "
            f"{_remedy(name, folder)}"
        )
    return name, cached or install(name, folder, progress)


def _choices(folder: Path | None) -> str:
    return f"{', '.join([*installed(folder), *_DINOV2])}, or a DINOv3"


def _remedy(name: str, folder: Path) -> str:
    return f"put {CONFIG} and {WEIGHTS} of https://huggingface.co/{name} into {folder / Path(name).name}"


def install(name: str, folder: Path, progress: Progress = silent) -> Path:
    """Puts an encoder of the Hub into the folder of encoders, if it is not there; where it is then.

    DinotileError, one line that says which files go where, if it cannot be had.
    """
    target, remedy = folder / Path(name).name, _remedy(name, folder)
    if is_dinov3(name):
        check_library(DINOv3)  # before anything is downloaded
    try:
        return hub.download(name, (CONFIG, WEIGHTS), target, read_checkpoint, progress)
    except hub.Unreachable as error:
        raise DinotileError(
            f"DINO weights {name!r} are not on this machine and the Hugging Face Hub cannot be reached: {remedy}"
        ) from error
    except hub.Gated as error:
        twin = f", or choose {_TWINS[name]}, which needs neither" if name in _TWINS else ""
        raise DinotileError(
            f"{name!r} is gated on the Hugging Face Hub: accept its licence at https://huggingface.co/{name}, then log "
            f"in with `hf auth login` or set HF_TOKEN{twin}"
        ) from error
    except hub.NotThere as error:
        raise DinotileError(f"the Hugging Face Hub has no {name!r} with {CONFIG} and {WEIGHTS}: {remedy}") from error
    except (hub.Failed, DinotileError, OSError) as error:
        raise DinotileError(f"DINO weights {name!r} cannot be downloaded ({one_line(error)}): {remedy}") from error


# What a checkpoint holds --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files were found to be what they should be."""

    folder: Path
    architecture: Architecture | DINOv3
    fingerprint: str
    """SHA-256 of the weights file, in hex."""

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The tensors whose names begin with `prefix`, float32, on the CPU, by transformers' names."""
        with open_tensors(self.folder / WEIGHTS) as file:
            names = [name for name in self.architecture.shapes() if name.startswith(prefix)]
            return {name: self._read(file, name).float() for name in names}

    def _read(self, file: Any, name: str) -> torch.Tensor:
        stored, third = self.architecture.stored(name)
        tensor: torch.Tensor = file.get_tensor(stored)
        return tensor if third is None else tensor.chunk(3)[third].clone()


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check a checkpoint's two files against each other; DinotileError with one line if anything is amiss."""
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            pickle = file == WEIGHTS and any(folder.glob("*.bin"))
            why = "; pickled weights (.bin) are not read, they can run code" if pickle else ""
            raise DinotileError(f"the DINO encoder in {folder} has no {file}{why}: put {file} there")
    architecture = _read_config(folder / CONFIG)
    _check_weights(folder / WEIGHTS, architecture)
    return Checkpoint(folder, architecture, fingerprint(folder))


def _read_config(path: Path) -> Architecture | DINOv3:
    try:
        config = _json(path)
        kind = config.get("model_type", config.get("architecture"))  # transformers' word, or timm's
        timm = isinstance(kind, str) and kind.removesuffix("_qkvb") in TIMM_MODELS
    except (OSError, *DAMAGED) as error:
        raise DinotileError(f"{path} is not a model's configuration ({one_line(error)}): get it again") from error
    if kind not in MODEL_TYPES and not timm:
        kinds = ", ".join([*MODEL_TYPES, *TIMM_MODELS])
        raise DinotileError(f"{path} describes a model of type {kind!r:.60}: an encoder is one of {kinds}")
    made = DINOv3 if timm or kind == "dinov3_vit" else Architecture
    try:
        if made is DINOv3:
            _check_normalisation(path, config)
        if timm:
            return TimmDINOv3.read(config)
        fields = {k: v for k, v in config.items() if k in made.__dataclass_fields__}
        if kind == "dinov2_with_registers":
            fields.setdefault("num_register_tokens", 4)
        return made(**fields)
    except (OSError, *DAMAGED) as error:
        line = f"{path} has numbers that fit no {made.family} ({one_line(error)}): get it again"
        raise DinotileError(line) from error


def _check_normalisation(path: Path, config: dict[str, Any]) -> None:
    """DinotileError for a DINOv3 that wants other colours than all the others: those trained on satellite images do.
    Only timm's configuration says which; transformers' has a file of its own for it, which need not be there."""
    preprocessor = path.with_name("preprocessor_config.json")
    said = _json(preprocessor) if preprocessor.is_file() else config.get("pretrained_cfg", {})
    mean, std = (said.get(f"image_{kind}", said.get(kind)) for kind in ("mean", "std"))
    if "sat493m" in path.as_posix() or (mean is not None and [*mean, *std] != [*MEAN, *STD]):
        raise DinotileError(f"{path.parent} has a DINOv3 for satellite images or the like: choose one of lvd1689m")


def _json(path: Path) -> Any:
    if path.stat().st_size > MAX_CONFIG:
        raise ValueError(f"more than {MAX_CONFIG} bytes")
    return json.loads(path.read_text(encoding="utf-8"))


def _check_weights(path: Path, architecture: Architecture | DINOv3) -> None:
    """Read the file's header only: it knows every tensor's shape, and whether the file is whole."""
    try:
        with open_tensors(path) as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise DinotileError(f"{path} is damaged or not whole ({one_line(error)}): get it again") from error
    wanted = {}
    for name, shape in architecture.shapes().items():
        name, third = architecture.stored(name)
        wanted[name] = shape if third is None else (3 * shape[0], *shape[1:])
    missing = [name for name in wanted if name not in shapes]
    if missing:
        raise DinotileError(
            f"{path} lacks {len(missing)} of {len(wanted)} tensors of a {architecture.family}, {missing[0]} first: "
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
