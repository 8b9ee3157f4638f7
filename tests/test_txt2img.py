"""txt2img: what the WebUI generates is upscaled, and its processing object is as it was in between and afterwards."""

from __future__ import annotations

import dataclasses
import types
import weakref
from typing import Any

import pytest
import torch
from PIL import Image

from lib_dinotile import DinotileError
from lib_dinotile.engine import flow
from lib_dinotile.settings import Settings, Txt2Img
from tests.test_engine import StubHost
from tests.test_freed import (  # noqa: F401
    Job,
    alive,
    modules,
    no_garbage_collector,
    ours,
    takeover,
)

OPTIONS = Txt2Img(enabled=True, tile=64, overlap=16, scale=2, patches=8, guidance=0.0, guard="off", denoise=0.5)
SIZE = 64


class Txt2ImgJob(Job):
    """One of txt2img, which generates grey images."""

    def __init__(self, hires: bool = False) -> None:
        super().__init__()
        for name in ("init_images", "image_mask", "resize_mode", "inpainting_fill", "initial_noise_multiplier"):
            del self.__dict__[name]  # only img2img has them
        self.enable_hr, self.is_hr_pass, self.disable_extra_networks = hires, False, True
        self.hr_checkpoint_name, self.hr_second_pass_steps = None, 0
        self.truncate_x = self.truncate_y = 0
        self.hr_upscale_to_x = self.hr_upscale_to_y = SIZE * 3 // 2
        self.denoising_strength, self.steps, self.width, self.height = 0.75, 20, SIZE, SIZE
        self.sampler: Any = "the WebUI's"
        self.seen: list[str] = []
        self.saving = False
        self.outpath_samples, self.iteration = "out", 0
        self.all_prompts = self.all_seeds = self.all_subseeds = None

    def init(self, *_: Any) -> None:
        self.seen.append("init")

    def sample(self, conditioning: Any, seeds: list[int], **_: Any) -> Any:
        self.seen.append("sample")
        side = SIZE * 3 // 2 if self.enable_hr else SIZE
        return Decoded(torch.zeros(3, side, side) for _ in seeds)

    def save_samples(self) -> bool:
        return self.saving


class Decoded(list):
    """As the WebUI's DecodedSamples."""

    already_decoded = True


@pytest.fixture
def txt2img(takeover, modules, monkeypatch) -> Any:  # noqa: F811
    shared, processing = modules("modules.shared"), modules("modules.processing")
    processing.DecodedSamples = Decoded
    processing.StableDiffusionProcessingTxt2Img = Txt2ImgJob
    processing.create_infotext = lambda *_, **__: "told"
    shared.opts.initial_noise_multiplier = 1.0
    shared.state.interrupt = lambda: setattr(shared.state, "interrupted", True)
    shared.state.stop_generating = lambda: setattr(shared.state, "stopping_generation", True)
    shared.opts.save_images_before_highres_fix = False
    shared.opts.samples_format = "png"
    modules("modules.devices").cpu = torch.device("cpu")
    module = modules("lib_dinotile.webui.txt2img")
    saved: list[str] = []

    def save(image: Image.Image, folder: str, *_: Any, suffix: str, **__: Any) -> tuple[str, None]:
        saved.append(f"{folder}/{image.width}{suffix}.png")
        return saved[-1], None

    modules("modules.images").save_image = save
    module.saved = saved
    return module


def generate(module: Any, p: Job, settings: Txt2Img = OPTIONS, count: int = 1) -> Any:
    """What the WebUI does, as far as it is of interest."""
    p.negative_prompts = [""] * count
    module.takeover(p, settings).apply()
    p.init([""] * count, [1] * count, [1] * count)
    return p.sample(
        conditioning=types.SimpleNamespace(batch=[None] * count),
        unconditional_conditioning=None,
        seeds=[1] * count,
        subseeds=[1] * count,
        subseed_strength=0.0,
        prompts=[""] * count,
    )


@pytest.mark.parametrize("hires, images", [(False, 1), (True, 1), (False, 2)])
def test_the_first_interrupt_stops_a_single_image_at_once_as_it_does_without_tiles(
    txt2img,
    modules,  # noqa: F811
    monkeypatch,
    hires,
    images,
):
    state, own = modules("modules.shared").state, Txt2ImgJob.sample
    before = state.stop_generating

    def sample(p: Txt2ImgJob, *arguments: Any, **more: Any) -> Any:
        state.stop_generating()  # the button
        return own(p, *arguments, **more)

    monkeypatch.setattr(Txt2ImgJob, "sample", sample)
    p = Txt2ImgJob(hires)
    p.n_iter = images
    generate(txt2img, p)
    alone = images == 1 and not hires
    assert (state.interrupted, state.stopping_generation) == (alone, not alone)
    assert state.stop_generating is before and p.extra_generation_params["DINO Tile painted"][0].startswith("0 of")


