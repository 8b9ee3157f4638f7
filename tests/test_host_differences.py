"""In what the WebUIs differ, a test for each: what one of them lacks, has besides, or does in its own way."""

from __future__ import annotations

import contextlib
import importlib.machinery
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

from lib_dinotile import DinotileError
from lib_dinotile.engine.host import Interrupted
from lib_dinotile.settings import APPROXIMATE, AUTOMATIC, DECODERS, FULL_VAE, LINEAR, TAESD, Settings
from tests.host_contract import Script, batch_of, latents_of, sampled
from tests.test_tiling import random_image
from tests.webui_samplers import Multicond
from tests.webui_stand_in import (
    A1111,
    FLUX,
    FORGE,
    KINDS,
    KLEIN,
    NEO,
    QWEN,
    REFORGE,
    TRANSFORMERS,
    UNETS,
    Scripts,
    WebUI,
)
from tests.webui_stand_in import webui as stand_in

some = pytest.mark.parametrize


@pytest.fixture(params=KINDS, ids=str)
def webui(request: pytest.FixtureRequest) -> Iterator[WebUI]:
    with stand_in(request.param) as made:
        yield made


def only(*kinds: Any) -> Any:
    return some("webui", kinds, indirect=True, ids=str)


# Interrogators and upscalers -----------------------------------------------------------------------------------------


def test_captions_are_there_where_the_webui_has_interrogators(webui):
    host, images = webui.host(webui.job()), [random_image(8, 6), random_image(9, 7)]
    if webui.kind.family == "neo":
        assert host.interrogators() == []
        return
    assert host.interrogators() == ["CLIP", "DeepBooru"]
    assert host.caption(images, "CLIP") == ["a picture of 8 by a clip", "a picture of 9 by a clip"]
    assert host.caption(images, "DeepBooru") == ["6, tags", "7, tags"]
    assert webui.modules["modules.deepbooru"].model.running == 0


@only(A1111, FORGE, REFORGE)
def test_an_interrogator_that_fails_or_is_stopped_is_let_go_of(webui):
    host, booru = webui.host(webui.job()), webui.modules["modules.deepbooru"].model
    shared = webui.modules["modules.shared"]
    shared.interrogator.interrogate = lambda image: shared.state.end() or "<error>"
    shared.state.end = lambda: pytest.fail("the job was ended")
    with pytest.raises(DinotileError, match="captions: CLIP failed"):
        host.caption([random_image(8, 6)], "CLIP")
    shared.state.skipped = True
    with pytest.raises(Interrupted):
        host.caption([random_image(8, 6)], "DeepBooru")
    assert booru.running == 0


@only(A1111, FORGE, REFORGE)
@some("fault", [IndexError("list index out of range"), OSError("no\nnetwork"), ValueError("a damaged\nfile")], ids=repr)
@some("name", ["CLIP", "DeepBooru"])
def test_an_interrogator_that_cannot_be_loaded_is_refused_in_one_line(webui, name, fault):
    """Where its download fails the WebUI takes the first of no files."""

    def load() -> None:
        raise fault

    shared = webui.modules["modules.shared"]
    shared.interrogator.load, shared.interrogator.interrogate = load, lambda image: "<error>"
    webui.modules["modules.deepbooru"].model.start = load
    with pytest.raises(DinotileError) as error:
        webui.host(webui.job()).caption([random_image(8, 6)], name)
    why = "its model is not on this machine and could not be downloaded"
    assert error.value.status_code == 422 and error.value.detail.startswith(
        f"captions: {name} cannot be loaded: {'a damaged file' if isinstance(fault, ValueError) else why}; "
    )


@only(FORGE, NEO, REFORGE)
def test_a_picture_of_a_single_latent_cell_has_no_conditioning_of_its_size(webui):
    """Forge takes what is as large as the latents for an inpainting checkpoint's."""
    host, tiled = webui.host(webui.job()), types.SimpleNamespace(pixels=None)
    for side, shape in ((1, (1, 2)), (2, (1, 1))):
        latents = torch.zeros(1, 4, side, side)
        assert host._image_conditioning(latents, tiled, None).shape[-2:] == shape


