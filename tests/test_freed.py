"""What a job had is gone at once when it is done, has failed or was stopped; no cycle waits for a collection."""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
import types
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image

from lib_dinotile import DinotileError
from lib_dinotile.dino.encoder import load_encoder
from lib_dinotile.engine import flow
from lib_dinotile.engine.host import Batch, Prompt
from lib_dinotile.engine.report import Report
from lib_dinotile.engine.team import Team
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.plan import Rect
from tests.conftest import import_of_webuis
from tests.stand_in import webui
from tests.test_engine import StubHost
from tests.test_tiling import random_image

OPTIONS = Settings(enabled=True, tile=64, overlap=16, scale=4, patches=8, guidance=0.0, guard="report", batch=1)
OUT_OF_MEMORY = "CUDA out of memory"


@pytest.fixture(autouse=True)
def no_garbage_collector() -> Iterator[None]:
    load_encoder("mini")  # libraries that are imported for the first time leave cycles of their own
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def modules() -> Iterator[Any]:
    """Imports a module by its name, in place of a WebUI's if need be."""
    with webui():
        yield importlib.import_module


# Guidance in a sampler's callback ------------------------------------------------------------------------------------


@pytest.fixture
def host(modules) -> Any:
    """A host whose sampler calls back what is registered, as the WebUI does: it would only log an error."""
    module = modules("lib_dinotile.hosts.webui")
    callbacks: list[Any] = []
    module.script_callbacks.on_cfg_after_cfg = callbacks.append
    module.script_callbacks.remove_callbacks_for_function = callbacks.remove

    class Host(module.WebUIHost):
        conditioned = full_decoder = full_precision = masked = None

        def __init__(self) -> None:
            pass

        def step(self, guide: Any, fails: bool = False) -> None:
            x = torch.zeros(1, 4, 8, 8)
            batch = Batch([Rect(0, 0, 64, 64)], [[Prompt()]], None, guide)
            denoiser = types.SimpleNamespace(step=0, total_steps=4)
            with self._steered(batch, [0], denoiser, x, torch.ones(1)):
                for callback in list(callbacks):
                    callback(types.SimpleNamespace(x=x))
                if fails:
                    raise RuntimeError("the sampler")

    host = Host()
    host.callbacks = callbacks
    return host


@pytest.mark.parametrize("fails, says", [(False, OUT_OF_MEMORY), (True, "the sampler")])
def test_guidance_that_ran_out_of_memory_has_let_go_of_it_when_the_batch_is_tried_again(host, fails, says):
    """As the engine does, with half as many tiles."""
    large: list[weakref.ref] = []

    def guide(x0, step, total, chosen):
        tensor = torch.zeros(1000)
        large.append(weakref.ref(tensor))
        raise torch.cuda.OutOfMemoryError(OUT_OF_MEMORY)

    said = None
    try:
        host.step(guide, fails)
    except Exception as error:
        said = str(error)
    assert said == says and len(large) == 1 and large[0]() is None and not host.callbacks


# Processes that share the work ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mine", [True, False])
def test_processes_that_share_the_work_let_go_of_what_failed(mine):
    class Two(Team):
        size = 2

        def gather(self, given: Any) -> list[Any]:
            nothing = None, []
            return [given, nothing] if mine else [(None, [RuntimeError("theirs")]), given]

    large: list[weakref.ref] = []

    def work(item: int) -> None:
        tensor = torch.zeros(1000)
        large.append(weakref.ref(tensor))
        raise RuntimeError("mine")

    said = ""
    try:
        Two().share([1, 2], work)
    except RuntimeError as error:
        said = str(error)
    assert said == ("mine" if mine else "theirs") and large[0]() is None


# Residuals in Forge --------------------------------------------------------------------------------------------------


