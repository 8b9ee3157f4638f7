"""Models for the command line: loaded and right, or refused in one line that helps; nothing of them is run."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lib_dinotile import DinotileError
from lib_dinotile import __main__ as cli
from lib_dinotile.hosts.diffusers import load_host
from lib_dinotile.hosts.diffusers_pipelines import load_pipeline
from lib_dinotile.settings import Generation
from tests.hub import Hub, ask, serve
from tests.processes import Running, command
from tests.test_diffusers import SOURCE, run, sd15, sdxl  # noqa: F401
from tests.test_tiling import random_image

HELPS = "give a Stable Diffusion 1.5, 2 or XL checkpoint"


@pytest.fixture
def copied(tmp_path, request):
    """Makes a folder that is a copy of a model's, with configurations changed: {"unet/config.json": {...}}."""

    def copy(model, **changes):
        folder = tmp_path / f"model {len(list(tmp_path.iterdir()))}"
        shutil.copytree(request.getfixturevalue(model), folder, copy_function=os.link)
        for part, values in changes.items():
            file = folder / part / "config.json"
            if part in ("scheduler", "index"):
                file = folder / ("model_index.json" if part == "index" else "scheduler/scheduler_config.json")
            found = {**json.loads(file.read_text()), **values}
            file.unlink()  # it is a link
            file.write_text(json.dumps(found))
        return folder

    return copy


def rewritten(file, change):
    """The weights of a file, changed."""
    weights = change(load_file(file))
    file.unlink()
    save_file(weights, file, metadata={"format": "pt"})


def refusal(model, **generation):
    with pytest.raises(DinotileError) as error:
        load_host(Generation(model=str(model), **generation))
    line = str(error.value)
    assert line.isprintable() and len(line) < 600 and line.startswith(("model: ", "config: "))
    return line


# Schedulers of a folder ----------------------------------------------------------------------------------------------

ODD_SOLVERS = {
    "sde": {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "sde-dpmsolver++",
        "use_karras_sigmas": True,
        "solver_order": 3,
    },
    "deis": {
        "_class_name": "DEISMultistepScheduler",
        "algorithm_type": "deis",
        "solver_type": "logrho",
        "final_sigmas_type": "zero",
        "solver_order": 2,
    },
    "ancestral": {"_class_name": "EulerAncestralDiscreteScheduler"},
    "thresholding": {"_class_name": "DDIMScheduler", "thresholding": True, "clip_sample": True},
    "singlestep": {"_class_name": "DPMSolverSinglestepScheduler", "lower_order_final": False},
    "unipc": {"_class_name": "UniPCMultistepScheduler", "solver_p": ["diffusers", "DDPMScheduler"]},
    "lcm": {"_class_name": "LCMScheduler", "original_inference_steps": 4},
}


@pytest.mark.parametrize("name", ODD_SOLVERS)
def test_a_folder_s_solver_makes_no_difference(sd15, copied, name):  # noqa: F811
    spaced = {"timestep_spacing": "leading", "steps_offset": 1}
    folder = str(copied("sd15", scheduler={**spaced, **ODD_SOLVERS[name]}))
    plain = run(str(copied("sd15", scheduler=spaced)))
    torch.manual_seed(7)
    assert (run(folder) == plain).all()
    assert abs(run(folder, 1) - plain).max() <= 1


@pytest.mark.parametrize(
    "config, says",
    [
        ({"_class_name": "EDMEulerScheduler", "sigma_max": 80.0}, "its scheduler EDMEulerScheduler stands for"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "its scheduler EDMDPMSolverMultistepScheduler stands for"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "its scheduler FlowMatchEulerDiscreteScheduler stands for",
        ),
        (
            {"_class_name": "CosineDPMSolverMultistepScheduler"},
            "its scheduler CosineDPMSolverMultistepScheduler stands for",
        ),
        ({"_class_name": ["scheduler", "Mine"]}, "its scheduler ["),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type 'continuous'"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas True"),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        ({"timestep_spacing": "anyhow"}, "timestep_spacing 'anyhow'"),
        ({"beta_start": "small"}, "its scheduler's configuration is damaged"),
        ({"num_train_timesteps": -5}, "its scheduler's configuration is damaged"),
        ({"trained_betas": [0.5, 2.0, 0.1]}, "its scheduler's configuration is damaged"),
        ({"steps_offset": "x"}, "its scheduler's configuration is damaged"),
    ],
)
def test_another_noise_than_the_samplers_are_for_is_refused(sd15, copied, config, says):  # noqa: F811
    assert says in refusal(copied("sd15", scheduler=config))


