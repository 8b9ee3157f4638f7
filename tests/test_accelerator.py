"""The pretend accelerator is like CUDA where that catches mistakes: devices, dtypes, memory."""

import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load, save
from torch import nn

from lib_dinotile.engine.memory import is_out_of_memory
from tests import accelerator
from tests.accelerator import DEVICE

pytestmark = pytest.mark.skipif(not accelerator.AVAILABLE, reason="this torch takes no device from Python")

HALF, FLOAT = torch.float16, torch.float32
DTYPES = [FLOAT, HALF, torch.bfloat16]
OTHER_DEVICE = "Expected all tensors to be on the same device"


@pytest.fixture
def counting_only():
    """No garbage collector: what is freed is freed by reference counting."""
    gc.disable()
    yield
    gc.enable()


def ones(*size, dtype=FLOAT):
    return torch.ones(size, device=DEVICE, dtype=dtype)


@pytest.mark.parametrize(
    "make",
    [
        lambda device: torch.zeros(2, 3, device=device),
        lambda device: torch.zeros(2, 3).to(device),
        lambda device: torch.zeros(2, 3).to(device, HALF, non_blocking=True),
        lambda device: torch.zeros_like(torch.zeros(2, 3), device=device),
        lambda device: torch.zeros(2, 3).new_ones(2, 3, device=device),
        lambda device: torch.tensor([[1.0, 2, 3], [4, 5, 6]], device=device),
        lambda device: torch.as_tensor(np.ones((2, 3)), device=device),
        lambda device: torch.full((2, 3), 7, device=device),
        lambda device: torch.arange(6, device=device).view(2, 3),
        lambda device: torch.linspace(0, 1, 6, device=device).view(2, 3),
        lambda device: torch.empty(2, 3, device=device).fill_(2),
        lambda device: load(save({"x": torch.ones(2, 3)}))["x"].to(device),
    ],
)
def test_tensors_are_made_on_the_device(make):
    on_device, on_cpu = make(torch.device(accelerator.NAME)), make("cpu")
    assert (on_device.device, on_cpu.device) == (DEVICE, torch.device("cpu"))
    assert DEVICE.type != "cpu"
    assert on_device.cpu().device.type == "cpu"
    assert on_device.cpu().dtype == on_cpu.dtype
    assert torch.equal(on_device.cpu(), on_cpu)


def test_no_memory_is_shared_with_the_cpu():
    there = torch.zeros(2)
    here = there.to(DEVICE)
    back = here.cpu()
    here.add_(1)
    assert (there.tolist(), here.tolist(), back.tolist()) == ([0, 0], [1, 1], [0, 0])


def test_nobody_finds_the_device_who_looks_for_one():
    assert not torch.accelerator.is_available()


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x, cpu: x + cpu,
        lambda x, cpu: cpu * x,
        lambda x, cpu: cpu.add_(x),
        lambda x, cpu: x.add_(cpu),
        lambda x, cpu: x @ cpu,
        lambda x, cpu: torch.cat([x, cpu]),
        lambda x, cpu: torch.stack([x.sum(), cpu.sum()]),
        lambda x, cpu: torch.where(cpu > 0, x, x),
        lambda x, cpu: F.conv2d(x[None, None], cpu[None, None]),
        lambda x, cpu: F.embedding(cpu.long(), x),
        lambda x, cpu: x.index_select(0, torch.tensor([0])),
        lambda x, cpu: x.masked_fill(cpu > 0, 0),
        lambda x, cpu: cpu.sum().add_(x.sum()),
        lambda x, cpu: cpu.index_put_((torch.tensor([0]),), x[:1]),
        lambda x, cpu: x.index_put_((torch.tensor([0, 1]),), cpu),
        lambda x, cpu: cpu + x.sum(),
        lambda x, cpu: torch.add(x, x, out=cpu),
    ],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_tensors_of_two_devices_do_not_mix(mixed, mode):
    with mode(), pytest.raises(RuntimeError, match=OTHER_DEVICE):
        mixed(ones(2, 2), torch.ones(2, 2))


def test_a_cpu_tensor_is_not_indexed_from_the_device():
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        torch.ones(3)[torch.tensor([0], device=DEVICE)]


