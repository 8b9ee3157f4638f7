"""Half precision: every part computes in its own dtype, and the image is that of float32."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from PIL import Image

from lib_dinotile import DinotileError
from lib_dinotile import __main__ as cli
from lib_dinotile.cli.upscale import _recipe
from lib_dinotile.condition.adapter import AdapterConfig
from lib_dinotile.condition.adapter_file import save_adapter
from lib_dinotile.condition.conditioner import MINI, Conditioner
from lib_dinotile.dino.encoder import encoder_dtype, without_autocast
from lib_dinotile.engine.denoisers import TileBatch
from lib_dinotile.engine.flow import upscale
from lib_dinotile.engine.host import Batch, Prompt
from lib_dinotile.hosts import devices
from lib_dinotile.hosts import diffusers as diffusers_host
from lib_dinotile.hosts.devices import DTYPES, empty_cache, find_device, find_dtype, precision_of
from lib_dinotile.hosts.diffusers import load_host
from lib_dinotile.settings import FULL_VAE, TAESD, Generation, Settings
from lib_dinotile.tiling.noise import NoiseField, TileNoise
from lib_dinotile.tiling.plan import Rect
from tests import accelerator
from tests.test_adapter import random_adapter
from tests.test_diffusers import sd15, sdxl  # noqa: F401
from tests.test_tiling import random_image

SOURCE = random_image(48, 32)
MASK = Image.new("L", SOURCE.size)
MASK.paste(255, (6, 6, 42, 28))
CPU = torch.device("cpu")


def _computes(precision):
    try:
        find_dtype(precision, CPU)
    except DinotileError:
        return False
    return True


HALVES = [
    pytest.param(name, marks=pytest.mark.skipif(not _computes(name), reason=f"this torch has no {name} on a CPU"))
    for name in ("fp16", "bf16")
]
RUNS = {"tiles": {"seams": "bands", "seam_denoise": 0.4}, "fused": {"order": "fused"}}


@pytest.fixture(scope="module")
def models(tmp_path_factory, sd15, sdxl):  # noqa: F811
    """By name: tiny pipelines whose VAEs also compute in half precision, but for SDXL's."""
    found = {"mini": "mini", "sdxl": sdxl}
    for name, kind in (("sd15", "epsilon"), ("v_prediction", "v_prediction")):
        folder = tmp_path_factory.mktemp(name) / "model"
        shutil.copytree(sd15, folder)
        for part, values in (("vae", {"force_upcast": False}), ("scheduler", {"prediction_type": kind})):
            file = next((folder / part).glob("*config.json"))
            file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
        found[name] = str(folder)
    return found


@pytest.fixture(scope="module")
def adapters(models, tmp_path_factory):
    """Files by the model's name; random ones for all but mini."""
    files, folder = {"mini": MINI / "adapter.safetensors"}, tmp_path_factory.mktemp("adapters")
    for name in models.keys() - files:
        host = load_host(Generation(models[name]))
        config = AdapterConfig(host.base, host.shape, "mini", features=192, width=16, blocks=1)
        save_adapter(random_adapter(config), folder / f"{name}.safetensors")
        files[name] = folder / f"{name}.safetensors"
    return files


@pytest.fixture(scope="module")
def painted(models, adapters):
    """Paints within a mask, with adapter, guidance and guard, once for the same arguments: (host, image, report)."""
    kept = {}

    def paint(model, precision, run):
        if (model, precision, run) not in kept:
            given = Generation(models[model], precision=precision, prompt="a cat", steps=4, denoise=0.5, cfg=2.0)
            host = load_host(given)
            settings = Settings(
                tile=64,
                overlap=16,
                patches=8,
                adapter=model,
                guidance_end=1.0,
                guard="report",
                colour="none",
                **RUNS[run],
            )
            conditioner = Conditioner.load(settings, host, adapters)
            result = upscale(host, SOURCE, settings, NoiseField(1, host.channels), conditioner, mask=MASK)
            kept[model, precision, run] = host, np.asarray(result.image).astype(int), result.report
        return kept[model, precision, run]

    return paint


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize(
    "model, run", [("mini", "tiles"), ("sd15", "fused"), ("v_prediction", "fused"), ("sdxl", "tiles")]
)
def test_the_image_is_near_that_of_float32(painted, model, run, precision):
    _, full, _ = painted(model, "fp32", run)
    host, half, report = painted(model, precision, run)
    assert host.dtype == DTYPES[precision]
    assert not any("full precision" in line for line in report.lines)
    plain = np.asarray(SOURCE.resize((96, 64), Image.Resampling.LANCZOS))
    change, error = abs(full - plain).mean(), abs(half - full).mean()
    assert change > 3 and error < 40 * torch.finfo(host.dtype).eps * change


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_only_the_unet_sees_half_precision(models, precision, cfg, monkeypatch):
    """Latents are float32 from the encoder to the decoder, and in every step of the solver."""
    host = load_host(Generation(models["sd15"], precision=precision, prompt="a cat", steps=4, cfg=cfg))
    seen, stepped = set(), set()
    host.unet.register_forward_pre_hook(lambda module, arguments: seen.add(arguments[0].dtype))
    step = host._solver.step

    def watched(prediction, number, x, noise):
        stepped.update((prediction.dtype, x.dtype))
        return step(prediction, number, x, noise)

    monkeypatch.setattr(host._solver, "step", watched)
    latents = host.encode(torch.rand(1, 3, 64, 64))
    tiled = TileBatch(Batch([Rect(0, 0, 64, 64)], [[Prompt()]], None), lambda: None)
    noise = TileNoise(NoiseField(1, 4), [Rect(0, 0, 8, 8)])
    with torch.no_grad():
        sampled = host.sample(latents.half(), tiled, noise, (64, 64), mask=torch.ones(1, 1, 8, 8))
    assert seen == {DTYPES[precision]} and stepped == {torch.float32}
    assert {latents.dtype, sampled.dtype, host.decode(sampled).dtype} == {torch.float32}