# Other folders -------------------------------------------------------------------------------------------------------


def test_a_folder_with_nothing_but_fp16_files_is_loaded(sd15, copied, tmp_path):  # noqa: F811
    folder = copied("sd15")
    for part, kind in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        rewritten(folder / part / f"{kind}.safetensors", lambda weights: {k: v.half() for k, v in weights.items()})
        (folder / part / f"{kind}.safetensors").rename(folder / part / f"{kind}.fp16.safetensors")
    assert abs(run(str(folder)) - run(sd15)).max() <= 3
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert "has a unet that cannot be loaded: Error no file named" in refusal(folder)


def test_latents_with_a_mean_and_a_spread_by_channel_are_what_the_unet_was_trained_with(sd15, copied):  # noqa: F811
    mean, spread = [0.3, -0.2, 0.0, 0.1], [1.5, 0.5, 1.0, 2.0]
    pixels = torch.rand(1, 3, 64, 64)
    plain = load_host(Generation(model=sd15))
    other = load_host(Generation(model=str(copied("sd15", vae={"latents_mean": mean, "latents_std": spread}))))
    with torch.no_grad():
        latents = plain.encode(pixels)
        moved = other.encode(pixels)
        scale = plain._codec.vae.config.scaling_factor
        wanted = (latents / scale - torch.tensor(mean).view(1, 4, 1, 1)) / torch.tensor(spread).view(1, 4, 1, 1) * scale
        assert torch.allclose(moved, wanted, atol=1e-5)
        assert torch.allclose(other.decode(moved), plain.decode(latents), atol=1e-5)


