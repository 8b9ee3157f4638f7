"""The whole engine on a GPU, with tiny random models: what tests/test_devices.py claims of a pretend one, and bits."""

import numpy as np
import pytest
import torch

from lib_dinotile.dino import encoder
from tests.device_matrix import FLOWS, Cell, cells, models, pixels  # noqa: F401

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

DEVICE = torch.device("cuda", 0)
WITHIN = {"fp32": "fp16"}
"""Tolerances: a GPU's convolutions round float32 to TF32."""


@pytest.mark.parametrize("cell", cells(), ids=str)
def test_every_cell_of_the_matrix_is_what_it_is_on_the_cpu(models, cell):  # noqa: F811
    models.check(cell, models.run(cell, DEVICE), WITHIN.get(cell.precision, ""))


@pytest.fixture
def deterministic():
    """cuDNN takes the same algorithm for the same convolution."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("pipeline", ["sd15", "sdxl"])
def test_the_same_seed_gives_the_same_bits(models, pipeline, flow, precision, deterministic):  # noqa: F811
    cell = Cell(pipeline, precision, "adapter", flow)
    first, second = (models.run(cell, DEVICE) for _ in range(2))
    assert np.array_equal(pixels(first), pixels(second))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("flow", ["chess", "fused"])
def test_any_batch_gives_about_the_same(models, flow, precision):  # noqa: F811
    cell = Cell("sd15", precision, "adapter", flow)
    one, four = (models.run(cell, DEVICE, batch=batch) for batch in (1, 4))
    assert abs(pixels(one) - pixels(four)).mean() < 0.5


@pytest.mark.parametrize("condition", ["plain", "all"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_model_is_as_it_was(models, condition, precision, deterministic):  # noqa: F811
    host = models.host("sd15", precision, DEVICE)
    draw = torch.Generator().manual_seed(0)
    x, words = (torch.randn(size, generator=draw).to(DEVICE, host.dtype) for size in ((2, 4, 8, 8), (2, 77, 768)))

    def ordinary():
        with torch.no_grad():
            return host.unet(x, 500, words).sample

    before = ordinary()
    models.run(Cell("sd15", precision, condition, "chess"), DEVICE)
    assert torch.equal(ordinary(), before)


@pytest.mark.parametrize("condition", ["plain", "all"])
@pytest.mark.parametrize("flow", FLOWS)
def test_nothing_stays_in_the_memory(models, flow, condition, monkeypatch):  # noqa: F811
    monkeypatch.setattr(encoder, "_GRIDS_KEPT", 1000)
    cell = Cell("sdxl", "fp16", condition, flow)

    def allocated():
        models.run(cell, DEVICE)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(DEVICE)

    before = allocated()  # models, prompts and position embeddings are loaded
    assert allocated() == before
