"""The whole engine on the pretend accelerator: devices and dtypes, memory that runs out, and what stays in it."""

import contextlib
import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device

from lib_dinotile.condition.adapter_file import load_adapter, save_adapter
from lib_dinotile.condition.guard import Guard
from lib_dinotile.condition.guidance import Guide
from lib_dinotile.dino import encoder
from lib_dinotile.dino.cache import FeatureCache
from lib_dinotile.dino.calibration import calibrate
from lib_dinotile.dino.encoder import load_encoder
from lib_dinotile.dino.field import feature_fields
from lib_dinotile.dino.head import load_heads, save_heads
from lib_dinotile.engine import memory
from lib_dinotile.engine.flow import UnfinishedError
from lib_dinotile.engine.host import Interrupted
from lib_dinotile.engine.memory import OutOfMemoryError
from lib_dinotile.engine.painter import PaintedBatch, PaintedTile
from lib_dinotile.engine.prediction import KINDS, coefficients, from_x0, timestep_to_sigma, to_x0
from lib_dinotile.engine.retry import Change
from lib_dinotile.engine.team import Processes, Team
from tests import accelerator
from tests.accelerator import DEVICE
from tests.device_matrix import CONDITIONS, ENCODER, FLOWS, PRECISIONS, Cell, cells, models, pixels  # noqa: F401
from tests.test_encoder import write_checkpoint
from tests.test_tiling import random_image

pytestmark = pytest.mark.skipif(not accelerator.AVAILABLE, reason="this torch takes no device from Python")

FOUR = random_image(128, 32)
"""Four tiles in a row when it is enlarged, if they do not overlap."""
APART = {"overlap": 0, "tile_prompts": "", "batch": 4, "every": 2, "guard": "report"}
CPU = torch.device("cpu")


@pytest.mark.parametrize("cell", cells(), ids=str)
def test_every_cell_of_the_matrix_is_what_it_is_on_the_cpu(models, cell):  # noqa: F811
    models.check(cell, models.run(cell, DEVICE))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_encoder_and_adapter_compute_on_the_device_in_its_precision(models, precision):  # noqa: F811
    """On the CPU they would give the same image, slowly."""
    cell = Cell("sd15", precision, "all", "chess")
    conditioner = models.conditioner(models.settings(cell), models.host(cell.pipeline, precision, DEVICE))
    for part in (conditioner.encoder, conditioner._adapter):
        assert {(each.device, each.dtype) for each in part.parameters()} == {(DEVICE, PRECISIONS[precision])}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_regions_are_the_same_on_all_devices_and_in_any_precision(models, precision):  # noqa: F811
    cell, source = Cell("sd15", precision, "guidance", "regions"), random_image(128, 96)
    cpu, device = (
        models.conditioner(models.settings(cell), models.host("sd15", each, place))
        for each, place in (("fp32", CPU), (precision, DEVICE))
    )
    regions = device.regions(source, (256, 192))
    assert torch.equal(regions.labels, cpu.regions(source, (256, 192)).labels) and len(regions.letters) == 2
    assert (device.encoder.device, device.encoder.dtype) == (DEVICE, PRECISIONS[precision])


def test_features_are_remembered_in_main_memory():
    cache = FeatureCache()
    cache.field(load_encoder("mini", device=DEVICE), torch.rand(3, 32, 32), (64, 64), 4)
    assert [features.device for features in cache._kept.values()] == [CPU]


def test_what_one_device_sees_is_not_remembered_for_another(monkeypatch):
    """Regions are found in what the encoder sees on the CPU, also where it looked on an accelerator before."""
    cache, source, seen = FeatureCache(), torch.rand(3, 32, 32), list[str]()

    def look(encoder, *arguments):
        seen.append(encoder.device.type)
        return feature_fields(encoder, *arguments)

    monkeypatch.setattr("lib_dinotile.dino.cache.feature_fields", look)
    for device in (DEVICE, CPU, DEVICE, CPU):
        cache.field(load_encoder("mini", device=device), source, (64, 64), 4)
    assert seen == [DEVICE.type, "cpu"]


def test_what_is_saved_was_brought_to_the_cpu(models, tmp_path):  # noqa: F811
    there, back = load_adapter(models.adapters["sd15"], DEVICE, torch.float16), tmp_path / "adapter.safetensors"
    save_adapter(there, back, torch.float32)
    for name, weight in load_adapter(back).state_dict().items():
        assert torch.equal(weight, there.state_dict()[name].cpu().float())
    heads = load_heads(models.heads["sharp"], "tiny", ENCODER.hidden_size, DEVICE)
    save_heads(heads, tmp_path / "heads.safetensors", "tiny")
    for layer, head in load_heads(tmp_path / "heads.safetensors", "tiny", ENCODER.hidden_size).items():
        assert torch.equal(head.outer.weight, heads[layer].outer.weight.cpu())