def test_resampling_is_always_there_and_a_model_gives_the_size_that_is_asked_for(webui):
    host, image = webui.host(webui.job()), random_image(13, 9)
    assert {"Lanczos", "Nearest", "None", "ESRGAN"} == set(host.upscalers())
    assert len(host.upscalers()) == 4
    for name, filter in (("Lanczos", Image.Resampling.LANCZOS), ("Nearest", Image.Resampling.NEAREST)):
        assert host.upscale(image, (37, 29), name) == image.resize((37, 29), filter)
    assert host.upscale(image, (37, 29), "ESRGAN").size == (37, 29)
    assert host.upscale(image, (300, 30), "ESRGAN").size == (300, 30)


def test_what_a_model_made_is_kept_by_its_file(webui, tmp_path):
    host, image, made = webui.host(webui.job()), random_image(13, 9), []
    data = next(data for data in webui.modules["modules.shared"].sd_upscalers if data.name == "ESRGAN")
    file = tmp_path / "esrgan.pth"
    data.data_path = str(file)
    if hasattr(data, "local_data_path"):
        data.local_data_path = str(file)
    inner = data.scaler.upscale
    data.scaler.upscale = lambda *args: made.append(args[2]) or inner(*args)
    host.upscale(image, (26, 18), "ESRGAN")
    host.upscale(image, (26, 18), "ESRGAN")
    assert len(made) == 2  # there is no file to know it by
    for content, count in ((b"one", 3), (b"one", 3), (b"other", 4)):
        if not file.exists() or file.read_bytes() != content:
            file.write_bytes(content)
        host.upscale(image, (26, 18), "ESRGAN")
        assert len(made) == count


# The checkpoint ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_has_its_family_and_one_that_is_not_loaded_none(webui):
    assert hasattr(webui.model, "is_sd2") == (webui.kind.family != "neo")
    assert webui.host(webui.job()).base == webui.kind.base
    from lib_dinotile.hosts.webui import base_of

    class FakeInitialModel:
        """What Forge Neo has before it loads one."""

    assert base_of(FakeInitialModel()) == "fakeinitialmodel"
    assert base_of(types.SimpleNamespace(is_sdxl=False, is_sd2=True)) == "sd2"


def test_the_size_of_a_latent_cell_is_that_of_the_checkpoint_loaded_now(webui):
    processing = webui.modules["modules.processing"]
    assert webui.host(webui.job()).factor == processing.opt_f == (16 if webui.kind == KLEIN else 8)
    processing.opt_f = 32
    assert webui.host(webui.job()).factor == 32


@only(*TRANSFORMERS)
def test_a_flow_model_gets_its_shift_before_it_is_sampled(webui):
    p = webui.job()
    host = webui.host(p)
    with webui.running():
        sampled(host, batch_of(range(3)), latents_of(host))
        assert webui.levels.shift == p.distilled_cfg_scale == 2.5
        p.distilled_cfg_scale = 4.0
        sampled(host, batch_of(range(3)), latents_of(host))
    assert webui.levels.shift == 4.0


@only(NEO, *TRANSFORMERS)
@some("fails", [False, True])
def test_what_is_encoded_is_not_referred_to(webui, fails):
    host = webui.host(webui.job())
    stitched, other = torch.ones(1, 4, 8, 8), torch.zeros(1)
    lists = webui.model.ref_latents, webui.args.ref_latents
    for pictures in lists:
        pictures.append(stitched)
    webui.model.ini_latent = other
    encode = webui.model.encode_first_stage

    def failing(pixels: torch.Tensor) -> torch.Tensor:
        encode(pixels)
        webui.args.ref_latents = [pixels]  # as for Anima
        raise RuntimeError("out of memory")

    if fails:
        webui.model.encode_first_stage = failing
    with webui.running():
        if fails:
            with pytest.raises(RuntimeError):
                latents_of(host)
        else:
            latents_of(host)
    assert webui.model.ini_latent is other
    assert webui.model.ref_latents is lists[0] and webui.args.ref_latents is lists[1]
    assert [len(pictures) for pictures in lists] == [1, 1] and all(pictures[0] is stitched for pictures in lists)