@pytest.mark.parametrize(
    "allowed",
    [
        lambda x, make: x * make(3.0),
        lambda x, make: make(3.0) - x,
        lambda x, make: torch.where(x > 1, x, make(0.0)),
        lambda x, make: x.clamp(min=make(2.0)),
        lambda x, make: torch.lerp(x, x + 1, make(0.5)),
        lambda x, make: x[make([1, 0])],
        lambda x, make: x[make([True, False])],
        lambda x, make: x.index_put((make([1]),), make(5.0)),
        lambda x, make: x.clone().copy_(make([[1.0, 2], [3, 4]])),
        lambda x, make: x.masked_fill(x > 1, make(9.0)),
    ],
)
def test_numbers_indices_and_copies_from_the_cpu_are_taken(allowed):
    x = torch.tensor([[1.0, 2], [3, 4]])
    assert torch.equal(allowed(x.to(DEVICE), torch.tensor).cpu(), allowed(x, torch.tensor))


def test_a_slice_of_a_cpu_tensor_takes_what_is_on_the_device():
    x = torch.zeros(3)
    x[:2] = ones(2)
    assert x.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    "words, mixed",
    [
        ("mat1 and mat2 must have the same dtype", lambda f, h: f @ h),
        ("must have the same dtype", lambda f, h: F.linear(f, f, h[0])),
        ("must have the same dtype", lambda f, h: torch.bmm(f[None], h[None])),
        ("must have the same dtype", lambda f, h: torch.einsum("ij,jk->ik", f, h)),
        (r"Input type \(float\) and weight type \(c10::Half\)", lambda f, h: F.conv2d(f[None, None], h[None, None])),
        (
            r"Input type \(c10::Half\) and bias type \(float\)",
            lambda f, h: F.conv2d(h[None, None], h[None, None], f[0, :1]),
        ),
        ("and bias type", lambda f, h: F.conv_transpose2d(h[None, None], h[None, None], f[0, :1])),
        ("same dtype", lambda f, h: F.scaled_dot_product_attention(f, h, h)),
        ("expected scalar type Half but found Float", lambda f, h: F.layer_norm(h, (2,), f[0], f[0])),
        ("expected scalar type Half but found Float", lambda f, h: F.group_norm(h, 1, f[0], f[0])),
        ("dtype", lambda f, h: torch.lerp(f, h, 0.5)),
        ("dtype", lambda f, h: f.index_copy(0, torch.tensor([0], device=DEVICE), h[:1])),
        ("dtype", lambda f, h: f.index_put((torch.tensor([0]),), h[0])),
        ("dtype", lambda f, h: f.scatter(0, torch.zeros(1, 2, dtype=torch.long, device=DEVICE), h)),
        ("not implemented for 'Long'", lambda f, h: f.long() @ f.long()),
    ],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_dtypes_that_cuda_refuses_are_refused(words, mixed, mode):
    with mode(), pytest.raises(RuntimeError, match=words):
        mixed(ones(2, 2), ones(2, 2, dtype=HALF))


def test_dtypes_are_promoted_where_cuda_does():
    f, h = ones(2, 2), ones(2, 2, dtype=HALF)
    assert (f + h).dtype == torch.cat([h, f]).dtype == torch.where(f > 0, h, f).dtype == FLOAT
    assert F.batch_norm(h[None], f[0], f[0], f[0], f[0]).dtype == HALF


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "work",
    [
        lambda x: F.interpolate(x, scale_factor=1.5, mode="bicubic", antialias=True),
        lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False),
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
        lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1)),
        lambda x: F.unfold(x, 3),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: x.softmax(1),
        lambda x: torch.quantile(x.float(), 0.5),
        lambda x: torch.cdist(x.float(), x.float()),
        lambda x: F.gelu(x).cumsum(-1).std(),
        lambda x: x.clone().erfinv_(),
    ],
)
def test_every_dtype_has_the_operations(work, dtype):
    x = torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.9
    expected = work(x)
    got = work(x.to(DEVICE, dtype)).cpu().to(FLOAT)
    assert torch.allclose(got, expected, atol=0.05 * float(expected.abs().max()))


def test_a_product_is_added_up_in_float32_and_rounded_once():
    x = torch.full((1, 4096), 1.0, dtype=HALF)
    assert (x.to(DEVICE) @ x.T.to(DEVICE)).item() == 4096
    assert (x.to(DEVICE) @ (x * 100).T.to(DEVICE)).isinf().item()


def test_numpy_and_pillow_need_the_cpu():
    for take in (np.asarray, Image.fromarray, lambda x: x.numpy()):
        with pytest.raises((TypeError, AttributeError)):
            take(ones(2, 2))
    with pytest.raises(TypeError, match="Use Tensor"):
        ones(2).numpy()
    assert ones(2).cpu().numpy().tolist() == [1, 1]


