"""Where a WebUI keeps dinotile's models. Set by command-line options (preload.py), made when first asked for."""

from __future__ import annotations

from pathlib import Path

from modules import paths, shared

from lib_dinotile.condition.conditioner import installed_weights
from lib_dinotile.dino.calibrated import FOLDER, Store
from lib_dinotile.dino.locks import Progress, silent


def _folder(option: str, name: str) -> Path:
    chosen = getattr(shared.cmd_opts, option, None)
    folder = Path(chosen) if chosen else Path(paths.models_path) / "dinotile" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def adapters() -> Path:
    """The folder with adapters, one .safetensors file each."""
    return _folder("dinotile_adapters_dir", "adapters")


def heads() -> Path:
    """The folder with restoration heads, one .safetensors file each."""
    return _folder("dinotile_heads_dir", "heads")


def trained_heads() -> dict[str, Path]:
    """The restoration heads that can be chosen, by name; those that dinotile calibrated are not among them."""
    return {name: file for name, file in installed_weights(heads()).items() if not name.startswith(f"{FOLDER}/")}


def calibrated_heads(progress: Progress = silent) -> Store:
    """The heads that dinotile calibrates by itself; progress: is told when it does."""
    return Store(heads() / FOLDER, progress)


def encoders() -> Path:
    """The folder with DINOv2 and DINOv3 models, one folder with config.json and model.safetensors each."""
    return _folder("dinotile_encoders_dir", "encoders")