@pytest.mark.parametrize("precision", HALVES)
def test_a_vae_that_would_overflow_stays_in_float32_with_its_own_weights(models, precision):
    for name, forced in (("sdxl", True), ("sd15", False)):
        vae = load_host(Generation(models[name], precision=precision))._codec.vae
        assert bool(vae.config.force_upcast) == forced
        there = AutoencoderKL.from_pretrained(models[name], subfolder="vae", torch_dtype=torch.float32).state_dict()
        for key, weight in vae.state_dict().items():
            assert torch.equal(weight, there[key] if forced else there[key].to(DTYPES[precision]))


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("choice", [FULL_VAE, TAESD])
@pytest.mark.parametrize("model", ["mini", "sd15", "sdxl"])
def test_guidance_sees_the_latents_in_float32_through_any_decoder(models, model, choice, precision, monkeypatch):
    torch.manual_seed(0)
    tiny = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    monkeypatch.setattr(diffusers_host, "_taesd", lambda base, download: tiny.float().requires_grad_(False))
    host = load_host(Generation(models[model], precision=precision))
    name, decode = host.guidance_decoder(choice)
    assert name == choice or model == "mini"
    latents = torch.randn(1, host.channels, 8, 8, requires_grad=True)
    pixels = decode(latents)
    (gradient,) = torch.autograd.grad(pixels.sum(), latents)
    assert pixels.dtype == gradient.dtype == torch.float32 and pixels.shape == (1, 3, 8 * host.factor, 8 * host.factor)
    assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("precision", HALVES)
def test_the_command_line_at_its_defaults(precision, tmp_path, monkeypatch, capsys):
    """Adapter, guidance and guard are on."""
    SOURCE.save(tmp_path / "in.png", None)
    quick = ["--steps", "3", "--tile", "64", "--overlap", "16", "--patches", "8", "--quiet"]
    seen, forward = set(), UNet2DConditionModel.forward
    monkeypatch.setattr(
        UNet2DConditionModel,
        "forward",
        lambda self, x, *rest, **more: seen.add(x.dtype) or forward(self, x, *rest, **more),
    )
    for asked, dtype in (("auto", torch.float32), (precision, DTYPES[precision])):
        seen.clear()
        out = tmp_path / f"{asked}.png"
        code = cli.main(
            ["upscale", str(tmp_path / "in.png"), str(out), *quick, "--precision", asked, "--device", "cpu"]
        )
        assert code == 0, capsys.readouterr().err
        assert seen == {dtype} and f"Precision: {precision_of(dtype)}," in Image.open(out).text["parameters"]


@pytest.mark.skipif(not accelerator.AVAILABLE, reason="this torch takes no device from Python")
@pytest.mark.parametrize("precision", ["fp32", *HALVES])
@pytest.mark.parametrize("model", ["mini", "sdxl"])
def test_a_device_that_lacks_what_mps_lacks(models, adapters, model, precision):
    """Neither float64 nor antialiased resizing, and no mixing of dtypes or devices."""

    def paint(**more):
        given = {"denoise": 0.5, "cfg": 2.0, "prompt": "a cat", **more}
        host = load_host(Generation(models[model], steps=2, **given))
        settings = Settings(
            tile=64, overlap=16, patches=8, adapter=model, guidance_end=1.0, guard="report", maps="both"
        )
        conditioner = Conditioner.load(settings, host, adapters)
        result = upscale(host, SOURCE, settings, NoiseField(1, host.channels), conditioner, mask=MASK)
        assert len(result.maps) == 2
        return conditioner.encoder, np.asarray(result.image).astype(int)

    _, full = paint(precision="fp32")
    with accelerator.lacking("float64", "antialias"):
        encoder, found = paint(precision=precision, device=str(accelerator.DEVICE))
    Conditioner.load(Settings(guidance=0.0, guard="off"), load_host(Generation()), {})  # keeps nothing there any more
    assert (encoder.device, encoder.dtype) == (accelerator.DEVICE, DTYPES[precision])
    assert abs(found - full).mean() < 40 * torch.finfo(DTYPES[precision]).eps * 30 + 0.01