@pytest.mark.parametrize("hires", [False, True])
def test_what_is_generated_is_upscaled(txt2img, alive, hires: bool):  # noqa: F811
    p = Txt2ImgJob(hires)
    before = {**vars(p)}
    (pixels,) = generate(txt2img, p)
    assert p.seen == ["init", "sample"] and pixels.shape == ((3, 192, 192) if hires else (3, 128, 128))
    txt2img.undo(p)
    assert {name: value for name, value in vars(p).items() if name not in ("extra_generation_params", "seen")} == {
        name: value for name, value in before.items() if name not in ("extra_generation_params", "seen")
    }
    assert p.extra_generation_params["DINO Tile denoise"] == 0.5 and ours(p) == []
    job = weakref.ref(p)
    del p
    assert job() is None and not [ref for refs in alive.values() for ref in refs if ref() is not None]


def test_tiles_are_sampled_with_the_options_own_strength_and_steps(txt2img, monkeypatch):
    seen = []

    def upscale(host: Any, source: Image.Image, *_: Any, **__: Any) -> Any:
        p = host._p
        seen.append((host.denoise, p.denoising_strength, p.steps, p.enable_hr, p.is_hr_pass, source.size))
        raise flow.UnfinishedError(RuntimeError("seen"), flow.Result(source, 0, 1, None))  # type: ignore[arg-type]

    monkeypatch.setattr(flow, "upscale", upscale)
    p = Txt2ImgJob(hires=True)
    with pytest.raises(DinotileError, match="seen"):
        generate(txt2img, p, dataclasses.replace(OPTIONS, steps=20))
    assert seen == [(0.5, 0.5, 20, False, False, (96, 96))]
    assert (p.denoising_strength, p.steps, p.enable_hr, p.sampler) == (0.75, 20, True, "the WebUI's")