@some("kind", KINDS, ids=str)
def test_weights_of_a_byte_or_of_a_format_of_their_own(kind):
    """On Forge they mean something only with a scale; A1111 has float8 without."""

    class Quantized(nn.Parameter):
        """As those of a GGUF file."""

    with stand_in(kind, half=True) as webui:
        odd = {
            "int8": nn.Parameter(torch.arange(-8, 8, dtype=torch.int8), requires_grad=False),
            "float8": nn.Parameter(torch.linspace(-2, 2, 16).to(torch.float8_e4m3fn), requires_grad=False),
            "gguf": Quantized(torch.linspace(-2, 2, 16).half(), requires_grad=False),
            "buffer": torch.linspace(-2, 2, 16).to(torch.float8_e5m2),
        }
        for name, value in odd.items():
            if name == "buffer":
                webui.unet.register_buffer(name, value)
            else:
                webui.unet.register_parameter(name, value)
        bits = {name: value.detach().clone().view(torch.uint8) for name, value in odd.items()}
        dtypes = {name: value.dtype for name, value in odd.items()}
        host = webui.host(webui.job())
        with host.full_precision():
            untouched = {name for name, value in odd.items() if value.dtype == dtypes[name]}
            assert untouched == ({"int8", "gguf"} if kind == A1111 else set(odd))
            assert webui.unet.out.weight.dtype == torch.float32
        for name, value in odd.items():
            assert getattr(webui.unet, name) is value and value.dtype == dtypes[name]
            assert torch.equal(value.detach().view(torch.uint8), bits[name])


# Decoders for guidance -----------------------------------------------------------------------------------------------


@some("choice", DECODERS)
def test_every_decoder_shows_the_picture_and_passes_gradients_on(webui, choice):
    host = webui.host(webui.job())
    with webui.running():
        colours = torch.tensor([[0.2, 0.5, 0.7], [0.8, 0.3, 0.4]])[..., None, None].expand(2, 3, 64, 64)
        latents = host.encode(colours)
        if choice == APPROXIMATE and webui.kind in TRANSFORMERS:
            with pytest.raises(DinotileError, match="the WebUI has no approximate for this checkpoint"):
                host.guidance_decoder(choice)
            return
        name, decode = host.guidance_decoder(choice)
        with torch.inference_mode(False), torch.enable_grad():
            x = latents.float().clone().requires_grad_()
            pixels = decode(x)
            (gradient,) = torch.autograd.grad(pixels.square().sum(), x)
        assert name == (LINEAR if choice == AUTOMATIC else choice)
        assert pixels.shape == (2, 3, 64, 64) and pixels.dtype == torch.float32
        assert (pixels - colours).abs().max() < 0.05
        assert gradient.shape == x.shape and gradient.isfinite().all() and (gradient.flatten(2).abs().sum(-1) > 0).any()
        assert torch.equal(decode(latents.float()), pixels)
    assert webui.downloads == ([] if choice in (AUTOMATIC, LINEAR, FULL_VAE) else webui.downloads[:1])


def test_automatic_takes_what_is_there_and_never_downloads(webui):
    host, neo = webui.host(webui.job()), webui.kind.family == "neo"
    taesd, common = webui.modules["modules.sd_vae_taesd"], webui.modules["modules.sd_vae_approx"]
    before = taesd.download_model, common.download_model
    small = webui.kind in UNETS
    for files, wanted in (
        ((), LINEAR),
        (("approx",), APPROXIMATE if small else LINEAR),
        (("tiny" if neo else "taesd",), TAESD),
    ):
        for name in files:
            (webui.models / name).touch()
        with webui.running():
            assert host.guidance_decoder(AUTOMATIC)[0] == wanted
    assert webui.downloads == [] and (taesd.download_model, common.download_model) == before


