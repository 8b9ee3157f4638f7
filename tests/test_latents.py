"""Where tiles start from: the source's latents, and those of neighbours."""

import gc
import weakref

import pytest
import torch
from PIL import ImageChops

from lib_dinotile.engine import flow, memory
from lib_dinotile.engine import latents as module
from lib_dinotile.engine.latents import SourceLatents
from lib_dinotile.engine.memory import PieceSize
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.noise import NoiseField
from lib_dinotile.tiling.plan import Rect, TilePlan
from tests.test_engine import StubHost, noisy, upscale
from tests.test_tiling import random_image


class CountingHost(StubHost):
    def __init__(self):
        super().__init__()
        self.encoded = []

    channels = 3 * 64

    def encode(self, pixels):
        self.encoded.append(tuple(pixels.shape[-2:]))
        return super().encode(pixels)


@pytest.fixture
def field(monkeypatch):
    monkeypatch.setattr(memory, "PIECE", 160)
    monkeypatch.setattr(memory, "OVERLAP", 32)
    host, plan = CountingHost(), TilePlan(500, 300, 96, 16)
    canvas = Canvas(random_image(500, 300), plan)
    return host, canvas, SourceLatents(host, canvas, plan.whole, PieceSize(plan.tile_size, 8), print)


@pytest.mark.parametrize(
    "area", [Rect(0, 0, 96, 96), Rect(200, 96, 96, 96), Rect(408, 208, 96, 96), Rect(0, 0, 504, 304)]
)
def test_a_crop_of_the_field_is_what_the_host_makes_of_those_pixels(field, area):
    _, canvas, latents = field
    assert torch.allclose(latents.crop(area), StubHost().encode(canvas.source(area)), atol=1e-6)


def test_pieces_are_small_and_each_is_encoded_once_while_they_are_kept(field):
    host, _, latents = field
    for tile in 2 * TilePlan(500, 300, 96, 16).tiles:
        latents.crop(tile)
    assert max(map(max, host.encoded)) <= 160
    assert len(host.encoded) == 4 * 3 and len(set(host.encoded)) == 1


def test_a_piece_is_as_large_as_a_tile_if_that_is_more():
    plan = TilePlan(3000, 2000, 1024, 64)
    assert max(PieceSize(plan.tile_size, 8).cut(plan.whole).tile_size) in range(memory.PIECE + 1, 1025)
    small = TilePlan(3000, 2000, 256, 64)
    assert max(PieceSize(small.tile_size, 8).cut(small.whole).tile_size) <= memory.PIECE


def test_a_field_that_is_too_large_to_be_kept_is_the_same(field, monkeypatch):
    host, canvas, latents = field
    whole = latents.crop(Rect(0, 0, 504, 304))
    monkeypatch.setattr(module, "CACHE", 1)
    plan = TilePlan(500, 300, 96, 16)
    few = SourceLatents(host, canvas, plan.whole, PieceSize(plan.tile_size, 8), print)
    assert torch.equal(few.crop(Rect(0, 0, 504, 304)), whole)


class FrailHost(StubHost):
    """Encodes to nan unless in full precision; large pictures do not fit into its memory."""

    def __init__(self, largest=10**6, needs_precision=True):
        super().__init__(noisy)
        self._largest, self._needs_precision, self.refused = largest, needs_precision, 0

    def encode(self, pixels):
        self._check(pixels)
        latents = super().encode(pixels)
        return latents if self.precise or not self._needs_precision else latents * torch.nan

    def decode(self, latents):
        pixels = super().decode(latents)
        self._check(pixels)
        return pixels

    def sample(self, *given):
        frail, self._largest, self._needs_precision = (self._largest, self._needs_precision), 10**6, False
        try:
            return super().sample(*given)
        finally:
            self._largest, self._needs_precision = frail

    def _check(self, pixels):
        if max(pixels.shape[-2:]) > self._largest:
            self.refused += 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("order", ["chess", "fused"])
def test_what_the_encoder_makes_no_number_of_is_encoded_again_in_full_precision(order):
    settings, noise = Settings(tile=64, overlap=16, order=order, colour="none"), NoiseField(5, 4)
    plain, frail = (upscale(host, random_image(100, 70), settings, noise) for host in (StubHost(noisy), FrailHost()))
    line = "the picture at 0, 0 was encoded again in full precision: the VAE returned NaN"
    assert frail.report.notes == [line] and frail.image.tobytes() == plain.image.tobytes()


@pytest.mark.parametrize("order", ["chess", "fused"])
def test_pieces_that_do_not_fit_into_memory_go_in_parts(order):
    settings, noise = Settings(tile=256, overlap=64, order=order, colour="none"), NoiseField(5, 4)
    host = FrailHost(largest=300, needs_precision=False)
    plain, small = (upscale(host, random_image(500, 350), settings, noise).image for host in (StubHost(noisy), host))
    assert host.refused and max(high - low for low, high in ImageChops.difference(plain, small).getextrema()) <= 1


def test_a_canvas_is_gone_with_its_run(monkeypatch):
    canvases = []
    monkeypatch.setattr(flow, "Canvas", lambda *given: canvases.append(weakref.ref(one := Canvas(*given))) or one)
    gc.disable()
    try:
        upscale(StubHost(noisy), random_image(60, 60), Settings(tile=64, overlap=16), NoiseField(5, 4))
        assert canvases[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("order", ["chess", "linear"])
def test_a_later_tile_holds_on_to_the_latents_of_earlier_ones(order):
    host, given, gave = StubHost(noisy), [], {}
    sample = host.sample

    def watched(latents, tiled, noise, canvas, denoise=None, mask=None):
        result = sample(latents, tiled, noise, canvas, denoise, mask)
        batch = tiled._batch.tiles
        given.extend(zip(batch, latents, [None] * len(batch) if mask is None else mask))
        gave.update(zip(batch, result))
        return result

    host.sample = watched
    settings = Settings(tile=64, overlap=16, order=order, colour="none")
    upscale(host, random_image(100, 70), settings, NoiseField(5, 4))
    plan, held = TilePlan(200, 140, 64, 16), 0
    for number, (tile, latents, free) in enumerate(given):
        assert (free is None) == (number == 0) or order == "chess"
        if free is None:
            continue
        earlier = torch.zeros_like(free, dtype=torch.bool)
        for other, *_ in given[:number]:
            if other != tile and tile in plan.touching(other):
                part = other.intersection(tile)
                mine, theirs = (part.within(rect).shrink(8).slices for rect in (tile, other))
                same = (latents[(..., *mine)] - gave[other][(..., *theirs)].half()).abs().amax(0, keepdim=True) == 0
                earlier[(..., *mine)] |= same
        assert (earlier | (free > 0)).all()
        held += int((free == 0).sum())
    assert held