def test_every_condition_and_every_flow_makes_another_image(models):  # noqa: F811
    """... or the matrix would tell nothing of them."""

    def image(condition, flow):
        return pixels(models.reference(Cell("sd15", "fp32", condition, flow)))

    plain = image("plain", "chess")
    others = [(condition, "chess") for condition in CONDITIONS] + [("plain", flow) for flow in FLOWS]
    assert [other for other in others if abs(image(*other) - plain).mean() <= 1] == [("plain", "chess")] * 2


@pytest.mark.parametrize("flow", ["chess", "fused"])
def test_a_vae_may_leave_its_latents_on_the_cpu(models, flow, monkeypatch):  # noqa: F811
    """As one does that a WebUI moves back and forth."""
    cell = Cell("sd15", "fp16", "guidance", flow)
    host = models.host(cell.pipeline, cell.precision, DEVICE)
    encode = host.encode
    monkeypatch.setattr(host, "encode", lambda pixels: encode(pixels).cpu())
    models.check(cell, models.run(cell, DEVICE))


@pytest.mark.parametrize("kind", KINDS)
def test_diffusion_maths_take_their_operands_from_anywhere(kind):
    x, given = torch.randn(2, 2, 4, 3, 5).to(DEVICE, torch.float16)
    with accelerator.lacking("float64"):
        alphas = torch.linspace(0.9, 0.1, 10)
        for place in (CPU, DEVICE):
            alpha, sigma = coefficients(alphas.to(place), torch.tensor([3, 7], device=DEVICE))
            assert alpha.device == sigma.device == DEVICE
            assert timestep_to_sigma(alphas.to(place), 3.5) == timestep_to_sigma(alphas, 3.5)
        for function in (to_x0, from_x0):
            here, there = (function(x, given.to(place), alpha.to(place), sigma, kind) for place in (CPU, DEVICE))
            assert here.device == there.device == DEVICE and torch.equal(here.cpu(), there.cpu())


# Memory ---------------------------------------------------------------------------------------------------------------


class Room:
    """Watches calls of one function, and how much of the device's memory they take; may let them have no more."""

    taken = 0
    room: int | None = None

    def __init__(self, monkeypatch, owner, name):
        call = getattr(owner, name)

        def watched(*arguments, **more):
            before = accelerator.alive_bytes()
            accelerator.reset()
            with contextlib.nullcontext() if self.room is None else accelerator.limit(before + self.room):
                result = call(*arguments, **more)
            self.taken = max(self.taken, accelerator.peak() - before)
            return result

        monkeypatch.setattr(owner, name, watched)


PLACES = {
    "model": ("plain", "chess", lambda host: (host.unet, "forward")),
    "fused": ("plain", "fused", lambda host: (host.unet, "forward")),
    "decoder": ("plain", "chess", lambda host: (host, "decode")),
    "backward pass": ("guidance", "chess", lambda host: (torch.autograd, "grad")),
    "guidance": ("guidance", "fused", lambda host: (Guide, "__call__")),
    "guard": ("guard", "chess", lambda host: (Guard, "distances")),
}


@pytest.mark.parametrize("place", PLACES)
def test_out_of_memory_halves_the_batch(models, place, monkeypatch):  # noqa: F811
    condition, flow, where = PLACES[place]
    cell = Cell("sd15", "fp16", condition, flow)

    room = Room(monkeypatch, *where(models.host("sd15", "fp16", DEVICE)))

    def run(**more):
        room.taken = 0
        result = models.run(cell, DEVICE, FOUR, **{**APART, **more})
        return room.taken, result

    (four, plain), (two, _) = run(), run(batch=2)
    room.room = (two + four) // 2
    taken, halved = run()
    assert taken <= room.room < four
    assert not any("out of memory" in line for line in plain.report.lines)
    assert halved.report.lines.count("out of memory with 4 tiles at once, went on with 2") == 1
    assert abs(pixels(halved) - pixels(plain)).mean() < 0.1


@pytest.mark.parametrize("condition", ["plain", "guidance"])
def test_the_whole_run_keeps_within_the_memory_that_there_is(models, condition, monkeypatch):  # noqa: F811
    monkeypatch.setattr(memory, "PIECE", 128)  # the codec, beside the tiles, is given no more than two of them
    cell = Cell("sd15", "fp16", condition, "chess")

    def peak(**more):
        accelerator.reset()
        result = models.run(cell, DEVICE, FOUR, **{**APART, **more})
        return accelerator.peak(), result

    peak()
    (four, plain), (two, _) = peak(), peak(batch=2)
    limit = (two + four) // 2
    with accelerator.limit(limit):
        most, halved = peak()
    assert two <= most <= limit < four
    assert halved.report.lines.count("out of memory with 4 tiles at once, went on with 2") == 1
    assert abs(pixels(halved) - pixels(plain)).mean() < 0.1


@pytest.mark.parametrize("flow", ["chess", "fused"])
def test_a_device_without_float64_and_antialiasing_gives_the_same(models, flow):  # noqa: F811
    cell = Cell("sd15", "fp32", "all", flow)
    with accelerator.lacking("float64", "antialias"):
        result = models.run(cell, DEVICE, maps="both")
    models.check(cell, result, "fp16")
    reference = models.run(cell, CPU, maps="both")
    for name in ("semantic", "consistency"):
        error = np.asarray(result.maps[name]).astype(int) - np.asarray(reference.maps[name])
        assert abs(error).mean() < 4