def test_automatic_passes_over_a_damaged_file(webui):
    host = webui.host(webui.job())
    for name in ("taesd", "tiny"):
        (webui.models / name).write_bytes(b"damaged")
    with webui.running():
        assert host.guidance_decoder(AUTOMATIC)[0] == LINEAR
        assert webui.log == ["DINO Tile: TAESD cannot be read, another decoder takes its place"]
        with pytest.raises(DinotileError, match="decoder: TAESD is not available: expected state_dict"):
            host.guidance_decoder(TAESD)


def test_automatic_does_not_take_more_memory_where_there_is_none(webui):
    host = webui.host(webui.job())
    for name in ("taesd", "tiny"):
        (webui.models / name).write_bytes(b"large")
    with webui.running(), pytest.raises(MemoryError):
        host.guidance_decoder(AUTOMATIC)


@only(NEO, FLUX, KLEIN, QWEN)
def test_a_latent_format_without_a_tiny_decoder_or_without_factors(webui):
    host, form = webui.host(webui.job()), webui.model.model_config.latent_format
    form.taesd_decoder_name = None
    for name in ("taesd", "tiny"):
        (webui.models / name).touch()
    with webui.running():
        assert host.guidance_decoder(AUTOMATIC)[0] == LINEAR
        with pytest.raises(
            DinotileError, match="the WebUI has no TAESD for this checkpoint; choose Automatic or full VAE"
        ):
            host.guidance_decoder(TAESD)
        form.latent_rgb_factors = None
        assert host.guidance_decoder(AUTOMATIC)[0] == FULL_VAE
    assert webui.downloads == []


def test_a_download_that_fails_is_told_in_one_line(webui):
    host, taesd = webui.host(webui.job()), webui.modules["modules.sd_vae_taesd"]
    taesd.download_model = lambda path, url: (_ for _ in ()).throw(OSError("no\nnetwork"))
    with webui.running(), pytest.raises(DinotileError) as error:
        host.guidance_decoder(TAESD)
    assert str(error.value) == "decoder: TAESD is not available: no network; choose Automatic or full VAE"


def test_the_linear_decoder_is_the_webuis_own(webui):
    host = webui.host(webui.job())
    cheap = webui.modules["modules.sd_vae_approx"].cheap_approximation
    with webui.running():
        latents = torch.randn(3, host.channels, 4, 5)
        _, decode = host.guidance_decoder(LINEAR)
        own = torch.cat([cheap(host._with_frame(latent[None])) for latent in latents])
        assert own.shape == ((3, 3, 8, 10) if webui.kind.packed else (3, 3, 4, 5))
        size = 4 * host.factor, 5 * host.factor
        assert torch.allclose(decode(latents), (F.interpolate(own, size=size, mode="bilinear") + 1) / 2, atol=1e-5)


def test_the_webuis_own_decoders_stay_as_they_are(webui):
    host = webui.host(webui.job())
    with webui.running():
        own = webui.modules["modules.sd_vae_taesd"].decoder_model()
        parts = [part for module in (own, webui.vae) for part in module.modules()]
        before = [(type(part), [id(weight) for weight in part._parameters.values()]) for part in parts]
        for choice in (TAESD, FULL_VAE):
            host.guidance_decoder(choice)
        assert [(type(part), [id(weight) for weight in part._parameters.values()]) for part in parts] == before


# What the preview counts ----------------------------------------------------------------------------------------------


def test_resize_by_makes_the_size_that_img2img_makes(webui):
    from lib_dinotile.hosts.webui import resized_by

    sizes = {"forge": (96, 72), "neo": (96, 80)}
    assert resized_by((67, 51), 1.5) == sizes.get(webui.kind.family, (100, 76))


@only(*UNETS)
@some("exactly", [False, True])
def test_steps_are_counted_as_they_are_run(webui, exactly):
    """A setting may say that it is as many as asked for, whatever the denoising strength."""
    from lib_dinotile.hosts.samplers import steps_asked

    webui.modules["modules.shared"].opts.img2img_fix_steps = exactly
    p = webui.job("Euler", 0.5)
    asked = types.SimpleNamespace(steps=p.steps, denoising_strength=0.5)
    assert steps_asked(asked) == webui.host(p).steps() == (6 if exactly else 4)


