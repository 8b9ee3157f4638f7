"""Stable Diffusion checkpoints, files or folders, as diffusers' pipelines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors import SafetensorError

from lib_dinotile import DinotileError, one_line
from lib_dinotile.settings import AUTOMATIC, Generation
from lib_dinotile.weights import open_tensors


def load_pipeline(generation: Generation) -> Any:
    """diffusers' pipeline of `generation.model`, a file, folder or Hugging Face id, on the CPU.

    DinotileError, one line, if it is not there, or is no Stable Diffusion 1.5, 2 or XL.
    """
    name, path, is_file = generation.model, Path(generation.model), os.path.isfile(generation.model)
    if path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin") and not is_file:
        raise DinotileError(f"model: there is no file {name}")
    try:
        pipe = _single_file(path, generation.config) if is_file else _pretrained(name)
    except DinotileError:
        raise
    except Exception as error:  # whatever the libraries raise for what is missing or damaged
        hint = " (--config FOLDER spares the Hugging Face Hub)" if is_file and not generation.config else ""
        raise DinotileError(f"model: {name} cannot be loaded{hint}: {one_line(error)}") from error
    if not isinstance(getattr(pipe, "unet", None), UNet2DConditionModel) or pipe.unet.config.in_channels != 4:
        raise DinotileError(
            f"model: {name} is a {type(pipe).__name__}; give a Stable Diffusion 1.5, 2 or XL checkpoint"
        )
    if generation.prediction != AUTOMATIC:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=generation.prediction)
    return pipe


def _single_file(path: Path, config: str) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # slow to import, and mini needs none

    if path.suffix != ".safetensors":
        raise DinotileError(f"model: {path.name} is not a .safetensors file; other formats can run code, convert it")
    try:
        with open_tensors(path) as file:
            names = set(file.keys())
            sdxl = any(name.startswith("conditioner.embedders.") for name in names)
    except (OSError, SafetensorError) as error:
        raise DinotileError(f"model: {path.name} cannot be read as a safetensors file: {error}") from error
    pipeline = StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline
    more: dict[str, Any] = {"config": config} if config else {}
    if not sdxl:
        more["safety_checker"] = None
    pipe = pipeline.from_single_file(str(path), **more)
    if "v_pred" in names:  # diffusers does not look at these marks
        zero = "ztsnr" in names
        pipe.scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=zero
        )
    return pipe


def _pretrained(name: str) -> Any:
    from diffusers import DiffusionPipeline

    config = DiffusionPipeline.load_config(name)
    more = {"safety_checker": None} if "safety_checker" in config else {}
    return DiffusionPipeline.from_pretrained(name, use_safetensors=True, **more)
