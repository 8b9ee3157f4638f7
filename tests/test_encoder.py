"""The patch encoder: the same features from either library, and one line for whatever is amiss."""

from __future__ import annotations

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
from lib_dinotile.dino.checkpoint import Architecture, read_checkpoint
from lib_dinotile.dino.encoder import KNOWN, PatchEncoder, installed, interpolate_positions, load_encoder
from tests.hub import ask
from tests.stand_in import stand_in

TINY = Architecture(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=70)
REGISTERS = dataclasses.replace(TINY, num_register_tokens=4)
SMALL = Architecture(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518)


def write_checkpoint(folder: Path, architecture: Architecture = TINY, seed: int = 0, **config: object) -> Path:
    """Random weights as a Hugging Face folder, large enough that every tensor shows in the features."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in architecture.shapes().items():
        scale = 0.3 if len(shape) == 1 else torch.Size(shape[1:]).numel() ** -0.5
        offset = 1.0 if name.endswith(("lambda1", "norm1.weight", "norm2.weight", "layernorm.weight")) else 0.0
        weights[name] = torch.randn(shape, generator=draw) * scale + offset
    kind = "dinov2_with_registers" if architecture.num_register_tokens else "dinov2"
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = dataclasses.asdict(architecture) | {"model_type": kind, "use_mask_token": False} | config
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny")


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.rand(2, 3, 6 * 14, 9 * 14, generator=torch.Generator().manual_seed(1))


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


@pytest.fixture(params=["transformers", "timm"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each library in turn; skipped where it is not there."""
    request.getfixturevalue(request.param)
    return request.param


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# The same features ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [TINY, REGISTERS], ids=["plain", "registers"])
@pytest.mark.parametrize("grid", [(5, 5), (6, 9), (3, 1), (12, 7)])
def test_both_libraries_give_the_same_features(tmp_path, transformers, timm, architecture, grid):
    folder = write_checkpoint(tmp_path / "encoder", architecture)
    first, second = (load_encoder(str(folder), backend=name) for name in ("transformers", "timm"))
    assert (first.backend, second.backend) == ("transformers", "timm")
    pixels = torch.rand(2, 3, grid[0] * 14, grid[1] * 14)
    for layer in range(-3, 3):
        error = relative_error(first(pixels, layer), second(pixels, layer))
        assert error < 1e-4, f"layer {layer}: {error:.1e}"


def test_both_libraries_give_the_same_features_at_the_size_of_dinov2_small(tmp_path, transformers, timm):
    folder = write_checkpoint(tmp_path / "small", SMALL)
    first, second = (load_encoder(str(folder), backend=name) for name in ("transformers", "timm"))
    pixels = torch.rand(1, 3, 4 * 14, 7 * 14)
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
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for architecture, kind, same in kinds:
        folder = write_checkpoint(tmp_path / kind.__name__, architecture)
        encoder, theirs = load_encoder(str(folder), backend="transformers"), kind.from_pretrained(folder).eval()
        for height, width in [(5, 5), *([(3, 4), (6, 9)] if same else [])]:
            pixels = torch.rand(2, 3, height * 14, width * 14)
            with torch.no_grad():
                tokens = theirs((pixels - mean) / std).last_hidden_state[:, 1 + architecture.num_register_tokens :]
            spatial = tokens.transpose(1, 2).reshape(2, 48, height, width)
            assert relative_error(encoder(pixels), spatial) < 1e-5, (kind.__name__, height, width)


def test_what_transformers_saves_is_loaded(tmp_path, transformers, timm, image):
    numbers = {k: v for k, v in dataclasses.asdict(TINY).items() if k != "num_register_tokens"}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**numbers))
    model.save_pretrained(tmp_path / "saved", safe_serialization=True)
    first, second = (load_encoder(str(tmp_path / "saved"), backend=name) for name in ("transformers", "timm"))
    assert relative_error(first(image), second(image)) < 1e-4


def test_every_tensor_of_the_file_has_a_say(tmp_path, backend, image):
    """So no weight is left as the library drew it."""
    folder = write_checkpoint(tmp_path / "encoder", dataclasses.replace(REGISTERS, num_hidden_layers=1))
    before = load_encoder(str(folder), backend=backend)(image)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith("attention.attention.key.bias"):
            continue  # the softmax does not see it
        noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(2))
        save_file(weights | {name: weights[name] + noise}, folder / "model.safetensors", metadata={"format": "pt"})
        assert not torch.allclose(load_encoder(str(folder), backend=backend)(image), before, atol=1e-4), name


