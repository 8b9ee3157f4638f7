"""LoRAs, a VAE and a ControlNet of the user's, beside tiny random checkpoints."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from diffusers.utils import USE_PEFT_BACKEND
from safetensors.torch import load_file, save_file

from lib_dinotile import DinotileError
from lib_dinotile import __main__ as cli
from lib_dinotile.engine.flow import upscale
from lib_dinotile.hosts.diffusers import load_host
from lib_dinotile.hosts.diffusers_addons import Lora, parse_loras
from lib_dinotile.hosts.diffusers_controlnet import load_controlnet
from lib_dinotile.settings import Generation, Settings
from lib_dinotile.tiling.noise import NoiseField
from lib_dinotile.tiling.plan import TilePlan
from tests.test_diffusers import HALVES, NAMED, SOURCE, Fixed, _parts, adapters, run, sd15, sdxl  # noqa: F401
from tests.test_regions import Shows
from tests.test_tiling import random_image

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
TEXT = "text_model_encoder_layers_1_self_attn_"


def one_line_of(model, **more):
    with pytest.raises(DinotileError) as error:
        load_host(Generation(model=model, **more))
    assert "\n" not in str(error.value) and error.value.status_code == 422
    return str(error.value)


# LoRA -----------------------------------------------------------------------------------------------------------------


with_peft = pytest.mark.skipif(not USE_PEFT_BACKEND, reason="diffusers loads LoRAs with peft and transformers 4.34")


def write_lora(path, context=768, texts=(("lora_te_", 768),), rank=4, alpha=2.0, **more):
    """As kohya's scripts write them: (down, up) of every layer by its name."""
    layers = {UNET + "attn1_to_q": (32, 32), UNET + "attn2_to_k": (context, 32)}
    for prefix, width in texts:
        layers |= {prefix + TEXT + name: (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    generator, tensors = torch.Generator().manual_seed(5), {}
    for name, (inputs, outputs) in layers.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, inputs, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(outputs, rank, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors | more, path)
    return {
        name: alpha / rank * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"] for name in layers
    }


@pytest.mark.parametrize(
    "text, loras",
    [
        ("", []),
        ("fur.safetensors", [("fur.safetensors", 1.0)]),
        ("fur.safetensors:0.8", [("fur.safetensors", 0.8)]),
        ("fur.safetensors:-1, b/c.safetensors : .5,", [("fur.safetensors", -1.0), ("b/c.safetensors", 0.5)]),
        (r"C:\loras\fur.safetensors", [(r"C:\loras\fur.safetensors", 1.0)]),
        (r"C:\loras\a, b.safetensors:2", [(r"C:\loras\a, b.safetensors", 2.0)]),
    ],
)
def test_loras_are_files_with_weights(text, loras):
    assert parse_loras(text) == [Lora(Path(path), weight) for path, weight in loras]


@with_peft
def test_a_lora_is_merged_into_unet_and_text_encoder_as_strongly_as_asked(sd15, tmp_path):  # noqa: F811
    changes = write_lora(tmp_path / "a.safetensors")
    plain, changed = (
        load_host(Generation(model=sd15, lora=lora)) for lora in ("", f"{tmp_path / 'a.safetensors'}:0.5")
    )
    merged = 0
    for one, other in ((plain.unet, changed.unet), (encoder(plain), encoder(changed))):
        for name, before in one.state_dict().items():
            layer = "_" + name.replace(".", "_").removesuffix("_weight")
            change = sum(each for key, each in changes.items() if name.endswith("weight") and key.endswith(layer))
            merged += torch.is_tensor(change)
            assert torch.allclose(other.state_dict()[name], before + 0.5 * change, atol=1e-5), name
    assert merged == len(changes)


def encoder(host):
    return host._text.__wrapped__._encoders[0][1]  # what is cached is the PromptEncoder


@with_peft
@pytest.mark.parametrize(
    "family, texts", [("sd15", [("lora_te_", 768)]), ("sdxl", [("lora_te1_", 1024), ("lora_te2_", 1024)])]
)
def test_a_lora_changes_the_image_and_two_add_up(family, texts, request, tmp_path):
    model = request.getfixturevalue(family)
    file = tmp_path / "a.safetensors"
    write_lora(file, {"sd15": 768, "sdxl": 2048}[family], texts)
    plain, once = run(model), run(model, lora=f"{file}:0.2")
    assert abs(once - plain).max() > 1
    assert abs(run(model, lora=f"{file}:0.1,{file}:0.1") - once).max() <= 1
    assert (run(model, lora=f"{file}:0") == plain).all()


@with_peft
def test_a_lora_that_does_not_fit_is_refused_in_one_line(sd15, sdxl, tmp_path):  # noqa: F811
    file = tmp_path / "a.safetensors"
    write_lora(file)
    assert "lora: a.safetensors does not fit this checkpoint" in one_line_of(sdxl, lora=str(file))
    # A layer of it has no place here: diffusers would leave it out and say nothing.
    for extra in ("lora_unet_down_blocks_7_attentions_0_transformer_blocks_0_attn1_to_q", "lora_te_text_model_nowhere"):
        more = {f"{extra}.lora_down.weight": torch.ones(4, 32), f"{extra}.lora_up.weight": torch.ones(32, 4)}
        write_lora(file, **more)
        assert "lora: a.safetensors does not fit this checkpoint" in one_line_of(sd15, lora=str(file)), extra
    write_lora(file, **{UNET + "attn1_to_q.dora_scale": torch.ones(32, 1)})
    assert "of a kind that diffusers does not load" in one_line_of(sd15, lora=str(file))


@with_peft
def test_what_is_no_lora_is_refused_in_one_line(sd15, tmp_path):  # noqa: F811
    save_file({"weight": torch.ones(3)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for text, says in (
        (tmp_path / "other.safetensors", "lora: other.safetensors is not a LoRA"),
        (tmp_path / "text.safetensors", "cannot be read as a safetensors file"),
        (tmp_path / "gone.safetensors", "lora: there is no file"),
        (tmp_path / "a.pt", "is not FILE.safetensors or FILE.safetensors:WEIGHT"),
        (f"{tmp_path / 'other.safetensors'}:much", "lora: 'much' is no weight of other.safetensors, give a number"),
        (f"{tmp_path / 'other.safetensors'}:nan", "lora: 'nan' is no weight of other.safetensors, give a number"),
    ):
        assert says in one_line_of(sd15, lora=str(text))


def test_without_what_diffusers_loads_loras_with_that_is_said(sd15, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("lib_dinotile.hosts.diffusers_addons.USE_PEFT_BACKEND", False)
    write_lora(tmp_path / "a.safetensors")
    said = one_line_of(sd15, lora=str(tmp_path / "a.safetensors"))
    assert said == "lora: needs newer packages: pip install --upgrade peft transformers"


# VAE ------------------------------------------------------------------------------------------------------------------


def another_vae(model, **more):
    """Of the checkpoint's architecture, with weights of its own."""
    torch.manual_seed(9)
    return AutoencoderKL.from_config(AutoencoderKL.load_config(model, subfolder="vae") | more).eval()


LDM = [
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"up_blocks\.(\d)\.resnets", lambda found: f"up.{3 - int(found[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{3 - int(found[1])}.upsample"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_(q|k|v)", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
]


def in_ldm(vae):
    """The tensors of a VAE as the files have them that the WebUIs load."""
    tensors = {}
    for name, tensor in vae.state_dict().items():
        for theirs, ours in LDM:
            name = re.sub(theirs, ours, name)
        attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", name)
        tensors[f"first_stage_model.{name}"] = tensor[..., None, None].contiguous() if attention else tensor
    return tensors


@pytest.mark.parametrize("kind", ["folder", "pipeline", "fp16 folder", "file", "file as in the WebUIs"])
def test_a_vae_of_the_user_s_takes_the_place_of_the_checkpoint_s(sd15, kind, tmp_path):  # noqa: F811
    vae, place = another_vae(sd15), tmp_path / "vae"
    if kind == "fp16 folder":
        vae = vae.half().float()
        vae.half().save_pretrained(place, variant="fp16")
        vae = vae.float()
    elif "folder" in kind or kind == "pipeline":
        vae.save_pretrained(place / "vae" if kind == "pipeline" else place)
    else:
        place = place.with_suffix(".safetensors")
        save_file(vae.state_dict() if kind == "file" else in_ldm(vae), place)
    host = load_host(Generation(model=sd15, vae=str(place)))
    for name, weights in vae.state_dict().items():
        assert torch.equal(host._codec.vae.state_dict()[name].float(), weights), name
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(host.encode(pixels), load_host(Generation(model=sd15)).encode(pixels))


def test_a_vae_of_other_latents_is_refused_in_one_line(sd15, tmp_path):  # noqa: F811
    for number, (more, says) in enumerate(
        (
            ({"latent_channels": 16}, "its latent_channels is 16, this one's 4"),
            ({"scaling_factor": 0.5}, "its scaling_factor is 0.5, this one's 0.18215"),
            ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "its latents_mean is"),
        )
    ):
        another_vae(sd15, **more).save_pretrained(tmp_path / str(number))
        assert f"vae: {tmp_path / str(number)} is for other checkpoints: {says}" in one_line_of(
            sd15, vae=str(tmp_path / str(number))
        )
    save_file(another_vae(sd15, latent_channels=16).state_dict(), tmp_path / "wide.safetensors")
    save_file({"weight": torch.ones(3)}, tmp_path / "other.safetensors")
    tensors = another_vae(sd15).state_dict()
    save_file({name: tensors[name] for name in list(tensors)[:-1]}, tmp_path / "cut.safetensors")
    save_file(
        {name: each for name, each in in_ldm(another_vae(sd15)).items() if "encoder" not in name},
        tmp_path / "decoder.safetensors",
    )
    for name in ("wide", "other", "cut", "decoder"):
        path = tmp_path / f"{name}.safetensors"
        assert f"vae: {path} is not an AutoencoderKL for this checkpoint, or is damaged" in one_line_of(
            sd15, vae=str(path)
        )
    AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).save_pretrained(
        tmp_path / "tiny"
    )
    assert "holds an AutoencoderTiny, not an AutoencoderKL" in one_line_of(sd15, vae=str(tmp_path / "tiny"))
    (tmp_path / "vae.pt").write_bytes(b"pickle")
    for name, says in (("gone", "there is no file or folder"), ("vae.pt", "other formats can run code, convert it")):
        assert says in one_line_of(sd15, vae=str(tmp_path / name))


# ControlNet -----------------------------------------------------------------------------------------------------------


def write_controlnet(folder, model, trained=True):
    """A random one for a checkpoint; untrained, it puts out zeros."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    net = ControlNetModel.from_unet(unet)
    for module in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        if trained:
            torch.nn.init.normal_(module.weight, std=0.3)
    net.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def nets(sd15, sdxl, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("nets")
    return {name: write_controlnet(folder / name, model) for name, model in (("sd15", sd15), ("sdxl", sdxl))}


@pytest.mark.parametrize(
    "family, cfg, settings",
    [
        ("sd15", 1.0, {}),
        ("sd15", 5.0, {"order": "fused"}),
        ("sd15", 5.0, {**NAMED, "seams": "bands"}),
        ("sdxl", 5.0, {}),
    ],
)
def test_a_controlnet_changes_the_image_which_is_the_same_at_any_batch(family, cfg, settings, request, nets):
    model = request.getfixturevalue(family)
    more = {"cfg": cfg, "settings": settings, "conditioner": Shows(HALVES) if "region_prompts" in settings else None}
    told = run(model, controlnet=nets[family], **more)
    assert abs(told - run(model, **more)).mean() > 0.5
    assert abs(run(model, 1, controlnet=nets[family], **more) - told).max() <= 1
    assert abs(run(model, 3, controlnet=nets[family], **more) - told).max() <= 1


def test_a_controlnet_counts_as_much_as_its_strength(sd15, nets, tmp_path):  # noqa: F811
    plain = run(sd15)
    assert (run(sd15, controlnet=nets["sd15"], controlnet_strength=0.0) == plain).all()
    assert (run(sd15, controlnet=write_controlnet(tmp_path / "new", sd15, trained=False)) == plain).all()
    half, whole = (run(sd15, controlnet=nets["sd15"], controlnet_strength=each) for each in (0.5, 1.0))
    assert 0.2 < abs(half - plain).mean() < abs(whole - plain).mean()


@pytest.mark.parametrize("order", ["chess", "fused"])
def test_every_tile_s_hint_is_the_enlarged_source_there(sd15, nets, order):  # noqa: F811
    host, seen = load_host(Generation(model=sd15, controlnet=nets["sd15"], steps=2, denoise=0.5, cfg=5.0)), []
    net = host._controlnet._model
    net.register_forward_pre_hook(lambda m, args, given: seen.append(given["controlnet_cond"]), with_kwargs=True)
    settings = Settings(tile=64, overlap=16, scale=2.0, order=order, guidance=0.0, guard="off")
    upscale(host, SOURCE, settings, NoiseField(1, host.channels))
    large = host.upscale(SOURCE, (140, 90), "Lanczos")
    plan = TilePlan(140, 90, 64, 16, host.factor)
    pixels = np.asarray(large).astype(np.float32) / 255
    height, width = plan.padded[1], plan.padded[0]
    pixels = np.pad(pixels, ((0, height - 90), (0, width - 140), (0, 0)), mode="edge")
    crops = {tile: torch.from_numpy(tile.of(np.moveaxis(pixels, 2, 0)).copy()) for tile in plan.tiles}
    shown = torch.cat(seen)
    found = {tile: sum(torch.allclose(one, crop, atol=1e-6) for one in shown) for tile, crop in crops.items()}
    assert sum(found.values()) == len(shown) and set(found.values()) == {2}  # with the prompt, and the negative one


def test_its_residuals_are_added_to_the_adapter_s(sd15, nets):  # noqa: F811
    host = load_host(Generation(model=sd15, prompt="a cat", controlnet=nets["sd15"]))
    generator = torch.Generator().manual_seed(0)
    x, hint = torch.randn(2, 4, 8, 8, generator=generator), torch.rand(2, 3, 64, 64, generator=generator)
    own = [torch.randn(2, c, -(-8 // d), -(-8 // d), generator=generator) for c, d in host.shape.slots]
    timestep, words = torch.tensor(300), [host.words("a cat")[0].expand(2, -1, -1)]
    with torch.no_grad():
        net = host._controlnet.residuals(x, timestep, {"encoder_hidden_states": words[0]}, hint)
        both = host.predict(x, timestep, words, own, hint)
        wanted = host.predict(x, timestep, words, [one + other for one, other in zip(own, net)])
        assert torch.allclose(both, wanted, atol=1e-5)
        assert torch.allclose(host.predict(x, timestep, words, None, hint), host.predict(x, timestep, words, net))
        assert not torch.allclose(both, host.predict(x, timestep, words, own), atol=1e-3)
    random = adapters(sd15)[1]
    told = run(sd15, controlnet=nets["sd15"], conditioner=Fixed(random))
    assert abs(told - run(sd15, controlnet=nets["sd15"])).mean() > 0.5
    assert abs(run(sd15, 1, controlnet=nets["sd15"], conditioner=Fixed(random)) - told).max() <= 1


def test_a_controlnet_is_a_file_too(sd15, nets, tmp_path):  # noqa: F811
    file = tmp_path / "net.safetensors"
    shutil.copy(Path(nets["sd15"]) / "diffusion_pytorch_model.safetensors", file)
    assert (run(sd15, controlnet=str(file)) == run(sd15, controlnet=nets["sd15"])).all()


def test_a_controlnet_of_another_base_is_refused_in_one_line(sd15, sdxl, nets, tmp_path):  # noqa: F811
    for model, other in ((sd15, "sdxl"), (sdxl, "sd15")):
        said = one_line_of(model, controlnet=nets[other])
        assert f"controlnet: {nets[other]} is for other checkpoints: its cross_attention_dim is" in said
        file = str(Path(nets[other]) / "diffusion_pytorch_model.safetensors")
        assert f"controlnet: {file} is not a ControlNetModel for this checkpoint" in one_line_of(model, controlnet=file)
    save_file({"weight": torch.ones(3)}, tmp_path / "other.safetensors")
    for name, says in (("other.safetensors", "is not a ControlNetModel"), ("gone", "there is no file or folder")):
        assert says in one_line_of(sd15, controlnet=str(tmp_path / name))
    assert "holds an AutoencoderKL, not a ControlNetModel" in one_line_of(sd15, controlnet=str(Path(sd15) / "vae"))


def test_a_unet_that_no_controlnet_is_made_for_is_refused_in_one_line(nets):
    """As those without a middle block, of distilled models."""
    unet = UNet2DConditionModel(
        block_out_channels=(8,), layers_per_block=1, norm_num_groups=8, mid_block_type=None,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    with pytest.raises(DinotileError, match=r"^controlnet: none fits this checkpoint's UNet: .*mid_block"):
        load_controlnet(unet, nets["sd15"], 1.0)


NET_LDM = [
    (r"^time_embedding\.linear_(\d)", lambda found: f"time_embed.{2 * int(found[1]) - 2}"),
    (r"^add_embedding\.linear_(\d)", lambda found: f"label_emb.0.{2 * int(found[1]) - 2}"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^controlnet_cond_embedding\.conv_in", "input_hint_block.0"),
    (r"^controlnet_cond_embedding\.conv_out", "input_hint_block.14"),
    (r"^controlnet_cond_embedding\.blocks\.(\d)", lambda found: f"input_hint_block.{2 * int(found[1]) + 2}"),
    (r"^controlnet_down_blocks\.(\d)", r"zero_convs.\1.0"),
    (r"^controlnet_mid_block", "middle_block_out.0"),
    (r"^down_blocks\.(\d)\.resnets\.0", lambda found: f"input_blocks.{2 * int(found[1]) + 1}.0"),
    (r"^down_blocks\.(\d)\.attentions\.0", lambda found: f"input_blocks.{2 * int(found[1]) + 1}.1"),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda found: f"input_blocks.{2 * int(found[1]) + 2}.0.op"),
    (r"^mid_block\.resnets\.(\d)", lambda found: f"middle_block.{2 * int(found[1])}"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"norm1\.(\w+)$", r"in_layers.0.\1"),
    (r"conv1\.", "in_layers.2."),
    (r"time_emb_proj\.", "emb_layers.1."),
    (r"norm2\.(\w+)$", r"out_layers.0.\1"),
    (r"conv2\.", "out_layers.3."),
    (r"conv_shortcut\.", "skip_connection."),
]
"""Names of a ControlNet with one layer a block, and what the original layout has for them."""


def net_in_ldm(net, prefix="control_model."):
    """The tensors of a ControlNet's folder as the files have them that the WebUIs load."""
    tensors = {}
    for name, tensor in load_file(Path(net) / "diffusion_pytorch_model.safetensors").items():
        for theirs, ours in NET_LDM:
            if "transformer_blocks" not in name or theirs.startswith("^"):
                name = re.sub(theirs, ours, name)
        tensors[prefix + name] = tensor
    return tensors


@pytest.mark.parametrize("prefix", ["", "control_model."])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_controlnet_in_the_original_layout_is_the_same(family, prefix, request, nets, tmp_path):
    model, file = request.getfixturevalue(family), tmp_path / "net.safetensors"
    beside = {"model.diffusion_model.out.0.weight": torch.ones(3)} if prefix else {}  # some come in a whole checkpoint
    save_file(net_in_ldm(nets[family], prefix) | beside, file)
    found, wanted = (
        load_host(Generation(model=model, controlnet=str(net)))._controlnet.state_dict() for net in (file, nets[family])
    )
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


UNION = {
    "task_embedding": torch.ones(6, 32),
    "transformer_layes.0.attn.in_proj_weight": torch.ones(96, 32),
    "spatial_ch_projs.weight": torch.ones(32, 32),
    "control_add_embedding.linear_1.weight": torch.ones(64, 16),
}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_controlnet_union_is_refused_by_its_name(family, request, nets, tmp_path):
    model, file = request.getfixturevalue(family), tmp_path / "net.safetensors"
    says = "is a ControlNet Union, which is not supported; give a ControlNet of the Tile kind"
    plain = load_file(Path(nets[family]) / "diffusion_pytorch_model.safetensors")
    for tensors in (plain | UNION, net_in_ldm(nets[family], "") | UNION, UNION):
        save_file(tensors, file)
        assert one_line_of(model, controlnet=str(file)) == f"controlnet: {file} {says}"
    folder = tmp_path / "folder"
    shutil.copytree(nets[family], folder)
    save_file(plain | UNION, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    for kind in ("ControlNetModel", "ControlNetUnionModel"):  # they are published as both
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "_class_name": kind}))
        assert one_line_of(model, controlnet=str(folder)) == f"controlnet: {folder} {says}"


def test_a_controlnet_with_other_weights_that_would_be_left_out_is_refused(sd15, nets, tmp_path):  # noqa: F811
    file = tmp_path / "net.safetensors"
    for tensors in (load_file(Path(nets["sd15"]) / "diffusion_pytorch_model.safetensors"), net_in_ldm(nets["sd15"])):
        prefix = "control_model." if "control_model.input_hint_block.0.weight" in tensors else ""
        save_file({**tensors, f"{prefix}zero_gate.weight": torch.ones(3)}, file)
        said = one_line_of(sd15, controlnet=str(file))
        assert said.startswith(f"controlnet: {file} is of a kind that is not supported (it has zero_gate.weight); give")


@pytest.mark.parametrize("option", ["vae", "controlnet"])
def test_a_file_of_another_kind_is_called_what_it_is(sd15, nets, option, tmp_path):  # noqa: F811
    write_lora(tmp_path / "lora.safetensors")
    save_file(net_in_ldm(nets["sd15"]), tmp_path / "net.safetensors")
    save_file(in_ldm(another_vae(sd15)), tmp_path / "vae.safetensors")
    save_file({"emb_params": torch.ones(1, 768)}, tmp_path / "words.safetensors")
    gives = {"vae": "give a VAE", "controlnet": "give a ControlNet of the Tile kind"}[option]
    for name, kind in (
        ("lora", "a LoRA, which goes with --lora"),
        ("words", "a textual inversion"),
        ("net", "a ControlNet, which goes with --controlnet"),
        ("vae", "a VAE, which goes with --vae"),
    ):
        file = str(tmp_path / f"{name}.safetensors")
        if f"--{option}" not in kind:
            assert one_line_of(sd15, **{option: file}) == f"{option}: {file} is {kind}; {gives}"


def test_a_controlnet_whose_hint_does_not_fit_is_refused_before_the_first_tile(sd15, tmp_path):  # noqa: F811
    unet = UNet2DConditionModel.from_pretrained(sd15, subfolder="unet")
    ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32)).save_pretrained(tmp_path / "net")
    said = one_line_of(sd15, controlnet=str(tmp_path / "net"))
    assert said.startswith(f"controlnet: {tmp_path / 'net'} does not fit {sd15}: ")