def test_mini_computes_in_float32_wherever_it_is_unless_asked(models, monkeypatch):
    asked = []
    monkeypatch.setattr(diffusers_host, "find_dtype", lambda name, device: asked.append(name) or torch.float32)
    for model, precision in (("mini", "auto"), ("mini", "fp16"), ("sd15", "auto")):
        load_host(Generation(models[model], precision=precision))
    assert asked == ["fp32", "fp16", "auto"]


def test_an_image_depends_on_the_precision_and_not_on_the_device(tmp_path):
    def recipe(**more):
        return _recipe(Settings(), Generation(**{"precision": "fp32", **more}), tmp_path / "in.png", None)

    assert recipe(device="cuda") == recipe(device="cpu")
    assert recipe(precision="fp16") != recipe(precision="bf16")


def test_a_precision_that_does_not_run_is_refused_in_one_line(monkeypatch):
    def missing(*_, **more):
        raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'\nsomewhere")

    monkeypatch.setattr(F, "conv2d", missing)
    with pytest.raises(DinotileError, match="does not compute in fp16 on cpu, give fp32") as error:
        load_host(Generation(precision="fp16"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps", "privateuseone"])
def test_autocast_is_off_where_there_is_any(kind):
    with torch.autocast("cpu", torch.bfloat16), without_autocast(torch.device(kind)):
        computed = torch.ones(2, 2) @ torch.ones(2, 2)
    assert computed.dtype == (torch.float32 if kind == "cpu" else torch.bfloat16)


def accelerators(monkeypatch, **counts):
    """As if there were so many devices of these types."""
    monkeypatch.setattr(devices, "_count", lambda kind: counts.get(kind, 0))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **more: zeros(*shape, **more))


@pytest.mark.parametrize(
    "counts, name, number, found",
    [
        ({}, "auto", 0, "cpu"),
        ({"cuda": 2, "xpu": 1}, "auto", 0, "cuda:0"),
        ({"cuda": 2, "xpu": 1}, "auto", 3, "cuda:1"),
        ({"cuda": 2}, "cuda", 1, "cuda:1"),
        ({"cuda": 2}, "cuda:0", 1, "cuda:0"),
        ({"cuda": 2}, "cpu", 1, "cpu"),
        ({"xpu": 2, "mps": 1}, "auto", 1, "xpu:1"),
        ({"mps": 1}, "auto", 1, "mps:0"),
        ({"cuda": 1, "mps": 1}, "mps", 0, "mps:0"),
    ],
)
def test_auto_is_the_best_accelerator_and_processes_spread(counts, name, number, found, monkeypatch):
    accelerators(monkeypatch, **counts)
    assert find_device(name, number) == torch.device(found)


@pytest.mark.parametrize("name", ["meta", "nowhere", "", "cpu:x", *(f"{kind}:9" for kind in devices.ACCELERATORS)])
def test_a_device_that_is_not_there_is_refused_in_one_line(name, monkeypatch):
    with pytest.raises(DinotileError, match=r"device: .* is not available \(.*\), give one of auto, ") as error:
        load_host(Generation(device=name))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps", "privateuseone", "cpu"])
def test_every_accelerator_computes_in_half_precision_and_the_cpu_does_not(kind):
    device, known = torch.device(kind), kind in devices.ACCELERATORS
    assert find_dtype("auto", device) == (torch.float16 if known else torch.float32)
    assert encoder_dtype(device, torch.float16) == (torch.float32 if kind == "cpu" else torch.float16)


def test_any_device_s_cache_is_emptied(monkeypatch):
    emptied = []
    for kind in ("cuda", "xpu", "mps"):
        module = SimpleNamespace(empty_cache=lambda kind=kind: emptied.append(kind))
        monkeypatch.setattr(torch, kind, module, raising=False)
    for kind in ("cuda", "xpu", "mps", "privateuseone", "cpu"):
        empty_cache(torch.device(kind))
    assert emptied == ["cuda", "xpu", "mps"]
