"""The flow, on a host that does what the test says."""

import contextlib
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from PIL import Image

from lib_dinotile import DinotileError
from lib_dinotile.engine.flow import UnfinishedError, canvas_size, upscale
from lib_dinotile.engine.host import Interrupted
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.noise import NoiseField
from lib_dinotile.tiling.plan import Rect
from tests.test_tiling import random_image


class StubHost:
    """Latents are blocks of pixels; sampling is the function given, of pixels."""

    base, shape, device, dtype, channels = "stub", None, "cpu", torch.float32, 4

    def __init__(self, sample=lambda latents, noise: latents, factor=8, stop_after=None, model=None):
        """model: where the sampler is to call one, through its tiles."""
        self.factor, self._sample, self._stop_after, self._model = factor, sample, stop_after, model
        self.sampled, self.seen, self.denoised, self.batches = [], [], [], []
        self.freed, self.precise = 0, False

    prompt, regional = "main", True

    def upscalers(self):
        return ["Lanczos"]

    def check_prompt(self, prompt):
        pass

    def interrogators(self):
        return ["Stub"]

    def caption(self, images, interrogator):
        return [f"caption of {image.width}" for image in images]

    def free_memory(self):
        self.freed += 1

    @contextlib.contextmanager
    def full_precision(self):
        self.precise = True
        yield
        self.precise = False

    def upscale(self, image, size, upscaler):
        return image.resize(size, Image.Resampling.LANCZOS)

    def encode(self, pixels):
        return F.pixel_unshuffle(pixels, self.factor)

    def decode(self, latents):
        return F.pixel_shuffle(latents, self.factor)

    def sample(self, latents, tiled, noise, canvas, denoise=None, mask=None):
        self.sampled.append(len(latents))
        self.denoised.append(denoise)

        def model(tiles, batch):
            self.batches.append(batch)
            return self.encode(self._model(self.decode(tiles)))

        result = latents if self._model is None else tiled(latents, model, lambda: latents)
        result = self.encode(self._sample(self.decode(result), noise))
        return result if mask is None else torch.lerp(latents, result, mask)

    def interrupted(self):
        return self._stop_after is not None and len(self.sampled) >= self._stop_after

    def steps(self, denoise=None):
        return 8

    def steps_note(self, denoise=None):
        return ""

    def batch_note(self):
        return ""

    def progress(self, progress, canvas):
        self.seen.append(progress)


def noisy(latents, noise):
    """A sampler whose result depends on the pixels and on two draws of noise at every place."""
    draws = (noise.next() + noise.next())[:, :3]
    return (latents * 0.8 + 0.1 + draws.repeat_interleave(8, -1).repeat_interleave(8, -2) * 0.05).clamp(0, 1)


@profile(max_examples=25)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([1.0, 1.5, 2.0, 3.3]), st.sampled_from([64, 96, 128]))
def test_the_result_has_exactly_the_size_asked_for_and_an_idle_sampler_changes_nothing(width, height, scale, tile):
    source = random_image(width, height)
    result = upscale(StubHost(), source, Settings(scale=scale, tile=tile, overlap=16), NoiseField(0, 4))
    assert result.complete
    assert result.image.size == (max(1, round(width * scale)), max(1, round(height * scale)))
    assert result.image.tobytes() == source.resize(result.image.size, Image.Resampling.LANCZOS).tobytes()


@pytest.mark.parametrize("order", ["chess", "linear"])
def test_the_same_seed_gives_the_same_image_at_any_batch_size(order):
    source, images = random_image(150, 110), []
    for batch in (1, 3, 16):
        settings = Settings(tile=96, overlap=32, batch=batch, order=order)
        images.append(np.asarray(upscale(StubHost(noisy), source, settings, NoiseField(5, 4)).image).astype(int))
    assert abs(images[0] - images[1]).max() <= 1 and abs(images[0] - images[2]).max() <= 1
    other = np.asarray(upscale(StubHost(noisy), source, settings, NoiseField(6, 4)).image).astype(int)
    assert abs(other - images[0]).mean() > 1


