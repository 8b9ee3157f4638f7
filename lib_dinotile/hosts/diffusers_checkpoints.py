"""Checkpoint files, told by the names and shapes of their tensors before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from lib_dinotile import DinotileError
from lib_dinotile.weights import open_tensors

ASK = "give a Stable Diffusion 1.5, 2 or XL checkpoint"
"""What every refusal ends with."""

UNET = "model.diffusion_model.input_blocks.0.0.weight"
VAE = "first_stage_model."
TEXT = ("cond_stage_model.", "conditioner.embedders.")
CONDITIONS = ("model.diffusion_model.label_emb.", "noise_augmentor.")
"""Of a UNet that is given more than text: SDXL's sizes, and what unCLIP makes of images."""


@dataclass(frozen=True)
class Marks:
    """What a file says of itself."""

    sdxl: bool
    sd2: bool
    v_prediction: bool
    zero_snr: bool


def _starts(*starts: str) -> Callable[[Collection[str]], bool]:
    return lambda names: any(name.startswith(starts) for name in names)


def _has(*parts: str) -> Callable[[Collection[str]], bool]:
    return lambda names: any(part in name for name in names for part in parts)


UNION = "a ControlNet Union, which is not supported"
OTHERS: dict[str, Callable[[Collection[str]], bool]] = {
    "a LoRA, which goes with --lora": _has(
        "lora_down", "lora_up", "lora_A", "lora_B", "hada_w", "lokr_w", "oft_blocks"
    ),
    UNION: _has("task_embedding", "control_add_embedding.", "transformer_layes.", "spatial_ch_projs."),
    "a ControlNet, which goes with --controlnet": _starts(
        "control_model.", "controlnet_", "input_hint_block.", "lllite_"
    ),
    "a textual inversion": lambda names: bool({"emb_params", "clip_l", "clip_g"} & {*names}),
    "an SD3 model": _has("joint_blocks."),
    "a Flux model": _has("double_blocks.", "single_transformer_blocks."),
    "a diffusion transformer": _has("transformer_blocks.0.attn.", "x_embedder.", "patch_embedding."),
    "a UNet alone": _starts("down_blocks.", "input_blocks."),
    "a VAE, which goes with --vae": _starts("encoder.conv_in.", "decoder.conv_in.", VAE),
    "a text encoder": _starts("text_model.", *TEXT),
}
"""Files without the UNet of a checkpoint: what they are, and how that is told by the names of their tensors."""


def kind_of(names: Collection[str]) -> str | None:
    """What a file without the UNet of a checkpoint is, by the names of its tensors; None if that is not known."""
    return next((kind for kind, tells in OTHERS.items() if tells(names)), None)


def by_channels(taken: int, given: int = 4) -> str:
    """What a model is whose UNet takes and gives so many channels."""
    known = {9: "an inpainting model", 8: "an InstructPix2Pix model", 7: "an x4 upscaler", 5: "a depth model"}
    return f"{known.get(taken, 'another kind of model')} (its UNet has {taken} channels in, {given} out)"


def check_checkpoint(path: Path) -> Marks:
    """The marks of a file that is a whole Stable Diffusion 1.5, 2 or XL; DinotileError with words that help if not."""
    if path.suffix.lower() != ".safetensors":
        raise DinotileError(f"model: {path.name} is not a .safetensors file; other formats can run code, convert it")
    try:
        with open_tensors(path) as tensors:
            names = set(tensors.keys())
            channels = tensors.get_slice(UNET).get_shape()[1] if UNET in names else 0
    except (OSError, SafetensorError) as error:
        raise DinotileError(f"model: {path.name} cannot be read as a safetensors file: {error}") from error
    except IndexError as error:
        raise DinotileError(f"model: {path.name} is damaged: {UNET} is no convolution") from error
    if UNET not in names:
        raise DinotileError(f"model: {path.name} is {kind_of(names) or 'no checkpoint: it has no UNet'}; {ASK}")
    sdxl = _starts("conditioner.embedders.1.")(names)
    if channels != 4:
        raise DinotileError(f"model: {path.name} is {by_channels(channels)}; {ASK}")
    if _starts("edm_")(names):
        raise DinotileError(f"model: {path.name} was trained with EDM's noise, which is not supported; {ASK}")
    if _starts("conditioner.embedders.0.model.")(names) and not sdxl:
        raise DinotileError(f"model: {path.name} is an SDXL refiner; {ASK}")
    if _starts(*CONDITIONS)(names) and not _starts("conditioner.embedders.")(names):
        raise DinotileError(f"model: {path.name} lacks the text encoders of SDXL, or needs images; {ASK}")
    for part, starts in (("VAE", (VAE,)), ("text encoder", TEXT)):
        if not _starts(*starts)(names):
            raise DinotileError(f"model: {path.name} has no {part}; {ASK} that has all parts")
    sd2 = _starts("cond_stage_model.model.")(names)
    return Marks(sdxl, sd2, "v_pred" in names, "ztsnr" in names)