@pytest.mark.parametrize("when", ["generating", "the first tile"])
def test_stopped_before_the_first_tile_it_gives_what_is_generated(txt2img, modules, monkeypatch, when):  # noqa: F811
    p = Txt2ImgJob()
    if when == "generating":
        modules("modules.shared").state.interrupted = True
    else:
        monkeypatch.setattr(StubHost, "interrupted", lambda host: True)
    first, second = generate(txt2img, p, count=2)
    assert first.shape == second.shape == (3, SIZE, SIZE)
    assert p.extra_generation_params["DINO Tile painted"] == ["0 of 9"] * 2


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("option", [False, True])
def test_an_error_keeps_the_image(txt2img, modules, monkeypatch, saving: bool, option: bool):  # noqa: F811
    def upscale(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(flow, "upscale", upscale)
    modules("modules.shared").opts.save_images_before_highres_fix = option
    p = Txt2ImgJob()
    p.saving = saving
    kept = ["out/64-before-dinotile.png"]  # also where nothing else is saved: it would be lost
    with pytest.raises(DinotileError) as error:
        generate(txt2img, p)
    assert txt2img.saved == kept  # once
    assert str(error.value) == "broken" + "".join(f"; the image before upscaling is saved in {name}" for name in kept)
    assert error.value.status_code == 500 and ours(p) == []
    # Forge keeps the last error, and what that knows.
    assert error.value.__cause__ is None and error.value.__context__ is None


@pytest.mark.parametrize("stopped", [False, True])
def test_the_users_own_prompts_of_tiles_stay_in_png_info(txt2img, modules, stopped: bool):  # noqa: F811
    modules("modules.shared").state.interrupted = stopped
    p, settings = Txt2ImgJob(), dataclasses.replace(OPTIONS, tile_prompts="1: whiskers")
    generate(txt2img, p, settings)
    assert p.extra_generation_params["DINO Tile tile prompts"] == settings.infotext["DINO Tile tile prompts"]


def test_an_image_without_tiles_has_its_place_among_the_reports(txt2img, modules):  # noqa: F811
    p, state = Txt2ImgJob(), modules("modules.shared").state
    module = modules("lib_dinotile.webui.takeover")
    state.skipped = True
    generate(txt2img, p, count=2)
    state.skipped = False
    p.sample(
        conditioning=types.SimpleNamespace(batch=[None]),
        unconditional_conditioning=None,
        seeds=[1],
        subseeds=[1],
        subseed_strength=0.0,
        prompts=[""],
    )
    found = types.SimpleNamespace(
        infotexts=["a", "b", "c"], index_of_first_image=0, images=[], extra_generation_params={}
    )
    module.Takeover.publish(p, found)
    first, second, third = found.extra_generation_params["DINO Tile report"]
    assert first is None and second is None and third["tiles"]


def test_what_surely_does_not_fit_is_refused_before_anything_is_generated(txt2img, monkeypatch):
    monkeypatch.setattr(flow, "enough_memory", lambda count: False)
    p = Txt2ImgJob()
    with pytest.raises(DinotileError, match="make the result smaller than 128x128"):
        generate(txt2img, p)
    assert p.seen == ["init"]


def test_an_error_of_the_webui_itself_is_left_alone(txt2img):
    class Failing(Txt2ImgJob):
        def sample(self, *_: Any, **__: Any) -> Any:
            raise ZeroDivisionError("theirs")

    p = Failing()
    with pytest.raises(ZeroDivisionError):
        generate(txt2img, p)
    assert ours(p) == [] and "sample" not in vars(p)


@pytest.mark.parametrize("saving", [False, True])
def test_the_image_is_saved_where_the_webui_saves_what_is_before_hires_fix(txt2img, modules, saving):  # noqa: F811
    modules("modules.shared").opts.save_images_before_highres_fix = saving
    p = Txt2ImgJob()
    p.saving = True
    generate(txt2img, p, count=2)
    assert txt2img.saved == ["out/64-before-dinotile.png"] * 2 * saving


@pytest.mark.parametrize(
    "values",
    [
        {"refiner_checkpoint": "other"},
        {"enable_hr": True, "hr_checkpoint_name": "other"},
        {"enable_hr": True, "hr_additional_modules": ["/models/vae.safetensors"]},
    ],
)
def test_other_models_are_refused_before_anything_is_generated(txt2img, values: dict[str, Any]):
    p = Txt2ImgJob()
    vars(p).update(values)
    with pytest.raises(DinotileError):
        txt2img.takeover(p, OPTIONS)
    assert p.seen == []


@pytest.mark.parametrize("modules_", [None, [], ["Use same choices"], ["b.safetensors"]])
def test_the_same_models_are_not(txt2img, modules, modules_):  # noqa: F811
    modules("modules.shared").opts.forge_additional_modules = ["/models/VAE/b.safetensors"] if modules_ else []
    p = Txt2ImgJob(hires=True)
    p.hr_checkpoint_name, p.hr_additional_modules = "Use same checkpoint", modules_
    txt2img.takeover(p, OPTIONS)


def test_the_progress_goes_on_where_the_webui_s_own_ends(txt2img, modules):  # noqa: F811
    bars, shared = modules("lib_dinotile.hosts.bars"), modules("modules.shared")
    p, shares = Txt2ImgJob(hires=True), []
    whole = type(p).sample

    def sample(self: Any, **more: Any) -> Any:
        for _ in range(50):  # more than there are steps
            shared.total_tqdm.update()
            shares.append(shared.state.job_no)
        return whole(self, **more)

    type(p).sample = sample
    try:
        generate(txt2img, p)
    finally:
        type(p).sample = whole
    assert shared.state.job_count == bars.JOBS + 2 * bars.PASS
    assert shares == sorted(shares) and shares[0] == 2 * bars.PASS // 40 and shares[-1] == 2 * bars.PASS
    assert shared.state.job_no == shared.state.job_count - 1  # the last one the WebUI counts


@pytest.mark.parametrize("name", ["denoise", "steps"])
def test_img2img_says_whose_these_options_are(name: str):
    with pytest.raises(DinotileError, match=f"{name}: only txt2img has this option"):
        Settings.parse({name: 0})
    assert getattr(Txt2Img.parse({name: 0}), name) == 0


def test_the_size_of_img2img_is_none_of_txt2img_s():
    with pytest.raises(DinotileError, match="target: 'img2img size' is not allowed"):
        Txt2Img.parse({"target": "img2img size"})
    assert {option.name for option in Txt2Img.table()} - {option.name for option in Settings.table()} == {
        "denoise",
        "steps",
    }