# What is refused -----------------------------------------------------------------------------------------------------


@some("kind, masked, says", [
    ("ControlNet", True, ""), ("IPAdapter", False, ""), ("InstantID", True, ""),
    ("LLLite", False, r"ControlNet-LLLite [^\n]*: choose another ControlNet"),
    ("FooocusInpaint", False, r"Fooocus Inpaint [^\n]*: choose another ControlNet"),
    ("IPAdapter", True, r"IP-Adapter with a mask [^\n]*: remove the mask, or switch DINO Tile off"),
])  # fmt: skip
def test_controlnets_that_tiles_cannot_follow_are_refused_in_one_line(webui, kind, masked, says):
    p, mask = webui.job(), torch.ones(1, 1, 8, 8) if masked else None
    if webui.kind.chain:
        names = {"LLLite": "ControlLLLitePatcher"}
        unit = types.SimpleNamespace(model=type(names.get(kind, f"{kind}Patcher"), (), {})(), control_mask=mask)
        script = Script("ControlNet", current_params={0: None, 1: types.SimpleNamespace(), 2: unit})
    else:
        kinds = types.SimpleNamespace(name={"LLLite": "Controlllite"}.get(kind, kind))
        unit = types.SimpleNamespace(control_model_type=kinds, effective_region_mask=mask)
        script = Script("ControlNet", latest_network=types.SimpleNamespace(control_params=[unit]))
    p.scripts = Scripts(Script("Other"), Script("ControlNet"), script)
    host = webui.host(p)
    with pytest.raises(DinotileError, match=f"^{says}$") if says else contextlib.nullcontext():
        host.check()


@only(FORGE)
@some("name, followed", [
    ("None", True), ("tile_resample", True), ("inpaint_global_harmonious", True), ("recolor_luminance", True),
    ("tile_colorfix", False), ("tile_colorfix+sharp", False), ("reference_only", False),
    ("reference_adain+attn", False), ("inpaint_only", False), ("inpaint_only+lama", False),
])  # fmt: skip
def test_preprocessors_that_keep_latents_of_the_whole_image_are_refused(webui, name, followed):
    p, preprocessor = webui.job(), types.SimpleNamespace(name=name)
    unit = types.SimpleNamespace(model=object(), control_mask=None, preprocessor=preprocessor)
    p.scripts = Scripts(Script("ControlNet", current_params={0: unit}))
    says = rf"^the ControlNet preprocessor {re.escape(name)} [^\n]*: choose another$"
    with contextlib.nullcontext() if followed else pytest.raises(DinotileError, match=says):
        webui.host(p).check()


@only(A1111)
@some("aligned", [False, True])
def test_controlnets_style_align_is_refused(webui, aligned):
    """It is at work without a unit, too."""
    p = webui.job()
    script = Script("ControlNet", latest_network=None, ui_batch_option_state=("All ControlNet units", aligned))
    p.scripts = Scripts(script)
    host = webui.host(p)
    with pytest.raises(DinotileError, match=r"^ControlNet's StyleAlign") if aligned else contextlib.nullcontext():
        host.check()


def test_what_tiles_cannot_follow_is_refused_in_one_line(webui):
    p = webui.job()
    host = webui.host(p)
    p.batch_size = 4
    host.check()
    if webui.kind.chain:
        host.channels, host.factor, kept = 32, 8, (host.channels, host.factor)
        with pytest.raises(DinotileError, match=r"^Mugen's VAE [^\n]*: choose another checkpoint$"):
            host.check()
        host.channels, host.factor = kept
    if webui.kind.family != "neo":
        return
    webui.args.wan = True
    with pytest.raises(DinotileError, match=r"^Wan [^\n]*: set the batch size to 1$"):
        host.check()
    p.batch_size = 1
    host.check()
    webui.args.pid = True
    with pytest.raises(DinotileError, match=r"^PiD [^\n]*: choose another checkpoint$"):
        host.check()


def test_a_unet_in_float8_has_companions_in_float16(webui):
    """reForge calls the UNet's dtype the device's."""
    webui.modules["modules.devices"].dtype = torch.float8_e4m3fn
    assert webui.host(webui.job()).dtype == torch.float16