def test_the_unet_that_forge_remembers_knows_nothing_of_a_job(modules):
    """It keeps the one that it has loaded last, with its ControlNets, until it loads another."""

    forge = modules("lib_dinotile.hosts.forge")
    host, p = forge.ForgeHost.__new__(forge.ForgeHost), Job()
    p.sampler = types.SimpleNamespace(model_wrap_cfg=types.SimpleNamespace(step=1, total_steps=4))
    host._job, host.device, host._hints, host._shown = weakref.ref(p), torch.device("cpu"), [], (None, [])
    control = forge.ResidualControl(host)

    class Condition:
        def residuals(self, sigma: float, progress: float) -> list[torch.Tensor]:
            return [torch.full((2, 1, 1, 1), sigma * progress)]

    masks = torch.full((8, 8), 0.25), torch.full((8, 8), 0.75)
    batch = Batch([Rect(0, 0, 64, 64)] * 2, [[Prompt("a", masks[0]), Prompt("b", masks[1])]] * 2, Condition())
    left, modify = [weakref.ref(each) for each in (host, p, batch)], forge._masking(host)
    with host.conditioned(batch, [1], [0, 1]):
        parts: list[dict[str, Any]] = [{}, {}]
        modify(None, torch.zeros(1, 4, 8, 8), torch.ones(1), None, parts, 7.0, {}, 1)
        assert [part["mask"].mean() for part in parts] == [0.25, 0.75]
        (own,) = control.get_control(torch.zeros(2, 4, 8, 8), torch.ones(2), None, 2)["middle"]
    assert own.flatten().tolist() == [0.25, 0.25]
    host._shown = None, []  # as after sampling
    assert host.masks == []
    del batch
    assert left[2]() is None
    del host, p
    assert control and modify and [each() for each in left] == [None] * 3


# A job of the WebUI --------------------------------------------------------------------------------------------------


class Job:
    """A processing object, with no more than a job needs."""

    def __init__(self) -> None:
        self.init_images = [random_image(40, 30)]
        self.refiner_checkpoint = self.scripts = self.image_mask = self.color_corrections = None
        self.script_args: list[Any] = []
        self.override_settings: dict[str, Any] = {}
        self.extra_generation_params: dict[str, Any] = {}
        self.width = self.height = 512
        self.resize_mode = self.inpainting_fill = 1
        self.batch_size = self.n_iter = 1
        self.tiling, self.seed_resize_from_w, self.seed_resize_from_h = None, -1, -1
        self.denoising_strength, self.initial_noise_multiplier, self.sampler_name = 0.5, 1.0, "Euler"
        self.negative_prompts, self.outpath_samples = [""], "out"
        info = types.SimpleNamespace(filename="stub.safetensors")
        families = {"is_sd1": True, "is_sd2": False, "is_sdxl": False}
        self.sd_model = types.SimpleNamespace(sd_checkpoint_info=info, **families)
        self.prompts_are_set_up = False

    def setup_prompts(self) -> None:
        """img2img's own."""
        self.prompts_are_set_up = True

    def init(self, *_: Any) -> None:
        """Likewise."""

    def sample(self, *_: Any) -> None:
        """Likewise."""

    def comment(self, text: str) -> None:
        pass

    def save_samples(self) -> bool:
        return False


@pytest.fixture
def takeover(modules, monkeypatch, tmp_path) -> Any:
    import_of_webuis("gradio")
    import_of_webuis("cv2")
    shared, processing, devices, paths = (
        modules(f"modules.{name}") for name in ("shared", "processing", "devices", "paths")
    )
    paths.models_path = str(tmp_path)
    processing.opt_f, processing.DecodedSamples = 8, list
    devices.device, devices.dtype = torch.device("cpu"), torch.float32
    shared.cmd_opts = types.SimpleNamespace()
    names = ("hypertile_enable_unet", "hypertile_enable_vae", "save_init_img", "img2img_color_correction")
    shared.opts = types.SimpleNamespace(
        data_labels=dict.fromkeys([*names, "tiling"]),
        tiling=False,
        img2img_background_color="#ffffff",
        sd_vae_encode_method="Full",
        sd_vae_decode_method="Full",
        live_previews_enable=False,
        samples_format="png",
        **dict.fromkeys(names, False),
    )
    stops = dict.fromkeys(("interrupted", "skipped", "stopping_generation"), False)
    counts = {"job_count": 1, "job_no": 0, "processing_has_refined_job_count": False}
    shared.state = types.SimpleNamespace(textinfo="", **stops, **counts)
    shared.total_tqdm = types.SimpleNamespace(update=lambda: None, updateTotal=lambda count: None)
    modules("modules.extra_networks").parse_prompt = lambda text: (text, {})
    webuis_images = modules("modules.images")
    webuis_images.flatten = lambda image, background: image.convert("RGB")
    webuis_images.save_image = lambda image, path, *_, suffix, **__: (f"{path}/00{suffix}.png", None)
    modules("modules.sd_samplers").create_sampler = lambda name, model: object()
    modules("modules.errors").report = lambda text, exc_info=False: None
    module = modules("lib_dinotile.webui.takeover")
    base = modules("lib_dinotile.hosts.webui").WebUIHost

    class Host(StubHost, base):
        """As the engine's tests have it, on a processing object."""

        def __init__(self, p: Any) -> None:
            base.__init__(self, p)
            StubHost.__init__(self)
            self.base = "sd15"

        free_memory = StubHost.free_memory
        conditioned = full_decoder = masked = None

        def sample(self, *arguments: Any, **more: Any) -> torch.Tensor:
            assert self.denoise == 0.5  # of the processing object
            return StubHost.sample(self, *arguments, **more)

    monkeypatch.setattr(module, "make_host", Host)
    return module