def test_every_tile_gets_the_noise_of_its_own_place():
    """A sampler that paints the noise itself paints the field, tile by tile."""

    def paint(latents, noise):
        return (noise.next()[:, :3] * 0.1 + 0.5).repeat_interleave(8, -1).repeat_interleave(8, -2).clamp(0, 1)

    settings = Settings(tile=64, overlap=16, colour="none")
    result = upscale(StubHost(paint), random_image(80, 60), settings, NoiseField(3, 4))
    field = (NoiseField(3, 4).crop([Rect(0, 0, 20, 15)], 0)[0, :3] * 0.1 + 0.5).clamp(0, 1)
    wanted = (field * 255).round().permute(1, 2, 0).numpy().repeat(8, 0).repeat(8, 1)
    assert abs(np.asarray(result.image).astype(int) - wanted).max() <= 1


def test_a_later_wave_sees_what_earlier_ones_painted():
    means = []
    host = StubHost(lambda latents, noise: means.append(float(latents.mean())) or torch.ones_like(latents))
    settings = Settings(tile=64, overlap=32, batch=1, colour="none")
    upscale(host, Image.new("RGB", (48, 32)), settings, NoiseField(0, 4))
    assert means[0] == 0 and means[1] > 0.1


def test_progress_counts_tiles():
    host = StubHost()
    upscale(host, random_image(100, 40), Settings(tile=64, overlap=0, batch=4), NoiseField(0, 4))
    texts = [look.text for look in host.seen]
    assert texts[0] == "painting tiles: 0 of 8" and texts[-1] == "painted 8 tiles"
    assert [look.done for look in host.seen] == [0, 0, 0.25, 0.5, 0.75, 1]
    assert all(look.ahead == after.done for look, after in itertools.pairwise(host.seen))


def test_stopped_between_batches_the_painted_tiles_stay():
    source = Image.new("RGB", (96, 32))
    host = StubHost(lambda latents, noise: torch.ones_like(latents), stop_after=1)
    result = upscale(host, source, Settings(tile=64, overlap=0, batch=1, colour="none"), NoiseField(0, 4))
    pixels = np.asarray(result.image)
    assert not result.complete and result.painted == 1
    assert (pixels[:, :64] == 255).all() and (pixels[:, 64:] == 0).all()


def test_stopped_within_a_batch_its_tiles_are_not_painted():
    def interrupted(latents, noise):
        raise Interrupted

    source = random_image(40, 40)
    result = upscale(StubHost(interrupted), source, Settings(tile=64, overlap=0), NoiseField(0, 4))
    assert result.painted == 0
    assert result.image.tobytes() == source.resize((80, 80), Image.Resampling.LANCZOS).tobytes()


@pytest.mark.parametrize("error", [RuntimeError("no such kernel\nand more"), KeyboardInterrupt()])
def test_broken_off_with_an_error_the_painted_tiles_stay(error):
    calls = []

    def third_time(latents, noise):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return torch.ones_like(latents)

    settings = Settings(tile=64, overlap=0, batch=1, colour="none")
    with pytest.raises(UnfinishedError) as caught:
        upscale(StubHost(third_time), Image.new("RGB", (128, 32)), settings, NoiseField(0, 4))
    result = caught.value.result
    assert result.painted == 2 and (np.asarray(result.image)[:, :128] == 255).all()
    assert str(caught.value).startswith("stopped after 2 of 4 tiles: ") and "\n" not in str(caught.value)
    assert caught.value.__cause__ is error and caught.value.status_code == 500


def test_what_cannot_be_done_is_refused_before_any_work():
    host = StubHost()
    with pytest.raises(DinotileError, match="upscaler: 'ESRGAN' is not installed, give one of Lanczos"):
        upscale(host, random_image(8, 8), Settings(upscaler="ESRGAN"), NoiseField(0, 4))
    with pytest.raises(DinotileError, match="the result would be 80000x8"):
        canvas_size((10000, 1), Settings(scale=8.0))
    assert host.sampled == [] and host.seen == []