@only(A1111)
def test_residuals_are_refused_where_another_unet_is_at_work(webui):
    host = webui.host(webui.job())
    host.check_residuals()
    webui.modules["modules.sd_unet"].get_unet_option = lambda: types.SimpleNamespace(label="[TRT] v1-5")
    with pytest.raises(DinotileError, match=r"the UNet '\[TRT\] v1-5'"):
        host.check_residuals()


def test_a_transformer_takes_no_residuals(webui):
    host = webui.host(webui.job())
    assert (host.shape is None) == (webui.kind in TRANSFORMERS)
    if webui.kind in UNETS:
        assert host.shape.slots == ((8, 1), (8, 1), (8, 2), (16, 2), (16, 2))


# Img2img taken over --------------------------------------------------------------------------------------------------


def taken_over(webui: WebUI, monkeypatch: pytest.MonkeyPatch, folder: Any) -> Any:
    """The module that takes img2img over, with what else of the WebUI it asks for."""
    module, processing = webui.module, webui.modules["modules.processing"]
    processing.DecodedSamples = list
    names = ("hypertile_enable_unet", "hypertile_enable_vae", "save_init_img", "img2img_color_correction")
    shared = webui.modules["modules.shared"]
    shared.cmd_opts = types.SimpleNamespace()
    vars(shared.opts).update(
        dict.fromkeys(names, False), data_labels=dict.fromkeys(names), sd_vae_encode_method="Full",
        sd_vae_decode_method="Full", img2img_background_color="#ffffff",
    )  # fmt: skip
    made = {
        "paths": {"models_path": str(folder)}, "masking": {}, "errors": {},
        "sd_samplers": {"create_sampler": lambda name, model: webui.job(name).sampler},
        "extra_networks": {"parse_prompt": lambda text: (text, {})},
        "images": {"flatten": lambda image, background: image.convert("RGB")},
    }  # fmt: skip
    for name, content in made.items():
        found = module(f"modules.{name}", **content)
        monkeypatch.setitem(sys.modules, found.__name__, found)
        setattr(webui.modules["modules"], name, found)
    speed, cv2 = types.SimpleNamespace(learn_speed=lambda *_: None), types.ModuleType("cv2")
    cv2.__spec__ = importlib.machinery.ModuleSpec("cv2", None)  # the libraries look whether it is installed
    monkeypatch.setitem(sys.modules, "lib_dinotile.webui.speed", speed)
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    import lib_dinotile.webui.takeover as takeover

    return takeover


def test_a_job_taken_over_ends_in_pixels_and_its_conditionings_are_its_own(webui, monkeypatch, tmp_path):
    """Forge Neo keeps conditionings by the pixels of the last job, which they may refer to."""
    takeover = taken_over(webui, monkeypatch, tmp_path)
    settings = Settings(enabled=True, tile=64, overlap=16, scale=2, encoder="mini", guidance=0.0, guard="off")
    counted: list[int] = []
    webui.modules["modules.shared"].total_tqdm.update = lambda: counted.append(1)
    sources, hashes = [random_image(40, 30), random_image(40, 30, 1), random_image(40, 30)], []
    for source in sources:
        p = webui.job()
        vars(p).update(
            init_images=[source], refiner_checkpoint=None, image_mask=None, color_corrections=None, script_args=[],
            override_settings={}, n_iter=1, init_latent=None, comment=print, resize_mode=0,
            mask=None, save_samples=bool,
        )  # fmt: skip
        with webui.running():
            takeover.Takeover(p, settings).apply()
            p.init(["a cat"], [1], [1])
            p.setup_conds()
            state = webui.modules["modules.shared"].state
            assert state.job_count == 10_000
            hashes.append(p.init_latent.float().sum().item())
            conds = Multicond((1,), p.c.batch)
            (found,) = p.sample(conds, p.uc, [1], [1], 0.0, ["a cat"])
            takeover.undo(p)
            assert state.job_no == len(counted) == 9_999  # the WebUI counts the last one itself
            state.processing_has_refined_job_count, state.job_no, state.job_count = False, 0, 1
            counted.clear()
        assert found.shape == (3, 60, 80) and ((found + 1) * 127.5).byte().float().mean() > 50
    assert hashes[0] == hashes[2] != hashes[1]
    assert webui.model.__dict__.get("ini_latent") is None and not webui.args.ref_latents