@pytest.fixture
def alive(takeover, monkeypatch) -> dict[str, list[weakref.ref]]:
    """What a job makes, by kind."""
    made: dict[str, list[weakref.ref]] = {}

    def watched(place: Any, name: str) -> None:
        original = getattr(place, name)

        def make(*arguments: Any, **more: Any) -> Any:
            one = original(*arguments, **more)
            made.setdefault(name, []).append(weakref.ref(one))
            return one

        monkeypatch.setattr(place, name, make)

    watched(takeover, "make_host")
    watched(takeover, "NoiseField")
    watched(flow, "Canvas")
    return made


def finish(takeover: Any, p: Job, webui_fails: bool = False) -> None:
    """What the WebUI's `process_images` does, as far as it is of interest."""
    takeover.Takeover(p, OPTIONS).apply()
    p.init([""], [1], [1])
    cond = types.SimpleNamespace(batch=[None])
    decoded = p.sample(cond, None, [1], [1], 0.0, [""])
    assert len(decoded) == 1
    if webui_fails:
        raise RuntimeError("another extension")
    processed = types.SimpleNamespace(images=[], infotexts=[""], index_of_first_image=0, extra_generation_params={})
    takeover.Takeover.publish(p, processed)
    takeover.undo(p)


def ours(p: Any) -> list[str]:
    """Types of this extension of what can be reached from a processing object."""
    seen: dict[int, Any] = {}
    ahead, found = [vars(p)], []
    while ahead:
        one = ahead.pop()
        if id(one) in seen or isinstance(one, (type, types.ModuleType)) or one is p:
            continue
        seen[id(one)] = one
        kind = type(one)
        if (getattr(one, "__module__", None) or kind.__module__).startswith("lib_dinotile"):
            found.append(f"{kind.__name__} {getattr(one, '__name__', '')}")
        if not isinstance(one, types.FunctionType):
            ahead.extend(gc.get_referents(one))
    return found


FAULTS = {
    "at the first tile": (RuntimeError, "broken", 0),
    "amid the tiles": (RuntimeError, "broken", 2),
    "out of memory": (torch.cuda.OutOfMemoryError, OUT_OF_MEMORY, 1),
    "what the user can mend": (DinotileError, "choose another", 0),
    "what the user can mend, amid the tiles": (DinotileError, "choose another", 2),
    "the user stops the program": (KeyboardInterrupt, "", 2),
}


def gone(p: Job, alive: dict[str, list[weakref.ref]]) -> bool:
    """Whether nothing is left of a job, neither on its processing object nor anywhere else."""
    assert ours(p) == [] and (p.width, p.height) == (512, 512)
    assert not [name for name in vars(p) if "dinotile" in name or name in ("init", "sample")]
    assert alive.keys() == {"make_host", "NoiseField", "Canvas"}
    return not [kind for kind, refs in alive.items() if any(ref() is not None for ref in refs)]


@pytest.mark.parametrize("stopped", [False, True])
def test_what_a_job_had_is_gone_when_it_is_done_or_was_stopped(takeover, alive, monkeypatch, stopped):
    if stopped:
        monkeypatch.setattr(StubHost, "interrupted", lambda host: len(host.sampled) > 1)
    p = Job()
    finish(takeover, p)
    assert p.extra_generation_params["DINO Tile painted"] == (["2 of 9"] if stopped else [None])
    job = weakref.ref(p)
    assert gone(p, alive)
    del p
    assert job() is None


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_job_had_is_gone_when_it_breaks_off(takeover, alive, monkeypatch, name):
    kind, text, painted = FAULTS[name]

    def upscale(host, image, settings, noise, conditioner, size, **more):
        """As the engine's, and it breaks off."""
        canvas = flow.Canvas(image.resize(size), flow.make_plan(host, size, settings))
        try:
            raise kind(text)
        except BaseException as error:
            result = flow.Result(canvas.finish(), painted, 4, Report([]))
            raise flow.UnfinishedError(error, result) from error

    monkeypatch.setattr(flow, "upscale", upscale)
    p, said = Job(), ""
    try:
        finish(takeover, p)
    except DinotileError as error:
        said = str(error)
    alone = name == "what the user can mend"
    kept = " (kept in out/00-unfinished.png)" if painted else ""  # whether or not the images were to be saved
    assert said == (text if alone else f"stopped after {painted} of 4 tiles{kept}: {text or 'KeyboardInterrupt'}")
    assert not [name for name, value in vars(p).items() if isinstance(value, torch.Tensor)]  # Forge keeps the job
    job = weakref.ref(p)
    assert gone(p, alive)
    del p
    assert job() is None


