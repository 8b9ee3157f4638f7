"""Stable Diffusion checkpoints as diffusers' pipelines: files, folders, and models of the Hugging Face Hub.

Of a folder only weights and numbers are read, by classes that are named here. So no code that comes with a model is
run, whatever diffusers and transformers do about classes of a folder's own; and what does not fit is said before a tile
is painted.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn

from lib_dinotile import DinotileError, one_line
from lib_dinotile.hosts.diffusers_checkpoints import ASK, by_channels, check_checkpoint
from lib_dinotile.hosts.diffusers_solvers import trained
from lib_dinotile.settings import AUTOMATIC, Generation
from lib_dinotile.weights import is_pointer

PARTS = {
    "unet": ("diffusers", {"UNet2DConditionModel"}),
    "vae": ("diffusers", {"AutoencoderKL"}),
    "text_encoder": ("transformers", {"CLIPTextModel"}),
    "tokenizer": ("transformers", {"CLIPTokenizer", "CLIPTokenizerFast"}),
}
"""Parts of a pipeline: their library, and the classes that may be named where the one above is loaded."""
SDXL_PARTS = {
    **PARTS,
    "text_encoder_2": ("transformers", {"CLIPTextModelWithProjection"}),
    "tokenizer_2": PARTS["tokenizer"],
}
UNUSED = {"scheduler", "safety_checker", "feature_extractor", "image_encoder"}
"""Parts that are not loaded; the scheduler's configuration is only read."""

LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
"""The last one is diffusers' own, for safety checkers."""
INPUTS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")
"""Keys of a UNet's configuration that ask for inputs which are not given here."""
UNCHANGED = {"steps_offset": 1, "clip_sample": False}
"""Of a scheduler that takes ours' place while a pipeline is made: StableDiffusionPipeline sets others to this."""
VARIANTS = (None, "fp16")
"""In the names of files with weights; the first that is there is loaded, and if it is damaged, none is."""
FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""Endings of names that are those of files."""


def is_hub_id(name: str) -> bool:
    """Whether it names a model that is looked for on the Hugging Face Hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if name == "mini" or os.path.exists(name) or Path(name).suffix.lower() in FILES:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def load_pipeline(generation: Generation) -> Any:
    """diffusers' pipeline of `generation.model`, a file, folder or Hugging Face id, on the CPU.

    DinotileError, one line, if it is not there, or is no Stable Diffusion 1.5, 2 or XL.
    """
    name, path, is_file = generation.model, Path(generation.model), os.path.isfile(generation.model)
    if path.suffix.lower() in FILES and not is_file:
        raise DinotileError(f"model: there is no file {name}")
    try:
        pipe = _single_file(path, generation) if is_file else _pretrained(_Source("model", name))
    except DinotileError:
        raise
    except Exception as error:  # whatever the libraries raise for what is missing or damaged
        hint = " (--config FOLDER spares the Hugging Face Hub)" if is_file and not generation.config else ""
        raise DinotileError(f"model: {name} cannot be loaded{hint}: {one_line(error)}") from error
    if generation.prediction != AUTOMATIC:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=generation.prediction)
    return pipe


def _single_file(path: Path, generation: Generation) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # slow to import, and mini needs none

    marks, config = check_checkpoint(path), generation.config
    if marks.sd2 and not marks.v_prediction and not config and generation.prediction == AUTOMATIC:
        raise DinotileError(
            f"model: {path.name} is a Stable Diffusion 2 and does not say what it predicts: give --prediction epsilon "
            "(mostly those for 512 pixels) or v_prediction (for 768)"
        )
    more: dict[str, Any] = dict.fromkeys(UNUSED - {"scheduler"} - ({"safety_checker"} if marks.sdxl else set()))
    scheduler = None
    if config:
        source = _Source("config", config)
        if source.sdxl != marks.sdxl:
            raise source.refuse(f"is for another kind of Stable Diffusion than {path.name}")
        scheduler = source.scheduler()
        source.tokenizers()
        more |= {"config": config, "scheduler": DDIMScheduler(**UNCHANGED)}
    kind = StableDiffusionXLPipeline if marks.sdxl else StableDiffusionPipeline
    try:
        with _in_small_letters(path) as file:
            pipe = kind.from_single_file(str(file), **more)
    except NotImplementedError as error:  # torch's, where a weight that the file lacks is to be moved
        raise DinotileError(f"model: {path.name} lacks weights of its unet or its vae") from error
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):  # weights that the file lacks are on no device
            _check_whole(path.name, name, [key for key, weight in part.named_parameters() if weight.is_meta])
    pipe.scheduler = scheduler or pipe.scheduler
    if marks.v_prediction:  # diffusers does not look at these marks
        pipe.scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=marks.zero_snr
        )
    return pipe