def test_numbers_are_read_from_the_device():
    x = ones(2) * 2
    assert (x.tolist(), x[0].item(), int(x[0]), bool(x[0] > 1), f"{x[0]:.1f}") == ([2, 2], 2, 2, True, "2.0")
    assert accelerator.NAME in repr(x)


def test_the_device_can_lack_float64():
    assert ones(2).double().dtype == torch.float64
    with accelerator.lacking("float64"):
        for make in (lambda: ones(2).double(), lambda: torch.ones(2, dtype=torch.float64).to(DEVICE)):
            with pytest.raises(TypeError, match="doesn't support float64"):
                make()


def test_the_device_can_lack_antialiasing():
    with accelerator.lacking("antialias"):
        assert F.interpolate(ones(1, 1, 4, 4), size=2, mode="bicubic").shape == (1, 1, 2, 2)
        with pytest.raises(NotImplementedError, match="not currently implemented for the MPS device"):
            F.interpolate(ones(1, 1, 4, 4), size=2, mode="bicubic", antialias=True)


def test_bytes_are_counted_by_storage(counting_only):
    before = accelerator.alive_bytes()
    x = ones(10, 10)
    assert accelerator.alive_bytes() - before == 400
    view = x[2:].T.reshape(5, 16).expand(3, 5, 16)  # the reshaping copies 80 numbers
    assert accelerator.alive_bytes() - before == 400 + 320
    same = x.view(100).detach()
    del x
    assert accelerator.alive_bytes() - before == 400 + 320
    assert "float32 (10, 10)" in accelerator.alive()
    del view, same
    assert accelerator.alive_bytes() == before


def test_a_tensor_can_change_its_shape_and_grow_in_place(counting_only):
    before = accelerator.alive_bytes()
    x = ones(2, 3)
    assert (x.unsqueeze_(0).shape, x.transpose_(1, 2).stride()) == ((1, 2, 3), (6, 1, 3))
    assert accelerator.alive_bytes() - before == 24
    y = torch.empty(0, device=DEVICE)
    torch.add(x, x, out=y)
    assert (y.shape, y.sum().item()) == ((1, 3, 2), 12)
    assert accelerator.alive_bytes() - before == 48
    del x, y
    assert accelerator.alive_bytes() == before


def test_the_peak_is_kept(counting_only):
    accelerator.reset()
    before = accelerator.alive_bytes()
    ones(100).sum()
    assert accelerator.peak() - before == 404
    accelerator.reset()
    assert accelerator.peak() == before


def test_what_is_kept_for_a_gradient_is_counted(counting_only):
    before = accelerator.alive_bytes()
    x = ones(100).requires_grad_()
    y = x.exp().sum()
    assert accelerator.alive_bytes() - before == 400 + 400 + 4
    (grad,) = torch.autograd.grad(y, x)
    del y
    assert accelerator.alive_bytes() - before == 400 + 400
    del x, grad
    assert accelerator.alive_bytes() == before


def test_a_module_leaves_the_device(counting_only):
    before = accelerator.alive_bytes()
    module = nn.Linear(10, 10).to(DEVICE)
    assert accelerator.alive_bytes() - before == 440
    module.to(HALF)
    assert accelerator.alive_bytes() - before == 220
    module.to("cpu")
    assert accelerator.alive_bytes() == before


@pytest.mark.parametrize(
    "make", [lambda: ones(100), lambda: torch.ones(100).to(DEVICE), lambda: ones(10, 1) + ones(10)]
)
def test_memory_runs_out(make, counting_only):
    before = accelerator.alive_bytes()
    with accelerator.limit(before + 399), pytest.raises(torch.OutOfMemoryError) as caught:
        make()
    assert str(caught.value).startswith("CUDA out of memory. Tried to allocate 400.00 bytes.")
    assert is_out_of_memory(caught.value)
    with accelerator.limit(accelerator.alive_bytes() + 480):
        assert make().shape
    del caught
    assert accelerator.alive_bytes() == before


def test_an_error_keeps_no_operands_alive(counting_only):
    before = accelerator.alive_bytes()
    with accelerator.limit(before + 1000), pytest.raises(torch.OutOfMemoryError) as caught:
        torch.cat([ones(100), ones(100)])
    assert caught.value is not None
    assert accelerator.alive_bytes() == before


def test_memory_runs_out_in_a_gradient():
    x = ones(1000).requires_grad_()
    y = x.exp().exp().sum()
    with accelerator.limit(accelerator.alive_bytes() + 1000), pytest.raises(torch.OutOfMemoryError):
        torch.autograd.grad(y, x)