@pytest.mark.parametrize("painted, total, later", [(9, 12, "the seam fix"), (9, 9, "the guard")])
def test_where_all_tiles_are_painted_no_later_error_costs_the_image(
    takeover, alive, monkeypatch, painted, total, later
):
    inner = flow.upscale

    def upscale(*args, **more):
        result = inner(*args, **more)
        try:
            raise RuntimeError("broken")
        except RuntimeError as error:
            result = dataclasses.replace(result, painted=painted, total=total, later=later)
            raise flow.UnfinishedError(error, result) from error

    monkeypatch.setattr(flow, "upscale", upscale)
    p = Job()
    finish(takeover, p)
    (note,) = p.extra_generation_params["DINO Tile notes"]
    assert note.split("; ")[-1] == f"all tiles are painted, but {later} failed: broken"
    assert p.extra_generation_params["DINO Tile painted"] == [None if painted == total else "9 of 12"]
    assert gone(p, alive)


def test_memory_that_runs_out_when_all_is_painted_costs_no_image(takeover, alive, monkeypatch):
    def to_sample(image: Any) -> Any:
        raise MemoryError("no more")

    monkeypatch.setattr(takeover, "to_sample", to_sample)
    p, said = Job(), ""
    try:
        finish(takeover, p)
    except DinotileError as error:
        said = str(error)
    assert said == "no more (kept in out/00-unfinished.png)" and gone(p, alive)


def test_the_host_knows_which_image_of_a_batch_is_painted_and_those_of_the_last_batch_are_gone(takeover, monkeypatch):
    inner, seen = takeover.Takeover._upscale, []

    def upscale(self: Any, host: Any, *more: Any) -> Any:
        seen.append(host.image)
        return inner(self, host, *more)

    monkeypatch.setattr(takeover.Takeover, "_upscale", upscale)
    p = Job()
    p.batch_size, p.negative_prompts, p.latents_after_sampling = 2, [""] * 2, []
    takeover.Takeover(p, OPTIONS).apply()
    p.init([""] * 2, [1, 2], [1, 2])
    p.latents_after_sampling.append("the last batch's")
    p.sample(types.SimpleNamespace(batch=[None] * 2), None, [1, 2], [1, 2], 0.0, [""] * 2)
    assert seen == [0, 1] and p.latents_after_sampling == []
    takeover.undo(p)