def _pretrained(source: _Source) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    scheduler = source.scheduler()
    parts: dict[str, Any] = {
        "scheduler": DDIMScheduler(**UNCHANGED),
        **source.tokenizers(),
        "text_encoder": source.weights(CLIPTextModel, "text_encoder"),
        "unet": source.weights(UNet2DConditionModel, "unet"),
        "vae": source.weights(AutoencoderKL, "vae"),
    }
    if source.sdxl:
        parts["text_encoder_2"] = source.weights(CLIPTextModelWithProjection, "text_encoder_2")
        zeros = bool(source.index.get("force_zeros_for_empty_prompt", True))
        pipe = StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
    else:
        unused = {"safety_checker": None, "feature_extractor": None}
        pipe = StableDiffusionPipeline(**parts, **unused, requires_safety_checker=False)
    pipe.scheduler = scheduler
    return pipe


@contextlib.contextmanager
def _in_small_letters(path: Path) -> Iterator[Path]:
    """The file by a name that ends with .safetensors: diffusers takes .SAFETENSORS for a pickle."""
    if path.suffix == ".safetensors":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, path.stem).with_suffix(".safetensors")
        try:
            os.symlink(path.absolute(), link)
        except OSError:  # on Windows few users may do that, but there both names are one
            link = path.with_suffix(".safetensors")
        yield link


def _check_whole(name: str, part: str, missing: list[str]) -> None:
    if missing:
        raise DinotileError(
            f"model: {name} lacks weights of its {part.replace('_', ' ')}, or they do not fit: {missing[0]}"
        )


