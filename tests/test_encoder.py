"""The patch encoder: the same features from either library, and one line for whatever is amiss."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_dinotile import DinotileError
from lib_dinotile.dino import checkpoint as checkpoint_module
from lib_dinotile.dino import encoder as encoder_module
from lib_dinotile.dino.architecture import Architecture
from lib_dinotile.dino.checkpoint import automatic_encoder, read_checkpoint
from lib_dinotile.dino.dinov3 import DINOv3
from lib_dinotile.dino.encoder import FACETS, KNOWN, PatchEncoder, installed, interpolate_positions, load_encoder
from tests.hub import ask
from tests.stand_in import stand_in

TINY = Architecture(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=70)
REGISTERS = dataclasses.replace(TINY, num_register_tokens=4)
TINY3 = DINOv3(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3, num_register_tokens=4)
GATED3 = dataclasses.replace(TINY3, intermediate_size=104, use_gated_mlp=True, hidden_act="silu")
ALL = {"plain": TINY, "registers": REGISTERS, "dinov3": TINY3, "dinov3 plus": GATED3}
SMALL3 = DINOv3(num_register_tokens=4)
SMALL = Architecture(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518)


def write_checkpoint(folder: Path, architecture: Architecture | DINOv3 = TINY, seed: int = 0, **config: object) -> Path:
    """Random weights as a Hugging Face folder, large enough that every tensor shows in the features."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in architecture.shapes().items():
        scale = 0.3 if len(shape) == 1 else torch.Size(shape[1:]).numel() ** -0.5
        offset = (
            1.0
            if name.endswith(("lambda1", "norm1.weight", "norm2.weight", "layernorm.weight")) or name == "norm.weight"
            else 0.0
        )
        weights[name] = torch.randn(shape, generator=draw) * scale + offset
    kind = "dinov2_with_registers" if architecture.num_register_tokens else "dinov2"
    if isinstance(architecture, DINOv3):  # with what it is augmented by in training
        kind, config = "dinov3_vit", {"pos_embed_jitter": 2.0, "pos_embed_rescale": 2.0} | config
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = dataclasses.asdict(architecture) | {"model_type": kind, "use_mask_token": False} | config
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture(params=[TINY, TINY3], ids=["dinov2", "dinov3"])
def architecture(request: pytest.FixtureRequest) -> Architecture | DINOv3:
    """Each family in turn."""
    return request.param


@pytest.fixture
def tiny(tmp_path: Path, architecture: Architecture | DINOv3) -> Path:
    return write_checkpoint(tmp_path / "tiny", architecture)