def test_so_it_does_where_an_encoder_is_calibrated(tmp_path):
    write_checkpoint(tmp_path / "tiny", ENCODER)
    pictures = [random_image(48, 48, seed).resize((112, 112)) for seed in range(3)]
    with accelerator.lacking("float64", "antialias"):
        there = calibrate(load_encoder(str(tmp_path / "tiny"), device=DEVICE), pictures, 2.0, (-1,)).heads[-1]
    here = calibrate(load_encoder(str(tmp_path / "tiny")), pictures, 2.0, (-1,)).heads[-1]
    assert here.outer.weight.any()
    assert torch.allclose(there.floor.cpu(), here.floor, atol=1e-3)
    assert torch.allclose(there.outer.weight.cpu(), here.outer.weight, atol=1e-3)


# NaN ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("flow", ["chess", "fused"])
@pytest.mark.parametrize("part", ["model", "encoder", "decoder"])
def test_nan_in_half_precision_is_mended_in_float32(models, part, flow, precision, monkeypatch):  # noqa: F811
    cell = Cell("sd15", precision, "adapter", flow)
    host = models.host("sd15", precision, DEVICE)
    vae = host._codec.vae
    owner = {"model": host.unet, "encoder": vae.encoder, "decoder": vae.decoder}[part]
    forward, seen = owner.forward, set()

    def overflows(x, *arguments, **more):
        seen.add(x.dtype)
        output = forward(x, *arguments, **more)
        wrong = 1 if x.dtype == torch.float32 else torch.nan
        return (output[0] * wrong,) if isinstance(output, tuple) else output * wrong

    monkeypatch.setattr(owner, "forward", overflows)
    result = models.run(cell, DEVICE)
    assert seen == {host.dtype, torch.float32}
    assert any("full precision" in line for line in result.report.lines) or (part, flow) == ("decoder", "fused")
    assert abs(pixels(result) - pixels(models.reference(cell))).mean() < 4


# What stays -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def counting_only():
    """No garbage collector: what is freed is freed by reference counting."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _nothing(host, monkeypatch):
    pass


def _fails(error):
    def patch(host, monkeypatch):
        forward, calls = host.unet.forward, []

        def failing(*arguments, **more):
            calls.append(1)
            if len(calls) == 2:
                raise error()  # a new one: it holds all frames
            return forward(*arguments, **more)

        monkeypatch.setattr(host.unet, "forward", failing)

    return patch


def _runs_out_of_memory(host, monkeypatch):
    room = Room(monkeypatch, host.unet, "forward")
    room.room = 1000


OUTCOMES = {
    "done": (_nothing, None),
    "error": (_fails(ValueError), ValueError),
    "interrupt": (_fails(KeyboardInterrupt), KeyboardInterrupt),
    "cancelled": (_fails(Interrupted), None),
    "out of memory": (_runs_out_of_memory, OutOfMemoryError),
}


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("flow", ["chess", "fused", "seams"])
def test_nothing_stays_on_the_device(models, flow, outcome, counting_only, monkeypatch):  # noqa: F811
    monkeypatch.setattr(encoder, "_GRIDS_KEPT", 1000)
    cell = Cell("sdxl", "fp16", "all", flow)
    patch, expected = OUTCOMES[outcome]

    def run():
        with pytest.MonkeyPatch.context() as patched:
            patch(models.host(cell.pipeline, cell.precision, DEVICE), patched)
            try:
                result = models.run(cell, DEVICE)
            except UnfinishedError as error:
                return type(error.__cause__)
            return None if result.complete == (outcome != "cancelled") else result

    assert run() is expected  # now models, prompts and position embeddings are loaded
    before, there = accelerator.alive_bytes(), accelerator.alive()
    assert run() is expected
    assert accelerator.alive() == there
    assert accelerator.alive_bytes() == before


@pytest.mark.parametrize("flow", ["chess", "fused", "seams"])
def test_what_comes_back_from_other_processes_goes_on_on_the_device(models, flow):  # noqa: F811
    """It comes by way of the CPU."""

    class Apart(Team):
        def gather(self, mine):
            return [send_to_device(mine, "cpu")]

    cell = Cell("sd15", "fp16", "all", flow)
    models.check(cell, models.run(cell, DEVICE, team=Apart()))


def test_what_processes_tell_each_other_goes_by_way_of_the_cpu(monkeypatch):
    sent = []
    monkeypatch.setattr("accelerate.utils.gather_object", lambda items: sent.extend(items) or items)
    there = torch.ones(3, 8, 8, device=DEVICE)
    painted = PaintedBatch([PaintedTile(there, there)], notes=["told"])
    team = Processes(SimpleNamespace(process_index=0, num_processes=2))
    team.gather((painted, [Change(None, there)], []))
    ((found, (change,), _),) = sent
    tensors = [found.tiles[0].change, found.tiles[0].latents, change.pixels]
    assert found.notes == ["told"] and [tensor.device.type for tensor in tensors] == ["cpu"] * 3
