"""The adapter network, its file, and what it is refused for."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib_dinotile import DinotileError
from lib_dinotile.condition.adapter import Adapter, AdapterCondition, AdapterConfig
from lib_dinotile.condition.adapter_file import check_encoder, check_fit, load_adapter, read_config, save_adapter
from lib_dinotile.condition.shape import SD15, SDXL, UNetShape

SMALL = AdapterConfig("sd15", UNetShape(((8, 1), (8, 2), (16, 2), (16, 2))), "tiny", features=12, width=16, blocks=1)


def random_adapter(config=SMALL, seed=0):
    """An adapter that changes something, and differently at different noise levels."""
    torch.manual_seed(seed)
    adapter = Adapter(config)
    for layer in (*adapter.gates, *adapter.outputs):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return adapter.requires_grad_(False)


def test_shapes_of_the_known_families():
    assert str(SD15) == ("3x320@1/1, 1x320@1/2, 2x640@1/2, 1x640@1/4, 2x1280@1/4, 3x1280@1/8; middle 1280@1/8")
    assert (len(SD15.slots), len(SDXL.slots)) == (12 + 1, 9 + 1)
    assert SDXL.slots[-1] == (1280, 4)


@pytest.mark.parametrize("shape", [SD15, SDXL, SMALL.shape])
@pytest.mark.parametrize("latent", [(64, 64), (63, 41), (8, 8)])
def test_residuals_have_the_sizes_that_strided_convolutions_leave(shape, latent):
    config = dataclasses.replace(SMALL, shape=shape)
    adapter = Adapter(config)
    residuals = adapter(adapter.prepare(torch.randn(2, 12, *adapter.grid(latent)), latent), torch.tensor([1.0]))
    for residual, (channels, downscale) in zip(residuals, shape.slots):
        size = latent
        while downscale > 1:  # a 3x3 convolution with stride 2 and padding 1
            size, downscale = tuple((side + 1) // 2 for side in size), downscale // 2
        assert residual.shape == (2, channels, *size)


def test_an_untrained_adapter_gives_exactly_nothing():
    adapter = Adapter(SMALL)
    for residual in adapter(adapter.prepare(torch.randn(3, 12, 2, 2), (8, 8)), torch.tensor([0.5])):
        assert not residual.any()


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
def test_half_precision_tells_noise_levels_as_float32_does(sigma):
    full, half = random_adapter(), random_adapter().to(torch.bfloat16)
    known = torch.tensor([sigma])
    seen, wanted = (adapter.noise(known).float() for adapter in (half, full))
    assert half.noise(known).dtype == torch.bfloat16
    assert (seen - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_every_output_learns_from_the_first_step():
    adapter = Adapter(SMALL)
    residuals = adapter(adapter.prepare(torch.randn(1, 12, 4, 4), (16, 16)), torch.tensor([1.0]))
    sum(((residual - 1) ** 2).sum() for residual in residuals).backward()
    assert all(output.weight.grad.abs().sum() > 0 for output in adapter.outputs)


def test_residuals_depend_on_features_place_and_noise_level():
    adapter, features = random_adapter(), torch.randn(1, 12, 4, 4)

    def residual(features, sigma):
        return adapter(adapter.prepare(features, (16, 16)), torch.tensor([sigma]))[0]

    plain = residual(features, 1.0)
    assert not torch.allclose(plain, residual(features.roll(1, -1), 1.0), atol=1e-3)
    assert not torch.allclose(plain, residual(features, 5.0), atol=1e-4)
    assert torch.equal(plain, residual(features, 1.0))


def test_tiles_of_a_batch_do_not_see_each_other():
    adapter, features = random_adapter(), torch.randn(3, 12, 4, 4)
    together = adapter(adapter.prepare(features, (16, 16)), torch.tensor([2.0]))
    for tile in range(3):
        alone = adapter(adapter.prepare(features[tile : tile + 1], (16, 16)), torch.tensor([2.0]))
        for a, b in zip(alone, together):
            assert torch.allclose(a[0], b[tile], atol=1e-6)


def test_strength_start_and_end():
    adapter, features = random_adapter(), torch.randn(1, 12, 4, 4)

    def condition(*arguments):
        return AdapterCondition(adapter, features, (16, 16), *arguments)

    assert condition(0.0).residuals(1.0, 0.5) is None
    window = condition(1.0, 0.25, 0.75)
    assert [window.residuals(1.0, progress) is None for progress in (0, 0.2, 0.25, 0.7, 0.75, 1)] == [
        True, True, False, False, True, True,
    ]  # fmt: skip
    assert condition().residuals(1.0, 1.0) is not None
    full, half = condition(1.0).residuals(1.0, 0), condition(0.5).residuals(1.0, 0)
    assert torch.allclose(full[0] / 2, half[0])


def test_a_step_is_computed_once(monkeypatch):
    adapter, calls = random_adapter(), []
    forward = Adapter.forward
    monkeypatch.setattr(Adapter, "forward", lambda *a: calls.append(1) or forward(*a))
    condition = AdapterCondition(adapter, torch.randn(1, 12, 4, 4), (16, 16))
    for sigma in (3.0, 3.0, 2.0, 2.0):
        condition.residuals(sigma, 0)
    assert len(calls) == 2


def test_a_file_gives_back_the_adapter(tmp_path):
    adapter, path = random_adapter(), tmp_path / "fur.safetensors"
    save_adapter(adapter, path, torch.float32, made_by="a test")
    again = load_adapter(path)
    assert again.config == adapter.config == read_config(path)
    for (name, a), b in zip(adapter.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name
    with safe_open(path, "pt") as file:
        assert file.metadata()["made_by"] == "a test"
        assert file.metadata()["format"] == "dinotile-adapter" and file.metadata()["version"] == "1"


def _metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def _with(path, **changes):
    tensors, metadata = load_file(path), {**_metadata(path), **changes}
    save_file(tensors, path, {key: value for key, value in metadata.items() if value is not None})


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"format": None}, "is not a dinotile adapter"),
        ({"version": "2"}, "has adapter format version 2"),
        ({"slots": "[[8, 3], [8, 1]]"}, "is damaged: bad adapter metadata"),
        ({"slots": "[[8"}, "is damaged: bad adapter metadata"),
        ({"features": "many"}, "is damaged: bad adapter metadata"),
        ({"features": "100000000"}, "is damaged: bad adapter metadata"),
        ({"features": "13"}, "is damaged: tensor norm.bias does not fit its metadata"),
        ({"hyperparameters": json.dumps({"width": 16})}, "is damaged: bad adapter metadata"),
        ({"hyperparameters": json.dumps({"width": 24, "blocks": 1, "grid": 4})}, "is damaged: tensor"),
    ],
)
def test_a_file_whose_metadata_does_not_hold_is_refused(tmp_path, changes, says):
    path = tmp_path / "odd.safetensors"
    save_adapter(random_adapter(), path)
    _with(path, **changes)
    with pytest.raises(DinotileError, match=says) as error:
        load_adapter(path)
    assert "\n" not in str(error.value)


@given(st.data())
def test_a_damaged_file_is_refused_or_read_never_more(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "a.safetensors"
    save_adapter(random_adapter(), path)
    raw = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "flip"]))
    place = data.draw(st.integers(0, len(raw) - 1 if kind == "cut" else 2000))
    if kind == "cut":
        raw = raw[:place]
    else:
        raw[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    try:
        load_adapter(path)
    except DinotileError as error:
        assert "\n" not in str(error)


def test_refused_when_it_does_not_fit_the_checkpoint_or_the_encoder():
    check_fit(SMALL, "fur", "sd15", SMALL.shape)
    with pytest.raises(DinotileError, match="adapter 'fur' is for sd15 checkpoints, this one is sdxl"):
        check_fit(SMALL, "fur", "sdxl", SMALL.shape)
    with pytest.raises(DinotileError, match=r"does not fit this checkpoint's UNet: it gives 1x8@1/1, .* 3x320"):
        check_fit(SMALL, "fur", "sd15", SD15)
    check_encoder(SMALL, "fur", "tiny", 12, 3)
    for encoder, width in (("other", 12), ("tiny", 13)):
        with pytest.raises(DinotileError, match=r"reads encoder 'tiny'|reads tokens 12 wide"):
            check_encoder(SMALL, "fur", encoder, width, 3)
    with pytest.raises(DinotileError, match="reads layer -1, of 0"):
        check_encoder(SMALL, "fur", "tiny", 12, 0)