def test_in_float32_the_controlnet_computes_in_it_too(sd15, nets):  # noqa: F811
    host = load_host(Generation(model=sd15, prompt="a cat", controlnet=nets["sd15"], precision="bf16"))
    weights = [each.clone() for each in host._controlnet.parameters()]
    with host.full_precision():
        assert {each.dtype for each in host._controlnet.parameters()} == {torch.float32}
    assert all(torch.equal(one, other) for one, other in zip(weights, host._controlnet.parameters()))
    assert weights[0].dtype == torch.bfloat16


# The built-in model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, value",
    [
        ("prompt", "a cat"),
        ("negative", "cloth"),
        ("cfg", "7"),
        ("clip-skip", "2"),
        ("lora", "a.safetensors"),
        ("vae", "a.safetensors"),
        ("controlnet", "a"),
        ("controlnet-strength", "0.5"),
        ("prediction", "epsilon"),
        ("config", "a"),
        ("tile-prompt", "fur"),
        ("tile-prompts", "1: fur"),
        ("region-prompts", "A: fur"),
    ],
)
def test_what_the_built_in_model_has_no_use_for_is_refused(option, value, tmp_path, capsys):
    random_image(20, 20).save(tmp_path / "in.png")
    assert cli.main(["upscale", str(tmp_path / "in.png"), str(tmp_path / "out.png"), f"--{option}", value]) == 2
    name = option.replace("-", "_")
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"dinotile: {name}: the built-in model mini has no use for it: leave it out, or give a --model"
    assert not (tmp_path / "out.png").exists()