@pytest.fixture
def image(architecture: Architecture | DINOv3) -> torch.Tensor:
    size = 6 * architecture.patch_size, 9 * architecture.patch_size
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def timm() -> types.ModuleType:
    """timm, which wants torchvision to load data: where there is none, a stand-in while timm is imported."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    if "timm" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("timm")
    with stand_in("torchvision"):
        return importlib.import_module("timm")


@pytest.fixture
def transformers() -> types.ModuleType:
    module = pytest.importorskip("transformers")
    if not hasattr(module, "Dinov2Model"):
        pytest.skip(f"transformers {module.__version__} has no Dinov2Model")
    return module


def has_dinov3(library: types.ModuleType) -> bool:
    """Asked of the library, in other words than dinotile does."""
    if library.__name__ == "timm":
        return library.is_model("vit_small_patch16_dinov3")
    return hasattr(library, "DINOv3ViTModel")


def dinov3_runs() -> bool:
    """Whether any library here has it."""
    found = [name for name in ("transformers", "timm") if importlib.util.find_spec(name) is not None]
    with stand_in("torchvision") if importlib.util.find_spec("torchvision") is None else contextlib.nullcontext():
        return any(has_dinov3(importlib.import_module(name)) for name in found)


def require(architecture: Architecture | DINOv3, *libraries: types.ModuleType) -> None:
    """Skips the test unless these libraries have a model of that kind."""
    lacks = [module.__name__ for module in libraries if isinstance(architecture, DINOv3) and not has_dinov3(module)]
    if lacks:
        pytest.skip(f"no DINOv3 in this {' and '.join(lacks)}")


@pytest.fixture(params=["transformers", "timm"])
def backend(request: pytest.FixtureRequest, architecture: Architecture | DINOv3) -> str:
    """Each library in turn; skipped where it is not there, or does not have the model."""
    require(architecture, request.getfixturevalue(request.param))
    return request.param


@pytest.fixture
def runs(architecture: Architecture | DINOv3) -> None:
    """Skipped where no library has the model."""
    if isinstance(architecture, DINOv3) and not dinov3_runs():
        pytest.skip("no library has DINOv3")


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# The same features ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ALL.values(), ids=ALL)
@pytest.mark.parametrize("grid", [(5, 5), (6, 9), (3, 1), (12, 7)])
def test_both_libraries_give_the_same_features(tmp_path, transformers, timm, architecture, grid):
    require(architecture, transformers, timm)
    folder = write_checkpoint(tmp_path / "encoder", architecture)
    first, second = (load_encoder(str(folder), backend=name) for name in ("transformers", "timm"))
    assert (first.backend, second.backend) == ("transformers", "timm")
    pixels = torch.rand(2, 3, grid[0] * first.patch, grid[1] * first.patch)
    for layer in range(-3, 3):
        for facet in FACETS:
            error = relative_error(first(pixels, layer, facet), second(pixels, layer, facet))
            assert error < 1e-4, f"{facet} of layer {layer}: {error:.1e}"


@pytest.mark.parametrize("architecture", [SMALL, SMALL3], ids=["dinov2", "dinov3"])
def test_both_libraries_give_the_same_features_at_the_size_of_a_small_one(tmp_path, transformers, timm, architecture):
    require(architecture, transformers, timm)
    folder = write_checkpoint(tmp_path / "small", architecture)
    first, second = (load_encoder(str(folder), backend=name) for name in ("transformers", "timm"))
    pixels = torch.rand(1, 3, 4 * first.patch, 7 * first.patch)
    with torch.inference_mode():
        for layer in (0, 8, -1):
            error = relative_error(first(pixels, layer), second(pixels, layer))
            print(f"layer {layer}: relative error {error:.1e}")
            assert error < 1e-4


def test_features_are_those_of_the_library_itself(tmp_path, transformers):
    """... on the grid it was trained on; on others too where the library interpolates position embeddings as we do."""
    kinds = [(TINY, transformers.Dinov2Model, int(transformers.__version__.split(".")[0]) >= 5)]
    if hasattr(transformers, "Dinov2WithRegistersModel"):
        kinds.append((REGISTERS, transformers.Dinov2WithRegistersModel, True))
    if has_dinov3(transformers):
        kinds += [(each, transformers.DINOv3ViTModel, True) for each in (TINY3, GATED3)]
    for number, (architecture, kind, same) in enumerate(kinds):
        folder = write_checkpoint(tmp_path / f"{number}", architecture)
        encoder, theirs = load_encoder(str(folder), backend="transformers"), kind.from_pretrained(folder).eval()
        for height, width in [(5, 5), *([(3, 4), (6, 9)] if same else [])]:
            pixels = torch.rand(2, 3, height * encoder.patch, width * encoder.patch)
            with torch.no_grad():
                tokens = theirs(normalised(pixels)).last_hidden_state[:, 1 + architecture.num_register_tokens :]
            spatial = tokens.transpose(1, 2).reshape(2, 48, height, width)
            assert relative_error(encoder(pixels), spatial) < 1e-5, (kind.__name__, height, width)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (pixels - mean) / std


def test_what_transformers_saves_is_loaded(tmp_path, transformers, timm, architecture, image):
    require(architecture, transformers, timm)
    numbers = dataclasses.asdict(architecture)
    if architecture is TINY3:
        model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**numbers))
    else:
        del numbers["num_register_tokens"]
        model = transformers.Dinov2Model(transformers.Dinov2Config(**numbers))
    model.save_pretrained(tmp_path / "saved", safe_serialization=True)
    first, second = (load_encoder(str(tmp_path / "saved"), backend=name) for name in ("transformers", "timm"))
    assert relative_error(first(image), second(image)) < 1e-4


TIMM_MODELS = ["vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3_qkvb"]


@pytest.mark.parametrize("name", TIMM_MODELS)
@pytest.mark.parametrize("architecture", [TINY3], ids=["dinov3"])
def test_what_timm_saves_is_loaded_and_gives_its_features(tmp_path, timm, architecture, backend, name):
    require(architecture, timm)
    arguments = {"embed_dim": 48, "depth": 3, "num_heads": 3}
    model = timm.create_model(name, **arguments).eval()
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    timm.models.save_for_hf(model, tmp_path / "saved", safe_serialization=True, model_args=arguments)
    encoder = load_encoder(str(tmp_path / "saved"), backend=backend)
    pixels = torch.rand(2, 3, 3 * 16, 7 * 16)
    with torch.no_grad():
        layers = model.forward_intermediates(normalised(pixels), norm=True, intermediates_only=True)
    for layer, features in enumerate(layers):
        assert relative_error(encoder(pixels, layer), features) < 1e-5, layer


@pytest.mark.parametrize("architecture", [TINY3, GATED3], ids=["dinov3", "dinov3 plus"])
def test_the_same_weights_in_timm_s_layout_give_the_same_features(tmp_path, architecture, backend):
    architecture = dataclasses.replace(architecture, intermediate_size=192)
    folder = write_checkpoint(tmp_path / "theirs", architecture)
    (tmp_path / "timm").mkdir()
    save_file(in_timm_s_layout(load_file(folder / "model.safetensors")), tmp_path / "timm" / "model.safetensors")
    (tmp_path / "timm" / "config.json").write_text(json.dumps(timm_config(architecture.use_gated_mlp)))
    first, second = (load_encoder(str(place), backend=backend) for place in (folder, tmp_path / "timm"))
    pixels = torch.rand(1, 3, 64, 80)
    for layer in range(3):
        assert torch.equal(first(pixels, layer), second(pixels, layer))
    assert first.fingerprint != second.fingerprint


def in_timm_s_layout(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of transformers' DINOv3."""
    names = {
        "embeddings.patch_embeddings": "patch_embed.proj",
        "embeddings.register_tokens": "reg_token",
        "embeddings.": "",
        "layer.": "blocks.",
        "attention.o_proj": "attn.proj",
        "layer_scale1.lambda1": "gamma_1",
        "layer_scale2.lambda1": "gamma_2",
        "gate_proj": "fc1_g",
        "up_proj": "fc1_x" if "layer.0.mlp.gate_proj.weight" in weights else "fc1",
        "down_proj": "fc2",
    }
    found = {}
    for name, tensor in weights.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        found[name] = tensor
    for number in range(3):
        at, to = f"blocks.{number}.attention", f"blocks.{number}.attn"
        found[f"{to}.qkv.weight"] = torch.cat([found.pop(f"{at}.{part}_proj.weight") for part in "qkv"])
        for part in "qv":
            found[f"{to}.{part}_bias"] = found.pop(f"{at}.{part}_proj.bias")
    return found