TIME = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 5 * 8 + 1024}
FOLDERS = {
    "inpainting": ("sd15", {"unet": {"in_channels": 9}}, "is an inpainting model"),
    "pix2pix": ("sd15", {"unet": {"in_channels": 8}}, "is an InstructPix2Pix model"),
    "learned variance": ("sd15", {"unet": {"out_channels": 8}}, "is another kind of model"),
    "classes": ("sd15", {"unet": {"class_embed_type": "projection"}}, "inputs .*class_embed_type: projection"),
    "counted classes": ("sd15", {"unet": {"num_class_embeds": 1000}}, "inputs .*num_class_embeds: 1000"),
    "Kandinsky": ("sd15", {"unet": {"encoder_hid_dim_type": "image_proj"}}, "inputs .*encoder_hid_dim_type"),
    "images": ("sd15", {"unet": {"addition_embed_type": "image"}}, "inputs .*addition_embed_type: image"),
    "distilled": ("sd15", {"unet": {"time_cond_proj_dim": 256}}, "inputs .*time_cond_proj_dim: 256"),
    "SDXL without sizes": ("sdxl", {"unet": {"addition_embed_type": None}}, "inputs .*addition_embed_type: None"),
    "scores": ("sdxl", {"unet": TIME}, "lacks weights|that cannot be loaded"),
    "uneven": ("sd15", {"unet": {"layers_per_block": [1, 2]}}, "another number of blocks at every level"),
    "refiner": ("sdxl", {"index": {"text_encoder": [None, None], "tokenizer": [None, None]}}, "is an SDXL refiner"),
    "no words": ("sd15", {"index": {"text_encoder": [None, None]}}, "without text_encoder"),
    "prior": ("sd15", {"index": {"unet": ["diffusers", "PriorTransformer"]}}, "has a PriorTransformer for its unet"),
    "flux": ("sd15", {"index": {"unet": None, "transformer": ["diffusers", "FluxTransformer2DModel"]}}, "without unet"),
    "kolors": (
        "sd15",
        {"index": {"text_encoder": ["transformers", "ChatGLMModel"]}},
        "has a ChatGLMModel for its text",
    ),
    "motion": ("sd15", {"index": {"motion_adapter": ["diffusers", "MotionAdapter"]}}, "with motion_adapter"),
    "controlnet": ("sd15", {"index": {"controlnet": ["diffusers", "ControlNetModel"]}}, "with controlnet"),
    "wrong width": ("sd15", {"unet": {"cross_attention_dim": 1024}}, "lacks weights|that cannot be loaded"),
    "VAE of 16": ("sd15", {"vae": {"latent_channels": 16}}, "lacks weights|that cannot be loaded"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_of_other_models_are_refused_with_words_that_help(copied, kind):
    model, changes, says = FOLDERS[kind]
    line = refusal(copied(model, **changes))
    assert re.search(says, line), line


PARTS = ["unet", "vae", "text_encoder"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "harm", ["a weight is missing", "a layer is missing", "a wrong shape", "no file", "cut off", "text"]
)
def test_folders_with_a_part_that_is_not_whole_are_refused(sd15, copied, part, harm):  # noqa: F811
    folder = copied("sd15")
    (file,) = (folder / part).glob("*.safetensors")
    layer = {"unet": "mid_block.", "vae": "decoder.mid_block.", "text_encoder": "encoder.layers.1."}[part]
    name = max(name for name in load_file(file) if name.endswith("weight"))
    if harm == "a weight is missing":
        rewritten(file, lambda weights: {key: value for key, value in weights.items() if key != name})
    elif harm == "a layer is missing":
        rewritten(file, lambda weights: {key: value for key, value in weights.items() if layer not in key})
    elif harm == "a wrong shape":
        rewritten(file, lambda weights: {**weights, name: torch.zeros(3, 5)})
    else:
        data = {"no file": b"", "cut off": file.read_bytes()[:5000], "text": b"<html>not found</html>"}[harm]
        file.unlink()
        if data:
            file.write_bytes(data)
    line = refusal(folder)
    words = part.replace("_", " ")
    assert (
        f"lacks weights of its {words}, or they do not fit: " in line
        or f"has a {words} that cannot be loaded: " in line
    )
    assert "missing" not in harm or name.removeprefix("text_model.").split(".")[0] in line or layer in line


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("left", ["nothing", "a folder", "its configuration"])
def test_a_folder_without_a_vocabulary_is_refused(copied, part, left):
    """Some versions of transformers load it, and every word is the end of the text."""
    folder = copied("sdxl" if part == "tokenizer_2" else "sd15") / part
    for file in folder.iterdir():
        if left != "its configuration" or file.name not in ("tokenizer_config.json", "special_tokens_map.json"):
            file.unlink()
    if left == "nothing":
        folder.rmdir()
    line = refusal(folder.parent)
    assert f"has no vocabulary in its {part} folder" in line or f"has a {part} that cannot be loaded: " in line


def test_nor_is_one_with_such_a_configuration(ldm_file, tmp_path):
    path, config = ldm_file
    shutil.copytree(config, tmp_path / "config")
    shutil.rmtree(tmp_path / "config" / "tokenizer")
    line = refusal(path, config=str(tmp_path / "config"))
    assert line.startswith(f"config: {tmp_path / 'config'} has ") and "tokenizer" in line


def test_weights_that_are_damaged_are_not_replaced_by_others(copied):
    folder = copied("sd15")
    (file,) = (folder / "unet").glob("*.safetensors")
    shutil.copy(file, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    load_pipeline(Generation(model=str(folder)))
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:5000])
    assert "has a unet that cannot be loaded: " in refusal(folder)


def test_parts_that_do_not_fit_each_other_are_refused(sd15, sdxl, copied):  # noqa: F811
    folder = copied("sd15")
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(f"{sdxl}/text_encoder", folder / "text_encoder")
    assert "do not fit each other" in refusal(folder)


def test_a_folder_without_a_pipeline_is_told_what_to_give(tmp_path, sd15):  # noqa: F811
    assert "has no model_index.json: give the folder of a whole diffusers pipeline" in refusal(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "a lora.safetensors")
    assert "give the folder of a whole diffusers pipeline" in refusal(tmp_path)
    save_file({name: torch.zeros(4, 4, 3, 3) for name in WHOLE}, tmp_path / "dream.safetensors")
    assert "give the file in it, dream.safetensors" in refusal(tmp_path)
    assert refusal(f"{sd15}/unet/") == f"model: {sd15}/unet/ has no model_index.json: give its parent folder, {sd15}"
    for text in ("", "[]", "{", '{"_class_name": 3}', "[" * 100_000):
        (tmp_path / "model_index.json").write_text(text)
        refusal(tmp_path)


# Code ----------------------------------------------------------------------------------------------------------------

EVIL = """
import pathlib
pathlib.Path(__file__).with_name("was run").touch()
from diffusers import *
from transformers import *
class Mine(UNet2DConditionModel, StableDiffusionPipeline): pass
"""


@pytest.mark.parametrize(
    "index",
    [
        {"unet": ["mine", "Mine"]},
        {"unet": ["unet.mine", "Mine"]},
        {"text_encoder": ["mine", "Mine"]},
        {"scheduler": ["mine", "Mine"]},
        {"safety_checker": ["mine", "Mine"]},
        {"extra": ["mine", "Mine"]},
        {"extra": ["mine", "Mine", "more"]},
        {"extra": {"mine": "Mine"}},
        {"unet": ["diffusers", "Mine.__class__"]},
        {"unet": ["os", "system"]},
        {"_class_name": ["mine", "Mine"]},
        {"_class_name": ["pipeline", "Mine"]},
    ],
)
@pytest.mark.parametrize("option", ["model", "config"])
def test_no_code_of_a_folder_is_run(sd15, copied, index, option, monkeypatch, tmp_path):  # noqa: F811
    folder = copied("sd15", index=index)
    for place in (folder, folder / "unet"):
        for name in ("mine.py", "pipeline.py", "Mine.py"):
            (place / name).write_text(EVIL)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    if option == "model":
        line = refusal(folder)
    else:
        weights = {name: torch.zeros(4, 4, 3, 3) for name in WHOLE}
        save_file(weights, tmp_path / "whole.safetensors")
        line = refusal(tmp_path / "whole.safetensors", config=str(folder))
    assert "brings code of its own" in line or "for its unet" in line
    assert not list(folder.rglob("was run"))


def test_nor_code_that_a_part_s_configuration_names(sd15, copied):  # noqa: F811
    auto = {"auto_map": {"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine", "AutoTokenizer": ["mine.Mine", None]}}
    folder = copied("sd15", text_encoder=auto, unet={**auto, "_class_name": ["mine", "Mine"]}, vae=auto)
    file = folder / "tokenizer" / "tokenizer_config.json"
    found = {**json.loads(file.read_text()), **auto}
    file.unlink()
    file.write_text(json.dumps(found))
    for place in (folder, *(folder / part for part in (*PARTS, "tokenizer"))):
        (place / "mine.py").write_text(EVIL)
    assert (run(str(folder)) == run(sd15)).all()
    assert not list(folder.rglob("was run"))


# Files ---------------------------------------------------------------------------------------------------------------

UNET = "model.diffusion_model.input_blocks.0.0.weight"
WHOLE = (UNET, "first_stage_model.decoder.conv_in.weight", "cond_stage_model.transformer.text_model.x")
FILES = {
    "LoRA": (
        ["lora_unet_down_blocks_0.lora_down.weight", "lora_unet_down_blocks_0.lora_up.weight"],
        "is a LoRA, which goes with --lora",
    ),
    "PEFT LoRA": (["unet.down_blocks.0.to_q.lora_A.weight"], "is a LoRA"),
    "LyCORIS": (["lora_te_text_model.hada_w1_a"], "is a LoRA"),
    "ControlNet": (["control_model.input_blocks.0.0.weight"], "is a ControlNet, which goes with --controlnet"),
    "diffusers ControlNet": (["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.x"], "is a ControlNet"),
    "VAE": (["first_stage_model.encoder.conv_in.weight"], "is a VAE, which goes with --vae"),
    "bare VAE": (["encoder.conv_in.weight", "decoder.conv_in.weight"], "is a VAE"),
    "embedding": (["emb_params"], "is a textual inversion"),
    "SD3": (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "is an SD3 model"),
    "Flux": (["double_blocks.0.img_attn.qkv.weight", "img_in.weight"], "is a Flux model"),
    "UNet of diffusers": (["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"], "is a UNet alone"),
    "text encoder": (["text_model.encoder.layers.0.mlp.fc1.weight"], "is a text encoder"),
    "classifier": (["classifier.weight", "vit.layer.0.weight"], "is no checkpoint: it has no UNet"),
    "nothing": ([], "is no checkpoint: it has no UNet"),
    "EDM": ([*WHOLE, "edm_vpred.sigma_max", "edm_vpred.sigma_min"], "was trained with EDM's noise"),
    "Playground": ([*WHOLE, "edm_mean", "edm_std"], "was trained with EDM's noise"),
    "refiner": ([UNET, WHOLE[1], "conditioner.embedders.0.model.transformer.x"], "is an SDXL refiner"),
    "unCLIP": ([*WHOLE, "model.diffusion_model.label_emb.0.0.weight"], "needs images"),
    "no VAE": ([UNET, WHOLE[2]], "has no VAE"),
    "no text encoder": (WHOLE[:2], "has no text encoder"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_of_other_kinds_are_refused_with_words_that_help(kind, tmp_path):
    names, says = FILES[kind]
    save_file({name: torch.zeros(4, 4, 3, 3) for name in names}, tmp_path / "x.safetensors")
    line = refusal(tmp_path / "x.safetensors")
    assert says in line and HELPS in line


@pytest.mark.parametrize(
    "channels, says", [(9, "an inpainting model"), (8, "an InstructPix2Pix model"), (5, "a depth")]
)
def test_so_are_checkpoints_with_more_inputs(channels, says, tmp_path):
    weights = {name: torch.zeros(4, channels, 3, 3) for name in WHOLE}
    save_file(weights, tmp_path / "x.safetensors")
    assert f"x.safetensors is {says}" in refusal(tmp_path / "x.safetensors")


def test_stable_diffusion_2_has_to_say_what_it_predicts(tmp_path):
    """diffusers takes all of them for those of 768 pixels."""
    names = (*WHOLE[:2], "cond_stage_model.model.transformer.resblocks.0.ln_1.weight")
    file, weights = tmp_path / "x.safetensors", {name: torch.zeros(4, 4, 3, 3) for name in names}
    save_file(weights, file)
    line = refusal(file)
    assert "is a Stable Diffusion 2 and does not say what it predicts: give --prediction epsilon" in line
    for known in ({"prediction": "epsilon"}, {"prediction": "v_prediction"}, {"config": str(tmp_path)}):
        assert "predicts" not in refusal(file, **known)
    save_file({**weights, "v_pred": torch.zeros(1)}, file)
    assert "predicts" not in refusal(file)


def test_a_git_lfs_pointer_is_called_one(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 2132625894\n"
    (tmp_path / "x.safetensors").write_text(pointer)
    assert "it is only a Git LFS pointer, download the file itself" in refusal(tmp_path / "x.safetensors")


def test_pointers_in_a_folder_are_refused_too(sd15, copied):  # noqa: F811
    folder = copied("sd15")
    (file,) = (folder / "unet").glob("*.safetensors")
    file.unlink()
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 2132625894\n")
    assert "has only a Git LFS pointer for its unet: download the file itself" in refusal(folder)


def test_the_configuration_of_another_kind_is_refused(sdxl, tmp_path):  # noqa: F811
    save_file({name: torch.zeros(4, 4, 3, 3) for name in WHOLE}, tmp_path / "x.safetensors")
    line = refusal(tmp_path / "x.safetensors", config=sdxl)
    assert line.startswith("config: ") and "another kind of Stable Diffusion than x.safetensors" in line


@pytest.fixture(scope="module")
def ldm_file(sd15, tmp_path_factory):  # noqa: F811
    """A checkpoint in the original layout, of the shapes of `sd15`, with random weights."""
    openaimodel = pytest.importorskip("ldm.modules.diffusionmodules.openaimodel")
    model = pytest.importorskip("ldm.modules.diffusionmodules.model")
    torch.manual_seed(0)
    sizes = {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": (1, 2)}
    heads = {"num_heads": 8, "use_spatial_transformer": True, "context_dim": 768, "legacy": False}
    unet = openaimodel.UNetModel(**sizes, **heads, num_res_blocks=1, attention_resolutions=[1], use_checkpoint=False)
    coder = {"ch": 32, "out_ch": 3, "ch_mult": (1,) * 4, "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 3}
    coder |= {"resolution": 64, "z_channels": 4}
    parts = {
        "model.diffusion_model.": unet,
        "first_stage_model.encoder.": model.Encoder(**coder),
        "first_stage_model.decoder.": model.Decoder(**coder),
        "first_stage_model.quant_conv.": torch.nn.Conv2d(8, 8, 1),
        "first_stage_model.post_quant_conv.": torch.nn.Conv2d(4, 4, 1),
    }
    weights = {f"{start}{key}": value for start, part in parts.items() for key, value in part.state_dict().items()}
    weights = {key: torch.randn_like(value) * 0.1 if not value.any() else value for key, value in weights.items()}
    words = load_file(f"{sd15}/text_encoder/model.safetensors")
    start = "cond_stage_model.transformer.text_model."
    weights |= {start + key.removeprefix("text_model."): value for key, value in words.items()}
    path, config = tmp_path_factory.mktemp("ldm") / "tiny.safetensors", tmp_path_factory.mktemp("config") / "sd15"
    save_file(weights, path)
    shutil.copytree(sd15, config)
    found = json.loads((config / "vae" / "config.json").read_text())
    (config / "vae" / "config.json").write_text(json.dumps({**found, "block_out_channels": [32] * 4}))
    for file in config.rglob("*.safetensors"):
        file.unlink()
    return path, str(config)


def test_a_file_in_the_original_layout_paints_with_a_solver_of_our_own(ldm_file):
    path, config = ldm_file
    plain = run(str(path), config=config)
    file = Path(config, "scheduler", "scheduler_config.json")
    kept = file.read_text()
    for name in ("sde", "deis"):
        file.write_text(json.dumps({**json.loads(kept), **ODD_SOLVERS[name]}))
        assert (run(str(path), config=config) == plain).all()
    file.write_text(kept)


@pytest.mark.parametrize("kind", ["CLIPVisionModelWithProjection", "CLIPImageProcessor"])
def test_of_a_configuration_nothing_else_is_loaded(ldm_file, tmp_path, kind):
    path, config = ldm_file
    shutil.copytree(config, tmp_path / "config")
    index = tmp_path / "config" / "model_index.json"
    parts = {"image_encoder": ["transformers", kind], "feature_extractor": ["transformers", kind]}
    index.write_text(json.dumps({**json.loads(index.read_text()), **parts}))
    for part in parts:  # a pickle that breaks whoever opens it, beside a file that diffusers looks for
        (tmp_path / "config" / part).mkdir()
        (tmp_path / "config" / part / "pytorch_model.bin").write_bytes(b"no pickle")
        save_file({"x": torch.zeros(1)}, tmp_path / "config" / part / "diffusion_pytorch_model.safetensors")
    assert (run(str(path), config=str(tmp_path / "config")) == run(str(path), config=config)).all()


def test_the_ending_may_be_in_capitals(ldm_file, tmp_path):
    path, config = ldm_file
    shutil.copy(path, tmp_path / "X.SAFETENSORS")
    assert (run(str(tmp_path / "X.SAFETENSORS"), config=config) == run(str(path), config=config)).all()
    assert "there is no file gone.SAFETENSORS" in refusal("gone.SAFETENSORS")
    (tmp_path / "X.CKPT").write_bytes(b"pickle")
    assert "X.CKPT is not a .safetensors file" in refusal(tmp_path / "X.CKPT")


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_what_a_scheduler_says_of_its_steps_stays(sd15, copied, ldm_file, offset):  # noqa: F811
    path, config = ldm_file
    folder = copied("sd15", scheduler={"steps_offset": offset, "clip_sample": True})
    shutil.copy(Path(config, "vae", "config.json"), folder / "of the file.json")
    assert load_pipeline(Generation(model=str(folder))).scheduler.config.steps_offset == offset
    (folder / "of the file.json").replace(folder / "vae" / "config.json")
    assert load_pipeline(Generation(model=str(path), config=str(folder))).scheduler.config.steps_offset == offset


@pytest.mark.parametrize("model", ["folder", "file", "mini"])
def test_nothing_is_said_where_nothing_is_to_be(sd15, ldm_file, model, tmp_path):  # noqa: F811
    """Neither by diffusers and transformers nor by the Hub's client, in a process that has not warned of it yet."""
    path, config = ldm_file
    given = {"folder": ["--model", sd15], "file": ["--model", path, "--config", config], "mini": []}[model]
    random_image(20, 20).save(tmp_path / "in.png")
    sizes = ["--steps", 2, "--tile", 64, "--overlap", 16, "--patches", 8]
    done = Running(command, "upscale", tmp_path / "in.png", tmp_path / "out.png", "--quiet", *sizes, *given).wait()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("part", ["middle_block.1.", "decoder.mid.", "encoder.layers.1.", "final_layer_norm.weight"])
def test_a_file_that_is_not_whole_is_refused(ldm_file, part, tmp_path):
    path, config = ldm_file
    weights = {key: value for key, value in load_file(path).items() if part not in key}
    save_file(weights, tmp_path / "x.safetensors")
    assert "x.safetensors lacks weights of its " in refusal(tmp_path / "x.safetensors", config=config)


# The Hub -------------------------------------------------------------------------------------------------------------


def test_what_the_hub_says_is_reported_as_what_it_is(tmp_path, monkeypatch):
    with serve(Hub({"me/files": {"README.md": b""}}, gated={"me/gated": 401})) as hub:
        ask(hub.url, str(tmp_path / "cache"), monkeypatch)
        assert "no such model on the Hugging Face Hub" in refusal("me/none")
        assert "accept the licence at https://huggingface.co/me/gated" in refusal("me/gated")
        assert "me/files on the Hugging Face Hub is no diffusers pipeline" in refusal("me/files")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refusal("me/none")
    assert "there is no folder me/none" in line and "nor is it in Hugging Face's cache" in line and "index" not in line
    assert "there is no file or folder not/a/model" in refusal("not/a/model")


def test_a_pipeline_on_the_hub_is_loaded_and_later_without_it(sd15, tmp_path, monkeypatch):  # noqa: F811
    files = {str(file.relative_to(sd15)): file.read_bytes() for file in Path(sd15).rglob("*") if file.is_file()}
    with serve(Hub({"me/tiny": files})) as hub:
        ask(hub.url, str(tmp_path / "cache"), monkeypatch)
        assert (run("me/tiny") == run(sd15)).all()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert (run("me/tiny") == run(sd15)).all()


def test_a_model_that_is_looked_for_is_said_so_and_the_client_of_the_hub_says_nothing(tmp_path, monkeypatch, capfd):
    import huggingface_hub.utils

    SOURCE.save(tmp_path / "in.png")
    files = [str(tmp_path / "in.png"), str(tmp_path / "out.png")]

    def loud(*arguments, **more):
        huggingface_hub.utils.logging.get_logger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise huggingface_hub.utils.LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", loud)
    assert cli.main(["upscale", *files, "--model", "me/none"]) == 2
    said = capfd.readouterr()
    assert said.out == "looking for me/none on the Hugging Face Hub\n" and said.err.count("\n") == 1
    assert "there is no folder me/none, nor is it in Hugging Face's cache" in said.err
    for name in ("gone.safetensors", "not/a/model"):
        assert cli.main(["upscale", *files, "--model", name]) == 2
        assert "looking" not in capfd.readouterr().out


def test_the_command_line_says_it_in_one_line_and_ends_with_2(tmp_path, copied, sd15, capsys):  # noqa: F811
    SOURCE.save(tmp_path / "in.png")
    folder = copied("sd15", unet={"in_channels": 9})
    code = cli.main(["upscale", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--model", str(folder), "--quiet"])
    assert code == 2 and capsys.readouterr().err.strip() == (
        f"dinotile: model: {folder} is an inpainting model (its UNet has 9 channels in, 4 out); {HELPS}"
    )
    assert not (tmp_path / "out.png").exists()
    assert np.asarray(Image.open(tmp_path / "in.png")).shape == (45, 70, 3)