def test_the_webuis_colour_correction_stays_within_the_mask(webui, monkeypatch, tmp_path):
    takeover, processing = taken_over(webui, monkeypatch, tmp_path), webui.modules["modules.processing"]
    functions = {
        "setup_color_correction": lambda image: image, "create_binary_mask": lambda image, round: image,
        "apply_color_correction": lambda _, image: ImageOps.invert(image),
    }  # fmt: skip
    for name, function in functions.items():
        monkeypatch.setattr(processing, name, function, raising=False)
    settings = Settings(enabled=True, tile=64, overlap=16, scale=2, encoder="mini", guidance=0.0, guard="off")
    source, mask, found = random_image(40, 30), Image.new("L", (40, 30)), []
    mask.paste(255, (0, 0, 20, 30))
    for corrected in (False, True):
        webui.modules["modules.shared"].opts.img2img_color_correction = corrected
        p = webui.job()
        vars(p).update(
            init_images=[source], refiner_checkpoint=None, image_mask=mask, color_corrections=None, script_args=[],
            override_settings={}, n_iter=1, init_latent=None, comment=print, resize_mode=0,
            mask=None, save_samples=bool, mask_round=True,
            inpainting_mask_invert=0, mask_blur_x=0, mask_blur_y=0, inpainting_fill=1, inpaint_full_res=False,
        )  # fmt: skip
        with webui.running():
            takeover.Takeover(p, settings).apply()
            p.init(["a cat"], [1], [1])
            p.setup_conds()
            found += p.sample(Multicond((1,), p.c.batch), p.uc, [1], [1], 0.0, ["a cat"])
            takeover.undo(p)
        assert p.color_corrections is None  # or the WebUI would correct all of the image
        shown = p.mask_for_overlay  # saved, and in the answer, where the WebUI is set up to
        assert shown.size == (80, 60)
        assert shown.getpixel((20, 30)) == 255 and shown.getpixel((60, 30)) == 0
    plain, corrected = found
    assert torch.equal(plain[..., 44:], corrected[..., 44:])
    torch.testing.assert_close(plain[..., :36], -corrected[..., :36], atol=0.01, rtol=0)  # a level of 255


def test_words_of_a_region_that_an_image_of_a_batch_lacks_stop_it_before_any_is_painted(webui, monkeypatch, tmp_path):
    takeover = taken_over(webui, monkeypatch, tmp_path)
    blank, halves = Image.new("RGB", (64, 48), "grey"), Image.new("RGB", (64, 48), "white")
    halves.paste(random_image(32, 48), (0, 0))
    quiet = {"guidance": 0.0, "guard": "off", "encoder": "mini", "patches": 8}
    settings = Settings(enabled=True, tile=64, overlap=16, scale=2, region_prompts="A: fur\nB: wall\nL: sea", **quiet)
    p = webui.job()
    vars(p).update(
        init_images=[halves, blank], refiner_checkpoint=None, image_mask=None, color_corrections=None, script_args=[],
        override_settings={}, n_iter=1, init_latent=None, comment=print, resize_mode=0,
            mask=None, save_samples=bool, batch_size=2,
        all_seeds=[1, 2],
    )  # fmt: skip
    upscaled: list[int] = []
    monkeypatch.setattr(takeover.flow, "upscale", lambda *_, **__: upscaled.append(1))
    with webui.running():
        takeover.Takeover(p, settings).apply()
        p.init(["a cat"] * 2, [1, 2], [1, 2])
        p.setup_conds()
        conds = Multicond((2,), p.c.batch * 2)
        with pytest.raises(DinotileError, match="region_prompts: there is no region L, this image has"):
            p.sample(conds, p.uc * 2, [1, 2], [1, 2], 0.0, ["a cat"] * 2)
    assert not upscaled