def test_registers_and_class_token_are_not_among_the_features(tmp_path, backend):
    folder = write_checkpoint(tmp_path / "encoder", REGISTERS)
    encoder = load_encoder(str(folder), backend=backend)
    features = encoder(torch.rand(1, 3, 28, 42))
    assert features.shape == (1, 48, 2, 3)
    assert features.dtype == torch.float32
    # Patches are where they are in the image: the first layer's features there change most by what is seen there.
    pixels = torch.full((1, 3, 70, 70), 0.5)
    changed = pixels.clone()
    changed[..., 14:28, 42:56] = torch.rand(3, 14, 14)
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


def test_pixels_that_are_not_whole_patches_are_refused(tiny):
    encoder = load_encoder(str(tiny))
    for shape in [(1, 3, 14, 15), (1, 3, 0, 14), (3, 14, 14), (1, 4, 14, 14)]:
        with pytest.raises(ValueError, match="whole patches of 14"):
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
    pixels = torch.rand(1, 3, 42, 28, requires_grad=True)
    encoder(pixels, 1).square().sum().backward()
    assert pixels.grad.abs().min() > 0
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().training and not any(m.training for m in encoder.modules())


def test_gradients_work_after_everything_else_happened_under_inference_mode(tiny, backend):
    """Forge runs all of a generation under inference mode."""
    pixels = torch.rand(1, 3, 42, 28)
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


def test_loading_draws_no_random_numbers(tiny, backend):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_encoder(str(tiny), backend=backend)
    assert torch.equal(torch.rand(3), expected)


def test_auto_takes_timm_where_transformers_has_no_dinov2(tiny, timm, image, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    assert load_encoder(str(tiny)).backend == "timm"
    monkeypatch.setitem(sys.modules, "timm.models.vision_transformer", None)
    assert_one_line(tiny, "transformers 4.32 or later, or timm", "Dinov2Model", "timm does not import")


def test_registers_run_where_transformers_knows_plain_dinov2_only(tmp_path, transformers, image, monkeypatch):
    """4.32 to 4.47, Forge's 4.46.1 among them."""
    folder = write_checkpoint(tmp_path / "encoder", REGISTERS)
    expected = load_encoder(str(folder), backend="transformers")(image)
    bare = types.ModuleType("transformers")
    for name in ("Dinov2Model", "Dinov2Config", "logging"):
        setattr(bare, name, getattr(transformers, name))
    monkeypatch.setitem(sys.modules, "transformers", bare)
    assert relative_error(load_encoder(str(folder), backend="transformers")(image), expected) < 1e-5


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
        "DINOv2 weights 'facebook/dinov2-small' are not on this machine",
        "the Hugging Face Hub cannot be reached",
        "put config.json and model.safetensors of https://huggingface.co/facebook/dinov2-small into "
        f"{tmp_path / 'dinov2-small'}",
        folder=tmp_path,
    )
    assert time.monotonic() - began < 5  # huggingface_hub 2.4 by itself: 23 s
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert_one_line(name, f"into {tmp_path / 'user' / 'dinotile' / 'encoders' / 'dinov2-small'}")


def test_what_the_hub_s_cache_has_is_used_without_a_network(tiny, no_network, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, local_files_only: str(tiny / file))
    assert load_encoder(KNOWN[0]).id == KNOWN[0]


def test_unknown_names_are_one_line(tmp_path, no_network, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where it may look for "../mine"
    write_checkpoint(tmp_path / "mine")
    assert_one_line("nonsense", "no DINOv2 encoder 'nonsense'", "mine, facebook/dinov2-small", folder=tmp_path)
    (tmp_path / "encoders").mkdir()
    assert_one_line("../mine", "no DINOv2 encoder '../mine'", folder=tmp_path / "encoders")
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
    name = "encoder.layer.1.mlp.fc2.bias"
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


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_a_damaged_configuration_is_one_line(tiny, text):
    (tiny / "config.json").write_text(text)
    assert_one_line(tiny, "config.json is not a model's configuration")


def test_the_giant_s_layers_run_through_transformers_and_are_one_line_for_timm(tmp_path, transformers, timm, image):
    folder = write_checkpoint(tmp_path / "giant", dataclasses.replace(TINY, use_swiglu_ffn=True))
    assert isinstance(load_encoder(str(folder), backend="transformers"), PatchEncoder)
    assert load_encoder(str(folder), backend="transformers")(image).shape == (2, 48, 6, 9)
    assert_one_line(folder, "SwiGLU", "choose the small, base or large DINOv2", backend="timm")


def test_heavy_libraries_are_imported_only_when_used():
    """A host's start does not wait for transformers or timm."""
    for module in (encoder_module, checkpoint_module):
        assert not {"transformers", "timm", "huggingface_hub", "safetensors"} & vars(module).keys()
