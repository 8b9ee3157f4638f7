"""Gradients, modules and models on the pretend accelerator."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import nn
from transformers import CLIPTextModel

from lib_dinotile.dino.encoder import load_encoder
from tests import accelerator
from tests.accelerator import DEVICE
from tests.test_accelerator import DTYPES, FLOAT, HALF, ones
from tests.test_adapter import random_adapter
from tests.test_diffusers import _parts, _text

pytestmark = pytest.mark.skipif(not accelerator.AVAILABLE, reason="this torch takes no device from Python")


def _chain(x, weight):
    y = F.conv2d(x, weight, padding=1).contiguous(memory_format=torch.channels_last)
    y = F.interpolate(y, scale_factor=2, mode="bicubic", antialias=True)
    y = F.group_norm(F.pixel_shuffle(F.avg_pool2d(y, 2), 2), 1)
    y = F.scaled_dot_product_attention(y, y, y) * 1
    y[..., :3] += 1
    return (y * torch.linspace(0, 1, y.numel(), device=y.device).view(y.shape)).sum()


@pytest.mark.parametrize("backward", [False, True])
def test_gradients_are_those_of_the_cpu(backward):
    draw = torch.Generator().manual_seed(0)
    tensors = [torch.rand(*shape, generator=draw) for shape in ((1, 3, 8, 8), (4, 3, 3, 3))]

    def gradients(device):
        leaves = [tensor.to(device).requires_grad_() for tensor in tensors]
        if not backward:
            return torch.autograd.grad(_chain(*leaves), leaves)
        _chain(*leaves).backward()
        return [leaf.grad for leaf in leaves]

    for got, expected in zip(gradients(DEVICE), gradients("cpu")):
        assert got.device == DEVICE
        assert torch.allclose(got.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_gradients_go_through_the_device_to_the_cpu():
    x, factor = torch.ones(2, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    y = x.to(DEVICE)
    z = torch.zeros(2, device=DEVICE).copy_(y * factor)
    # Recorded a second time below, the data would keep the graph.
    assert not any(tensor._data.requires_grad for tensor in (y, z))
    grads = torch.autograd.grad((z * z).sum().cpu(), (x, factor))
    assert ([grad.tolist() for grad in grads], {grad.device.type for grad in grads}) == ([[18, 18], 12], {"cpu"})


def test_gradients_inside_inference_mode():
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
        x = ones(2).requires_grad_()
        assert torch.autograd.grad((x * x).sum(), x)[0].tolist() == [2, 2]


def test_inference_tensors_are_told_apart_also_through_views():
    with torch.inference_mode():
        made = ones(2, 2)
    outside = made[0]
    normal = ones(2, 2)
    with torch.inference_mode():
        view = normal[0]
    assert [x.is_inference() for x in (made, outside, normal, view)] == [True, True, False, False]
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        made.add_(1)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        (ones(2).requires_grad_() * outside).sum().backward()


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_autocast_of_another_device_changes_nothing(device_type):
    with torch.autocast(device_type, dtype=torch.bfloat16, enabled=device_type == "cpu"):
        assert (ones(2, 2) @ ones(2, 2)).dtype == FLOAT


def test_the_random_stream_is_the_device_s_own():
    def draws(between):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            between()
            return torch.rand(3)

    def there():
        torch.manual_seed(5)
        return torch.rand(3, device=DEVICE)

    with torch.random.fork_rng(devices=[]):
        assert torch.equal(there().cpu(), there().cpu())
        assert not torch.equal(there().cpu(), draws(lambda: None))
    assert torch.equal(draws(lambda: None), draws(lambda: F.dropout(torch.randn(3, device=DEVICE))))
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, device=DEVICE, generator=torch.Generator())


def test_modules_move_load_and_are_copied():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(DEVICE, HALF, memory_format=torch.channels_last)
    assert isinstance(module[0].weight, nn.Parameter)
    assert (module[0].weight.device, module[0].weight.dtype) == (DEVICE, HALF)
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    state = {name: tensor.cpu().float() * 0 + 2 for name, tensor in module.state_dict().items()}
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        same.load_state_dict(state)
        assert [type(p) for p in same.parameters()] == [type(p) for p in module.parameters()]
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in same.parameters())
        assert (same[0].weight == 2).all()
        assert not (module[0].weight == 2).any()
    assert len(list(module.to("cpu").parameters())) == 4
    assert module[0].weight.device.type == "cpu"


def _unet(device, dtype):
    unet = _parts(24)["unet"].eval().to(device, dtype)
    latents, text = torch.randn(2, 4, 8, 8).to(device, dtype), torch.randn(2, 5, 24).to(device, dtype)
    return unet(latents, 500, text).sample


def _vae(device, dtype):
    vae = _parts(24)["vae"].eval().to(device, dtype)
    latents = vae.encode(torch.rand(1, 3, 32, 32).to(device, dtype)).latent_dist.mode()
    return vae.decode(latents).sample


def _tiny_vae(device, dtype):
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    vae.eval().to(device, dtype)
    return vae.decode(vae.encode(torch.rand(1, 3, 16, 16).to(device, dtype)).latents).sample


def _words(device, dtype):
    tokens = torch.arange(54).remainder(53)[None].to(device)
    return _text(32, CLIPTextModel).eval().to(device, dtype)(tokens).last_hidden_state


def _features(device, dtype):
    return load_encoder("mini", device=device, dtype=dtype)(torch.rand(1, 3, 56, 84).to(device))


def _residuals(device, dtype):
    adapter = random_adapter().to(device, dtype)
    features = torch.randn(2, 12, 4, 4).to(device, dtype)
    residuals = adapter(adapter.prepare(features, (16, 16)), torch.tensor([2.0], device=device, dtype=dtype))
    return torch.cat([residual.flatten() for residual in residuals])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("work", [_unet, _vae, _tiny_vae, _words, _features, _residuals])
def test_models_give_about_what_they_give_on_the_cpu_in_float32(work, mode, dtype):
    def run(device, dtype):
        with torch.random.fork_rng(devices=[]), mode():
            torch.manual_seed(0)
            return work(device, dtype)

    expected, got = run("cpu", FLOAT), run(DEVICE, dtype)
    assert got.device == DEVICE
    error = (got.cpu().float() - expected).std() / expected.std()
    assert error < {FLOAT: 1e-4, HALF: 0.01, torch.bfloat16: 0.1}[dtype]
    assert (error > 0) == (dtype != FLOAT) or error < 1e-4


def test_a_gradient_goes_through_a_unet_in_half_precision():
    unet = _parts(24)["unet"].to(DEVICE, HALF).requires_grad_(False)
    x = torch.randn(1, 4, 8, 8).to(DEVICE, HALF).requires_grad_()
    (grad,) = torch.autograd.grad(unet(x, 10, ones(1, 5, 24, dtype=HALF)).sample.square().sum(), x)
    assert (grad.dtype, grad.shape) == (HALF, x.shape)
    assert grad.isfinite().all()
    assert grad.any()