def timm_config(gated: bool = False, **change: object) -> dict[str, object]:
    """`config.json` as timm writes it."""
    return {
        "architecture": f"vit_small_{'plus_' if gated else ''}patch16_dinov3_qkvb",
        "num_classes": 0,
        "num_features": 48,
        "global_pool": "avg",
        "model_args": {"embed_dim": 48, "depth": 3, "num_heads": 3},
        "pretrained_cfg": {"tag": "lvd1689m", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    } | change


@pytest.mark.parametrize("architecture", [REGISTERS, TINY3, GATED3], ids=["dinov2", "dinov3", "dinov3 plus"])
def test_every_tensor_of_the_file_has_a_say(tmp_path, architecture, backend, image):
    """So no weight is left as the library drew it."""
    folder = write_checkpoint(tmp_path / "encoder", dataclasses.replace(architecture, num_hidden_layers=1))
    before = load_encoder(str(folder), backend=backend)(image)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith("attention.attention.key.bias"):
            continue  # the softmax does not see it
        noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(2))
        save_file(weights | {name: weights[name] + noise}, folder / "model.safetensors", metadata={"format": "pt"})
        assert not torch.allclose(load_encoder(str(folder), backend=backend)(image), before, atol=1e-4), name


@pytest.mark.parametrize("architecture", [REGISTERS, TINY3], ids=["dinov2", "dinov3"])
def test_registers_and_class_token_are_not_among_the_features(tiny, backend):
    encoder = load_encoder(str(tiny), backend=backend)
    p = encoder.patch
    features = encoder(torch.rand(1, 3, 2 * p, 3 * p))
    assert features.shape == (1, 48, 2, 3)
    assert features.dtype == torch.float32
    # Patches are where they are in the image: the first layer's features there change most by what is seen there.
    pixels = torch.full((1, 3, 5 * p, 5 * p), 0.5)
    changed = pixels.clone()
    changed[..., p : 2 * p, 3 * p : 4 * p] = torch.rand(3, p, p)
    moved = (encoder(changed, 0) - encoder(pixels, 0)).norm(dim=1)[0]
    assert divmod(int(moved.argmax()), 5) == (1, 3)