class _Source:
    """A folder in diffusers' layout, or a model of the Hugging Face Hub in it: known to have all that a Stable
    Diffusion 1.5, 2 or XL has, and nothing that asks for more."""

    def __init__(self, option: str, name: str) -> None:
        """option: the command line's, which it was given with. DinotileError if it is another kind of model."""
        self._option, self.name = option, name
        self.index = self._read_index()
        """What its model_index.json has."""
        self._check_index()
        self.sdxl = "text_encoder_2" in self.index
        self._check_unet(dict(UNet2DConditionModel.load_config(name, subfolder="unet")))

    def refuse(self, text: str, hint: str = f"; {ASK}") -> DinotileError:
        return DinotileError(f"{self._option}: {self.name} {text}{hint}")

    def scheduler(self) -> DDIMScheduler:
        """One that has nothing but what the UNet was trained with."""
        config = DDIMScheduler.load_config(self.name, subfolder="scheduler")  # of any class: it only reads
        return DDIMScheduler(**trained(config, f"{self._option}: {self.name}"))

    def tokenizers(self) -> dict[str, Any]:
        """By part. DinotileError for one without a vocabulary, which some versions of transformers load: to it all
        words are the same."""
        from transformers import CLIPTokenizer

        found: dict[str, Any] = {}
        for part in ("tokenizer", "tokenizer_2") if self.sdxl else ("tokenizer",):
            try:
                found[part] = CLIPTokenizer.from_pretrained(self.name, subfolder=part)
                known = {*found[part]("a").input_ids} - {*found[part].all_special_ids}
            except Exception as error:  # whatever is raised where files are missing or damaged
                raise self.refuse(f"has a {part} that cannot be loaded: {one_line(error)[:300]}", "") from error
            if not known:
                raise self.refuse(f"has no vocabulary in its {part} folder (vocab.json and merges.txt)", "")
        return found

    def weights(self, kind: Any, part: str) -> Any:
        """A part of the pipeline with all its weights; DinotileError if some are not there."""
        words = part.replace("_", " ")
        files = [*Path(self.name, part).glob("*.safetensors")]
        if any(map(is_pointer, files)):
            raise self.refuse(f"has only a Git LFS pointer for its {words}", ": download the file itself")
        # transformers only says to look at what it has logged; diffusers raises an error that names the weight.
        more = {"ignore_mismatched_sizes": True} if part.startswith("text_encoder") else {}
        first: Exception | None = None
        for variant in VARIANTS[:1] if any("." not in file.stem for file in files) else VARIANTS:
            try:
                model, found = kind.from_pretrained(
                    self.name, subfolder=part, use_safetensors=True, variant=variant, output_loading_info=True, **more
                )
            except Exception as error:  # whatever is raised where there are no such files, or damaged ones
                first = first or error
                continue
            misfits = [each[0] for each in found.get("mismatched_keys", ())]
            _check_whole(self.name, part, sorted({*found["missing_keys"], *misfits}))
            return model.eval()
        text = " ".join(str(first).split())
        reason = (text.partition(" because ")[2] or text).partition(". ")[0]  # without advice for programmers
        raise self.refuse(f"has a {words} that cannot be loaded: {reason[:300]}", "")

    def _read_index(self) -> dict[str, Any]:
        file = Path(self.name) / "model_index.json" if os.path.isdir(self.name) else _from_hub(self._option, self.name)
        if not file.is_file():
            raise self.refuse("has no model_index.json", f": give {_what_instead(self.name)}")
        try:
            index = json.loads(file.read_text(encoding="utf-8"))
            entries = {key: value for key, value in index.items() if value not in (None, [None, None])}
        except (OSError, ValueError, RecursionError, AttributeError) as error:
            raise self.refuse(f"has a damaged model_index.json: {one_line(error)}", "") from error
        return entries

    def _check_index(self) -> None:
        kind = self.index.get("_class_name")
        parts = {key: value for key, value in self.index.items() if isinstance(value, (list, dict))}
        foreign = [key for key, value in parts.items() if not _is_of_library(value)]
        if foreign or not isinstance(kind, str):
            part = (foreign or ["_class_name"])[0].replace("_class_name", "pipeline")
            raise self.refuse(f"brings code of its own for the {part}, which is not run here")
        if "text_encoder_2" in parts and "text_encoder" not in parts:
            raise self.refuse("is an SDXL refiner")
        wanted = SDXL_PARTS if "text_encoder_2" in parts else PARTS
        for part, (library, kinds) in wanted.items():
            if part not in parts:
                raise self.refuse(f"is a {kind} without {part}")
            if parts[part][0] != library or parts[part][1] not in kinds:
                raise self.refuse(f"has a {parts[part][1]} for its {part}")
        odd = sorted(parts.keys() - wanted.keys() - UNUSED)
        if odd:
            raise self.refuse(f"is a {kind} with {odd[0]}")

    def _check_unet(self, config: dict[str, Any]) -> None:
        channels = config.get("in_channels", 4), config.get("out_channels", 4)
        if channels != (4, 4):
            raise self.refuse(f"is {by_channels(*channels)}")
        asked = {key: config[key] for key in INPUTS if config.get(key) is not None}
        if config.get("addition_embed_type") != ("text_time" if self.sdxl else None):
            asked["addition_embed_type"] = config.get("addition_embed_type")
        for key, value in asked.items():
            raise self.refuse(f"has a UNet with inputs that are not given here ({key}: {value})")
        if not isinstance(config.get("layers_per_block", 2), int):
            raise self.refuse("has a UNet with another number of blocks at every level")


def _what_instead(folder: str) -> str:
    """What may be meant by a folder that is no pipeline."""
    parent = os.path.normpath(os.path.join(folder, os.pardir))
    if os.path.isfile(os.path.join(parent, "model_index.json")):
        return f"its parent folder, {parent}"
    for file in sorted(Path(folder).glob("*.safetensors")):
        with contextlib.suppress(DinotileError):
            check_checkpoint(file)
            return f"the file in it, {file.name}"
    return "the folder of a whole diffusers pipeline"


def _is_of_library(entry: Any) -> bool:
    """Whether an entry of model_index.json names a class of diffusers or transformers."""
    named = isinstance(entry, list) and len(entry) == 2 and all(isinstance(each, str) for each in entry)
    return named and entry[0] in LIBRARIES and entry[1].isidentifier()


def _from_hub(option: str, name: str) -> Path:
    """The model_index.json of a model of the Hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(name, "model_index.json"))
    except HFValidationError as error:
        raise DinotileError(f"{option}: there is no file or folder {name}") from error
    except LocalEntryNotFoundError as error:  # a subclass of EntryNotFoundError that means no network
        raise DinotileError(
            f"{option}: there is no folder {name}, nor is it in Hugging Face's cache, and the Hub cannot be reached"
        ) from error
    except GatedRepoError as error:  # a subclass of RepositoryNotFoundError
        raise DinotileError(
            f"{option}: accept the licence at https://huggingface.co/{name} first, and log in with: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise DinotileError(
            f"{option}: there is no folder {name}, and no such model on the Hugging Face Hub"
        ) from error
    except EntryNotFoundError as error:
        raise DinotileError(f"{option}: {name} on the Hugging Face Hub is no diffusers pipeline; {ASK}") from error
