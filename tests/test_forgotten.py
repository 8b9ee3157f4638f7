"""Nothing of a run stays alive when it is over, however it ends: without the garbage collector's help."""

import gc
import weakref

import pytest
import torch

from lib_dinotile.engine import flow
from lib_dinotile.engine.flow import UnfinishedError, upscale
from lib_dinotile.engine.host import Interrupted
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.noise import NoiseField
from tests.test_engine import StubHost, noisy
from tests.test_tiling import random_image


class Failing(StubHost):
    """The fourth call of the sampler, or of the model in a fused run, breaks off with an error, or gives NaN."""

    def __init__(self, error):
        super().__init__(self.sampler, model=self.model)
        self.error, self.calls = error, 0

    def sampler(self, latents, noise):
        return noisy(latents, noise)

    def model(self, pixels):
        self.calls += 1
        if self.calls == 4 and self.error is not None:
            if self.error is torch.nan:
                return pixels * torch.nan
            raise self.error()
        return pixels


@pytest.fixture
def alive(monkeypatch):
    """Weak references to the canvases and latents of runs, without a garbage collector."""
    references = []

    def canvas(*arguments):
        made = Canvas(*arguments)
        references.append(weakref.ref(made))
        return made

    monkeypatch.setattr(flow, "Canvas", canvas)
    gc.collect()
    gc.disable()
    yield lambda: [reference() for reference in references if reference() is not None]
    gc.enable()


@pytest.mark.parametrize("order", ["chess", "linear", "fused"])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, Interrupted, torch.nan, MemoryError])
@pytest.mark.parametrize("batch", [1, 2])
def test_after_a_run_its_canvas_is_gone(alive, order, error, batch):
    host = Failing(error)
    settings = Settings(tile=64, overlap=16, order=order, batch=batch, guidance=0.0, guard="off")
    try:
        upscale(host, random_image(120, 60), settings, NoiseField(5, 4))
    except UnfinishedError:
        assert error in (RuntimeError, KeyboardInterrupt, MemoryError)
    assert host.calls >= 4
    host.batches.clear()  # which this host keeps for other tests
    assert not alive()