def test_the_layer_is_the_one_asked_for(tiny, backend, image):
    encoder = load_encoder(str(tiny), backend=backend)
    for layer in range(3):
        assert torch.equal(encoder(image, layer), encoder(image, layer - 3))
        assert not torch.allclose(encoder(image, layer), encoder(image, (layer + 1) % 3), atol=1e-2)
    for layer in (3, -4):
        with pytest.raises(ValueError, match="of 3 layers"):
            encoder(image, layer)


def test_features_do_not_depend_on_what_else_is_in_the_batch(tiny, backend, image):
    encoder = load_encoder(str(tiny), backend=backend)
    alone = torch.cat([encoder(each[None]) for each in image])
    assert relative_error(encoder(image), alone) < 1e-5


def test_features_are_the_same_at_every_call(tiny, backend, image):
    """What a DINOv3's positions are changed by at random is for its training."""
    encoder = load_encoder(str(tiny), backend=backend).train()
    torch.manual_seed(0)
    first, state = encoder(image), torch.get_rng_state()
    encoder.float()  # forgets what it has kept of positions
    assert torch.equal(encoder(image), first) and torch.equal(torch.get_rng_state(), state)


def test_pixels_that_are_not_whole_patches_are_refused(tiny, runs):
    encoder = load_encoder(str(tiny))
    p = encoder.patch
    for shape in [(1, 3, p, p + 1), (1, 3, 0, p), (3, p, p), (1, 4, p, p)]:
        with pytest.raises(ValueError, match=f"whole patches of {p}"):
            encoder(torch.zeros(shape))


def test_position_embeddings_keep_their_place_whatever_the_grid():
    ramp = (torch.arange(8) + 0.5) / 8
    square = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij"), -1).reshape(1, 64, 2)
    assert torch.equal(interpolate_positions(square, (8, 8), False), square)
    for antialias in (False, True):
        down, across = interpolate_positions(square, (16, 4), antialias).view(16, 4, 2).unbind(-1)
        assert torch.allclose(down, down[:, :1]) and torch.allclose(across, across[:1])
        # Cell centres stay where they are (torch's bicubic kernel reproduces a ramp to 0.006 away from the border).
        assert torch.allclose(down[4:12, 0], (torch.arange(4, 12) + 0.5) / 16, atol=0.01)
        assert torch.allclose(across[0, 1:3], torch.tensor([0.375, 0.625]), atol=0.01)
    smooth, sharp = (
        interpolate_positions(torch.randn(1, 1024, 4), (4, 4), antialias).std() for antialias in (True, False)
    )
    assert smooth < 0.5 * sharp
    half = torch.randn(1, 16, 4).half()
    assert torch.equal(interpolate_positions(half, (6, 5), True), interpolate_positions(half.float(), (6, 5), True))


# How it can be used ------------------------------------------------------------------------------------------------


def test_the_gradient_with_respect_to_the_image_is_there_and_the_weights_have_none(tiny, backend):
    encoder = load_encoder(str(tiny), backend=backend)
    pixels = torch.rand(1, 3, 3 * encoder.patch, 2 * encoder.patch, requires_grad=True)
    encoder(pixels, 1).square().sum().backward()
    assert pixels.grad.abs().min() > 0
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().training and not any(m.training for m in encoder.modules())


def test_gradients_work_after_everything_else_happened_under_inference_mode(tiny, architecture, backend):
    """Forge runs all of a generation under inference mode."""
    pixels = torch.rand(1, 3, 3 * architecture.patch_size, 2 * architecture.patch_size)
    with torch.inference_mode():
        encoder = load_encoder(str(tiny), backend=backend).to("cpu", torch.float64).to(torch.float32)
        before = encoder(pixels)
        with torch.inference_mode(False), torch.enable_grad():
            wanted = pixels.clone().requires_grad_()
            after = encoder(wanted)
            after.square().sum().backward()
    assert wanted.grad.abs().sum() > 0
    assert torch.equal(before, after)
    kept = [*encoder.parameters(), *encoder.buffers(), *encoder._grids.values()]
    assert not any(tensor.is_inference() for tensor in kept)


