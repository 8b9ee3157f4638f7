"""The benchmarks run; what they measure is not looked at here."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import models
from lib_dinotile.condition.conditioner import Conditioner
from lib_dinotile.hosts.diffusers import load_host
from lib_dinotile.settings import Settings


@pytest.fixture
def speed(monkeypatch):
    from benchmarks import speed

    monkeypatch.setattr(speed, "SETTINGS", replace(speed.SETTINGS, tile=64, overlap=16))
    return speed


def test_the_engine_costs_something_beside_the_model(speed):
    host, image = load_host(speed.GENERATION), speed.noise(32)
    conditioner = Conditioner.load(replace(speed.SETTINGS, adapter="mini"), host, speed.ADAPTERS)
    plain, adapted = (models.Watched(host).run(image, speed.SETTINGS, given) for given in (None, conditioner))
    assert models.overhead([plain]) > 1 and models.overhead([adapted]) > 1
    assert adapted.ours.calls > plain.ours.calls > 0  # residuals beside the noise
    assert min(speed.per_tile([models.Watched(host, 2).run(image, speed.SETTINGS)])) > 0


def test_a_run_that_is_broken_off_shares_out_what_is_done_once_over_all_its_tiles(speed):
    run = models.Watched(load_host(speed.GENERATION), 2).run(speed.noise(32), speed.SETTINGS)
    assert run.done < run.result.total
    run.began, run.ended, run.whole.seconds, run.model.seconds, run.ours.seconds = 1.0, 9.0, 10.0, 7.0, 1.0
    assert speed.per_tile([run]) == (6 / run.done, 2 / run.done + 2 / run.result.total)


def test_with_a_model_that_does_nothing_the_engine_still_works(speed):
    """Its pixels are not the source's, or colour correction would have nothing to do."""
    source = speed.example(128)
    run = speed.Null(source).run(source, replace(speed.OWN, tile=128, overlap=16))
    assert run.result.complete and run.done == run.result.total == 9
    assert run.own > 0 < run.once and 9 * run.own + run.model.seconds + run.once == pytest.approx(run.whole.seconds)
    assert speed.lerp(1) > 0
    shown = run.decode(torch.zeros(1, 4, 32, 32)).mean((0, 2, 3)) * 255
    assert (shown - torch.tensor(np.array(source).mean((0, 1)))).abs().max() > 3


class Small:
    """A host whose memory holds no more than so many tiles."""

    def __init__(self, host, most):
        self.__dict__ = {**vars(host), "_small": host, "_most": most}

    def __getattr__(self, name):
        return getattr(self._small, name)

    def decode(self, latents):
        if len(latents) > self._most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self._small.decode(latents)


@pytest.fixture
def speed_gpu(monkeypatch):
    pytest.importorskip("transformers.models.dinov2", reason="the encoder wants transformers 4.31")
    from benchmarks import speed

    monkeypatch.setattr(speed, "ACROSS", 2)
    monkeypatch.setattr(speed, "RUNS", 1)
    return speed


def test_what_a_gpu_decides_can_be_tried_without_one(speed_gpu, capsys):
    found = speed_gpu.gpu([models.TINY], "cpu", batches=(1, 2))
    assert found["torch"] == torch.__version__ and found["date"] in capsys.readouterr().out
    assert found["calibration_seconds"] > 0
    tiny = found[models.TINY]
    assert tiny["seconds"]["1"] > 0 < tiny["seconds"]["2"] and tiny["peak_gib"] == {"1": 0.0, "2": 0.0}
    assert tiny["overhead"] > 1 and tiny["guidance"] > 0 and tiny["tiles_an_hour"] > 0
    assert None not in (tiny["guard"], tiny["adapter"])


def test_what_the_memory_does_not_hold_is_no_figure_and_not_the_end(speed_gpu):
    """Also though the engine itself would make do with fewer tiles at once."""
    host = Small(models.RandomHost(models.TINY), most=2)
    assert speed_gpu.with_batch(host, 2)[0] > 0
    assert speed_gpu.fitting(speed_gpu.with_batch, host, 4) is None
    assert speed_gpu.fitting(speed_gpu.with_batch, Small(host, most=0), 1) is None
    with pytest.raises(ZeroDivisionError):
        speed_gpu.fitting(lambda: 1 / 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(speed):
    with pytest.raises(SystemExit, match="cuda: there is no such device here"):
        speed.main(["--gpu", "--json"])


def test_a_cut_is_a_seam(speed):
    from benchmarks import seams

    image = speed.noise(seams.SIDE)
    edges = seams.Lines.of(range(0, seams.SIDE, 64), 64, seams.SIDE)
    shown, same = seams.Pool(), seams.Pool()
    shown.add(seams.cut(image, 64, 40, 0), image, (edges, edges))
    same.add(image, image, (edges, edges))
    assert shown.seam()[0] > 1.02 > same.seam()[0]


def test_what_peers_paint_is_told(speed):
    from benchmarks import peers

    assert [peers.ultimate_side(tile) for tile in (256, 512)] == [320, 576]
    side = peers.Side("dinotile", peers.shipped(scale=4.0), 1024, 9, (384, 384))
    reply = peers.client.Reply([], [], {"DINO Tile report": [{"tiles": [], "notes": [], "retried": 0.25}]})
    assert side.painted(reply) == "9 tiles of 384 x 384, 1.33 megapixels, and 25% again"
    plain = peers.Side("Ultimate SD Upscale", {}, 1024, 4, (576, 576))
    assert plain.painted(peers.client.Reply([], [])) == "4 tiles of 576 x 576, 1.33 megapixels"


def test_as_shipped_is_as_nobody_has_changed_anything(speed):
    """The client's own requests switch guidance and guard off."""
    from benchmarks import peers

    webui, image = peers.client.WebUI("http://127.0.0.1:9"), speed.noise(8)
    (sent,) = webui.body(image, **peers.shipped(scale=4.0))["alwayson_scripts"]["dino tile"]["args"]
    assert Settings.parse(sent) == Settings(enabled=True, scale=4.0)
    (sent,) = webui.body(image, **peers.dinotile(scale=4.0))["alwayson_scripts"]["dino tile"]["args"]
    assert Settings.parse(sent) == Settings(enabled=True, scale=4.0, guidance=0.0, guard="off")