def test_what_the_webui_needs_to_save_the_image_is_asked_for_before_the_first_tile(takeover, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(flow, "enough_memory", lambda count: asked.append(count) or False)
    p = Job()
    p.batch_size = 2
    with pytest.raises(DinotileError, match=r"^out of memory before the first tile: make the result smaller"):
        finish(takeover, p)
    assert asked == [2 * 48 * 160 * 120]


@pytest.mark.parametrize("saves", [False, True])
def test_an_error_in_a_later_batch_costs_no_image_of_an_earlier_one(takeover, alive, monkeypatch, saves):
    inner, calls, kept = flow.upscale, [], []

    def upscale(*args, **more):
        calls.append(1)
        if len(calls) == 3:
            raise DinotileError("out of memory before the first tile", 500)
        return inner(*args, **more)

    def save_image(image, path, basename, seed, *_: Any, suffix: str, **__: Any) -> tuple[str, None]:
        kept.append(seed)
        return f"{path}/{seed}{suffix}.png", None

    monkeypatch.setattr(flow, "upscale", upscale)
    monkeypatch.setattr(takeover.images, "save_image", save_image)
    p = Job()
    p.save_samples = lambda: saves
    takeover.Takeover(p, OPTIONS).apply()
    p.init([""] * 3, [1, 2, 3], [1, 2, 3])
    cond = types.SimpleNamespace(batch=[None])
    for seed in (1, 2):
        p.sample(cond, None, [seed], [seed], 0.0, [""])
    said = "" if saves else r" \(kept in out/1-unfinished.png, out/2-unfinished.png\)"
    with pytest.raises(DinotileError, match=rf"^out of memory before the first tile{said}$"):
        p.sample(cond, None, [3], [3], 0.0, [""])
    assert kept == ([] if saves else [1, 2])  # what the WebUI has saved itself is not saved again
    assert gone(p, alive)


def test_a_sampler_that_cannot_be_used_is_refused_before_anything_is_made(takeover, alive, monkeypatch):
    def steps(host, denoise=None):
        raise DinotileError("this sampler changes the size of tiles")

    monkeypatch.setattr(StubHost, "steps", steps)
    p = Job()
    takeover.Takeover(p, OPTIONS).apply()
    with pytest.raises(DinotileError, match=r"^this sampler changes"):
        p.init([""], [1], [1])
    assert ours(p) == []


@pytest.mark.parametrize("button", ["interrupted", "skipped", "stopping_generation"])
def test_what_is_got_ready_before_the_first_tile_can_be_stopped(takeover, button):
    state = takeover.shared.state
    takeover._getting_ready("downloading", 0.25)
    assert state.textinfo == "DINO Tile: downloading (25%)"
    setattr(state, button, True)
    with pytest.raises(DinotileError, match=r"^stopped before the first tile$"):
        takeover._getting_ready("downloading", 0.5)


def test_png_info_has_nothing_of_the_last_image_of_the_same_job(takeover):
    """The Batch tab takes one processing object for all images of a folder."""
    p = Job()
    p.extra_generation_params = {"DINO Tile notes": ["old"], "DINO Tile colour": "none", "Mask blur": 4}
    finish(takeover, p)
    assert "DINO Tile colour" not in p.extra_generation_params and p.extra_generation_params["Mask blur"] == 4
    assert p.extra_generation_params["DINO Tile notes"] != ["old"]


@pytest.mark.parametrize("fill, off", [(0, "Guidance strength and Guard"), (2, "Colour correction")])
def test_what_a_mask_switches_off_is_noted(takeover, monkeypatch, fill, off):
    p, mask = Job(), Image.new("L", (40, 30), 255)
    vars(p).update(
        image_mask=mask, mask_round=True, inpainting_mask_invert=0, mask_blur_x=0, mask_blur_y=0, inpainting_fill=fill,
        inpaint_full_res=False, mask=None,
    )  # fmt: skip
    takeover.processing.create_binary_mask = lambda image, round: image
    settings = dataclasses.replace(OPTIONS, colour="AdaIN", guidance=2.0, guard="report")
    notes = takeover.Takeover(p, settings)._notes
    assert f"{off} off: Masked content paints something new there" in notes and len(notes) == 1 + (fill == 2)
    assert takeover.Takeover(p, dataclasses.replace(OPTIONS, colour="none", guard="off"))._notes == []


def test_refusals_in_the_page_have_labels(takeover, modules):
    p = Job()
    modules("lib_dinotile.webui.replaced").refuse(
        p, DinotileError("overlap: 320 is not allowed with tile 512"), OPTIONS.with_label
    )
    with pytest.raises(DinotileError, match=r"^Tile overlap: 320 is not allowed"):
        p.init([""], [1], [1])
    takeover.Takeover(p, dataclasses.replace(OPTIONS, upscaler="nope")).apply(OPTIONS.with_label)
    with pytest.raises(DinotileError, match=r"^Upscaler: 'nope' is not installed"):
        p.init([""], [1], [1])


@pytest.mark.parametrize("place", ["init", "webui", "refused", "refused for no reason of ours"])
def test_a_job_that_fails_elsewhere_is_gone_too(takeover, modules, monkeypatch, place):
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    if place == "init":
        monkeypatch.setattr(takeover.Conditioner, "load", fails)
    p, said = Job(), None
    source, image = weakref.ref(p), weakref.ref(p.init_images[0])
    try:
        if place.startswith("refused"):
            try:
                raise DinotileError("not allowed") if place == "refused" else ZeroDivisionError("by zero")
            except Exception as error:
                modules("lib_dinotile.webui.replaced").refuse(p, error)
            p.init([""], [1], [1])
        else:
            finish(takeover, p, webui_fails=place == "webui")
    except Exception as error:
        said = str(error)
    assert said in ("broken", "another extension", "not allowed", "by zero")
    if place != "webui":  # which tells nobody
        assert ours(p) == [] and "init" not in vars(p)
    del p
    assert source() is None and image() is None


def test_a_copy_of_a_job_is_given_back_by_itself(takeover):
    """The WebUI and its scripts copy processing objects."""
    p = Job()
    takeover.Takeover(p, OPTIONS).apply()
    other = copy.copy(p)
    takeover.undo(other)
    assert (other.width, p.width) == (512, 160) and "init" not in vars(other) and "init" in vars(p)