def test_the_dtype_is_the_weights_and_autocast_does_not_matter(tiny, backend, image):
    encoder = load_encoder(str(tiny), backend=backend)
    plain = encoder(image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(image), plain)
    half = load_encoder(str(tiny), backend=backend, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(image).dtype == torch.float32
    assert 1e-4 < relative_error(half(image), plain) < 0.1


def test_a_dinov3_does_not_compute_in_float16(tiny, architecture, runs):
    expected = torch.float32 if architecture is TINY3 else torch.float16
    assert load_encoder(str(tiny), dtype=torch.float16).dtype == expected


def test_loading_draws_no_random_numbers(tiny, backend):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_encoder(str(tiny), backend=backend)
    assert torch.equal(torch.rand(3), expected)


def test_auto_takes_timm_where_transformers_lacks_the_model(tiny, timm, architecture, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    if architecture is TINY or has_dinov3(timm):
        assert load_encoder(str(tiny)).backend == "timm"
    for module in ("vision_transformer", "eva"):
        monkeypatch.setitem(sys.modules, f"timm.models.{module}", None)
    kind, needs = ("Dinov2", "4.32") if architecture is TINY else ("DINOv3ViT", "4.56")
    assert_one_line(tiny, f"transformers {needs} or later, or timm", f"{kind}Model", "timm does not import")


@pytest.mark.parametrize("architecture", [TINY3], ids=["dinov3"])
def test_versions_without_dinov3_refuse_it_in_one_line(tiny, timm, monkeypatch):
    """As those that A1111 and its ControlNet pin."""

    class EvaBlock:
        def __init__(self, dim: int, num_heads: int) -> None:
            raise AssertionError("this is not called")

    if dinov3_runs():
        old = types.ModuleType("timm.models.eva")
        old.EvaBlock = EvaBlock
        monkeypatch.setitem(sys.modules, "timm.models.eva", old)
        monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    needs = "DINOv3 needs transformers 4.56 or later, or timm 1.0.20 or later (else choose a DINOv2)"
    assert_one_line(tiny, needs, "no DINOv3ViTModel from transformers", "this timm has no DINOv3")


@pytest.mark.parametrize("architecture", [REGISTERS], ids=["registers"])
def test_registers_run_where_transformers_knows_plain_dinov2_only(tiny, transformers, image, monkeypatch):
    """4.32 to 4.47, Forge's 4.46.1 among them."""
    expected = load_encoder(str(tiny), backend="transformers")(image)
    bare = types.ModuleType("transformers")
    for name in ("Dinov2Model", "Dinov2Config", "logging"):
        setattr(bare, name, getattr(transformers, name))
    monkeypatch.setitem(sys.modules, "transformers", bare)
    assert relative_error(load_encoder(str(tiny), backend="transformers")(image), expected) < 1e-5


# Where encoders are found ------------------------------------------------------------------------------------------


def test_installed_encoders_are_listed_and_loaded_by_those_names(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "BUILT_IN_FOLDER", write_checkpoint(tmp_path / "built-in"))
    folder = tmp_path / "encoders"
    for place in ("dinov2-small", "facebook/dinov2-base", "mine"):
        write_checkpoint(folder / place)
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "config.json").write_text("{}")
    names = installed(folder)
    assert names == ["mini", "facebook/dinov2-base", "facebook/dinov2-small", "mine"]
    for name in names:
        encoder = load_encoder(name, folder)
        assert encoder.id == name
        assert (encoder.patch, encoder.width, encoder.depth) == (14, 48, 3)
    assert load_encoder("dinov2-small", folder).id == "facebook/dinov2-small"
    assert load_encoder(str(folder / "mine")).id == "mine"
    assert installed(tmp_path / "nowhere") == installed(None) == ["mini"]


def test_a_dinov3_is_called_by_its_hugging_face_id_in_either_layout(tmp_path):
    folder = tmp_path / "encoders"
    names = [name for name in KNOWN if "dinov3" in name]
    for name in names:
        write_checkpoint(folder / name.split("/")[1], TINY3)
    assert installed(folder) == ["mini", *sorted(names)] and len(names) == 8


def test_automatic_is_a_dinov3_only_where_there_is_no_dinov2(tmp_path):
    """The defaults were not measured with it."""
    assert automatic_encoder(tmp_path) == "mini"
    for name, expected in (
        ("dinov3-vitl16-pretrain-lvd1689m", "facebook/dinov3-vitl16-pretrain-lvd1689m"),
        ("vit_small_patch16_dinov3.lvd1689m", "timm/vit_small_patch16_dinov3.lvd1689m"),
        ("mine", "mine"),
        ("dinov2-large", "facebook/dinov2-large"),
        ("dinov2-small", "facebook/dinov2-small"),
    ):
        write_checkpoint(tmp_path / name)
        assert automatic_encoder(tmp_path) == expected


def test_the_fingerprint_is_that_of_the_weights(tmp_path):
    one, again, other = (write_checkpoint(tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    assert read_checkpoint(one).fingerprint == read_checkpoint(again).fingerprint
    assert read_checkpoint(one).fingerprint != read_checkpoint(other).fingerprint


# One line for what is amiss ----------------------------------------------------------------------------------------


def assert_one_line(name: object, *says: str, folder: Path | None = None, backend: str = "auto") -> None:
    with pytest.raises(DinotileError) as caught:
        load_encoder(str(name), folder, backend=backend)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500, line
    for part in says:
        assert part in line, line


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Hub, and an empty cache of it."""
    ask("http://127.0.0.1:9", str(tmp_path / "cache"), monkeypatch)


@pytest.mark.parametrize("name", [KNOWN[0], "dinov2-small"])
def test_missing_weights_without_a_network_are_one_line_that_says_which_files_to_put_where(
    tmp_path, no_network, monkeypatch, name
):
    began = time.monotonic()
    assert_one_line(
        name,
        "DINO weights 'facebook/dinov2-small' are not on this machine",
        "the Hugging Face Hub cannot be reached",
        "put config.json and model.safetensors of https://huggingface.co/facebook/dinov2-small into "
        f"{tmp_path / 'dinov2-small'}",
        folder=tmp_path,
    )
    assert time.monotonic() - began < 5  # huggingface_hub 2.4 by itself: 23 s
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert_one_line(name, f"into {tmp_path / 'user' / 'dinotile' / 'encoders' / 'dinov2-small'}")


def test_what_the_hub_s_cache_has_is_used_without_a_network(tiny, runs, no_network, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, local_files_only: str(tiny / file))
    assert load_encoder(KNOWN[0]).id == KNOWN[0]


def test_unknown_names_are_one_line(tmp_path, no_network, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where it may look for "../mine"
    write_checkpoint(tmp_path / "mine")
    assert_one_line("nonsense", "no DINO encoder 'nonsense'", "mine, facebook/dinov2-small", folder=tmp_path)
    (tmp_path / "encoders").mkdir()
    assert_one_line("../mine", "no DINO encoder '../mine'", folder=tmp_path / "encoders")
    assert_one_line("", "no encoder is named", folder=tmp_path)
    monkeypatch.setattr(checkpoint_module, "BUILT_IN_FOLDER", tmp_path / "gone")
    assert_one_line("mini", "built-in encoder is missing", str(tmp_path / "gone"))


def test_pickled_weights_are_refused(tiny):
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    assert_one_line(tiny, "has no model.safetensors", "pickled weights (.bin) are not read", str(tiny))
    (tiny / "pytorch_model.bin").unlink()
    assert_one_line(tiny, "has no model.safetensors: put model.safetensors there")
    (tiny / "config.json").unlink()
    assert_one_line(tiny, "has no config.json")


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_a_truncated_file_is_one_line(tiny, keep):
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert_one_line(tiny, str(weights), "damaged or not whole", "get it again")


def test_missing_and_misshapen_tensors_are_one_line_and_never_random(tiny, backend):
    path = tiny / "model.safetensors"
    weights = load_file(path)
    name = "layer.1.mlp.down_proj.bias" if "norm.bias" in weights else "encoder.layer.1.mlp.fc2.bias"
    save_file({k: v for k, v in weights.items() if k != name}, path, metadata={"format": "pt"})
    assert_one_line(tiny, f"lacks 1 of {len(weights)} tensors", name, backend=backend)
    save_file(weights | {name: torch.zeros(7)}, path, metadata={"format": "pt"})
    assert_one_line(tiny, "does not fit its config.json", f"{name} is [7], not [48]", backend=backend)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "vit"}, "a model of type 'vit'"),
        ({"model_type": None}, "a model of type None"),
        ({"hidden_size": "wide"}, "numbers that fit no DINOv2"),
        ({"patch_size": 0}, "numbers that fit no DINOv2"),
        ({"num_attention_heads": 5}, "numbers that fit no DINOv2"),
        ({"num_channels": 1}, "numbers that fit no DINOv2"),
        ({"hidden_size": 96}, "does not fit its config.json"),
        ({"num_hidden_layers": 4}, "lacks 18 of"),
    ],
)
def test_a_configuration_of_something_else_is_one_line(tmp_path, change, says):
    assert_one_line(write_checkpoint(tmp_path / "encoder", **change), says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": "wide"}, "numbers that fit no DINOv3"),
        ({"num_attention_heads": 24}, "numbers that fit no DINOv3"),
        ({"patch_size": [16, 16]}, "numbers that fit no DINOv3"),
        ({"key_bias": True}, "numbers that fit no DINOv3"),
        ({"rope_theta": 0}, "numbers that fit no DINOv3"),
        ({"hidden_size": 96}, "does not fit its config.json"),
        ({"num_hidden_layers": 4}, "lacks 17 of"),
        ({"model_type": "dinov3_convnext"}, "a model of type 'dinov3_convnext'"),
    ],
)
def test_a_configuration_of_another_dinov3_is_one_line(tmp_path, change, says):
    assert_one_line(write_checkpoint(tmp_path / "encoder", TINY3, **change), says)


SATELLITE = {"mean": [0.43, 0.411, 0.296], "std": [0.213, 0.156, 0.143]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture": "vit_7b_patch16_dinov3"}, "a model of type 'vit_7b_patch16_dinov3'"),
        ({"model_args": {"rope_type": "mixed"}}, "numbers that fit no DINOv3 (its 'rope_type' is not"),
        ({"model_args": [48]}, "numbers that fit no DINOv3"),
        ({"model_args": {}}, "lacks 135 of 186 tensors of a DINOv3"),
        ({"pretrained_cfg": SATELLITE}, "for satellite images or the like: choose one of lvd1689m"),
    ],
)
def test_a_configuration_of_another_model_of_timm_s_is_one_line(tmp_path, change, says):
    folder = write_checkpoint(tmp_path / "encoder", TINY3)
    weights = in_timm_s_layout(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(timm_config(**change)))
    assert_one_line(folder, says)


def test_a_model_for_satellite_images_is_one_line(tmp_path):
    line = "for satellite images or the like: choose one of lvd1689m"
    assert_one_line(write_checkpoint(tmp_path / "dinov3-vitl16-pretrain-sat493m", TINY3), line)
    folder = write_checkpoint(tmp_path / "encoder", TINY3)
    told = {f"image_{kind}": value for kind, value in SATELLITE.items()}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    assert_one_line(folder, line)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_a_damaged_configuration_is_one_line(tiny, text):
    (tiny / "config.json").write_text(text)
    assert_one_line(tiny, "config.json is not a model's configuration")


@pytest.mark.parametrize("architecture", [TINY], ids=["dinov2"])
def test_the_giant_s_layers_run_through_transformers_and_are_one_line_for_timm(tmp_path, transformers, timm, image):
    folder = write_checkpoint(tmp_path / "giant", dataclasses.replace(TINY, use_swiglu_ffn=True))
    assert isinstance(load_encoder(str(folder), backend="transformers"), PatchEncoder)
    assert load_encoder(str(folder), backend="transformers")(image).shape == (2, 48, 6, 9)
    assert_one_line(folder, "SwiGLU", "choose the small, base or large DINOv2", backend="timm")


def test_heavy_libraries_are_imported_only_when_used():
    """A host's start does not wait for transformers or timm."""
    for module in (encoder_module, checkpoint_module):
        assert not {"transformers", "timm", "huggingface_hub", "safetensors"} & vars(module).keys()
